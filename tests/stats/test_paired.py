"""Paired differences and ratios: against scipy, by hand, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, stats

from steerkit.stats.mean import mean_interval
from steerkit.stats.paired import paired_difference, ratio


@pytest.mark.parametrize("n", [3, 7, 60])
def test_the_ends_of_a_ratio_are_where_its_pairs_are_just_not_different(n) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.normal(1, 0.2, n), rng.normal(2, 0.2, n)
    found = ratio(a, b)

    def excess(r: float) -> float:
        return stats.ttest_1samp(a - r * b, 0).pvalue - 0.05

    low = optimize.brentq(excess, found.value - 5 * (found.value - found.low), found.value - 1e-9)
    high = optimize.brentq(excess, found.value + 1e-9, found.value + 5 * (found.high - found.value))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6)
    assert found.value == pytest.approx(a.sum() / b.sum()) and found.n == n and found.bounded


def test_a_ratio_leaves_out_pairs_with_a_missing_member() -> None:
    whole = ratio([1.0, 2.0, 4.0], [2.0, 2.0, 3.0])
    assert ratio([1.0, np.nan, 2.0, 9.0, 4.0], [2.0, 1.0, 2.0, np.nan, 3.0]) == whole
    with pytest.raises(ValueError, match="none complete"):
        ratio([np.nan], [1.0])
    with pytest.raises(ValueError, match=r"got shapes \[2\] and \[1\]"):
        ratio([1.0, 2.0], [1.0])


def test_a_ratio_of_one_pair_has_no_interval_and_a_constant_one_has_no_width() -> None:
    one = ratio([1.0], [4.0])
    assert one.value == 0.25 and np.isnan([one.low, one.high]).all() and not one.bounded
    constant = ratio([0.0, 2.0, 4.0, 6.0], [1.0, 4.0, 7.0, 10.0])
    assert constant.low < constant.value < constant.high
    exact = ratio([4.0, 4.1, 4.2], [8.0, 8.2, 8.4])
    assert (exact.value, exact.low, exact.high) == pytest.approx((0.5, 0.5, 0.5))


def test_a_ratio_to_a_mean_that_may_be_zero_can_be_anything() -> None:
    rng = np.random.default_rng(0)
    found = ratio(rng.normal(size=50), rng.normal(size=50))
    assert (found.low, found.high) == (-np.inf, np.inf) and not found.bounded
    assert ratio(rng.normal(size=50), rng.normal(2, 1, size=50)).bounded


@pytest.mark.parametrize("n", [6, 60])
def test_the_interval_of_a_ratio_covers_the_true_one_in_about_95_of_100_samples(n) -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        b = rng.gamma(4, size=n) if n > 10 else rng.normal(4, 1, size=n)
        result = ratio(0.6 * b + rng.normal(0, 0.5, n), b)
        covered += result.low <= 0.6 <= result.high
    assert 930 <= covered <= 970


@pytest.mark.parametrize("grouped", [False, True])
def test_a_paired_difference_is_the_interval_of_the_differences_bit_for_bit(grouped) -> None:
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=30), rng.normal(size=30)
    second[4] = np.nan
    groups = [i // 3 for i in range(30)] if grouped else None
    result = paired_difference(first, second, groups, n_boot=200, seed=5)
    assert result == mean_interval(first - second, groups, n_boot=200, seed=5)
    assert result.n_missing == 1 and result.mean == pytest.approx(np.nanmean(first - second))


def test_pairs_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got shapes \[2\] and \[3\]. Pass one of each per unit"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
