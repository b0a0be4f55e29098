"""Projections of a sweep's texts on the direction of their row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from torch import Tensor, nn

from steerkit.capture.batches import read_tokens
from steerkit.io.progress import progress
from steerkit.models.active import suspended
from steerkit.models.site_names import DEFAULT
from steerkit.sweeps.columns import KEYS
from steerkit.sweeps.layers import layers_of
from steerkit.sweeps.result import ids_of
from steerkit.text.tokens import decode
from steerkit.vectors.vector import SteeringVector


def sweep_projections(
    model: nn.Module, tokenizer: Any, table: pd.DataFrame, vectors: Mapping[str, SteeringVector]
) -> pd.DataFrame:
    """Project each token of a sweep's texts on the vector of its row, read by the unsteered model.

    `h . v / |v|`, with h the stream at the token after the row's layer (the last layer, of several). The model reads
    the token ids that were generated, the end-of-sequence token included, after those of the prompt. The push itself is
    not included. Each distinct continuation is forwarded once. Rows without ids have no entry.

    Args:
        table: rows of `SweepResult.table`, all or some.
        vectors: by the names in the table.

    Returns:
        One row per token, with the columns vector, layer, coefficient, prompt_id, sample, choice (where the sweep has
        choices), position (in the text, from 0), token_id, start and stop (characters of the text; of tokens that share
        a character the last one has it, and special tokens have none), projection (in the unit of the stream).

    Raises:
        ValueError: a vector is missing, or does not hold the layer; a table without token ids.
    """
    directions: dict[tuple[Any, Any], tuple[int, Tensor]] = {}
    for name, label in table[["vector", "layer"]].drop_duplicates().itertuples(index=False, name=None):
        if name not in vectors:
            raise ValueError(
                f"expected a vector for each name in the table; got {list(vectors)[:8]} and no {name!r}. Add it."
            )
        layers = layers_of(label)
        last = max(vectors[name].layers) if layers == "all" else int(layers[-1])
        if vectors[name].site != DEFAULT:
            raise ValueError(
                f"expected vectors at {DEFAULT}; {name!r} was read at {vectors[name].site}. Use sk.project."
            )
        directions[name, label] = (last, vectors[name].at(last).unit().layers[last].double())
    read_layers = sorted({layer for layer, _ in directions.values()})
    columns = [*KEYS, *(["choice"] if "choice" in table else [])]
    rows_of: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[Any, ...]]] = {}
    for prompt_ids, new_ids, key in zip(*ids_of(table), table[columns].itertuples(index=False, name=None), strict=True):
        rows_of.setdefault((prompt_ids, new_ids), []).append(key)
    texts = [(before, ids, row_keys) for (before, ids), row_keys in rows_of.items() if ids]
    found: dict[int, list[tuple[Any, ...]]] = {}
    with suspended(model), progress("projections", len(texts)) as advance:
        for number, streams in read_tokens(model, read_layers, [(*before, *ids) for before, ids, _ in texts]):
            before, ids, row_keys = texts[number]
            stops = _token_ends(tokenizer, ids)
            tokens = list(zip(range(len(ids)), ids, [0, *stops], stops, strict=False))
            found[number] = []
            for key in row_keys:
                layer, unit = directions[key[0], key[1]]
                along = (streams[layer][len(before) :].cpu().double() @ unit).tolist()
                found[number] += [(*key, *token, value) for token, value in zip(tokens, along, strict=True)]
            advance(1)
    projected = [row for number in sorted(found) for row in found[number]]
    return pd.DataFrame(projected, columns=[*columns, "position", "token_id", "start", "stop", "projection"])


def _token_ends(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Where each token ends in the text that the ids decode to, without special tokens."""
    text = decode(tokenizer, ids)
    end = 0
    ends = list[int]()
    for count in range(1, len(ids)):
        prefix = decode(tokenizer, ids[:count])
        while end < min(len(prefix), len(text)) and prefix[end] == text[end]:
            end += 1
        ends.append(end)
    return [*ends, len(text)]
