"""Paired differences and ratios against a slow reference that draws every resample in a loop."""

from __future__ import annotations

import math

import numpy as np
import pytest

from steerkit.stats.bootstrap import bootstrap_ci
from steerkit.stats.paired import paired_difference, ratio


def slow_ratio(a: list[float], b: list[float], n_boot: int, seed: int) -> tuple[float, float, float, float]:
    """Value, low, high and the lower end of the denominator's mean; the draws are those of `ratio`."""
    n = len(a)
    drawn = np.random.default_rng(seed).integers(n, size=(n_boot, n)).tolist()
    ratios, denominators = [], []
    for rows in drawn:
        denominators.append(math.fsum(b[i] for i in rows) / n)
        ratios.append(math.fsum(a[i] for i in rows) / n / denominators[-1])
    low, high = quantile(ratios, 0.025), quantile(ratios, 0.975)
    return math.fsum(a) / math.fsum(b), low, high, quantile(denominators, 0.025)


def quantile(values: list[float], share: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    below = math.floor(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


@pytest.mark.parametrize("n", [2, 7, 60])
def test_a_ratio_equals_the_slow_reference(n) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.normal(1, 0.5, n), rng.uniform(0.5, 2, n)
    result = ratio(a, b, n_boot=300, seed=4)
    value, low, high, denominator_low = slow_ratio(a.tolist(), b.tolist(), 300, 4)
    assert (result.value, result.low, result.high) == pytest.approx((value, low, high), rel=1e-12)
    assert result.denominator_low == pytest.approx(denominator_low, rel=1e-12) and result.n == n


def test_a_ratio_leaves_out_pairs_with_a_missing_member() -> None:
    whole = ratio([1.0, 2.0, 4.0], [2.0, 2.0, 3.0])
    assert ratio([1.0, np.nan, 2.0, 9.0, 4.0], [2.0, 1.0, 2.0, np.nan, 3.0]) == whole
    with pytest.raises(ValueError, match="none complete"):
        ratio([np.nan], [1.0])
    with pytest.raises(ValueError, match=r"got shapes \[2\] and \[1\]"):
        ratio([1.0, 2.0], [1.0])


def test_a_ratio_of_one_pair_has_no_interval_and_a_constant_one_has_no_width() -> None:
    one = ratio([1.0], [4.0])
    assert one.value == 0.25 and np.isnan([one.low, one.high]).all()
    constant = ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert (constant.value, constant.low, constant.high) == (0.5, 0.5, 0.5)


def test_a_denominator_that_may_be_zero_is_reported() -> None:
    rng = np.random.default_rng(0)
    assert ratio(rng.normal(size=50), rng.normal(size=50)).denominator_low < 0
    assert ratio(rng.normal(size=50), rng.normal(2, 1, size=50)).denominator_low > 0


def test_the_interval_of_a_ratio_covers_the_true_one_in_about_95_of_100_samples() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        b = rng.gamma(4, size=60)
        result = ratio(0.6 * b + rng.normal(0, 0.5, 60), b, n_boot=400)
        covered += result.low <= 0.6 <= result.high
    assert 180 <= covered <= 198


@pytest.mark.parametrize("grouped", [False, True])
def test_a_paired_difference_is_the_bootstrap_of_the_differences_bit_for_bit(grouped) -> None:
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=30), rng.normal(size=30)
    second[4] = np.nan
    groups = [i // 3 for i in range(30)] if grouped else None
    result = paired_difference(first, second, groups, n_boot=200, seed=5)
    assert result == bootstrap_ci(first - second, groups, n_boot=200, seed=5)
    assert result.n_missing == 1 and result.mean == pytest.approx(np.nanmean(first - second))


def test_a_paired_difference_from_several_controls_resamples_the_controls_too() -> None:
    rng = np.random.default_rng(3)
    first, controls = rng.normal(size=40), rng.normal(size=40)[:, None] * 0.01 + rng.normal(size=6)
    result = paired_difference(first, controls, n_boot=500)
    assert result == bootstrap_ci(first[:, None] - controls, resample_columns=True, n_boot=500)
    rows_only = bootstrap_ci(first[:, None] - controls, n_boot=500)
    assert result.high - result.low > 1.2 * (rows_only.high - rows_only.low)
    one = paired_difference(first, controls[:, :1])
    assert one == paired_difference(first, controls[:, 0])


def test_pairs_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got shapes \[2\] and \[3\]. Pass one row per unit"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
