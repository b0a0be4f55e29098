"""Figure of a GRPO run: rewards, schedules, length, accuracy, and the number of agents in an output."""

from __future__ import annotations

from typing import Any

import pandas as pd

from steerkit.show.plots import MARKERS, PALETTE, TWO_COLUMNS, new_figure, styled

PANELS = (
    ("reward parts", ("reward", "clip", "format")),
    ("accuracy and ends in time", ("correct", "success")),
    ("tokens", ("length", "clip_tokens")),
    ("w_fmt", ("w_fmt",)),
    ("agents in an output, shares", ("agents_1", "agents_2", "agents_3")),
    ("groups without spread", ("groups_without_spread",)),
)
NAMES = {
    "clip": "w_clip R(y; l)",
    "format": "w_fmt R_fmt",
    "correct": "right at all",
    "success": "right within l",
    "clip_tokens": "l",
    "groups_without_spread": "share",
    "agents_1": "one",
    "agents_2": "two",
    "agents_3": "three",
}
"""The text of a column in the legend, where it is not its name."""


@styled()
def training_curves(logs: pd.DataFrame, title: str | None = None) -> Any:
    """A panel per quantity over the steps of GRPO: a thin line per seed, their mean as a thick line.

    Args:
        logs: the rows of `log.jsonl` of one or more runs, with a column `seed`.
    """
    wanted = {"step", "seed", *(name for _, names in PANELS for name in names)}
    if logs.empty or (missing := sorted(wanted - set(logs))):
        raise ValueError(
            f"expected the log of GRPO with a column seed; got {len(logs)} rows, missing: {missing}. Add them."
        )
    figure, grid = new_figure(TWO_COLUMNS, 3.2 + 0.2 * bool(title), title, 2, 3, sharex=True)
    for axes, (label, names) in zip(grid.flat, PANELS, strict=True):
        for number, name in enumerate(names):
            for _, part in logs.groupby("seed"):
                axes.plot(part["step"], part[name], color=PALETTE[number], lw=0.5, alpha=0.5)
            mean = logs.groupby("step")[name].mean()
            text = NAMES.get(name, name)
            every = max(1, len(mean) // 6)
            axes.plot(mean.index, mean, color=PALETTE[number], label=text, marker=MARKERS[number], markevery=every)
        axes.set_title(label)
        if len(names) > 1:
            low, high = axes.get_ylim()
            axes.set_ylim(low, high + 0.25 * (high - low))  # room for the legend above the curves
            axes.legend(loc="upper left", ncols=len(names), columnspacing=1)
    for axes in grid[-1]:
        axes.set_xlabel("GRPO step")
    seeds = logs["seed"].nunique()
    size = f"Thick: mean over {seeds} seed{'s' * (seeds > 1)}, each step's batch of completions; thin: each seed."
    figure.supxlabel(size, x=0.01, ha="left")
    return figure
