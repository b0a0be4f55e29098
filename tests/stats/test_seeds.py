"""Means over training seeds: Student's t over the seeds' means, and what one seed can say."""

from __future__ import annotations

from math import isnan, nan

import numpy as np
import pytest
from scipy import stats

from steerkit.stats.mean import mean_interval
from steerkit.stats.seeds import QUESTION, SEED, over_seeds, seed_interval


def test_the_interval_over_seeds_is_students_over_their_means() -> None:
    rng = np.random.default_rng(0)
    values, seeds = rng.normal(size=90), np.repeat([7, 3, 5], 30)
    found = over_seeds(values, seeds.tolist())
    means = [values[seeds == seed].mean() for seed in (3, 5, 7)]
    theirs = stats.ttest_1samp(means, 0)
    assert (found.unit, found.seeds, found.n) == (SEED, 3, 90)
    assert found.by_seed == pytest.approx(means) and found.mean == pytest.approx(np.mean(means))
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval()))
    assert found.p == pytest.approx(theirs.pvalue)


def test_more_questions_do_not_narrow_what_seeds_spread() -> None:
    few = over_seeds(np.tile([0.2, 0.8], 1), [0, 1])
    many = over_seeds(np.tile([0.2, 0.8], 500), [0, 1] * 500)
    assert (few.low, few.high) == pytest.approx((many.low, many.high))


def test_with_one_seed_the_interval_is_over_its_questions() -> None:
    values = np.random.default_rng(1).normal(size=20)
    found, questions = over_seeds(values, [4] * 20), mean_interval(values)
    assert (found.unit, found.low, found.high, found.p) == (QUESTION, questions.low, questions.high, questions.p)
    grouped = over_seeds(np.repeat(values, 2), [4] * 40, [i // 2 for i in range(40)])
    assert (grouped.low, grouped.high) == pytest.approx((questions.low, questions.high))


def test_a_seed_without_a_value_is_no_seed() -> None:
    found = over_seeds([1.0, nan, 3.0, nan], [0, 0, 1, 2])
    assert found.by_seed == (1.0, 3.0) and found.n == 2
    assert isnan(over_seeds([nan, nan], [0, 1]).mean)
    with pytest.raises(ValueError, match="a seed per value"):
        over_seeds([1.0, 2.0], [0])


def test_equal_seeds_have_no_spread_and_one_has_none_that_is_known() -> None:
    same = seed_interval([0.5, 0.5, 0.5])
    assert (same.low, same.high, same.p) == (0.5, 0.5, 0.25)  # the exact sign-flip test's
    assert seed_interval([0.0, 0.0]).p == 1
    assert isnan(seed_interval([0.5, nan]).low) and seed_interval([0.5, nan]).n_missing == 1


def test_one_of_several_seeds_with_values_has_no_interval() -> None:
    values, seeds = [1.0, 0.0, 1.0, nan], [0, 0, 0, 1]
    alone = over_seeds(values, seeds, of=6)
    assert (alone.mean, alone.seeds) == (pytest.approx(2 / 3), 1) and isnan(alone.low) and isnan(alone.p)
    assert over_seeds(values, seeds, of=1).unit == QUESTION != alone.unit
