"""Bootstrap intervals and Holm's p-values: they cover as often as they say, and equal what is worked by hand."""

from __future__ import annotations

import tracemalloc
from dataclasses import FrozenInstanceError, astuple, replace
from math import isnan, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerkit.stats import bootstrap
from steerkit.stats.bootstrap import bootstrap_ci
from steerkit.stats.multiple import holm

# Bootstrap


def test_bootstrap_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    intervals = [bootstrap_ci(rng.normal(1, 2, size=40), n_boot=1000, seed=i) for i in range(300)]
    assert 0.90 <= np.mean([i.low <= 1 <= i.high for i in intervals]) <= 0.98


def test_p_rejects_a_true_null_about_as_often_as_its_level() -> None:
    rng = np.random.default_rng(1)
    p = np.array([bootstrap_ci(rng.normal(0, 2, size=40), n_boot=1000, seed=i).p for i in range(300)])
    assert 0.02 <= (p <= 0.05).mean() <= 0.10
    assert 0.4 <= (p <= 0.5).mean() <= 0.6


def test_bootstrap_interval_approaches_the_normal_one() -> None:
    x = np.random.default_rng(0).normal(3, 2, size=400)
    interval = bootstrap_ci(x, n_boot=20000, level=0.9)
    error = 1.6449 * x.std() / np.sqrt(400)
    assert interval.mean == pytest.approx(x.mean())
    assert (interval.low, interval.high) == pytest.approx((x.mean() - error, x.mean() + error), abs=0.04 * error)
    assert (interval.n, interval.n_missing) == (400, 0)
    assert interval.p == 2 / 20001


def test_bootstrap_p_of_a_hand_worked_distribution() -> None:
    # Resamples of (0, 1) have mean 0, 1/2, 1 with odds 1 : 2 : 1, so p is near 2 * 1/4; of (-1, 2), near 2 * 1/4 too.
    assert bootstrap_ci([0, 1], n_boot=40000).p == pytest.approx(0.5, abs=0.015)
    assert bootstrap_ci([-1, 2], n_boot=40000).p == pytest.approx(0.5, abs=0.015)
    assert bootstrap_ci([0.0, 0.0, 0.0]).p == 1


def test_a_mean_within_rounding_of_zero_counts_on_both_sides() -> None:
    # Means of (-a, a) are -a, 0, a with odds 1 : 2 : 1, so both tails hold 3/4 and p is capped at 1.
    assert bootstrap_ci([-0.1, 0.1]).p == 1
    # 0.1 + 0.2 - 0.3 is 5e-17 in floating point, so no resample has a mean of 0 exactly.
    assert bootstrap_ci([[0.1, 0.2, -0.3]] * 5).p == 1


def test_bootstrap_p_does_not_depend_on_the_sign_and_scale() -> None:
    x = np.random.default_rng(3).normal(0.3, 1, size=30)
    p = bootstrap_ci(x).p
    assert 0.02 < p < 0.5
    assert bootstrap_ci(-x).p == bootstrap_ci(1e-9 * x).p == p


def test_missing_values_are_left_out_and_counted() -> None:
    assert bootstrap_ci([1.0, nan, 3.0, nan, 5.0]) == replace(bootstrap_ci([1.0, 3.0, 5.0]), n_missing=2)


def test_a_missing_cell_of_a_matrix_weighs_nothing() -> None:
    interval = bootstrap_ci([[1.0, 2.0], [nan, 6.0], [nan, nan]])
    assert (interval.mean, interval.n, interval.n_missing) == (3.0, 2, 3)
    # Rows drawn twice give 3/2 or 6, one of each (1 + 2 + 6) / 3.
    assert (interval.low, interval.high) == (1.5, 6.0)


@pytest.mark.parametrize("resample_columns", [False, True])
def test_all_missing_gives_nan_everywhere(resample_columns: bool) -> None:
    interval = bootstrap_ci(np.full((4, 3), nan), resample_columns=resample_columns)
    assert all(map(isnan, (interval.mean, interval.low, interval.high, interval.p)))
    assert (interval.n, interval.n_missing) == (0, 12)


def test_the_spread_of_one_unit_is_unknown_and_not_zero() -> None:
    for interval in (
        bootstrap_ci([2.0, nan]),
        bootstrap_ci([1.0, 3.0], groups=["a", "a"]),
        bootstrap_ci([[1.0], [3.0]], resample_columns=True),
    ):
        assert interval.mean == 2
        assert isnan(interval.low) and isnan(interval.high) and isnan(interval.p)


def test_groups_are_resampled_whole() -> None:
    # Two groups of 3 and 1 rows: the mean is 0 or 4, or (0 * 3 + 4) / 4 = 1 with one of each.
    interval = bootstrap_ci([0, 4, 0, 0], groups=["x", "y", "x", "x"], level=0.9)
    assert (interval.mean, interval.low, interval.high, interval.n) == (1, 0, 4, 2)
    middle = bootstrap_ci([0, 4, 0, 0], groups=["x", "y", "x", "x"], level=0.2)
    assert (middle.low, middle.high) == (1, 1)


def test_copies_of_a_row_in_one_group_do_not_narrow_the_interval() -> None:
    x = np.random.default_rng(0).normal(size=20)
    once, copied = bootstrap_ci(x), bootstrap_ci(np.tile(x, 9), groups=list(range(20)) * 9)
    assert astuple(copied) == pytest.approx(astuple(once))
    ungrouped = bootstrap_ci(np.tile(x, 9))
    assert ungrouped.high - ungrouped.low < 0.5 * (once.high - once.low)


def test_a_group_without_a_value_is_no_unit() -> None:
    interval = bootstrap_ci([1, nan, nan, 3], groups=[1, 2, 2, "1"])
    assert (interval.mean, interval.n, interval.n_missing) == (2, 2, 2)


def test_a_column_without_a_value_is_not_drawn() -> None:
    x = np.random.default_rng(0).normal(size=(10, 3))
    padded = np.column_stack([x, np.full(10, nan)])
    expected = replace(bootstrap_ci(x, resample_columns=True), n_missing=10)
    assert bootstrap_ci(padded, resample_columns=True) == expected


def test_columns_only_average_unless_resampled() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 1)) + 3 * rng.normal(size=(1, 6))
    rows, crossed = bootstrap_ci(x), bootstrap_ci(x, resample_columns=True)
    assert astuple(rows) == pytest.approx(astuple(bootstrap_ci(x.mean(axis=1))))
    assert rows.mean == crossed.mean and rows.n == crossed.n == 30
    spread = np.sqrt(x.mean(axis=1).var() / 30 + x.mean(axis=0).var() / 6)
    assert crossed.high - crossed.low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    assert rows.high - rows.low < 0.5 * (crossed.high - crossed.low)


def test_only_the_crossed_interval_covers_when_columns_are_random() -> None:
    rng = np.random.default_rng(0)
    crossed: list[bool] = []
    rows: list[bool] = []
    for seed in range(150):
        x = rng.normal(size=(20, 1)) + rng.normal(size=(1, 12)) + rng.normal(size=(20, 12))
        for hits, resample_columns in ((crossed, True), (rows, False)):
            interval = bootstrap_ci(x, resample_columns=resample_columns, n_boot=500, seed=seed)
            hits.append(interval.low <= 0 <= interval.high)
    assert np.mean(crossed) >= 0.87
    assert np.mean(rows) <= 0.84


def test_crossed_bootstrap_equals_resampling_cells_by_hand() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0.4, 1, size=(12, 5))
    x[rng.random(x.shape) < 0.3] = nan
    groups = np.repeat(list("abcd"), 3)
    means = []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in rng.choice(list("abcd"), size=4)])
        means.append(np.nanmean(x[rows][:, rng.integers(5, size=5)]))
    interval = bootstrap_ci(x, groups.tolist(), resample_columns=True, n_boot=8000)
    width = interval.high - interval.low
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.06 * width)
    assert interval.mean == pytest.approx(np.nanmean(x))


@pytest.mark.filterwarnings("error")
def test_a_crossed_resample_without_a_value_does_not_count() -> None:
    # Only the diagonal is there: some resamples draw row 0 twice and column 1 twice.
    interval = bootstrap_ci([[1.0, nan], [nan, 3.0]], resample_columns=True, level=0.99)
    assert (interval.mean, interval.low, interval.high, interval.n) == (2, 1, 3, 2)


def test_bootstrap_is_a_function_of_its_arguments_and_seed_alone() -> None:
    x = np.random.default_rng(0).normal(size=(15, 4))
    np.random.seed(1)
    expected = np.random.random()
    np.random.seed(1)
    first = bootstrap_ci(x, resample_columns=True, seed=5)
    assert np.random.random() == expected
    assert bootstrap_ci(x, resample_columns=True, seed=5) == first
    assert bootstrap_ci(x, resample_columns=True, seed=6) != first


def test_draws_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(15, 4))
    whole = bootstrap_ci(x, resample_columns=True)
    monkeypatch.setattr(bootstrap, "_BLOCK", 15 * 7)
    assert astuple(bootstrap_ci(x, resample_columns=True)) == pytest.approx(astuple(whole), rel=1e-12)


def test_bootstrap_memory_is_bounded() -> None:
    x = np.zeros(10_000)
    tracemalloc.start()
    bootstrap_ci(x)  # all weights at once would be 160 MB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_interval_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        bootstrap_ci([1, 2]).mean = 0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": []}, r"expected values \[n\] or \[n, k\], not empty; got \[0\]"),
        ({"values": np.zeros((2, 2, 2))}, r"expected values \[n\] or \[n, k\], not empty; got \[2, 2, 2\]"),
        ({"values": [1, np.inf]}, "expected finite values, or NaN; got 1 infinite"),
        (
            {"values": [1, 2], "resample_columns": True},
            r"expected values \[n, k\] to resample columns; got shape \[2\]",
        ),
        ({"values": [1, 2], "groups": [1]}, "expected a group for each of 2 rows; got 1 groups"),
        ({"values": [1, 2], "groups": ["a", nan]}, "expected a group for each row; got nan in row 1"),
        ({"values": [1, 2], "groups": [None, "a"]}, "expected a group for each row; got None in row 0"),
        ({"values": [1, 2], "n_boot": 0}, "got n_boot=0, level=0.95"),
        ({"values": [1, 2], "level": 95}, "expected n_boot >= 1 and 0 < level < 1; got n_boot=2000, level=95"),
    ],
)
def test_bootstrap_rejects_what_it_cannot_resample(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_ci(**arguments)


def test_bootstrap_rejects_a_single_str_as_groups() -> None:
    with pytest.raises(TypeError, match="expected groups to be a sequence; got the single str 'ab'"):
        bootstrap_ci([1, 2], groups="ab")


# Holm


def test_holm_of_hand_worked_p_values() -> None:
    # Sorted: 4 * 0.005, 3 * 0.01, 2 * 0.03, and 1 * 0.04 lifted to 0.06.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]).tolist() == [1, 1]
    assert holm([0.04]).tolist() == [0.04]
    assert holm([]).shape == (0,)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.999))
def test_holm_rejects_what_the_step_down_procedure_rejects(p: list[float], alpha: float) -> None:
    order = np.argsort(p, kind="stable")
    rejected = set()
    for step, i in enumerate(order):
        if p[i] * (len(p) - step) > alpha:
            break
        rejected.add(int(i))
    adjusted = holm(p)
    assert set(np.flatnonzero(adjusted <= alpha).tolist()) == rejected
    assert (np.diff(adjusted[order]) >= 0).all() and (adjusted >= p).all() and (adjusted <= 1).all()


@pytest.mark.parametrize(
    ("p", "message"),
    [
        ([0.1, 1.5], r"expected p_values in \[0, 1\]; got 0.1 to 1.5"),
        ([-0.1, 0.5], r"expected p_values in \[0, 1\]; got -0.1 to 0.5"),
        ([0.1, nan], "expected finite p_values; got nan at index 1"),
        ([[0.1]], r"expected p_values of shape \[n\]; got \[1, 1\]"),
    ],
)
def test_holm_rejects_what_is_no_probability(p: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        holm(p)
