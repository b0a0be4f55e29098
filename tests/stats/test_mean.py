"""Intervals and p-values of a mean, and of a direction against controls: by hand, by scipy, and by simulation."""

from __future__ import annotations

from itertools import product
from math import isnan, nan
from typing import Any

import numpy as np
import pytest
from scipy import stats

from steerkit.stats import mean as module
from steerkit.stats.controls import against_controls, controls_needed
from steerkit.stats.mean import mean_interval, sign_flip


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
    rng, ratios = np.random.default_rng(5), []
    for _ in range(20_000):
        drawn = rng.choice(x, 12)
        ratios.append((drawn.mean() - x.mean()) / stats.sem(drawn))
    above, below = np.quantile(ratios, [0.025, 0.975])
    slow = x.mean() - below * stats.sem(x), x.mean() - above * stats.sem(x)
    assert found.low == pytest.approx(min(t[0], slow[0]), rel=0.03)
    assert found.high == pytest.approx(max(t[1], slow[1]), rel=0.05) and found.high > 1.1 * t[1]


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
    assert (found.low, found.high, found.p, found.p_rank) == pytest.approx((0, 0, 1, 1))


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
