"""A mean over units with an interval and a p-value that hold their error rates also for few and skewed values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
from scipy import special

from steerkit.stats.checks import check_sequence, finite_vector

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy.typing import ArrayLike

EXACT_UNITS = 15
"""Up to this many units all flips of signs are counted, else `FLIPS` random ones."""
FLIPS = 20_000
SMALLEST_ERROR = 0.1
"""The least standard error of a resample in the studentised bootstrap, as a share of the sample's."""
_BLOCK = 2**20  # numbers held at once; it bounds memory and does not change the draws


@dataclass(frozen=True)
class Interval:
    """A mean from `low` to `high`, in the unit of the values; see `mean_interval`.

    `n` counts the units (groups, else rows) with a value, `n_missing` the NaN entries left out; `p` is the two-sided
    p-value of the mean against 0.
    """

    mean: float
    low: float
    high: float
    n: int
    n_missing: int
    p: float


def mean_interval(
    values: ArrayLike,
    groups: Collection[Hashable] | None = None,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    binary: bool | None = None,
) -> Interval:
    """The mean of `values`, missing entries left out, with an interval and the p-value of a sign-flip test.

    Units are whole groups, else rows. With T_g the sum of a unit's values, C_g their number, and m = sum T / sum C,

        se = sqrt(G / (G - 1) * sum_g (T_g - m C_g)^2) / sum_g C_g.

    The interval reaches from the lower of two lower ends to the higher of two upper ends: those of Student's t,
    `m -+ t_{G-1} se`, and those of the studentised bootstrap, `m - q se` with q the quantiles of
    `(m* - m) / se*` over resamples of units. The first alone is too narrow for skewed values, the second alone for few
    and for discrete ones. To se* a tenth of se is added in squares (and the ratio is scaled up by as much): where all
    units but one are nearly equal, resamples without this one would otherwise have almost no error and decide the
    interval.

    Differences of two binary scores (right or wrong, before and after) are -1, 0 or 1, and a sample of few of them may
    have little or no spread. Their interval also holds that of Bonett and Price: with a units at 1, b at -1, n in all,
    and z the normal quantile (a unit of several rows counts with its mean: a and b are the sums of the positive and of
    the negative means),

        d = (a - b) / (n + 2),  d -+ z sqrt(((a + 1) / (n + 2) + (b + 1) / (n + 2) - d^2) / (n + 2)).

    The p-value is that of the sign-flip test of `mean = 0`: the share of all assignments of signs to the units whose
    mean is as far from 0, exact for at most 15 units. It needs symmetric values under the null hypothesis, which
    differences of two exchangeable measurements are.

    Args:
        values: `[n]`. NaN is missing, never 0.
        groups: n labels; rows that share one are one unit. Rows, not groups, weigh the same in the mean.
        n_boot: number of resamples.
        level: coverage of the interval, in (0, 1).
        seed: the result is a function of the arguments and this seed.
        binary: whether values are differences of binary scores. Default: whether all of them are -1, 0 or 1 and one is
            not 0.

    Returns:
        `Interval`; `low`, `high` and `p` are NaN for fewer than two units with a value, `mean` too without any. `low`
        and `high` are also NaN where all units have one mean and the values are not binary: such a sample does not say
        how far another one could be.

    Raises:
        ValueError: `values` empty, infinite or not `[n]`; `groups` of another length or with a missing label; `n_boot`
            below 1; `level` outside (0, 1).

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 12; Good, "Permutation Tests", 2000;
    Bonett and Price, "Adjusted Wald Confidence Interval for a Difference of Binomial Proportions Based on Paired Data",
    2012.

    Example:
        >>> mean_interval([0.2, 0.1, 0.4, 0.3]).p
        0.125
    """
    if n_boot < 1 or not 0 < level < 1:
        raise ValueError(f"expected n_boot >= 1 and 0 < level < 1; got n_boot={n_boot}, level={level}. Try 2000, 0.95.")
    totals, counts, n_missing = _units(values, groups)
    units, nan = len(totals), float("nan")
    mean = float(totals.sum() / counts.sum()) if units else nan
    if units < 2:
        return Interval(mean, nan, nan, units, n_missing, nan)
    centred = totals - mean * counts  # a shift of all values changes nothing but the mean
    error = float(_standard_error(centred, counts, np.ones((1, units)))[1][0])
    ends = special.stdtrit(units - 1, [(1 - level) / 2, (1 + level) / 2]) * error
    low, high = mean + float(ends[0]), mean + float(ends[1])
    ratios = _studentised(centred, counts, n_boot, seed)
    if len(ratios):
        below, above = np.quantile(ratios, [(1 + level) / 2, (1 - level) / 2])
        low, high = min(low, mean - float(below) * error), max(high, mean - float(above) * error)
    if _are_binary_differences(totals, counts, binary):
        ends_of_pairs = _bonett_price(totals / counts, level)
        low, high = min(low, ends_of_pairs[0]), max(high, ends_of_pairs[1])
    elif error <= 1e-12 * float(np.abs(totals).max(initial=0.0)):
        low = high = nan
    return Interval(mean, low, high, units, n_missing, sign_flip(totals, seed))


def _are_binary_differences(
    totals: Float[np.ndarray, " unit"], counts: Float[np.ndarray, " unit"], binary: bool | None
) -> bool:
    if binary is not None:
        return binary and bool((np.abs(totals) <= counts).all())
    return bool((counts == 1).all() and np.isin(totals, (-1, 0, 1)).all() and totals.any())


def _bonett_price(means: Float[np.ndarray, " unit"], level: float) -> tuple[float, float]:
    n = len(means) + 2
    up, down = (float(means.clip(0).sum()) + 1) / n, (float((-means).clip(0).sum()) + 1) / n
    half = float(special.ndtri((1 + level) / 2)) * np.sqrt((up + down - (up - down) ** 2) / n)
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def is_binary(scores: ArrayLike) -> bool:
    """Whether all scores are 0 or 1; NaN is missing.

    Example:
        >>> is_binary([1.0, 0.0, float("nan")]), is_binary([0.5, 1.0])
        (True, False)
    """
    x = np.asarray(scores, dtype=float)
    return bool(np.isin(x[~np.isnan(x)], (0, 1)).all())


def accuracy_interval(values: ArrayLike, groups: Collection[Hashable] | None = None, level: float = 0.95) -> Interval:
    """A share of right answers with Wilson's interval, whose ends stay in [0, 1] and differ also where all are right.

    With a the share, G units, se the standard error of `mean_interval`, and q the quantile of Student's t with G - 1
    degrees of freedom,

        m = a (1 - a) / (se^2 (G - 1) / G),
        (a + q^2 / 2m -+ q sqrt(a (1 - a) / m + q^2 / 4m^2)) / (1 + q^2 / m).

    m is the number of independent answers that would have this standard error: n where every row is a unit, fewer where
    the rows of a unit agree. It is at most n, and G where all answers are equal.

    Args:
        values: `[n]`, in [0, 1]. NaN is missing.
        groups: as in `mean_interval`.
        level: coverage of the interval, in (0, 1).

    Returns:
        `Interval` without a p-value (NaN); `low` and `high` are NaN for fewer than two units.

    Raises:
        ValueError: as `mean_interval`; a value outside [0, 1].

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927; Dean and Pagano,
    "Evaluating Confidence Interval Methods for Binomial Proportions in Clustered Surveys", 2015.

    Example:
        >>> round(accuracy_interval([1.0] * 20).low, 2)
        0.82
    """
    totals, counts, n_missing = _units(values, groups)
    x = np.asarray(values, dtype=float)
    if (x < 0).any() or (x > 1).any():
        raise ValueError(f"expected values in [0, 1]; got {np.nanmin(x):g} to {np.nanmax(x):g}. Pass right or wrong.")
    if not 0 < level < 1:
        raise ValueError(f"expected 0 < level < 1; got {level}. Try 0.95.")
    units, nan = len(totals), float("nan")
    mean = float(totals.sum() / counts.sum()) if units else nan
    if units < 2:
        return Interval(mean, nan, nan, units, n_missing, nan)
    error = float(_standard_error(totals, counts, np.ones((1, units)))[1][0])
    spread, noise = mean * (1 - mean), error**2 * (units - 1) / units
    size = float(units) if spread < 1e-12 else min(float(counts.sum()), spread / noise) if noise else counts.sum()
    q = float(special.stdtrit(units - 1, (1 + level) / 2))
    centre, half = mean + q**2 / (2 * size), q * np.sqrt(spread / size + q**2 / (4 * size**2))
    scale = 1 + q**2 / size
    low, high = float((centre - half) / scale), float((centre + half) / scale)
    return Interval(mean, max(0.0, min(low, mean)), min(1.0, max(high, mean)), units, n_missing, nan)


def _units(
    values: ArrayLike, groups: Collection[Hashable] | None
) -> tuple[Float[np.ndarray, " unit"], Float[np.ndarray, " unit"], int]:
    """The sum and the number of the values of each unit that has one, and how many values are missing."""
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"expected values [n], not empty; got shape {list(x.shape)}. Pass one value per row.")
    if np.isinf(x).any():
        raise ValueError(f"expected finite values, or NaN; got {np.isinf(x).sum()} infinite. Use NaN for missing.")
    codes = _unit_codes(groups, len(x))
    there = ~np.isnan(x)
    totals = np.bincount(codes[there], x[there], minlength=codes.max() + 1)
    counts = np.bincount(codes[there], minlength=codes.max() + 1).astype(float)
    return totals[counts > 0], counts[counts > 0], int((~there).sum())


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
    centred: Float[np.ndarray, " unit"], counts: Float[np.ndarray, " unit"], n_boot: int, seed: int
) -> Float[np.ndarray, " draw"]:
    """`(m* - m) / se*` of the resamples whose units differ; `centred` are `T_g - m C_g`."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // len(centred))
    scale = np.abs(centred).max()
    least = SMALLEST_ERROR * float(_standard_error(centred, counts, np.ones((1, len(centred))))[1][0])
    found = []
    for start in range(0, n_boot, block):
        weights = _draw_counts(rng, min(block, n_boot - start), len(centred))
        means, errors = _standard_error(centred, counts, weights)
        differ = errors > 1e-6 * scale  # the error of equal units is 0 up to the root of the rounding
        found.append(means[differ] / np.hypot(errors[differ], least))
    return np.hypot(1, SMALLEST_ERROR) * np.concatenate(found)


def sign_flip(totals: ArrayLike, seed: int = 0) -> float:
    """The two-sided p-value of the hypothesis that units are symmetric around 0.

    p is the share of assignments of signs s with `|sum_g s_g T_g| >= |sum_g T_g|`, the given one included: of all 2^G
    for at most 15 units, else of the given one and 20,000 random ones.

    Args:
        totals: `[unit]`, the value or the sum of each unit.
        seed: of the random signs.

    Raises:
        ValueError: a value that is NaN or infinite.

    Example:
        >>> sign_flip([1.0, 2.0, 3.0])
        0.25
    """
    x = finite_vector("totals", totals)
    least = abs(x.sum()) - 1e-12 * np.abs(x).sum()
    if len(x) <= EXACT_UNITS:
        sums = np.zeros(1)
        for value in x:
            sums = np.concatenate([sums + value, sums - value])
        return float((np.abs(sums) >= least).mean())
    hits = sum(int((np.abs(signs @ x) >= least).sum()) for signs in _signs(len(x), seed))
    return (1 + hits) / (1 + FLIPS)


def _signs(units: int, seed: int) -> Iterator[Float[np.ndarray, "draw unit"]]:
    """`FLIPS` random rows of -1 and 1, in blocks."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // units)
    for start in range(0, FLIPS, block):
        drawn = min(block, FLIPS - start)
        bits = np.unpackbits(np.frombuffer(rng.bytes(-(-drawn * units // 8)), np.uint8), count=drawn * units)
        yield 2.0 * bits.reshape(drawn, units) - 1


def _draw_counts(rng: np.random.Generator, n_boot: int, n: int) -> Float[np.ndarray, "n_boot n"]:
    """How often each of n units is drawn in n draws with replacement: multinomial, one row per resample."""
    draws = rng.integers(n, size=(n_boot, n)) + n * np.arange(n_boot)[:, None]
    return np.bincount(draws.ravel(), minlength=n_boot * n).reshape(n_boot, n).astype(float)


def _unit_codes(groups: Collection[Hashable] | None, n_rows: int) -> Int[np.ndarray, " n_rows"]:
    """The resampled unit of each row, numbered in order of first appearance."""
    if groups is None:
        return np.arange(n_rows)
    check_sequence("groups", groups)
    if len(groups) != n_rows:
        raise ValueError(f"expected a group for each of {n_rows} rows; got {len(groups)} groups. Label every row.")
    for i, group in enumerate(groups):
        if group is None or type(group).__name__ in ("NAType", "NaTType") or group != group:
            raise ValueError(f"expected a group for each row; got {group} in row {i}. Label it.")
    code = defaultdict[Hashable, int](count().__next__)
    return np.array([code[group] for group in groups])
