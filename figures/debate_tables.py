"""Tables of docs/agents.md: what a reproduction found, from `results/miniature`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from steerkit.io.markdown import markdown_table
from steerkit.io.tables import read_table
from steerkit.stats.format import interval_text

ALPHA = 0.05
CHECKPOINTS = ("base", "SFT", "IMAD", "SFT without tags", "SFT on single turns")
CONTROLS = ("random", "matched", "shuffled")


def _read(folder: Path, name: str) -> pd.DataFrame:
    return read_table(folder / "miniature" / f"{name}.csv")[0]


def _families(folder: Path, name: str) -> dict[str, pd.DataFrame]:
    """A table of each family that has it; `FileNotFoundError` if none has."""
    paths = sorted((folder / "miniature").glob(f"*/{name}.csv"))
    if not paths:
        raise FileNotFoundError(f"expected {name}.csv of a family below {folder / 'miniature'}")
    return {path.parent.name: read_table(path)[0] for path in paths}


def _interval(row: Any, name: str, digits: int = 2, signed: bool = False, ends: Sequence[str] = ()) -> str:
    low, high = ends or (f"{name}_low", f"{name}_high")
    if pd.isna(getattr(row, name)):
        return ""
    return interval_text(getattr(row, name), getattr(row, low), getattr(row, high), digits, signed=signed)


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a Markdown table, with every column that one of them has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return markdown_table(columns, ([row.get(column, "") for column in columns] for row in rows))


READ = {
    ("personas", "trace"): "whole trace",
    ("personas", "untagged"): "trace without tags",
    ("personas", "plain"): "turn alone",
    ("same persona", "trace"): "one persona: whole trace",
    ("same persona", "plain"): "one persona: turn alone",
}
"""Debates and texts that a probe reads -> column of the table."""


def read(folder: Path) -> str:
    """Accuracy of a probe for the speaker at the last token of a turn, the layer chosen by nested cross-validation."""
    rows = []
    for family, table in _families(folder, "separability").items():
        some = table[(table["layer"].astype(str) == "nested") & (table["position"] == "last")]
        some = some[(some["features"] == "resid") & (some["labels"] == "true")]
        for stage in (stage for stage in CHECKPOINTS if stage in set(some["stage"])):
            part = some[some["stage"] == stage].set_index(["debates", "source"])
            line = {"family": family, "checkpoint": stage}
            for key, column in READ.items():
                line[column] = _interval(part.loc[key], "accuracy") if key in part.index else ""
            rows.append({**line, "seeds": f"{part['seeds'].max():.0f}"})
    return _table(rows)


FALLS = {
    "fall": "decrease",
    "fall over random": "decrease minus that under random directions",
    "fall over the base's": "decrease minus that at the base",
}
"""Measure of `analysis.paper.pooling.malicious_fall` -> column of the table."""


def malicious(folder: Path) -> str:
    """The paper's malicious experiment: the fall of the trait at coefficients of -3 and below, a row per checkpoint."""
    table = _read(folder, "malice/malicious_fall")
    rows = []
    for (stage, context), part in table.groupby(["stage", "context"], sort=False):
        at = part.set_index("measure")
        shown = f"{at['zero'].iloc[0]:.2f}"
        seeds = f"{at['seeds'].iloc[0]:.0f} of {at['runs'].iloc[0]:.0f}"
        line = {"checkpoint": stage, "context": context, "share with the trait at coefficient 0": shown}
        for measure, column in FALLS.items():
            line[column] = _interval(at.loc[measure], "value", signed=True, ends=("low", "high"))
        rows.append({**line, "decrease by seed": at.loc["fall", "by_seed"], "seeds": seeds})
    return _table(rows)


def unnamed(folder: Path) -> str:
    """ROUGE-L gained by each agent's direction where the context names no agent, and the agents above each control."""
    rows = []
    for family, gains in _families(folder, "gains").items():
        some = gains[(gains["score"] == "rouge_l") & ~gains["identity"].astype(bool)]
        for stage in (stage for stage in CHECKPOINTS if stage in set(some["stage"])):
            part = some[some["stage"] == stage]
            zero = part[part["over"] == "coefficient 0"].sort_values("agent")
            line = {"family": family, "checkpoint": stage}
            for row in zero.itertuples():
                gain = _interval(row, "gain", signed=True, ends=("low", "high"))
                line[f"agent {row.agent}: unsteered, gain"] = f"{row.unsteered:.2f}, {gain}"
            for control in CONTROLS:
                over = part[part["over"] == control]
                above = (over["low"] > 0) & (over["p_holm"] <= ALPHA)
                line[f"agents above {control}"] = f"{above.sum()} of {len(over)}" if len(over) else ""
            rows.append(line)
    return _table(rows)


def protocol(folder: Path) -> str:
    """The paper's protocol at coefficients 0 to 5: area under ROUGE-L unsteered and by kind of directions."""
    rows = []
    for family, table in _families(folder, "protocol").items():
        some = table[(table["score"] == "rouge_l") & (table["grid"] == "coefficient")]
        for (stage, context), part in some.groupby(["stage", "context"], sort=False):
            at = {row.measure: _interval(row, "value", 3, ends=("low", "high")) for row in part.itertuples()}
            own = next((name for name in ("own", "planted") if f"area, {name}" in at), "own")
            rows.append(
                {
                    "family": family,
                    "checkpoint": stage,
                    "context": context,
                    "unsteered": at.get("at strength 0", ""),
                    "own or planted directions": at.get(f"area, {own}", ""),
                    "random": at.get("area, random", ""),
                    "shuffled": at.get("area, shuffled", ""),
                    "own - random": at.get("area over random", ""),
                }
            )
    return _table(rows)


def suppression(folder: Path) -> str:
    """The malicious agent, named, at the setting chosen on validation: trait and accuracy, and whose text is left."""
    rows = [
        {
            "checkpoint": row.stage,
            "seeds with the trait": f"{row.shown} of {row.runs}",
            "trait: before -> after": f"{row.trait_0:.2f} -> {row.trait:.2f}",
            "decrease / before": _interval(row, "removed"),
            "under random - after": _interval(row, "over_random", signed=True),
            "under matched - after": _interval(row, "over_matched", signed=True),
            "accuracy: before -> after": f"{row.accuracy_0:.2f} -> {row.accuracy:.2f}",
            "accuracy: after / before": _interval(row, "kept"),
            "begins like another agent: before -> after": f"{row.other_opening_0:.2f} -> {row.other_opening:.2f}",
        }
        for row in _read(folder, "malice/suppression_kept").itertuples()
        if row.context == "forced"
    ]
    return _table(rows)


def transplant(folder: Path) -> str:
    """Answers after another question's first round: a row per family and checkpoint."""
    rows = [
        {
            "family": family,
            "text of": row.stage,
            "texts with a turn of round 1": f"{row.share_with_round_1:.0%}",
            "answers that change": f"{row.changed:.2f}",
            "answers that change after the own round 1": f"{row.changed_again:.2f}",
            "difference": _interval(row, "value", signed=True, ends=("low", "high")),
            "difference by seed": " ".join(f"{float(value):.2f}" for value in row.by_seed.split()),
            "answers that follow, minus chance": _interval(row, "follows", signed=True),
            "no answer": f"{row.missing:.2f}",
        }
        for family, table in _families(folder, "transplant").items()
        for row in table.itertuples()
    ]
    return _table(rows)


def patched(folder: Path) -> str:
    """Answers that follow the activations of another first round, by layer: a row per checkpoint and text."""
    rows = []
    for family, table in _families(folder, "patched_rounds").items():
        follows = table[(table["quantity"] == "follows") & (table["part"] == "round 1")]
        for (stage, text, then), part in follows.groupby(["stage", "text", "then"], sort=False):
            places = {
                f"{row.site}, layer {row.layer}": _interval(row, "share", ends=("low", "high"))
                for row in part.itertuples()
            }
            line = {"family": family, "checkpoint": stage, "text": text, "next in the text": then}
            rows.append({**line, **places, "pairs per seed": f"{part['n'].mean():.0f}"})
    return _table(rows)


ERASED = {
    "agents": "names",
    "shuffled": "shuffled names",
    "variance": "largest variance",
    "injected": "vectors",
}
"""Erasure of `analysis.probes.erased` -> what the table calls it."""


def erased(folder: Path) -> str:
    """ROUGE-L that an identity adds; under each erasure the share of it that is left, and what the erasure costs.

    There is no share where the erasure costs at least as much as the identity adds: it damages the texts in general. An
    identity that adds too little in every seed has a row without erasures.
    """
    rows = []
    for family, table in _families(folder, "erasure_gains").items():
        survives = _families(folder, "erasure_survives")[family].set_index(["stage", "identity", "erasure"])
        costs = table[table["quantity"] == "cost"]
        plain = table[(table["quantity"] == "gain") & (table["erasure"] == "none")]
        for row in plain.itertuples():
            line = {"family": family, "checkpoint": row.stage, "agent given by": row.identity}
            line["gain"] = _interval(row, "mean", signed=True, ends=("low", "high"))
            tested = []
            for cost in costs[(costs["stage"] == row.stage) & (costs["identity"] == row.identity)].itertuples():
                if (key := (row.stage, row.identity, cost.erasure)) in survives.index:
                    share = _interval(survives.loc[key], "survives") if -cost.mean < row.mean else ""
                    shown = _interval(cost, "mean", signed=True, ends=("low", "high"))
                    tested.append({**line, "erased": ERASED[cost.erasure], "share left": share, "cost": shown})
            rows += tested or [line]
    return _table(rows)
