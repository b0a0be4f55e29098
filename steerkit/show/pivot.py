"""Pivots of a sweep for a terminal: one table per score and vector, layers down and coefficients across."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from steerkit.stats.format import digits_for, interval_text, number_text
from steerkit.sweeps.layers import natural_order
from steerkit.sweeps.result import LESS_IS_BETTER, SweepResult

Columns = dict[str, list[str]]


def pivots(result: SweepResult, scores: Sequence[str]) -> dict[str, Columns]:
    """Title -> columns of text: for each score and vector its means, then its gains with their 95 % intervals.

    The controls of a vector are summarised: one row per layer and role with the mean over all of them.
    """
    roles = result.roles()
    shown = [name for name, (role, _) in roles.items() if role == "vector"] or list(roles)
    tables = {}
    for score in scores:
        label = f"{score} (lower is better)" if score in LESS_IS_BETTER else score
        gains = result.gains(score)
        for vector in shown:
            tables[f"{label} of {vector}: mean over prompts, by layer and {result.axis}"] = _means(
                result, score, vector
            )
            mine = gains[gains["vector"] == vector]
            if len(mine):
                title = f"{label} of {vector}: gain with its 95 % interval (over controls: that of a further one)"
                tables[title] = _gains(mine, result.axis)
    return tables


def _means(result: SweepResult, score: str, vector: str) -> Columns:
    """Rows: the vector at each layer, then each role of its controls; columns: coefficients."""
    table = result.table
    digits = digits_for(table[score])
    kinds = {vector: [vector]}
    for role in dict.fromkeys(role for role, _ in result.roles().values() if role != "vector"):
        controls = result.controls_of(vector, role)
        if controls:
            kinds[f"{len(controls)} {role}"] = controls
    parts = {
        (layer, name): part.groupby(result.axis)[score].mean()
        for name, vectors in kinds.items()
        for layer, part in table[table["vector"].isin(vectors)].groupby("layer", sort=False)
    }
    keys = sorted(parts, key=lambda key: (natural_order(key[0]), list(kinds).index(key[1])))
    coefficients = sorted(table[result.axis].unique())
    columns = {"layer": [str(layer) for layer, _ in keys], "vector": [name for _, name in keys]}
    for coefficient in coefficients:
        values = [parts[key].get(coefficient, float("nan")) for key in keys]
        columns[f"{coefficient:g}"] = [number_text(value, digits) for value in values]
    return columns


def _gains(gains: pd.DataFrame, axis: str) -> Columns:
    """Rows: each layer over coefficient 0 and over each role of controls; columns: strengths, in two-line cells."""
    digits = min(3, digits_for(gains["gain"]))
    orders = list(dict.fromkeys(gains["over"]))
    coefficients = sorted(gains[axis].unique())
    groups = {
        key: part.set_index(axis).reindex(coefficients) for key, part in gains.groupby(["layer", "over"], sort=False)
    }
    keys = sorted(groups, key=lambda key: (natural_order(key[0]), orders.index(key[1])))
    columns = {
        "layer": [str(layer) for layer, _ in keys],
        "over": [str(over).removeprefix("coefficient ") for _, over in keys],
    }
    for number, coefficient in enumerate(coefficients):
        estimates = [groups[key][["gain", "low", "high"]].iloc[number] for key in keys]
        columns[f"{coefficient:g}"] = [
            interval_text(mean, low, high, digits).replace(" ", "\n", 1) for mean, low, high in estimates
        ]
    return columns
