"""Timing in interleaved pairs: both sides run by turns in one process, and the ratio of each pair is kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from steerkit.stats.bootstrap import bootstrap_ci


@dataclass(frozen=True)
class Measured:
    """One line of the results.

    Args:
        job, against: what was timed, and what it was held against.
        ratio: geometric mean over the pairs of `seconds(against) / seconds(ours)`: above 1, ours is faster.
        low, high: its 95 % bootstrap interval over pairs.
        pairs: how many.
        ours, theirs: median seconds of either side.
        spread: (maximum - minimum) / median of our seconds.
        target: the bound the ratio is held to, as text with a comparison and a number; empty where none is.
        note: what a reader has to know.
        unit: what the ratio counts, if not time.
    """

    job: str
    against: str
    ratio: float
    low: float
    high: float
    pairs: int
    ours: float
    theirs: float
    spread: float = 0.0
    target: str = ""
    note: str = ""
    unit: str = "s"

    @property
    def holds(self) -> bool | None:
        """Whether the point estimate meets the target; None without one."""
        if not self.target:
            return None
        sign, bound = self.target.split()
        return self.ratio >= float(bound) if sign == ">=" else self.ratio <= float(bound)

    def row(self) -> dict[str, Any]:
        return asdict(self)


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(
    job: str,
    against: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    pairs: int = 5,
    target: str = "",
    note: str = "",
    inverse: bool = False,
) -> Measured:
    """Time both sides by turns, each pair in the other order than the last, after one call each that does not count.

    Args:
        inverse: report `ours / theirs` instead, for a floor that theirs is.
    """
    ours(), theirs()
    mine, other = list[float](), list[float]()
    for number in range(pairs):
        for side, times in ((ours, mine), (theirs, other))[:: 1 if number % 2 else -1]:
            times.append(seconds(side))
    return measured(job, against, mine, other, target, note, inverse)


def measured(
    job: str,
    against: str,
    ours: list[float],
    theirs: list[float],
    target: str = "",
    note: str = "",
    inverse: bool = False,
    unit: str = "s",
) -> Measured:
    """The line for figures that were taken in pairs."""
    logs = np.log(np.array(ours) / np.array(theirs) if inverse else np.array(theirs) / np.array(ours))
    interval = bootstrap_ci(logs)
    middle = statistics.median(ours)
    spread = (max(ours) - min(ours)) / middle
    ratio, low, high = (float(np.exp(x)) for x in (interval.mean, interval.low, interval.high))
    return Measured(
        job, against, ratio, low, high, len(ours), middle, statistics.median(theirs), spread, target, note, unit
    )
