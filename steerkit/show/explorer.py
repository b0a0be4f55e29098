"""A sweep as the data of its page: rows, curves beside their controls, tokens with their projections. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from steerkit.stats.areas import curve_auc
from steerkit.stats.bootstrap import bootstrap_ci
from steerkit.sweeps.result import KEYS, SweepResult

SETTINGS = ("positions", "operation", "temperature", "top_p", "max_new_tokens", "seed")
NO_SCORES = (*KEYS, *SETTINGS, "group", "prompt", "chat", "reference", "text", "finished", "relative_dose")
LAST = ("projection", "n_tokens")
TAG = re.compile(r"<[^<>\n]{1,40}>|\[/?INST\]")
ROLE = re.compile(r"^\s*(?:system|user|assistant|model)\s*(?:\n|$)")


def explorer_data(sweep: SweepResult, projections: pd.DataFrame | None = None) -> dict[str, Any]:
    """What the page's script reads, as plain data; equal results give equal data.

    Controls of one role share one line, the mean over them; its interval resamples prompts and controls. Other lines
    are those of `SweepResult.curve`, areas those of its `curve_auc`.

    Args:
        sweep: its numeric columns, but for settings, are scores; infinite values count as missing.
        projections: what `steerkit.sweeps.projections.sweep_projections` gives for some or all of these rows.
            Their mean per text becomes one more score, `projection`.

    Returns:
        `rows`: columns of numbers, a row of the table each; texts are places in `strings`, and vector, layer, prompt_id
        and sample are places in `names`. `series`: a line or None per score. `places`: vector and layer ("0,1") ->
        its own series and its controls', and the `[centre, extent]` of its projections (the mean over the unsteered
        texts, and what 98 % of the tokens stay within of it). `pieces`: text -> its tokens' lengths in UTF-16 units.

    Raises:
        ValueError: projections of other texts.
    """
    table = sweep.table.reset_index(drop=True)
    tokens = [None] * len(table) if projections is None else _tokens(table, projections)
    if projections is not None:
        table = table.assign(projection=[np.nan if part is None else part["projection"].mean() for part in tokens])
    scores = score_columns(table)
    numbers = {name: table[name].astype(float).replace([np.inf, -np.inf], np.nan) for name in scores}
    table = table.assign(**numbers)
    strings: dict[str, int] = {}
    data = _rows(table, scores, strings)
    series, places = _series(SweepResult(table), scores, data["names"])
    for key, scale in _scales(table, tokens, data["rows"]).items():
        places[key]["shade"] = scale
    pieces = {}
    for text, place, part in zip(table["text"], data["rows"]["text"], tokens, strict=True):
        if part is not None and place not in pieces:
            ends = zip(part["start"], part["stop"], strict=True)
            pieces[place] = [len(text[start:stop].encode("utf-16-le", "surrogatepass")) // 2 for start, stop in ends]
    values = [None if part is None else [_rounded(x, 4) for x in part["projection"]] for part in tokens]
    data["rows"]["projections"] = values if projections is not None else None
    return {**data, "series": series, "places": places, "pieces": pieces, "strings": list(strings)}


def score_columns(table: pd.DataFrame) -> list[str]:
    """The numeric columns that are no setting, in the order of the table; `projection` and `n_tokens` last."""
    found = [name for name in table if name not in NO_SCORES and pd.api.types.is_numeric_dtype(table[name])]
    return [name for name in found if name not in LAST] + [name for name in LAST if name in found]


def prompt_labels(prompts: Sequence[str], width: int = 70) -> list[str]:
    """What tells a prompt from the others, cut to a width: its last turn, less the lines that all of them have."""
    turns = [_turns(prompt) for prompt in prompts]
    last = [said[-1] for said in turns]
    told = last if len(set(last)) == len(set(prompts)) else ["\n".join(said) for said in turns]
    lines = [text.split("\n") for text in told]
    shared = set.intersection(*map(set, lines))
    own = ("\n".join(line for line in part if line not in shared) for part in lines)
    labels = (" ".join(TAG.sub(" ", mine or text).split()) for mine, text in zip(own, told, strict=True))
    return [label if len(label) <= width else label[: width - 1] + "\u2026" for label in labels]


def _turns(prompt: str) -> list[str]:
    """What was said in a chat that its template has rendered with roles; any other prompt as it is."""
    parts = TAG.split(prompt)
    said = [text for part in parts if (text := ROLE.sub("", part, count=1).strip())]
    return said if said and any(map(ROLE.match, parts)) else [prompt]


def _rows(table: pd.DataFrame, scores: Sequence[str], strings: dict[str, int]) -> dict[str, Any]:
    def place(value: Any) -> int | None:
        return None if pd.isna(value) else strings.setdefault(str(value), len(strings))

    columns: dict[str, Any] = {"coefficient": table["coefficient"].astype(float).tolist()}
    names = {}
    for column in ("vector", "layer", "prompt_id", "sample"):
        codes, uniques = pd.factorize(table[column].astype(str))
        columns[column], names[column] = codes.tolist(), list(uniques)
    columns["text"] = [place(text) for text in table["text"]]
    columns["reference"] = [place(x) for x in table["reference"]] if "reference" in table else [None] * len(table)
    for column in ("relative_dose", "finished"):
        columns[column] = table[column].tolist() if column in table else [None] * len(table)
    columns["scores"] = [[_rounded(value, 6) for value in table[name]] for name in scores]
    first = table.drop_duplicates("prompt_id")
    prompts = first["prompt"].tolist() if "prompt" in first else first["prompt_id"].astype(str).tolist()
    labels = zip(names["prompt_id"], prompt_labels(prompts), strict=True)
    return {
        "rows": columns,
        "names": names,
        "scores": [str(name) for name in scores],
        "labels": [f"{name}: {label}" if label != name else name for name, label in labels],
        "prompts": [place(prompt) for prompt in prompts],
    }


def _series(
    sweep: SweepResult, scores: Sequence[str], names: dict[str, list[str]]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Every line that is drawn, and which of them belong to each vector and layer, its own first."""
    series: list[dict[str, Any]] = []
    places: dict[str, dict[str, Any]] = {}
    keys = {}
    for (vector, layer), part in sweep.table.groupby(["vector", "layer"], sort=False):
        keys[str(vector), str(layer)] = key = f"{names['vector'].index(str(vector))},{names['layer'].index(str(layer))}"
        places[key] = {"series": [len(series)], "shade": None}
        series.append({"name": str(vector), "lines": [_line(part, score) for score in scores]})
    roles = sweep.roles()
    kinds: dict[tuple[str, str | None, str], list[str]] = {}
    for vector, layer in keys:
        role, of = roles[vector]
        if role != "vector":
            kinds.setdefault((layer, of, role), []).append(vector)
    for (layer, of, role), controls in kinds.items():
        part = sweep.table[sweep.table["vector"].isin(controls) & (sweep.table["layer"].astype(str) == layer)]
        for (vector, at), key in keys.items():
            mine, of_mine = roles[vector]
            if at == layer and of in (None, vector if mine == "vector" else of_mine) and controls != [vector]:
                places[key]["series"].append(len(series))
        series.append({"name": role, "lines": [_line(part, score) for score in scores]})
    return series, places


def _line(part: pd.DataFrame, score: str) -> dict[str, Any] | None:
    """`points` of [coefficient, mean, low, high, n], the `area` under them with its interval, `of` how many vectors."""
    part = part[part.groupby("vector")[score].transform(lambda values: values.notna().any())]
    if part.empty:
        return None
    if part["vector"].nunique() == 1:
        alone = SweepResult(part)
        points = alone.curve(score, ["vector"])[["coefficient", "mean", "low", "high", "n"]].to_numpy().tolist()
        several = part["coefficient"].nunique() > 1
        areas = alone.curve_auc(score, ["vector"]).iloc[0][["curve_auc", "low", "high"]] if several else []
        return {"points": [[c, *_point(rest)] for c, *rest in points], "area": _point(areas) or None, "of": 1}
    wide = part.groupby(["group", "prompt_id", "vector", "coefficient"])[score].mean().unstack("coefficient")
    points = [[float(coefficient), *_pooled(wide[coefficient])] for coefficient in wide]
    area = None
    if wide.shape[1] > 1:
        rows = wide.to_numpy()
        each = [curve_auc(wide.columns, row) if np.isfinite(row).all() else np.nan for row in rows]
        area = _pooled(pd.Series(each, index=wide.index))[:3]
    return {"points": points, "area": area, "of": int(part["vector"].nunique())}


def _pooled(values: pd.Series) -> list[float | None]:
    """Mean, interval and n over prompts and control vectors, both resampled."""
    table = values.unstack("vector")
    groups = table.index.get_level_values("group")
    interval = bootstrap_ci(table.to_numpy(), groups, resample_columns=True)
    return _point([interval.mean, interval.low, interval.high, interval.n])


def _tokens(table: pd.DataFrame, projections: pd.DataFrame) -> list[pd.DataFrame | None]:
    """The tokens of each row, in order; None where there are none."""
    parts = {tuple(map(str, key)): part for key, part in projections.groupby(KEYS, sort=False)}
    found = [parts.get(tuple(map(str, key))) for key in table[KEYS].itertuples(index=False, name=None)]
    for text, part in zip(table["text"], found, strict=True):
        if part is not None and (pd.isna(text) or part["stop"].iloc[-1] != len(text)):
            raise ValueError(
                f"expected the projections of this sweep's texts; got {part['stop'].iloc[-1]} characters for "
                f"{text!r:.60}. Read them anew."
            )
    return found


def _scales(
    table: pd.DataFrame, tokens: Sequence[pd.DataFrame | None], rows: dict[str, Any]
) -> dict[str, list[float | None]]:
    by_place: dict[str, dict[bool, list[np.ndarray]]] = {}
    for vector, layer, coefficient, part in zip(
        rows["vector"], rows["layer"], rows["coefficient"], tokens, strict=True
    ):
        if part is not None:
            both = by_place.setdefault(f"{vector},{layer}", {True: [], False: []})
            both[coefficient == 0].append(part["projection"].to_numpy(float))
    scales = {}
    for key, both in by_place.items():
        every = np.concatenate(both[True] + both[False])
        centre = float(np.concatenate(both[True] or both[False]).mean())
        scales[key] = _point([centre, np.quantile(np.abs(every - centre), 0.98)])
    return scales


def _point(values: Any) -> list[float | None]:
    return [_rounded(value, 5) for value in values]


def _rounded(value: Any, figures: int) -> float | None:
    return None if pd.isna(value) or math.isinf(value) else float(f"{float(value):.{figures}g}")
