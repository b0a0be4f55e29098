"""Intervals and p-values of a mean, and of a direction against controls: by hand, by scipy, and by simulation."""

from __future__ import annotations

import tracemalloc
from dataclasses import FrozenInstanceError
from itertools import product
from math import isnan, nan
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import special, stats

from steerkit.stats import mean as module
from steerkit.stats.controls import against_controls, control_band, controls_needed
from steerkit.stats.items import slopes
from steerkit.stats.mean import accuracy_interval, mean_interval, sign_flip
from steerkit.stats.paired import ratio
from steerkit.stats.seeds import over_seeds, seed_interval
from steerkit.stats.sign import shown_sign


def test_p_is_the_share_of_all_flips_and_scipys() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 5, 9):
        x = rng.normal(0.4, 1, n)
        means = [np.mean(np.array(signs) * x) for signs in product([-1, 1], repeat=n)]
        slow = np.mean(np.abs(means) >= abs(x.mean()) - 1e-12)
        theirs = stats.permutation_test(
            (x,), lambda v, axis: v.mean(axis=axis), permutation_type="samples", vectorized=True, n_resamples=10**6
        ).pvalue
        assert mean_interval(x).p == pytest.approx(slow) == pytest.approx(theirs)


def test_with_many_units_random_flips_come_near_the_exact_share(monkeypatch) -> None:
    x = np.random.default_rng(1).normal(0.3, 1, 15)
    exact = sign_flip(x)
    monkeypatch.setattr(module, "EXACT_UNITS", 3)
    assert sign_flip(x) == pytest.approx(exact, abs=4 * np.sqrt(exact / module.FLIPS))
    assert sign_flip(np.full(200, 1.0)) == 1 / (1 + module.FLIPS)
    assert sign_flip(x) == sign_flip(-x) == sign_flip(1e-9 * x)


def test_p_cannot_fall_below_what_the_number_of_units_allows() -> None:
    assert mean_interval([5.0] * 8).p == 2 / 2**8
    assert mean_interval([0.0, 0.0, 0.0]).p == 1


def test_the_interval_holds_students_and_the_studentised_bootstraps() -> None:
    x = np.random.default_rng(2).exponential(1, 12)
    found = mean_interval(x, n_boot=40_000)
    t = stats.t.interval(0.95, 11, x.mean(), stats.sem(x))
    drawn = np.random.default_rng(5).choice(x, (20_000, 12))
    errors = np.hypot(stats.sem(drawn, axis=1), 0.1 * stats.sem(x)) / np.hypot(1, 0.1)
    ratios = (drawn.mean(1) - x.mean()) / errors
    above, below = np.quantile(ratios, [0.025, 0.975])
    slow = x.mean() - below * stats.sem(x), x.mean() - above * stats.sem(x)
    assert found.low == pytest.approx(min(t[0], slow[0]), rel=0.03)
    assert found.high == pytest.approx(max(t[1], slow[1]), rel=0.05) and found.high > 1.1 * t[1]


def test_one_value_apart_from_nearly_equal_ones_does_not_make_the_interval_endless() -> None:
    x = np.array([0.97, 0.98, 0.99, 1.0, 1.0, 0.96, 0.99, 0.98, 0.97, 0.3])
    found = mean_interval(x)
    assert 0.5 < found.high - found.low < 15 * stats.sem(x)


def test_groups_are_units() -> None:
    x = np.random.default_rng(0).normal(size=14)
    once = mean_interval(x)
    copied = mean_interval(np.tile(x, 3), groups=list(range(14)) * 3)
    assert (copied.low, copied.high, copied.p, copied.n) == pytest.approx((once.low, once.high, once.p, 14))
    uneven = mean_interval([0.0, 4.0, 0.0, 0.0], groups=["x", "y", "x", "x"])
    assert (uneven.mean, uneven.n) == (1.0, 2)
    error = np.sqrt(2 * (3.0**2 + 3.0**2)) / 4
    assert uneven.high >= 1 + stats.t.ppf(0.975, 1) * error - 1e-9


def test_missing_values_are_left_out_and_one_unit_has_no_spread() -> None:
    assert mean_interval([1.0, nan, 3.0, 5.0]).mean == 3.0 and mean_interval([1.0, nan, 3.0, 5.0]).n_missing == 1
    for values, groups in (([2.0, nan], None), ([1.0, 3.0], ["a", "a"])):
        found = mean_interval(values, groups)
        assert found.mean == 2 and isnan(found.low) and isnan(found.high) and isnan(found.p)
    assert isnan(mean_interval([nan, nan]).mean)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": []}, "not empty"),
        ({"values": [[1.0]]}, r"values \[n\]"),
        ({"values": [np.inf, 1.0]}, "finite"),
        ({"values": [1.0], "level": 1.0}, "level"),
        ({"values": [1.0, 2.0], "groups": ["a"]}, "a group for each"),
    ],
)
def test_what_has_no_mean_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_interval(**arguments)


def test_the_interval_approaches_the_normal_one() -> None:
    x = np.random.default_rng(0).normal(3, 2, size=400)
    interval = mean_interval(x, n_boot=20000, level=0.9)
    error = 1.6449 * x.std() / np.sqrt(400)
    assert interval.mean == pytest.approx(x.mean())
    assert (interval.low, interval.high) == pytest.approx((x.mean() - error, x.mean() + error), abs=0.04 * error)
    assert (interval.n, interval.n_missing) == (400, 0)


def test_p_and_interval_do_not_depend_on_sign_and_scale() -> None:
    x = np.random.default_rng(3).normal(0.3, 1, size=30)
    found, turned, small = mean_interval(x), mean_interval(-x), mean_interval(1e-9 * x)
    assert 0.02 < found.p < 0.5 and found.p == turned.p == small.p
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))
    assert (small.low, small.high) == pytest.approx((1e-9 * found.low, 1e-9 * found.high))


def test_differences_that_cancel_have_a_mean_of_zero() -> None:
    assert mean_interval([-0.1, 0.1]).p == 1


def test_a_group_without_a_value_is_no_unit() -> None:
    interval = mean_interval([1, nan, nan, 3], groups=[1, 2, 2, "1"])
    assert (interval.mean, interval.n, interval.n_missing) == (2, 2, 2)


def test_the_result_is_a_function_of_the_arguments_and_the_seed_alone() -> None:
    x = np.random.default_rng(0).exponential(size=40)
    np.random.seed(1)
    expected = np.random.random()
    np.random.seed(1)
    first = mean_interval(x, seed=5)
    assert np.random.random() == expected
    assert mean_interval(x, seed=5) == first != mean_interval(x, seed=6)


def test_memory_is_bounded() -> None:
    x = np.random.default_rng(0).normal(size=10_000)
    tracemalloc.start()
    mean_interval(x)  # all weights at once would be 160 MB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6


def test_an_interval_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        mean_interval([1, 2]).mean = 0  # type: ignore[misc]


def test_a_single_str_is_no_list_of_groups() -> None:
    with pytest.raises(TypeError, match="expected groups to be a sequence; got the single str 'ab'"):
        mean_interval([1, 2], groups="ab")


# Accuracies


@pytest.mark.parametrize(("right", "n"), [(0, 10), (3, 10), (10, 10), (57, 90)])
def test_an_accuracy_of_single_answers_has_wilsons_interval(right: int, n: int, monkeypatch) -> None:
    theirs = stats.binomtest(right, n).proportion_ci(method="wilson")
    monkeypatch.setattr(special, "stdtrit", lambda _, share: special.ndtri(share))
    found = accuracy_interval([1.0] * right + [0.0] * (n - right))
    assert (found.mean, found.n) == (right / n, n) and isnan(found.p)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_copies_of_an_answer_in_one_group_do_not_narrow_an_accuracys_interval() -> None:
    x = (np.random.default_rng(0).random(20) < 0.7).astype(float)
    once, copied = accuracy_interval(x), accuracy_interval(np.tile(x, 9), groups=list(range(20)) * 9)
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    ungrouped = accuracy_interval(np.tile(x, 9))
    assert ungrouped.high - ungrouped.low < 0.5 * (once.high - once.low)


def test_an_accuracys_interval_covers_the_true_one_and_stays_within_0_and_1() -> None:
    rng = np.random.default_rng(0)
    for n, p in ((8, 0.5), (20, 0.9), (100, 0.97)):
        found = [accuracy_interval((rng.random(n) < p).astype(float)) for _ in range(600)]
        assert np.mean([one.low <= p <= one.high for one in found]) >= 0.93
        assert all(0 <= one.low <= one.mean <= one.high <= 1 and one.high - one.low > 0 for one in found)


@pytest.mark.parametrize("values", [[1.5, 0.0], [-0.1, 1.0]])
def test_what_is_no_accuracy_is_refused(values) -> None:
    with pytest.raises(ValueError, match=r"values in \[0, 1\]"):
        accuracy_interval(values)


# Against controls


def test_a_gain_over_controls_by_hand() -> None:
    found = against_controls([5.0, 7.0], [[1.0, 2.0, 6.0], [3.0, 4.0, 8.0]])
    means = np.array([2.0, 3.0, 7.0])
    half = stats.t.ppf(0.975, 2) * means.std(ddof=1) * np.sqrt(4 / 3)
    assert (found.gain, found.n, found.k, found.p_rank) == (2.0, 2, 3, 2 / 4)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))
    assert found.p > 0.05 and (found.p < 0.05) == (found.low > 0)


def test_a_prompt_without_a_score_is_left_out_and_a_control_without_one_is_filled_by_its_prompt() -> None:
    easy, hard = [10.0, 11.0, 12.0], [0.0, 1.0, 2.0]
    whole = against_controls([11.0, 1.0], [easy, hard])
    assert against_controls([11.0, 1.0, nan], [easy, hard, [9.0, 9.0, 9.0]]) == whole
    hole = against_controls([11.0, 1.0], [easy, [0.0, 1.0, nan]])
    assert abs(hole.gain) < 0.3  # and not as if the third control had 12 on average
    assert against_controls([1.0], [[nan]]).k == 0 and isnan(against_controls([1.0], [[nan]]).gain)
    one = against_controls([1.0], [[0.0]])
    assert one.gain == 1 and isnan(one.low) and one.p_rank == 0.5


def test_a_direction_equal_to_all_controls_is_not_unlike_them() -> None:
    found = against_controls([0.1] * 3, [[0.1] * 20] * 3)
    assert (found.gain, found.p, found.p_rank) == (0, 1, 1) and isnan(found.low) and isnan(found.high)


def test_controls_at_a_floor_have_no_interval_and_a_p_value_by_rank() -> None:
    zeros = against_controls([0.0] * 9 + [0.5], np.zeros((10, 2)))
    assert isnan(zeros.low) and zeros.p == pytest.approx(1 / 3)
    rng = np.random.default_rng(0)
    for k, most in ((2, 0.05), (5, 0.05), (19, 0.055)):
        above = 0
        for _ in range(1500):
            odds = -4.6 + rng.normal(size=(10, 1)) + rng.normal(size=(1, k + 1))
            scores = (rng.random((10, k + 1)) < 1 / (1 + np.exp(-odds))).astype(float)
            found = against_controls(scores[:, 0], scores[:, 1:])
            above += shown_sign(found.gain, found.low, found.high, found.p) > 0
        assert above / 1500 <= most, k
    clear = against_controls([1.0] * 10, np.zeros((10, 19)))
    assert shown_sign(clear.gain, clear.low, clear.high, clear.p) == 1 and clear.p == pytest.approx(0.05)


def test_missing_scores_of_controls_are_filled_by_prompt_and_control_and_leave_their_spread_as_it_is() -> None:
    rng = np.random.default_rng(1)
    prompts, controls = rng.normal(size=(12, 1)), rng.normal(size=(1, 5))
    whole = prompts + controls
    holes = np.where(rng.random(whole.shape) < 0.4, np.nan, whole)
    holes[:, 0] = whole[:, 0]
    some = against_controls(whole[:, 0] + 1, holes)
    every = against_controls(whole[:, 0] + 1, whole)
    assert (some.gain, some.low, some.high) == pytest.approx((every.gain, every.low, every.high))
    apart = np.full((4, 2), np.nan)
    apart[:2, 0], apart[2:, 1] = 1.0, 2.0  # two controls without a prompt in common
    assert isnan(against_controls([1.0] * 4, apart).low)


def test_infinite_scores_are_refused() -> None:
    for values, others in (([np.inf, 0.0], np.zeros((2, 3))), ([1.0, 0.0], [[np.inf, 0.0], [0.0, 1.0]])):
        with pytest.raises(ValueError, match="finite scores"):
            against_controls(values, others)
    with pytest.raises(ValueError, match="finite scores"):
        control_band([[np.inf, 1.0]])
    with pytest.raises(ValueError, match="finite scores"):
        slopes([0.0, 1.0], [[np.inf, 1.0]])
    with pytest.raises(ValueError, match="finite totals"):
        sign_flip([nan, 1.0, 2.0])
    with pytest.raises(ValueError, match="finite members"):
        ratio([np.inf, 1.0], [1.0, 2.0])


@pytest.mark.parametrize("call", [lambda: ratio([1.0, 2.0], [1.0, 2.0], level=95),
                                  lambda: seed_interval([1.0, 2.0], level=95),
                                  lambda: over_seeds([1.0, 2.0], [1, 2], level=95)])  # fmt: skip
def test_a_level_in_per_cent_is_refused(call) -> None:
    with pytest.raises(ValueError, match=r"a level in \(0, 1\); got 95"):
        call()


def test_missing_groups_and_seeds_are_refused() -> None:
    for missing in (None, nan, pd.NA, pd.NaT):
        with pytest.raises(ValueError, match="a group for each row"):
            mean_interval([1.0, 2.0], ["a", missing])
    with pytest.raises(ValueError, match="a seed per value"):
        over_seeds([1.0, 2.0], [1, nan])


@pytest.mark.parametrize("units", [8, 12])
def test_binary_differences_of_groups_of_two_are_covered(units) -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        one = (rng.random(units) < 0.9).astype(float)
        found = mean_interval(np.repeat(one, 2), np.repeat(np.arange(units), 2).tolist(), n_boot=200, binary=True)
        covered += found.low <= 0.9 <= found.high
    assert covered >= 186
    equal = mean_interval([1.0] * 20, np.repeat(np.arange(10), 2).tolist(), binary=True)
    assert (equal.low, equal.high) == (mean_interval([1.0] * 10, binary=True).low, 1.0)


def test_as_many_controls_as_a_level_needs() -> None:
    assert [controls_needed(level) for level in (0.05, 0.01, 0.1, 0.5)] == [19, 99, 9, 1]
    above = against_controls([9.0, 9.0], np.random.default_rng(0).normal(size=(2, 19)))
    assert above.p_rank == pytest.approx(0.05) and above.low > 0
    with pytest.raises(ValueError, match="level"):
        controls_needed(0)


def test_a_further_random_direction_is_flagged_as_often_as_the_level_says() -> None:
    rng = np.random.default_rng(0)
    flagged, ranked, covered = [], [], []
    for _ in range(1000):
        prompts = rng.normal(0, 2, (8, 1))
        scores = prompts + rng.normal(0, 1, (1, 20)) + rng.normal(0, 1, (8, 20))
        found = against_controls(scores[:, 0], scores[:, 1:])
        flagged.append(found.low > 0 or found.high < 0)
        ranked.append(found.p_rank <= 0.05)
        covered.append((found.p < 0.05) == flagged[-1])
    assert 0.03 <= np.mean(flagged) <= 0.07 and 0.03 <= np.mean(ranked) <= 0.07 and all(covered)


def test_eight_skewed_differences_are_called_different_from_zero_as_often_as_the_level_says() -> None:
    rng = np.random.default_rng(0)
    p, covered = [], []
    for seed in range(1500):
        x = rng.lognormal(0, 0.7, 8) - rng.lognormal(0, 0.7, 8)
        found = mean_interval(x, n_boot=300, seed=seed)
        p.append(found.p)
        covered.append(found.low <= 0 <= found.high)
    assert 0.03 <= np.mean(np.array(p) <= 0.05) <= 0.07
    assert 0.93 <= np.mean(covered) <= 0.98


@pytest.mark.parametrize("n", [8, 12, 16])
@pytest.mark.parametrize("up, down", [(0.2, 0.05), (0.8, 0.0), (0.37, 0.2), (0.6, 0.05)])
def test_differences_of_binary_scores_are_covered_also_where_all_of_them_are_equal(n, up, down) -> None:
    covered = 0.0
    for ups in range(n + 1):
        for downs in range(n + 1 - ups):
            values = [1.0] * ups + [-1.0] * downs + [0.0] * (n - ups - downs)
            found = mean_interval(values, n_boot=200, binary=True)
            chance = stats.multinomial.pmf([ups, downs, n - ups - downs], n, [up, down, 1 - up - down])
            covered += chance * (found.low <= up - down + 1e-9 and found.high >= up - down - 1e-9)
    assert covered >= 0.93


def test_the_interval_of_binary_differences_is_bonett_and_prices_where_all_are_equal() -> None:
    found = mean_interval([1.0] * 10)
    d, z = 10 / 12, 1.959964
    assert found.low == pytest.approx(d - z * np.sqrt((12 / 12 - d**2) / 12), abs=1e-6) and found.high == 1
    assert isnan(mean_interval([0.0] * 10).low)  # a sample without spread says nothing about the next one
    assert mean_interval([0.0] * 10, binary=True).low == pytest.approx(-z * np.sqrt((2 / 12) / 12), abs=1e-6)
    assert isnan(mean_interval([1.0] * 10, binary=False).low)


def test_differences_of_other_scores_have_the_interval_they_had() -> None:
    x = np.random.default_rng(0).normal(0, 1, 12)
    assert mean_interval(x) == mean_interval(x, binary=False)
    rows, groups = [1.0, 0.0, 1.0, 1.0], ["a", "a", "b", "b"]
    assert mean_interval(rows, groups) == mean_interval(rows, groups, binary=False)


def test_the_band_of_controls_is_where_a_direction_is_not_unlike_them() -> None:
    rng = np.random.default_rng(0)
    controls = rng.normal(size=(12, 19))
    band = control_band(controls)
    assert (band.n, band.k) == (12, 19) and band.mean == pytest.approx(controls.mean())
    for value in (band.low - 0.01, band.low + 0.01, band.high - 0.01, band.high + 0.01):
        found = against_controls(np.full(12, value), controls)
        assert (found.low > 0 or found.high < 0) == (value < band.low or value > band.high)
    one = control_band(controls[:, :1])
    assert one.k == 1 and isnan(one.low) and isnan(control_band([[nan]]).mean)
    with pytest.raises(ValueError, match=r"controls \[n, k\]"):
        control_band([1.0, 2.0])
