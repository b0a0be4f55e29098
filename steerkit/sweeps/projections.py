"""Projections of a sweep's texts on the direction of their row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from torch import Tensor, nn

from steerkit.io.progress import progress
from steerkit.steering.watch import suspended
from steerkit.text.prompt import Rendered, encode_prompt
from steerkit.text.tokens import encode
from steerkit.vectors.projections import streams_of_text
from steerkit.vectors.vector import SteeringVector

ROW = ["vector", "layer", "coefficient", "prompt_id", "sample"]


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
    with suspended(model), progress("projections", len(texts)) as advance:
        for (rendered, prompt, text), wanted in texts.items():
            before = encode_prompt(tokenizer, Rendered(prompt) if rendered else prompt)
            ids = encode(tokenizer, text)
            if ids:
                streams = streams_of_text(model, (*before, *ids), layers)
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
