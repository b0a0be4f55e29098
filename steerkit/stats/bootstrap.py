"""Bootstrap intervals of a mean over groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from steerkit.stats.checks import check_sequence

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy.typing import ArrayLike


# Weights held at once by the bootstrap (8 MiB of float64). It bounds memory and does not change the draws.
_BLOCK = 2**20


@dataclass(frozen=True)
class Interval:
    """A mean from `low` to `high`, in the unit of the values; see `bootstrap_ci`.

    `n` counts the resampled units (groups, else rows) with a value, `n_missing` the NaN entries left out; `p` is the
    two-sided bootstrap p-value of the mean against 0.
    """

    mean: float
    low: float
    high: float
    n: int
    n_missing: int
    p: float


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
        if group is None or (isinstance(group, float) and np.isnan(group)):
            raise ValueError(f"expected a group for each row; got {group} in row {i}. Label it.")
    code = defaultdict[Hashable, int](count().__next__)
    return np.array([code[group] for group in groups])


def bootstrap_ci(
    values: ArrayLike,
    groups: Collection[Hashable] | None = None,
    resample_columns: bool = False,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of the mean of `values`, missing entries left out.

    The mean of a resample is `sum_ij w[i] v[j] x[i, j] / sum_ij w[i] v[j]` over the entries that are not NaN, with `w`
    multinomial counts of the units (whole groups, else rows) and `v` those of the columns, or 1. The interval runs
    between the `(1 - level) / 2` and `(1 + level) / 2` quantiles of B such means b, and
    `p = min(1, 2 min(1 + #{b <= 0}, 1 + #{b >= 0}) / (B + 1))`, b within rounding error of 0 counting as 0. `low`,
    `high` and `p` are NaN where fewer than two units, or columns to be resampled, have a value (their spread is
    unknown, not 0); `mean` too where none has.

    Args:
        values: `[n]`, or `[n, k]` with prompts as rows and e.g. random directions as columns. NaN is missing, never 0.
        groups: n labels; rows that share one are drawn together. Rows, not groups, weigh the same in the mean.
        resample_columns: draw columns as well as rows (crossed), so that the spread between them is in the interval.
        n_boot: number of resamples B. Those in which every entry is missing do not count.
        level: coverage of the interval, in (0, 1).
        seed: the result is a function of the arguments and this seed; global random state is not touched.

    Raises:
        TypeError: `groups` is a single str.
        ValueError: `values` empty, infinite or not `[n]` or `[n, k]`, or `[n]` with `resample_columns`; `groups` of
            another length or with a missing label; `n_boot` below 1; `level` outside (0, 1).

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993; Owen, "The Pigeonhole Bootstrap", 2007.
    """
    table = np.asarray(values, dtype=float)
    if table.ndim not in (1, 2) or table.size == 0:
        raise ValueError(f"expected values [n] or [n, k], not empty; got {list(table.shape)}. Give one value per row.")
    if np.isinf(table).any():
        raise ValueError(f"expected finite values, or NaN; got {np.isinf(table).sum()} infinite. Use NaN for missing.")
    if resample_columns and table.ndim == 1:
        raise ValueError(f"expected values [n, k] to resample columns; got shape {list(table.shape)}. Pass a matrix.")
    if n_boot < 1 or not 0 < level < 1:
        raise ValueError(f"expected n_boot >= 1 and 0 < level < 1; got n_boot={n_boot}, level={level}. Try 2000, 0.95.")
    table = table.reshape(len(table), -1)
    codes = _unit_codes(groups, len(table))
    missing = np.isnan(table)
    n_missing = int(missing.sum())
    totals, counts = np.zeros((2, codes.max() + 1, table.shape[1] if resample_columns else 1))
    for sums, entries in ((totals, np.where(missing, 0.0, table)), (counts, 1.0 - missing)):
        np.add.at(sums, codes, entries if resample_columns else entries.sum(axis=1, keepdims=True))
    filled = np.ix_(counts.any(axis=1), counts.any(axis=0))
    totals, counts = totals[filled], counts[filled]

    (n, k), nan = totals.shape, float("nan")
    mean = float(totals.sum() / counts.sum()) if n else nan
    means = np.full(n_boot, np.nan)
    if n > 1 and (k > 1 or not resample_columns):
        row_rng, column_rng = np.random.default_rng(seed).spawn(2)
        block = max(1, _BLOCK // max(n, k))
        for start in range(0, n_boot, block):
            part = means[start : start + block]
            w = _draw_counts(row_rng, len(part), n)
            v = _draw_counts(column_rng, len(part), k) if resample_columns else 1.0
            weight = (w @ counts * v).sum(axis=1)
            np.divide((w @ totals * v).sum(axis=1), weight, out=part, where=weight > 0)
    means = means[~np.isnan(means)]
    if not means.size:
        return Interval(mean, nan, nan, n, n_missing, nan)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    zero = 1e-12 * np.nanmean(np.abs(table))
    tail = 1 + min((means <= zero).sum(), (means >= -zero).sum())
    return Interval(mean, float(low), float(high), n, n_missing, min(1.0, float(2 * tail / (len(means) + 1))))
