"""The data of a sweep's page: rows, curves with their controls, tokens with their projections. Imports no torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from steerkit.show.chats import prompt_labels, turns_of
from steerkit.stats.areas import curve_auc
from steerkit.stats.controls import control_band
from steerkit.sweeps.columns import KEYS
from steerkit.sweeps.result import OF_CHOICES, SweepResult

SETTINGS = ("positions", "operation", "temperature", "top_p", "max_new_tokens", "seed")
NO_SCORES = (*KEYS, *SETTINGS, "group", "prompt", "prompt_ids", "ids", "reference", "text", "finished", "relative_dose")
LAST = ("projection", "n_tokens")
FLUENCY = ("perplexity", "repeated_4grams")
TITLES = {
    "rouge_l": "ROUGE-L with the reference",
    "rouge_l_symbols": "ROUGE-L with the reference, symbols kept",
    "rouge_l_unicode": "ROUGE-L with the reference, all scripts",
    "distance": "distance from the unsteered text",
    "repeated_4grams": "share of repeated 4-grams",
    "distinct_2": "share of distinct word pairs",
    "perplexity": "perplexity under the unsteered model",
    "kl": "KL divergence from the unsteered model, nats per token",
    "share_steered": "share of positions that were steered",
    "log_prob": "log-probability",
    "n_tokens": "tokens per text",
    "projection": "mean projection on the direction",
    "trait": "trait score",
    "right": "right answer",
}
"""Plain names of scores; any other score is called by its column."""
SHARES = (
    *("rouge_l", "rouge_l_symbols", "rouge_l_unicode", "distance", "repeated_4grams", "distinct_2", "share_steered"),
    *("probability", "trait", "right"),
)
"""Scores from 0 to 1: their bands are cut to this range, unless a score of this name has other values."""


def explorer_data(
    sweep: SweepResult, projections: pd.DataFrame | None = None, opens_on: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what the page's script reads, as plain data; equal results give equal data.

    Controls of one role share one line, the mean over them, with the prediction interval of a further control
    (`steerkit.stats.controls.control_band`). The other lines are those of `SweepResult.curve`, and areas those of
    `SweepResult.curve_auc`. Intervals of scores in `SHARES` are cut to 0 and 1.

    Args:
        sweep: its numeric columns, except settings, are scores; infinite values count as missing.
        projections: result of `steerkit.sweeps.projections.sweep_projections` for some or all of these rows. Their mean
            per text becomes one more score, `projection`.
        opens_on: `vector`, `layer` and `coefficient` of the text that is shown first; default: the first vector that is
            no control, at its smallest positive coefficient.

    Returns:
        A dict with these keys, among others:
            `rows`: columns of numbers, one entry per row of the table. Texts are indices into `strings`; vector, layer,
                prompt_id and sample are indices into `names`.
            `axis`: what the column coefficient holds: the coefficient, or the dose of a sweep over doses.
            `series`: the drawn lines, each with a line or None per score.
            `conditions`: vector and layer ("0,1") -> `series`, the indices of its own line and of its controls' lines,
                and `shade`, the `[centre, extent]` of its projections: the mean over the unsteered texts, and the
                distance from it that 98 % of the tokens do not exceed.
            `pieces`: index of a text -> the lengths of its tokens in UTF-16 units.
            `turns`: per prompt the `[role, text]` of its messages (`steerkit.show.chats.turns_of`).
            `yes_no`: indices of the scores whose values are 0 and 1 only.
            `start`: what is shown first.

    Raises:
        ValueError: projections of other texts, or `opens_on` is not in the sweep.
    """
    table = sweep.table.reset_index(drop=True)
    tokens = [None] * len(table) if projections is None else tokens_by_row(table, projections)
    if sweep.axis == "dose":  # one dose is another coefficient for each vector
        table = table.assign(coefficient=table["dose"]).drop(columns="dose")
    choices = _choices(table)
    table = _by_choice(table, choices)
    if projections is not None:
        means = [np.nan if part is None else part["projection"].mean() for part in tokens]
        table = table.assign(projection=means)
    scores = score_columns(table)
    infinite = {name: count for name in scores if (count := int(np.isinf(table[name].astype(float)).sum()))}
    if infinite:
        warnings.warn(f"expected finite scores; the page leaves out the infinite ones: {infinite}", stacklevel=2)
    finite = {name: table[name].astype(float).replace([np.inf, -np.inf], np.nan) for name in scores}
    table = table.assign(**finite)
    strings: dict[str, int] = {}
    data = _rows(table, scores, strings, sweep.meta.get("special_tokens", ()))
    if choices:
        data["names"]["sample"] = [choices[int(number)] for number in data["names"]["sample"]]
    series, conditions = _series(SweepResult(table), scores, data["names"])
    for key, shade in _shades(tokens, data["rows"]).items():
        conditions[key]["shade"] = shade
    pieces = {}
    for text, index, part in zip(table["text"], data["rows"]["text"], tokens, strict=True):
        if part is not None and index not in pieces:
            ends = zip(part["start"], part["stop"], strict=True)
            pieces[index] = [len(text[start:stop].encode("utf-16-le", "surrogatepass")) // 2 for start, stop in ends]
    values = [None if part is None else [_rounded(x, 4) for x in part["projection"]] for part in tokens]
    data["rows"]["projections"] = values if projections is not None else None
    start = _start(sweep, data["names"], opens_on or {})
    return {
        **data,
        "axis": sweep.axis,
        "series": series,
        "conditions": conditions,
        "pieces": pieces,
        "strings": list(strings),
        "titles": [TITLES.get(name, name) for name in scores],
        "yes_no": [k for k, name in enumerate(scores) if {1} <= set(table[name].dropna()) <= {0, 1}],
        "start": start,
    }


def _start(sweep: SweepResult, names: Mapping[str, Sequence[str]], opens_on: Mapping[str, Any]) -> dict[str, Any]:
    """The selection that is shown first, as indices into `names`."""
    roles = sweep.roles()
    own = [vector for vector in names["vector"] if roles[vector][0] == "vector"]
    wanted = {"vector": own[0] if own else names["vector"][0], **opens_on}
    start: dict[str, Any] = {}
    for name, value in wanted.items():
        if name == "coefficient":
            there = sweep.table[sweep.axis].tolist()
        elif name in ("vector", "layer"):
            there = list(names[name])
            value = str(value)
        else:
            raise ValueError(f"expected vector, layer and coefficient in opens_on; got {name!r}. Remove it.")
        if value not in there:
            raise ValueError(f"expected a {name} of the sweep in opens_on; got {value!r}. Pass one of its rows.")
        start[name] = value if name == "coefficient" else there.index(value)
    return start


def _choices(table: pd.DataFrame) -> list[str]:
    """The choices of a sweep by their index, named by their number where prompts have different ones; none of texts."""
    if "choice" not in table:
        return []
    several = table.groupby("sample")["choice"].unique()
    return [str(own[0]) if len(own) == 1 else f"choice {number}" for number, own in several.items()]


def _by_choice(table: pd.DataFrame, choices: Sequence[str]) -> pd.DataFrame:
    """The table with a column per choice and score, which is NaN in rows of other choices: their mean says nothing."""
    for score in [name for name in OF_CHOICES if name in table and choices]:
        own = {f"{score} of {name!r}": table[score].where(table["sample"] == i) for i, name in enumerate(choices)}
        table = table.drop(columns=score).assign(**own)
    return table.drop(columns="choice") if choices else table


def score_columns(table: pd.DataFrame) -> list[str]:
    """The numeric columns that are not settings.

    First the table's first score and one of fluency, which the page shows unfolded; then the others in the table's
    order; `projection` and `n_tokens` last.
    """
    scores = [name for name in table if name not in NO_SCORES and pd.api.types.is_numeric_dtype(table[name])]
    first = [name for name in scores if name not in (*LAST, *FLUENCY)][:1]
    first += [name for name in FLUENCY if name in scores][:1]
    return [*first, *(n for n in scores if n not in (*first, *LAST)), *(n for n in LAST if n in scores)]


def _rows(
    table: pd.DataFrame, scores: Sequence[str], strings: dict[str, int], special_tokens: Collection[str]
) -> dict[str, Any]:
    """The table's rows as columns of numbers, with the names, labels and prompts that they refer to.

    Args:
        strings: text -> index; texts are added to it.
        special_tokens: those of the tokenizer that occur in the prompts.
    """

    def index_of(value: Any) -> int | None:
        return None if pd.isna(value) else strings.setdefault(str(value), len(strings))

    columns: dict[str, Any] = {"coefficient": table["coefficient"].astype(float).tolist()}
    names = {}
    for column in ("vector", "layer", "prompt_id", "sample"):
        codes, uniques = pd.factorize(table[column].astype(str))
        columns[column] = codes.tolist()
        names[column] = list(uniques)
    columns["text"] = [index_of(text) for text in table["text"]]
    has_reference = "reference" in table
    columns["reference"] = [index_of(text) for text in table["reference"]] if has_reference else [None] * len(table)
    for column in ("relative_dose", "finished"):
        columns[column] = table[column].tolist() if column in table else [None] * len(table)
    columns["scores"] = [[_rounded(value, 6) for value in table[name]] for name in scores]
    first = table.drop_duplicates("prompt_id")
    prompts = first["prompt"].tolist() if "prompt" in first else first["prompt_id"].astype(str).tolist()
    messages = first["messages"] if "messages" in first else [None] * len(first)
    known = [message if isinstance(message, str) else None for message in messages]
    turns = [turns_of(prompt, given, special_tokens) for prompt, given in zip(prompts, known, strict=True)]
    labels = zip(names["prompt_id"], prompt_labels(prompts, turns), strict=True)
    return {
        "rows": columns,
        "names": names,
        "scores": [str(name) for name in scores],
        "labels": [f"{name}: {label}" if label != name else name for name, label in labels],
        "prompts": [index_of(prompt) for prompt in prompts],
        "turns": turns,
    }


def _series(
    sweep: SweepResult, scores: Sequence[str], names: dict[str, list[str]]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """All drawn lines, and for each vector and layer the indices of its lines, its own first."""
    series: list[dict[str, Any]] = []
    conditions: dict[str, dict[str, Any]] = {}
    keys = {}
    for (vector, layer), part in sweep.table.groupby(["vector", "layer"], sort=False):
        keys[str(vector), str(layer)] = key = f"{names['vector'].index(str(vector))},{names['layer'].index(str(layer))}"
        conditions[key] = {"series": [len(series)], "shade": None}
        series.append({"name": str(vector), "lines": [_line(part, score) for score in scores]})
    roles = sweep.roles()
    kinds: dict[tuple[str, str | None, str], list[str]] = {}
    for vector, layer in keys:
        role, control_of = roles[vector]
        if role != "vector":
            kinds.setdefault((layer, control_of, role), []).append(vector)
    for (layer, control_of, role), controls in kinds.items():
        part = sweep.table[sweep.table["vector"].isin(controls) & (sweep.table["layer"].astype(str) == layer)]
        for (vector, its_layer), key in keys.items():
            its_role, its_vector = roles[vector]
            steered = vector if its_role == "vector" else its_vector
            if its_layer == layer and control_of in (None, steered) and controls != [vector]:
                conditions[key]["series"].append(len(series))
        series.append({"name": role, "lines": [_line(part, score, controls=True) for score in scores]})
    for k, score in enumerate(scores):
        if score in SHARES and sweep.table[score].dropna().between(0, 1).all():
            for line in (one["lines"][k] for one in series if one["lines"][k] is not None):
                line["points"] = [[c, mean, *map(_cut, ends), n] for c, mean, *ends, n in line["points"]]
    return series, conditions


def _cut(end: float | None) -> float | None:
    return None if end is None else min(max(end, 0.0), 1.0)


def _line(part: pd.DataFrame, score: str, controls: bool = False) -> dict[str, Any] | None:
    """One drawn line, of a vector or of controls of a kind; a single control has no band.

    Returns:
        `points`: lists of coefficient, mean, low, high, n; `area`: the area under them with its interval, or None;
        `of`: number of vectors. None where no vector has the score.
    """
    part = part[part.groupby("vector")[score].transform(lambda values: values.notna().any())]
    if part.empty:
        return None
    if part["vector"].nunique() == 1 and not controls:
        alone = SweepResult(part)
        points = alone.curve(score, ["vector"])[["coefficient", "mean", "low", "high", "n"]].to_numpy().tolist()
        several = part["coefficient"].nunique() > 1
        areas = alone.curve_auc(score, ["vector"]).iloc[0][["curve_auc", "low", "high"]] if several else []
        return {
            "points": [[c, *_all_rounded(rest)] for c, *rest in points],
            "area": _all_rounded(areas) or None,
            "of": 1,
        }
    wide = part.groupby(["group", "prompt_id", "vector", "coefficient"])[score].mean().unstack("coefficient")
    points = [[float(coefficient), *_pooled(wide[coefficient])] for coefficient in wide]
    area = None
    if wide.shape[1] > 1:
        rows = wide.to_numpy()
        areas = [curve_auc(wide.columns, row) if np.isfinite(row).all() else np.nan for row in rows]
        area = _pooled(pd.Series(areas, index=wide.index))[:3]
    return {"points": points, "area": area, "of": int(part["vector"].nunique())}


def _pooled(values: pd.Series) -> list[float | None]:
    """Mean over control vectors, the interval of a further one, and the number of prompts."""
    band = control_band(values.unstack("vector").to_numpy())
    return _all_rounded([band.mean, band.low, band.high, band.n])


def tokens_by_row(table: pd.DataFrame, projections: pd.DataFrame) -> list[pd.DataFrame | None]:
    """The tokens of each row in their order; None for a row without projections."""
    keys = [*KEYS[:-1], "choice" if "choice" in table else "sample"]
    if missing := [name for name in keys if name not in projections]:
        raise ValueError(
            f"expected projections of this sweep with the columns {keys}; {missing} are missing. Read the projections "
            "again (sweep_projections)."
        )
    parts = {tuple(map(str, key)): part for key, part in projections.groupby(keys, sort=False)}
    tokens = [parts.get(tuple(map(str, key))) for key in table[keys].itertuples(index=False, name=None)]
    for text, part in zip(table["text"], tokens, strict=True):
        if part is not None and (pd.isna(text) or part["stop"].iloc[-1] != len(text)):
            raise ValueError(
                f"expected the projections of this sweep's texts; got {part['stop'].iloc[-1]} characters for "
                f"{text!r:.60}. Read the projections again (sweep_projections)."
            )
    return tokens


def _shades(tokens: Sequence[pd.DataFrame | None], rows: dict[str, Any]) -> dict[str, list[float | None]]:
    """Vector and layer ("0,1") -> `[centre, extent]` of its projections (see `explorer_data`)."""
    unsteered: dict[str, list[np.ndarray]] = {}
    steered: dict[str, list[np.ndarray]] = {}
    keys = [f"{vector},{layer}" for vector, layer in zip(rows["vector"], rows["layer"], strict=True)]
    for key, coefficient, part in zip(keys, rows["coefficient"], tokens, strict=True):
        if part is not None:
            kind = unsteered if coefficient == 0 else steered
            kind.setdefault(key, []).append(part["projection"].to_numpy(float))
    shades = {}
    for key in dict.fromkeys([*unsteered, *steered]):
        values = np.concatenate(unsteered.get(key, []) + steered.get(key, []))
        centre = float(np.concatenate(unsteered.get(key) or steered[key]).mean())
        shades[key] = _all_rounded([centre, np.quantile(np.abs(values - centre), 0.98)])
    return shades


def _all_rounded(values: Any) -> list[float | None]:
    return [_rounded(value, 5) for value in values]


def _rounded(value: Any, figures: int) -> float | None:
    """A number with some significant figures; None for NaN and infinities."""
    return None if pd.isna(value) or math.isinf(value) else float(f"{float(value):.{figures}g}")
