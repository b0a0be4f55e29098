"""Paired statistics: differences and ratios of two measurements of the same units, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from steerkit.stats.bootstrap import Interval, bootstrap_ci

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Ratio:
    """A ratio of two means from `low` to `high`; see `ratio`.

    Args:
        value: mean of the numerators over mean of the denominators.
        low: lower end of its interval; NaN for fewer than two pairs.
        high: upper end of its interval.
        n: pairs without a missing member.
        denominator_low: lower end of the interval of the denominators' mean. Where it is not above 0, the ratio can
            have any size and sign.
    """

    value: float
    low: float
    high: float
    n: int
    denominator_low: float


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    groups: Collection[Hashable] | None = None,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of `first - second` over pairs, with its percentile bootstrap interval (see `bootstrap_ci`).

    A difference within a pair is free of what both members share, such as how hard a question is.

    Args:
        first: `[n]`. NaN is missing: the pair is left out.
        second: `[n]`; or `[n, k]`, k controls measured on the same n units. With k > 1 the controls are resampled too,
            so that their spread is in the interval.
        groups: n labels; rows that share one are drawn together. Default: each row is a unit of its own.
        n_boot: number of resamples.
        level: coverage of the interval, in (0, 1).
        seed: the result is a function of the arguments and this seed.

    Returns:
        `Interval` with the mean difference, its interval, n, and the two-sided p-value against 0.

    Raises:
        ValueError: another number of rows in `second` than in `first`; see `bootstrap_ci` for the others.

    Example:
        >>> paired_difference([3.0, 5.0, 4.0], [1.0, 2.0, 3.0]).mean
        2.0
    """
    left, right = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if left.ndim != 1 or right.ndim not in (1, 2) or len(left) != len(right):
        raise ValueError(
            f"expected first [n] and second [n] or [n, k]; got shapes {list(left.shape)} and {list(right.shape)}. Pass "
            "one row per unit in both."
        )
    differences = left[:, None] - right.reshape(len(right), -1)
    several = differences.shape[1] > 1
    return bootstrap_ci(differences, groups, resample_columns=several, n_boot=n_boot, level=level, seed=seed)


def ratio(
    numerators: ArrayLike, denominators: ArrayLike, n_boot: int = 2000, level: float = 0.95, seed: int = 0
) -> Ratio:
    """Mean of the numerators over mean of the denominators, with its percentile bootstrap interval over pairs.

    A resample draws n of the n pairs with replacement and has the ratio `sum_i a[i] / sum_i b[i]` over the drawn pairs.
    The interval runs between the `(1 - level) / 2` and `(1 + level) / 2` quantiles of these ratios. Resamples that give
    0/0 are left out.

    Args:
        numerators: `[n]`, one per unit that is resampled (average the rows of a group first). NaN is missing.
        denominators: `[n]`, of the same units.
        n_boot: number of resamples.
        level: coverage of the interval, in (0, 1).
        seed: the result is a function of the arguments and this seed.

    Raises:
        ValueError: two shapes, or no pair without a missing member.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 10.

    Example:
        >>> ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]).value
        0.5
    """
    left, right = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    if left.ndim != 1 or left.shape != right.shape:
        raise ValueError(
            f"expected numerators [n] and denominators [n]; got shapes {list(left.shape)} and {list(right.shape)}. "
            "Pass one of each per unit."
        )
    complete = ~(np.isnan(left) | np.isnan(right))
    pairs = np.stack([left[complete], right[complete]]).T
    if not len(pairs):
        raise ValueError(f"expected a pair without NaN at least; got {len(left)} pairs, none complete. Pass others.")
    drawn = np.random.default_rng(seed).integers(len(pairs), size=(n_boot, len(pairs)))
    means = np.array([pairs[rows].mean(axis=0) for rows in drawn])
    mean = pairs.mean(axis=0)
    ends = [round(50 * (1 - level), 9), round(50 * (1 + level), 9)]  # 2.5 and 97.5 exactly
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = means[:, 0] / means[:, 1]
        value = float(mean[0] / mean[1])
        known = len(pairs) > 1 and not np.isnan(ratios).all()
        low, high = np.nanpercentile(ratios, ends) if known else (np.nan, np.nan)
    denominator_low = float(np.percentile(means[:, 1], ends[0]))
    return Ratio(value, float(low), float(high), len(pairs), denominator_low)
