"""Paired statistics: differences and ratios of two measurements of the same units, with intervals."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import special

from steerkit.stats.checks import check_level
from steerkit.stats.mean import Interval, is_binary, mean_interval

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Ratio:
    """A ratio of two means from `low` to `high`; see `ratio`.

    Args:
        value: mean of the numerators over mean of the denominators.
        low: lower end of its interval; NaN for fewer than two pairs, minus infinity where the denominators' mean is not
            different from 0.
        high: upper end; NaN or infinity likewise.
        n: pairs without a missing member.
    """

    value: float
    low: float
    high: float
    n: int

    @property
    def bounded(self) -> bool:
        """Whether both ends are finite."""
        return math.isfinite(self.low) and math.isfinite(self.high)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    groups: Collection[Hashable] | None = None,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The mean of `first - second` over pairs, with the interval and p-value of `mean_interval`.

    A difference within a pair is free of what both members share, such as how hard a question is.

    Args:
        first: `[n]`. NaN is missing: the pair is left out.
        second: `[n]`, of the same units.
        groups: n labels; rows that share one are one unit. Default: each row is a unit of its own.
        n_boot: number of resamples.
        level: coverage of the interval, in (0, 1).
        seed: the result is a function of the arguments and this seed.

    Returns:
        `Interval` with the mean difference, its interval, n, and the two-sided p-value against 0.

    Raises:
        ValueError: another shape of `second` than of `first`; see `mean_interval` for the others.

    Example:
        >>> paired_difference([3.0, 5.0, 4.0], [1.0, 2.0, 3.0]).mean
        2.0
    """
    left, right = _pairs(first, second)
    binary = is_binary(left) and is_binary(right)
    return mean_interval(left - right, groups, n_boot=n_boot, level=level, seed=seed, binary=binary)


def ratio(numerators: ArrayLike, denominators: ArrayLike, level: float = 0.95) -> Ratio:
    """Mean of the numerators over mean of the denominators, with Fieller's interval.

    With a and b the pairs' members, the interval holds every r for which the mean of `a - r b` is not different from 0
    by Student's t with n - 1 degrees of freedom:

        |mean(a) - r mean(b)| <= t sqrt(var(a) - 2 r cov(a, b) + r^2 var(b)) / sqrt(n).

    Where the mean of b is itself not different from 0, any ratio is possible, and the ends are infinite.

    Args:
        numerators: `[n]`, one per unit (average the rows of a group, or of a training seed, first). NaN is missing.
        denominators: `[n]`, of the same units.
        level: coverage of the interval, in (0, 1).

    Raises:
        ValueError: two shapes, an infinite value, no pair without a missing member, or a level outside (0, 1).

    Source: Fieller, "Some Problems in Interval Estimation", 1954.

    Example:
        >>> ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]).value
        0.5
    """
    check_level(level)
    left, right = _pairs(numerators, denominators)
    if np.isinf(left).any() or np.isinf(right).any():
        raise ValueError("expected finite members of the pairs, or NaN; got infinite ones. Use NaN for missing.")
    complete = ~(np.isnan(left) | np.isnan(right))
    a, b = left[complete], right[complete]
    n = len(a)
    if not n:
        raise ValueError(f"expected a pair without NaN at least; got {len(left)} pairs, none complete. Pass others.")
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(a.mean() / b.mean())
    if n < 2:
        return Ratio(value, math.nan, math.nan, n)
    (var_a, cov), (_, var_b) = np.cov(a, b) * float(special.stdtrit(n - 1, (1 + level) / 2)) ** 2 / n
    square, half, rest = b.mean() ** 2 - var_b, a.mean() * b.mean() - cov, a.mean() ** 2 - var_a
    if not square > 0:
        return Ratio(value, -math.inf, math.inf, n)
    root = math.sqrt(max(0.0, half**2 - square * rest))
    return Ratio(value, float(half - root) / square, float(half + root) / square, n)


def _pairs(first: ArrayLike, second: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    left, right = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if left.ndim != 1 or left.shape != right.shape:
        raise ValueError(
            f"expected two members [n] of n pairs; got shapes {list(left.shape)} and {list(right.shape)}. Pass one of "
            "each per unit."
        )
    return left, right
