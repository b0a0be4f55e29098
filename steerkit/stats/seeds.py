"""Means over training seeds: the unit of a claim about training is a run, not a question."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import special

from steerkit.stats.checks import check_level
from steerkit.stats.mean import Interval, mean_interval

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

SEED, QUESTION = "training seed", "question (one seed)"


@dataclass(frozen=True)
class OverSeeds:
    """A mean over training seeds; see `over_seeds`.

    Args:
        mean: mean over seeds of the seeds' means.
        low: lower end of its interval.
        high: upper end.
        p: two-sided p-value of the mean against 0.
        unit: what the interval is over, `SEED` or `QUESTION`.
        by_seed: the mean of each seed, in the order of the seeds.
        n: number of values.
    """

    mean: float
    low: float
    high: float
    p: float
    unit: str
    by_seed: tuple[float, ...]
    n: int

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return len(self.by_seed)


def over_seeds(
    values: ArrayLike,
    seeds: Collection[int],
    questions: Collection[Hashable] | None = None,
    level: float = 0.95,
    of: int | None = None,
) -> OverSeeds:
    """The mean of a measurement over training seeds, with Student's t interval over the seeds' means.

    With one seed there is no spread between seeds: the interval is then over its questions (`mean_interval`), and holds
    for this one checkpoint.

    Args:
        values: `[n]`, one per seed and question. NaN is missing.
        seeds: the training seed of each value.
        questions: the question of each value, for values that share one; used with one seed only.
        level: coverage of the interval, in (0, 1).
        of: number of training seeds that were run, if some of them may have no value. Where several were run and one
            has values, there is no interval: what that one shows may be what singled it out.

    Raises:
        ValueError: seeds of another length, or missing; values and level as in `seed_interval`.

    Example:
        >>> over_seeds([1.0, 0.0, 1.0, 1.0], [0, 0, 1, 1]).by_seed
        (0.5, 1.0)
    """
    x, codes = np.asarray(values, dtype=float), np.asarray(list(seeds))
    if x.shape != codes.shape:
        raise ValueError(f"expected a seed per value; got {len(codes)} for shape {list(x.shape)}. Label every value.")
    if any(seed is None or seed != seed for seed in codes.tolist()):
        raise ValueError("expected a seed per value; some are missing (NaN). Label every value.")
    there = ~np.isnan(x)
    by_seed = tuple(float(x[there & (codes == seed)].mean()) for seed in np.unique(codes[there]))
    if len(by_seed) == 1 and (of or 1) == 1:
        found, unit = mean_interval(x, questions, level=level), QUESTION
    else:
        found, unit = seed_interval(by_seed or [float("nan")], level), SEED
    return OverSeeds(found.mean, found.low, found.high, found.p, unit, by_seed, int(there.sum()))


def seed_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """The mean over training seeds, with Student's t interval and p-value: `m -+ t_{S-1} s / sqrt(S)`.

    The unit is a training run. Its value is a mean over questions, whose noise is a part of the spread between runs.

    Args:
        values: `[seed]`, one mean (or difference of means) per training seed. NaN is missing.
        level: coverage of the interval, in (0, 1).

    Returns:
        `Interval` with n the number of seeds; `low`, `high` and `p` are NaN for fewer than two.

    Raises:
        ValueError: values that are empty, infinite or not `[seed]`; a level outside (0, 1).

    Example:
        >>> round(seed_interval([0.80, 0.84, 0.85]).low, 2)
        0.76
    """
    check_level(level)
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or x.size == 0 or np.isinf(x).any():
        raise ValueError(f"expected finite values [seed], not empty; got shape {list(x.shape)}. Pass one per seed.")
    there = x[~np.isnan(x)]
    seeds, n_missing, nan = len(there), len(x) - len(there), float("nan")
    mean = float(there.mean()) if seeds else nan
    if seeds < 2:
        return Interval(mean, nan, nan, seeds, n_missing, nan)
    # Equal values have no spread to judge by: the p-value is then that of the exact sign-flip test.
    error = float(there.std(ddof=1)) / seeds**0.5
    half = float(special.stdtrit(seeds - 1, (1 + level) / 2)) * error
    near = 1e-12 * float(np.abs(there).max())
    if error > near:
        p = 2 * float(special.stdtr(seeds - 1, -abs(mean) / error))
    else:
        p = 1.0 if abs(mean) <= near else 2.0 ** (1 - seeds)
    return Interval(mean, mean - half, mean + half, seeds, n_missing, p)
