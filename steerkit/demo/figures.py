"""The demo's figures of doses and gains, drawn from its tables. Imports no torch."""

from __future__ import annotations

from typing import Any

import pandas as pd

from steerkit.demo.traits import PERSONAS
from steerkit.show.plots import curve_grid, intervals

AXES = {
    "trait": "trait score",
    "rouge_l_symbols": "ROUGE-L",
    "repeated_4grams": "repeated 4-grams",
    "perplexity": "perplexity",
}
SHARES = ("trait", "rouge_l_symbols", "repeated_4grams")
"""Scores between 0 and 1: their intervals are drawn within these limits."""
CONTROLS = ("random", "shuffled")


def dose_panels(curves: pd.DataFrame) -> dict[str, dict[str, pd.DataFrame]]:
    """Score -> persona -> curves of its vector and of its controls, which are named by their role."""
    panels: dict[str, dict[str, pd.DataFrame]] = {}
    roles = curves["role"].replace("vector", "persona's vector")
    for score, label in AXES.items():
        curve = curves.assign(vector=roles)[curves["score"] == score]
        if score in SHARES:
            curve = curve.assign(**{end: curve[end].clip(0, 1) for end in ("low", "high")})
        panels[label] = {
            title: curve[curve["persona"] == name].drop(columns=["persona", "role", "score"])
            for name, title in PERSONAS.items()
        }
    return panels


def dose_figure(curves: pd.DataFrame, title: str) -> Any:
    """Validation: every score over the coefficient, a column per persona."""
    return curve_grid(dose_panels(curves), "coefficient", controls=CONTROLS, log=["perplexity"], title=title)


def gain_figure(gains: pd.DataFrame, title: str) -> Any:
    """Test: the gain in trait score of each persona, over each comparison."""
    return intervals(gain_rows(gains), "gain in trait score on test", title=title)


def gain_rows(gains: pd.DataFrame) -> pd.DataFrame:
    """The gains in trait score as rows of a forest plot."""
    rows = gains[gains["score"] == "trait"]
    return pd.DataFrame(
        {
            "name": rows["persona"].map(PERSONAS),
            "comparison": "over " + rows["over"],
            **{key: rows[key] for key in ("gain", "low", "high", "n")},
            "p": rows["p_rank"].fillna(rows["p_holm"]),
        }
    ).reset_index(drop=True)
