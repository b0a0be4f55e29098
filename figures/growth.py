"""Figure of the growth of time with the size of a job."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from steerkit.show.plots import GREY, PALETTE, SMALLEST, TWO_COLUMNS, new_figure, styled


@styled()
def growth(measured: pd.DataFrame) -> Any:
    """A panel per job: seconds over its size, on logarithmic axes, with a dashed line of slope 1.

    Memory is in the table only: most jobs take less than the 50 MiB by which the C library's cache changes it.

    Args:
        measured: columns grows (the job), size, seconds; see `benchmarks.growth.table`.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator

    jobs = list(measured.groupby("grows", sort=False))
    steepest = max(np.log(part["seconds"].iloc[-1] / part["seconds"].iloc[0])
                   / np.log(part["size"].iloc[-1] / part["size"].iloc[0]) for _, part in jobs)  # fmt: skip
    title = f"Seconds grow at most with the power {steepest:.2f} of a job's size"
    figure, grid = new_figure(TWO_COLUMNS, 3.6, title, -(-len(jobs) // 3), 3)
    for axes, (name, part) in zip(grid.flat, jobs, strict=True):
        size, seconds = part["size"].to_numpy(), part["seconds"].to_numpy()
        axes.loglog(size, seconds, "o-", color=PALETTE[0])
        axes.loglog(size, seconds[-1] * size / size[-1], color=GREY, lw=0.8, ls="--")
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=FuncFormatter("{0:g}".format))
        axes.set_xticks(size, [str(s) for s in size])
        axes.minorticks_off()
        axes.set_xlabel(name)
    for axes in grid[:, 0]:
        axes.set_ylabel("seconds")
    figure.supxlabel("Dashed: seconds in proportion to the size.", x=0.01, ha="left", size=SMALLEST)
    return figure
