"""What a direction says: the tokens it speaks for, and how far each token of a text lies along it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.blocks import evaluating, find_blocks, unwrap
from steerkit.capture import capture_resid
from steerkit.progress import progress
from steerkit.steering import Steering, taken_over
from steerkit.texts import Prompt, Rendered, encode, encode_prompt
from steerkit.vectors import SteeringVector

PUSH = 0.1
ROW = ["vector", "layer", "coefficient", "prompt_id", "sample"]


def tokens_of(
    model: nn.Module, tokenizer: Any, vector: SteeringVector, prompts: Sequence[Prompt], k: int = 10
) -> pd.DataFrame:
    """The tokens whose logits a direction raises and lowers most, if it is added right before the final norm.

    Per layer's vector v, with h the stream after the last block at a prompt's last token and u the map from there to
    the logits (final norm and unembedding): `(u(h + e v^) - u(h - e v^)) / (2 e)`, `v^` the unit direction and
    `e = 0.1 |h|`, mean over prompts; less its mean over the vocabulary, which moves no probability. What later blocks
    make of the direction is not in it.

    Columns: layer, side (`raised` or `lowered`), rank from 1, token_id, token, slope (logits per unit of the stream).

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    last = max(find_blocks(model).modules)
    ids = [torch.tensor([encode_prompt(tokenizer, prompt)], device=_device(model)) for prompt in prompts]
    if not ids or k < 1:
        raise ValueError(f"expected one prompt and one token at least; got {len(ids)} and k={k}.")
    sizes = []
    for row in ids:
        with torch.inference_mode(), evaluating(unwrap(model)), capture_resid(model, last) as stream:
            model(input_ids=row, use_cache=False)
        sizes.append(float(stream[last][0, -1].float().norm()))
    rows = []
    for layer in vector.layers:
        unit = SteeringVector({last: vector.unit().layers[layer]}, vector.meta)
        slope = torch.zeros(())
        for row, size in zip(ids, sizes, strict=True):
            plus, minus = (_logits(model, row, unit, sign * PUSH * size) for sign in (1, -1))
            slope = slope + (plus - minus) / (2 * PUSH * size * len(ids))
        slope = slope - slope.mean()
        for side, sign in (("raised", 1), ("lowered", -1)):
            best = (sign * slope).topk(min(k, len(slope)))
            for rank, token in enumerate(best.indices.tolist(), 1):
                rows.append((layer, side, rank, token, tokenizer.decode([token]), float(slope[token])))
    return pd.DataFrame(rows, columns=["layer", "side", "rank", "token_id", "token", "slope"])


def projections(
    model: nn.Module, tokenizer: Any, vector: SteeringVector, texts: Sequence[Prompt], layer: int
) -> pd.DataFrame:
    """How far each token's stream lies along a direction: `h . v / |v|` at one layer, in the stream's own unit.

    Columns: text (index), position, token_id, token, projection, cosine (`projection / |h|`).
    """
    unit = vector.at(layer).unit().layers[layer].double()
    rows = []
    for number, text in enumerate(texts):
        ids = encode_prompt(tokenizer, text)
        h = _streams(model, ids, [layer])[layer]
        along = h @ unit
        cosine = along / h.norm(dim=-1)
        for position, (token, x, y) in enumerate(zip(ids, along.tolist(), cosine.tolist(), strict=True)):
            rows.append((number, position, token, tokenizer.decode([token]), x, y))
    return pd.DataFrame(rows, columns=["text", "position", "token_id", "token", "projection", "cosine"])


def sweep_projections(
    model: nn.Module, tokenizer: Any, table: pd.DataFrame, vectors: Mapping[str, SteeringVector]
) -> pd.DataFrame:
    """How far each token of a sweep's texts lies along the vector of its row, read by the unsteered model.

    `h . v / |v|`, h the stream at the token, after the row's layer (the last, of several), the text behind its prompt.
    The push itself is not in it: what is measured is where the written text lies. Each distinct text is forwarded once.

    Args:
        table: rows of `SweepResult.table`; all, or those that matter.
        vectors: by the names in the table.

    Columns: those that name a row (vector, layer, coefficient, prompt_id, sample), position (in the text, from 0),
    token_id, start and stop (characters of the text; of tokens that share a character the last has it), projection.

    Raises:
        ValueError: a vector is missing, or does not hold the layer.
    """
    places: dict[tuple[Any, Any], tuple[int, Tensor]] = {}
    for name, label in table[["vector", "layer"]].drop_duplicates().itertuples(index=False, name=None):
        if name not in vectors:
            raise ValueError(f"expected a vector for each name in the table; got {list(vectors)[:8]} and no {name!r}.")
        layer = int(str(label).split("+")[-1])
        places[name, label] = (layer, vectors[name].at(layer).unit().layers[layer].double())
    layers = sorted({layer for layer, _ in places.values()})
    chat = table["chat"] if "chat" in table else [False] * len(table)
    texts: dict[tuple[bool, str, str], list[tuple[Any, ...]]] = {}
    keys = table[ROW].itertuples(index=False, name=None)
    for rendered, prompt, text, key in zip(chat, table["prompt"], table["text"], keys, strict=True):
        texts.setdefault((bool(rendered), prompt, text), []).append(key)
    rows = []
    with taken_over(model), progress("projections", len(texts)) as advance:
        for (rendered, prompt, text), wanted in texts.items():
            before = encode_prompt(tokenizer, Rendered(prompt) if rendered else prompt)
            ids = encode(tokenizer, text)
            if ids:
                streams = _streams(model, (*before, *ids), layers)
                stops = _stops(tokenizer, before, ids, text)
                tokens = list(zip(range(len(ids)), ids, [0, *stops], stops, strict=False))
                for key in wanted:
                    layer, unit = places[key[0], key[1]]
                    along = (streams[layer][len(before) :] @ unit).tolist()
                    rows += [(*key, *token, x) for token, x in zip(tokens, along, strict=True)]
            advance(1)
    return pd.DataFrame(rows, columns=[*ROW, "position", "token_id", "start", "stop", "projection"])


def _stops(tokenizer: Any, before: Sequence[int], ids: Sequence[int], text: str) -> list[int]:
    """Where in `text` each token ends. Decoded behind a token of the prompt, since a first space is dropped alone."""
    lead = list(before[-1:])

    def decoded(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode([*lead, *tokens], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    skip, end, stops = len(decoded([])), 0, list[int]()
    for count in range(1, len(ids)):
        said = decoded(ids[:count])[skip:]
        while end < min(len(said), len(text)) and said[end] == text[end]:
            end += 1
        stops.append(end)
    return [*stops, len(text)]


def _streams(model: nn.Module, ids: Sequence[int], layers: Sequence[int]) -> dict[int, Float[Tensor, "pos d_model"]]:
    """The stream of one text after each of these layers, in float64 on the CPU."""
    with torch.inference_mode(), evaluating(unwrap(model)), capture_resid(model, layers) as streams:
        model(input_ids=torch.tensor([list(ids)], device=_device(model)), use_cache=False)
    return {layer: streams[layer][0].cpu().double() for layer in layers}


def _logits(model: nn.Module, ids: Tensor, vector: SteeringVector, coefficient: float) -> Float[Tensor, " vocabulary"]:
    with (
        torch.inference_mode(),
        evaluating(unwrap(model)),
        Steering(vector, coefficient, "all", foreign=True).on(model),
    ):
        return model(input_ids=ids, use_cache=False).logits[0, -1].float().cpu()


def _device(model: nn.Module) -> torch.device:
    return next(unwrap(model).parameters()).device
