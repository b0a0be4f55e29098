"""Holm's adjusted p-values: by hand, and against the step-down procedure."""

from __future__ import annotations

from math import nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerkit.stats.multiple import holm


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
