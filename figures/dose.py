"""The figure of README: the demo's trait score over the relative dose, and on test beside all control directions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from steerkit.show.plots import GREY, INK, PALETTE, TWO_COLUMNS, new_figure, styled

SIZE = 7.5
"""Points of the text in a figure of this width."""
PANELS = {"trait": "trait score", "perplexity": "perplexity (one control of each kind)"}
CONTROLS = {"random": ("random directions", INK, "s"), "shuffled": ("shuffled-label vectors", PALETTE[2], "^")}
SPREAD = 0.05
"""Largest shift of a control sideways, as a share of the axis; the legend names it."""


@styled()
def dose_with_controls(
    curves: pd.DataFrame, means: pd.DataFrame, controls: pd.DataFrame, persona: str, title: str
) -> Any:
    """Draw the trait score and the perplexity of a persona over the dose.

    The line is the mean on validation questions. At the chosen dose the test questions are
    shown: the persona's vector with its interval, and each control direction as a marker.

    Args:
        curves: the demo's `dose_curves`.
        means: the demo's `means`.
        controls: mean trait score of each control, see `analysis.documents.demo_controls`.
        persona: one of the demo.
        title: the finding, printed above the panels.
    """
    figure, [row] = new_figure(TWO_COLUMNS, 2.8, title, 1, 2)
    handles: dict[str, Any] = {}
    mine = controls[controls["persona"] == persona]
    for axes, (score, label) in zip(row, PANELS.items(), strict=True):
        line = curves[(curves["vector"] == persona) & (curves["score"] == score)].sort_values("coefficient")
        dose = line["relative_dose"] * np.sign(line["coefficient"])
        drawn = _with_interval(axes, dose, line, score, color=PALETTE[0], fmt="o-", elinewidth=0.8)
        points = {f"validation, {int(line['n'].max())} questions (chose the dose)": drawn}
        tested = means[(means["score"] == score) & (means["coefficient"] != 0)].set_index("vector")
        for number, (role, (words, color, marker)) in enumerate(CONTROLS.items()):
            if score == "trait":
                shown = mine[mine["role"] == role]
                values, n = shown["trait"].to_numpy(), len(shown)
            else:
                values = tested.loc[[f"{persona}/{role}"], "mean"].to_numpy()
            side = (-1) ** (number + 1) * np.linspace(0.2, 1, len(values)) * SPREAD * float(np.ptp(dose))
            look = {"ls": "", "ms": 3.2, "mfc": "none", "mew": 0.8, "zorder": 4}
            (drawn,) = axes.plot(tested.loc[persona, "relative_dose"] + side, values, marker, color=color, **look)
            points[f"test, {n} {words} (markers are shifted sideways; all have this dose)"] = drawn
        own = tested.loc[[persona]]
        look = {"color": PALETTE[1], "fmt": "D", "ms": 4.5, "elinewidth": 1.6, "zorder": 5}
        drawn = _with_interval(axes, own["relative_dose"], own, score, **look)
        handles = handles or {f"test, {int(own['n'].iloc[0])} questions, at the chosen dose": drawn, **points}
        axes.axvline(0, color=GREY, lw=0.6, zorder=1)
        axes.set_xlabel("relative dose", size=SIZE)
        axes.set_title(label, size=SIZE)
        if score == "perplexity":
            axes.set_yscale("log")
            axes.set_yticks(ticks := [1, 1.5, 2, 3, 5, 10, 20, 50], [f"{tick:g}" for tick in ticks])
            axes.yaxis.set(minor_formatter="")
            axes.set_ylim(1, 1.1 * line["high"].max())
        else:
            axes.set_ylim(-0.04, 1.04)
    about: Any = {
        "title": "Mean and 95 % interval over questions, within 0 and 1 for the trait score",
        "alignment": "left",
    }
    figure.legend(handles.values(), handles, loc="outside lower left", ncols=1, **about)
    return figure


def _with_interval(axes: Any, x: pd.Series, rows: pd.DataFrame, score: str, **look: Any) -> Any:
    low, high = (rows[end].clip(0, 1) if score == "trait" else rows[end] for end in ("low", "high"))
    return axes.errorbar(x, rows["mean"], [rows["mean"] - low, high - rows["mean"]], **look)
