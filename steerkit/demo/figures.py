"""The demo's figures of doses and gains, drawn from its tables. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from steerkit.demo.summary import unmet
from steerkit.demo.traits import PERSONAS
from steerkit.show.plots import INK, curve_grid, intervals

AXES = {
    "trait": "trait score",
    "rouge_l_symbols": "ROUGE-L",
    "repeated_4grams": "repeated 4-grams",
    "perplexity": "perplexity",
}
SHARES = ("trait", "rouge_l_symbols", "repeated_4grams")
"""Scores between 0 and 1: their intervals are drawn within these limits."""
CONTROLS = ("random", "shuffled")
RISES = 0.25
"""A trait score whose mean spans less on validation is not said to rise."""


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


def dose_figure(curves: pd.DataFrame, title: str, chosen: Mapping[str, float]) -> Any:
    """Validation: every score over the coefficient, a column per persona.

    Args:
        curves: the demo's `dose_curves`.
        title: the finding.
        chosen: persona -> the chosen coefficient, a dotted line.
    """
    labels = {"random": "one random direction of its norm", "shuffled": "one vector from shuffled labels"}
    figure = curve_grid(
        dose_panels(curves),
        "coefficient (dotted: chosen)",
        controls=CONTROLS,
        log=["perplexity"],
        title=title,
        labels=labels,
        sample=f"n = {int(curves['n'].max())} validation questions",
    )
    personas = list(PERSONAS)
    for number, axes in enumerate(figure.axes):
        axes.axvline(chosen[personas[number % len(personas)]], color=INK, lw=1, ls=":", zorder=1)
    return figure


def gain_figure(gains: pd.DataFrame, title: str) -> Any:
    """Test: the gain in trait score of each persona, over each comparison."""
    return intervals(gain_rows(gains), "gain in trait score on test", title=title)


def gain_rows(gains: pd.DataFrame) -> pd.DataFrame:
    """The gains in trait score as rows of a forest plot; p of the sign-flip test only over coefficient 0."""
    rows = gains[gains["score"] == "trait"]
    return pd.DataFrame(
        {
            "name": rows["persona"].map(PERSONAS),
            "comparison": "over " + rows["over"],
            **{key: rows[key] for key in ("gain", "low", "high", "n", "p_rank")},
            "p": rows["p_holm"].where(rows["over"] == "coefficient 0"),
        }
    ).reset_index(drop=True)


def gain_title(gains: pd.DataFrame) -> str:
    """The finding of the gains: the personas whose trait score rises over coefficient 0 and over all controls."""
    trait = gains[gains["score"] == "trait"]
    names = [PERSONAS[str(name)] for name, rows in trait.groupby("persona", sort=False) if not unmet(rows)]
    return f"Steering raises the trait score of {' and '.join(names)}" if names else "Steering raises no trait score"


def dose_title(curves: pd.DataFrame) -> str:
    """The finding of the doses: the personas whose mean trait score is somewhere at least `RISES` above that at 0."""
    trait = curves[(curves["score"] == "trait") & (curves["role"] == "vector")]
    means = trait.groupby("persona", sort=False)["mean"]
    unsteered = trait[trait["coefficient"] == 0].groupby("persona", sort=False)["mean"].mean()
    above = trait[trait["coefficient"] > 0].groupby("persona", sort=False)["mean"].max()
    gained = (above - unsteered).reindex(list(means.groups))
    names = [PERSONAS[str(name)] for name in gained.index[gained >= RISES]]
    return f"The trait scores of {' and '.join(names)} rise with the dose" if names else "No trait score rises"


def probe_title(table: pd.DataFrame) -> str:
    """The finding of a probe by layer: its best held-out accuracy, beside that of the embedding."""
    rows = table[(table["features"] == "resid") & (table["labels"] == "true")].set_index("layer")["accuracy"]
    blocks = rows[[layer for layer in rows.index if layer not in ("embed", "nested")]]
    return f"Best layer {blocks.idxmax()}: {blocks.max():.2f} accurate; the embedding: {rows['embed']:.2f}"
