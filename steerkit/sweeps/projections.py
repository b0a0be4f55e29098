"""Projections of a sweep's texts on the direction of their row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from torch import Tensor, nn

from steerkit.io.progress import progress
from steerkit.steering.watch import suspended
from steerkit.sweeps.layers import layers_of
from steerkit.text.prompt import Rendered, encode_prompt
from steerkit.text.tokens import encode
from steerkit.vectors.projections import streams_of_text
from steerkit.vectors.vector import SteeringVector

ROW = ["vector", "layer", "coefficient", "prompt_id", "sample"]


def sweep_projections(
    model: nn.Module, tokenizer: Any, table: pd.DataFrame, vectors: Mapping[str, SteeringVector]
) -> pd.DataFrame:
    """Project each token of a sweep's texts on the vector of its row, read by the unsteered model.

    `h . v / |v|`, with h the stream at the token after the row's layer (the last layer, of several), the text read as
    continuation of its prompt. The push itself is not included. Each distinct text is forwarded once.

    Args:
        table: rows of `SweepResult.table`, all or some.
        vectors: by the names in the table.

    Returns:
        One row per token, with the columns vector, layer, coefficient, prompt_id, sample, position (in the text, from
        0), token_id, start and stop (characters of the text; of tokens that share a character the last one has it),
        projection (in the unit of the stream).

    Raises:
        ValueError: a vector is missing, or does not hold the layer.
    """
    directions: dict[tuple[Any, Any], tuple[int, Tensor]] = {}
    for name, label in table[["vector", "layer"]].drop_duplicates().itertuples(index=False, name=None):
        if name not in vectors:
            raise ValueError(
                f"expected a vector for each name in the table; got {list(vectors)[:8]} and no {name!r}. Add it."
            )
        layers = layers_of(label)
        last = max(vectors[name].layers) if layers == "all" else int(layers[-1])
        directions[name, label] = (last, vectors[name].at(last).unit().layers[last].double())
    read_layers = sorted({layer for layer, _ in directions.values()})
    chat = table["chat"] if "chat" in table else [False] * len(table)
    rows_of: dict[tuple[bool, str, str], list[tuple[Any, ...]]] = {}
    keys = table[ROW].itertuples(index=False, name=None)
    for is_chat, prompt, text, key in zip(chat, table["prompt"], table["text"], keys, strict=True):
        rows_of.setdefault((bool(is_chat), prompt, text), []).append(key)
    projected = []
    with suspended(model), progress("projections", len(rows_of)) as advance:
        for (is_chat, prompt, text), row_keys in rows_of.items():
            before = encode_prompt(tokenizer, Rendered(prompt) if is_chat else prompt)
            ids = encode(tokenizer, text)
            if ids:
                streams = streams_of_text(model, (*before, *ids), read_layers)
                stops = _token_ends(tokenizer, before, ids, text)
                tokens = list(zip(range(len(ids)), ids, [0, *stops], stops, strict=False))
                for key in row_keys:
                    layer, unit = directions[key[0], key[1]]
                    along = (streams[layer][len(before) :] @ unit).tolist()
                    projected += [(*key, *token, value) for token, value in zip(tokens, along, strict=True)]
            advance(1)
    return pd.DataFrame(projected, columns=[*ROW, "position", "token_id", "start", "stop", "projection"])


def _token_ends(tokenizer: Any, before: Sequence[int], ids: Sequence[int], text: str) -> list[int]:
    """Where in `text` each token ends.

    The ids are decoded after a token of the prompt, since a decoder may drop a space at the start of a text.
    """
    lead = list(before[-1:])

    def decoded(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode([*lead, *tokens], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    lead_length = len(decoded([]))
    end = 0
    ends = list[int]()
    for count in range(1, len(ids)):
        prefix = decoded(ids[:count])[lead_length:]
        while end < min(len(prefix), len(text)) and prefix[end] == text[end]:
            end += 1
        ends.append(end)
    return [*ends, len(text)]
