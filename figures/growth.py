"""Figure of the growth of time and memory with the size of a job."""

from __future__ import annotations

from typing import Any

import pandas as pd

from steerkit.show.plots import GREY, PALETTE, TWO_COLUMNS, new_figure, styled

QUANTITIES = {"seconds": "seconds", "mib": "MiB above the loaded model"}


@styled()
def growth(measured: pd.DataFrame) -> Any:
    """A column per job: seconds and MiB over its size, on logarithmic axes, with a dashed line of slope 1 for each.

    Args:
        measured: columns grows (the job), size, seconds, mib; see `benchmarks.growth.table`.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator

    jobs = list(measured.groupby("grows", sort=False))
    figure, grid = new_figure(
        1.8 * TWO_COLUMNS, 3.6, "Seconds and memory over the size of a job", 2, len(jobs), sharex="col"
    )
    for column, (name, part) in zip(grid.T, jobs, strict=True):
        size = part["size"].to_numpy()
        for axes, quantity, color in zip(column, QUANTITIES, PALETTE, strict=False):
            y = part[quantity].clip(lower=1.0 if quantity == "mib" else None).to_numpy()
            axes.loglog(size, y, "o-", color=color)
            axes.loglog(size, y[-1] * size / size[-1], color=GREY, lw=0.8, ls="--")
            axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=FuncFormatter("{0:g}".format))
            axes.set_xticks(size, [str(s) for s in size])
            axes.minorticks_off()
        column[-1].set_xlabel(name)
    for axes, label in zip(grid[:, 0], QUANTITIES.values(), strict=True):
        axes.set_ylabel(f"{label}\n(dashed: slope 1)")
    return figure
