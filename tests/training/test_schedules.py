"""Schedules: hand-worked values, always in range, never going back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.train.schedules import Anneal, Gate, linear, pass_gate, staged

SHARE = st.floats(0, 1)


def test_linear_goes_from_the_papers_start_to_its_end() -> None:
    anneal = Anneal("linear")
    assert anneal.at(0.0) == (1.0, 2000)
    assert anneal.at(0.5) == (pytest.approx(0.525), 1250)
    assert anneal.at(1.0) == (pytest.approx(0.05), 500)
    assert linear(10, 4, 1.5) == 4  # held at the end
    assert linear(10, 4, -1) == 10


def test_staged_is_the_released_scripts_three_stages() -> None:
    anneal = Anneal("staged")
    assert [anneal.at(p) for p in (0.0, 0.33, 0.34, 0.66, 0.67, 1.0)] == [
        (1.0, 2048), (1.0, 2048), (0.554, 1280), (0.554, 1280), (0.107, 512), (0.107, 512)
    ]  # fmt: skip


def test_a_gate_waits_while_the_average_success_is_below_the_floor() -> None:
    gate = pass_gate(Gate(), 0.5, step=0.25, floor=0.2, memory=0.5)
    assert gate == Gate(0.25, 0.5)
    gate = pass_gate(gate, 0.0, step=0.25, floor=0.2, memory=0.5)
    assert gate == Gate(0.5, 0.25)  # 0.25 is still above 0.2
    gate = pass_gate(gate, 0.0, step=0.25, floor=0.2, memory=0.5)
    assert gate == Gate(0.5, 0.125)  # waits
    gate = pass_gate(gate, 0.4, step=0.25, floor=0.2, memory=0.5)
    assert gate == Gate(0.75, 0.2625)  # goes on


@given(st.lists(SHARE, max_size=60), st.floats(0.001, 0.5), SHARE)
def test_a_gate_never_goes_back_and_never_beyond_its_end(observed: list[float], step: float, floor: float) -> None:
    gate = Gate()
    for share in observed:
        after = pass_gate(gate, share, step, floor)
        assert gate.progress <= after.progress <= 1
        assert after.success is not None and 0 <= after.success <= 1
        gate = after


def test_a_schedule_arrives_in_the_last_step_of_its_share() -> None:
    assert Anneal().pace(11) == 0.1
    assert Anneal(share=0.5).pace(40) == 1 / 19
    assert Anneal(share=0.01).pace(40) == 1.0


@pytest.mark.parametrize("observed", [-0.1, 1.1, float("nan")])
def test_a_success_rate_that_is_none_is_refused(observed: float) -> None:
    with pytest.raises(ValueError, match="within 0 and 1"):
        pass_gate(Gate(), observed, 0.1)


def test_impossible_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="'linear', 'staged' or 'gated'"):
        Anneal("cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="from 1 token"):
        Anneal(clip=(100, 0))
    with pytest.raises(ValueError, match="share of the steps"):
        Anneal(share=0.0)
    with pytest.raises(ValueError, match="one stage"):
        staged([], 0.5)
