"""A mean over units with an interval and a p-value that hold their error rates also for few and skewed values."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from steerkit.stats.bootstrap import Interval, _draw_counts, _unit_codes

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import ArrayLike

EXACT_UNITS = 15
"""Up to this many units all flips of signs are counted, else `FLIPS` random ones."""
FLIPS = 20_000
_BLOCK = 2**20  # numbers held at once; it bounds memory and does not change the draws


def mean_interval(
    values: ArrayLike,
    groups: Collection[Hashable] | None = None,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The mean of `values`, missing entries left out, with an interval and the p-value of a sign-flip test.

    Units are whole groups, else rows. With T_g the sum of a unit's values, C_g their number, and m = sum T / sum C,

        se = sqrt(G / (G - 1) * sum_g (T_g - m C_g)^2) / sum_g C_g.

    The interval reaches from the lower of two lower ends to the higher of two upper ends: those of Student's t,
    `m -+ t_{G-1} se`, and those of the studentised bootstrap, `m - q se` with q the quantiles of
    `(m* - m) / se*` over resamples of units. The first alone is too narrow for skewed values, the second alone for few
    and for discrete ones. The p-value is that of the sign-flip test of `mean = 0`: the share of all assignments of
    signs to the units whose mean is as far from 0, exact for at most 15 units. It needs symmetric values under the null
    hypothesis, which differences of two exchangeable measurements are.

    Args:
        values: `[n]`. NaN is missing, never 0.
        groups: n labels; rows that share one are one unit. Rows, not groups, weigh the same in the mean.
        n_boot: number of resamples.
        level: coverage of the interval, in (0, 1).
        seed: the result is a function of the arguments and this seed.

    Returns:
        `Interval`; `low`, `high` and `p` are NaN for fewer than two units with a value, `mean` too without any.

    Raises:
        ValueError: `values` empty, infinite or not `[n]`; `groups` of another length or with a missing label; `n_boot`
            below 1; `level` outside (0, 1).

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 12; Good, "Permutation Tests", 2000.

    Example:
        >>> mean_interval([0.2, 0.1, 0.4, 0.3]).p
        0.125
    """
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"expected values [n], not empty; got shape {list(x.shape)}. Pass one value per row.")
    if np.isinf(x).any():
        raise ValueError(f"expected finite values, or NaN; got {np.isinf(x).sum()} infinite. Use NaN for missing.")
    if n_boot < 1 or not 0 < level < 1:
        raise ValueError(f"expected n_boot >= 1 and 0 < level < 1; got n_boot={n_boot}, level={level}. Try 2000, 0.95.")
    codes = _unit_codes(groups, len(x))
    there = ~np.isnan(x)
    totals = np.bincount(codes[there], x[there], minlength=codes.max() + 1)
    counts = np.bincount(codes[there], minlength=codes.max() + 1).astype(float)
    totals, counts = totals[counts > 0], counts[counts > 0]
    units, n_missing, nan = len(totals), int((~there).sum()), float("nan")
    mean = float(totals.sum() / counts.sum()) if units else nan
    if units < 2:
        return Interval(mean, nan, nan, units, n_missing, nan)
    error = float(_standard_error(totals, counts, np.ones((1, units)))[1][0])
    ends = stats.t.ppf([(1 - level) / 2, (1 + level) / 2], units - 1) * error
    low, high = mean + float(ends[0]), mean + float(ends[1])
    ratios = _studentised(totals, counts, mean, n_boot, seed)
    if len(ratios):
        below, above = np.quantile(ratios, [(1 + level) / 2, (1 - level) / 2])
        low, high = min(low, mean - float(below) * error), max(high, mean - float(above) * error)
    return Interval(mean, low, high, units, n_missing, sign_flip(totals, seed))


def seed_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """The mean over training seeds, with Student's t interval and p-value: `m -+ t_{S-1} s / sqrt(S)`.

    The unit is a training run. Its value is a mean over questions, whose noise is a part of the spread between runs.

    Args:
        values: `[seed]`, one mean (or difference of means) per training seed. NaN is missing.
        level: coverage of the interval, in (0, 1).

    Returns:
        `Interval` with n the number of seeds; `low`, `high` and `p` are NaN for fewer than two.

    Example:
        >>> round(seed_interval([0.80, 0.84, 0.85]).low, 2)
        0.76
    """
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or x.size == 0 or np.isinf(x).any():
        raise ValueError(f"expected finite values [seed], not empty; got shape {list(x.shape)}. Pass one per seed.")
    there = x[~np.isnan(x)]
    seeds, n_missing, nan = len(there), len(x) - len(there), float("nan")
    mean = float(there.mean()) if seeds else nan
    if seeds < 2:
        return Interval(mean, nan, nan, seeds, n_missing, nan)
    error = float(there.std(ddof=1)) / seeds**0.5
    half = float(stats.t.ppf((1 + level) / 2, seeds - 1)) * error
    near = 1e-12 * float(np.abs(there).max())
    p = 2 * float(stats.t.sf(abs(mean) / error, seeds - 1)) if error > near else float(abs(mean) <= near)
    return Interval(mean, mean - half, mean + half, seeds, n_missing, p)


def _standard_error(
    totals: Float[np.ndarray, " unit"], counts: Float[np.ndarray, " unit"], weights: Float[np.ndarray, "draw unit"]
) -> tuple[Float[np.ndarray, " draw"], Float[np.ndarray, " draw"]]:
    """Mean and standard error of each resample; `weights` say how often it holds each unit."""
    number = weights @ counts
    mean = (weights @ totals) / number
    squares = weights @ totals**2 - 2 * mean * (weights @ (totals * counts)) + mean**2 * (weights @ counts**2)
    units = len(totals)
    return mean, np.sqrt(np.maximum(squares, 0) * units / (units - 1)) / number


def _studentised(
    totals: Float[np.ndarray, " unit"], counts: Float[np.ndarray, " unit"], mean: float, n_boot: int, seed: int
) -> Float[np.ndarray, " draw"]:
    """`(m* - m) / se*` of the resamples whose units differ."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // len(totals))
    scale = np.abs(totals).max()
    found = []
    for start in range(0, n_boot, block):
        weights = _draw_counts(rng, min(block, n_boot - start), len(totals))
        means, errors = _standard_error(totals, counts, weights)
        differ = errors > 1e-9 * scale
        found.append((means[differ] - mean) / errors[differ])
    return np.concatenate(found)


def sign_flip(totals: ArrayLike, seed: int = 0) -> float:
    """The two-sided p-value of the hypothesis that units are symmetric around 0.

    p is the share of assignments of signs s with `|sum_g s_g T_g| >= |sum_g T_g|`, the given one included: of all 2^G
    for at most 15 units, else of the given one and 20,000 random ones.

    Args:
        totals: `[unit]`, the value or the sum of each unit.
        seed: of the random signs.

    Example:
        >>> sign_flip([1.0, 2.0, 3.0])
        0.25
    """
    x = np.asarray(totals, dtype=float)
    least = abs(x.sum()) - 1e-12 * np.abs(x).sum()
    if len(x) <= EXACT_UNITS:
        sums = np.zeros(1)
        for value in x:
            sums = np.concatenate([sums + value, sums - value])
        return float((np.abs(sums) >= least).mean())
    hits = sum(int((np.abs(signs @ x) >= least).sum()) for signs in _signs(len(x), seed))
    return (1 + hits) / (1 + FLIPS)


def _signs(units: int, seed: int) -> Iterator[Float[np.ndarray, "draw unit"]]:
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // units)
    for start in range(0, FLIPS, block):
        yield rng.choice([-1.0, 1.0], size=(min(block, FLIPS - start), units))
