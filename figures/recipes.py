"""Figures and tables of the recipes: CAA by layer and by dose, against random directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from steerkit.show.plots import curve_grid

CAA, RANDOM = "CAA", "random directions"


def caa_curves(tables: Mapping[str, pd.DataFrame], axis: str) -> Any:
    """Gain in the probability of the matching letter by layer or dose: a row per model, a column per behavior.

    The title is the finding. In grey the mean of the random directions, with the interval of a further one.

    Args:
        tables: model -> the table `by_layer` or `by_dose` of `analysis.recipes.caa`.
        axis: `layer` or `dose`.
    """
    panels = {
        f"gain in probability of the\nmatching letter, {model}": {
            name.partition("-")[0]: against_random(part, axis) for name, part in _letters(table).items()
        }
        for model, table in tables.items()
    }
    label = "steered layer, at a dose of 0.2" if axis == "layer" else "dose"
    return curve_grid(panels, label, controls=[RANDOM], title=_finding(tables, axis), sample=_sample(tables.values()))


def _finding(tables: Mapping[str, pd.DataFrame], axis: str) -> str:
    """At how many layers or doses both gains have the sign of the dose, with intervals that exclude 0."""
    every = pd.concat([table[table["measure"] == "letters"].assign(model=model) for model, table in tables.items()])
    sign = every[axis].map(lambda dose: 1 if axis == "layer" or dose > 0 else -1)
    intended = every["low"].where(sign > 0, -every["high"]) > 0
    found = intended.groupby([every["model"], every["behavior"], every[axis]]).all()
    return (
        f"CAA moves the letter as intended, and more than random directions, at {found.sum()} of {len(found)} {axis}s"
    )


def against_random(gains: pd.DataFrame, axis: str) -> pd.DataFrame:
    """The gains of a vector over coefficient 0, and those of random directions, as a curve of `plots.curve_grid`.

    With `g` the gain over coefficient 0 and `r [low, high]` that over random directions, these gain `g - r` on average,
    and a further one `[g - high, g - low]`.

    Args:
        gains: columns `axis`, over, gain, low, high, n.
    """
    plain, random = (gains[gains["over"] == over].set_index(axis) for over in ("coefficient 0", "random"))
    own = plain.loc[:, ["gain", "low", "high", "n"]].rename(columns={"gain": "mean"}).assign(vector=CAA)
    gain = plain.loc[random.index, "gain"]
    band = {"mean": gain - random["gain"], "low": gain - random["high"], "high": gain - random["low"]}
    both = pd.concat([own, pd.DataFrame({**band, "n": random["n"], "vector": RANDOM})])
    curve = both.rename_axis("coefficient").reset_index()
    if axis == "layer":
        return curve
    unsteered = [{"vector": one, "coefficient": 0.0, "mean": 0.0, "low": 0.0, "high": 0.0} for one in (CAA, RANDOM)]
    return pd.concat([curve, pd.DataFrame(unsteered).assign(n=curve["n"].max())], ignore_index=True)


def _letters(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    letters = table[table["measure"] == "letters"]
    return {str(name): part for name, part in letters.groupby("behavior", sort=False)}


def _sample(tables: Any) -> str:
    every = pd.concat(list(tables))
    letters = every[every["measure"] == "letters"]
    groups = "\u2013".join(str(n) for n in sorted({int(letters["n"].min()), int(letters["n"].max())}))
    return f"n = {groups} question groups, k = {int(letters['k'].max())} random directions"
