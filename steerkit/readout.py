"""What a direction says: the tokens it speaks for, and how far each token of a text lies along it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.blocks import evaluating, find_blocks, unwrap
from steerkit.capture import capture_resid
from steerkit.steering import Steering
from steerkit.texts import Prompt, encode_prompt
from steerkit.vectors import SteeringVector

PUSH = 0.1


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
        inputs = torch.tensor([ids], device=_device(model))
        with torch.inference_mode(), evaluating(unwrap(model)), capture_resid(model, layer) as stream:
            model(input_ids=inputs, use_cache=False)
        h = stream[layer][0].double().cpu()
        along = h @ unit
        cosine = along / h.norm(dim=-1)
        for position, (token, x, y) in enumerate(zip(ids, along.tolist(), cosine.tolist(), strict=True)):
            rows.append((number, position, token, tokenizer.decode([token]), x, y))
    return pd.DataFrame(rows, columns=["text", "position", "token_id", "token", "projection", "cosine"])


def _logits(model: nn.Module, ids: Tensor, vector: SteeringVector, coefficient: float) -> Float[Tensor, " vocabulary"]:
    with (
        torch.inference_mode(),
        evaluating(unwrap(model)),
        Steering(vector, coefficient, "all", foreign=True).on(model),
    ):
        return model(input_ids=ids, use_cache=False).logits[0, -1].float().cpu()


def _device(model: nn.Module) -> torch.device:
    return next(unwrap(model).parameters()).device
