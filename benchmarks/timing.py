"""Timing in interleaved pairs: two sides run in turn, and the ratio of each pair enters the mean."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

MIN_PAIRS = 11
STORE = Path(__file__).parents[1] / "results" / "speed"
"""Folder of the stored rows of all jobs."""


@dataclass(frozen=True)
class Measured:
    """One line of the results.

    Args:
        job: what was timed.
        against: what it is compared with.
        ratio: geometric mean over the pairs of `seconds(against) / seconds(ours)`: above 1, ours is faster.
        low: lower end of its 95 % interval (Student's t over the pairs' logarithms).
        high: upper end.
        pairs: number of pairs.
        ours: median seconds of our side.
        theirs: median seconds of the other side.
        spread: (maximum - minimum) / median of our seconds.
        target: required bound of the ratio, as text with a comparison and a number; empty without one.
        note: a remark for the reader.
        unit: of `ours` and `theirs`.
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
        """Whether the whole interval of at least 11 pairs meets the target; None without a target or with fewer pairs.

        A single measurement, such as a peak of memory, has no interval and is judged by itself.
        """
        if not self.target or 1 < self.pairs < MIN_PAIRS:
            return None
        sign, bound = self.target.split()
        low, high = (self.low, self.high) if self.pairs > 1 else (self.ratio, self.ratio)
        return low >= float(bound) if sign == ">=" else high <= float(bound)

    def row(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(
    job: str,
    against: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    pairs: int = MIN_PAIRS,
    target: str = "",
    note: str = "",
    inverse: bool = False,
) -> Measured:
    """Time both sides in turn, after one uncounted call each; the order alternates from pair to pair.

    Args:
        job: what is timed.
        against: what it is compared with.
        ours: our side.
        theirs: the other side.
        pairs: number of pairs.
        target: see `Measured`.
        note: see `Measured`.
        inverse: report `ours / theirs`, for a floor.
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
    """The line of results for measurements that were taken in pairs; arguments as for `compare`."""
    logs = np.log(np.array(ours) / np.array(theirs) if inverse else np.array(theirs) / np.array(ours))
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5 if len(logs) > 1 else np.nan
    middle = statistics.median(ours)
    spread = (max(ours) - min(ours)) / middle
    ratio, low, high = (float(np.exp(logs.mean() + x)) for x in (0.0, -half, half))
    return Measured(
        job, against, ratio, low, high, len(ours), middle, statistics.median(theirs), spread, target, note, unit
    )
