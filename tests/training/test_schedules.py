"""Schedules: hand-worked values, always in range; a gate tests a limit before it holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.train.schedules import Anneal, linear, pass_gate, staged

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


def test_a_gate_tests_the_next_limit_before_it_holds_and_opens_again_when_success_collapses() -> None:
    assert pass_gate(0.5, now=0.9, under_next=0.3, step=0.25, floor=0.2) == 0.75  # goes on
    assert pass_gate(0.5, now=0.9, under_next=0.1, step=0.25, floor=0.2) == 0.5  # waits
    assert pass_gate(0.5, now=0.1, under_next=0.0, step=0.25, floor=0.2) == 0.25  # goes back
    assert pass_gate(0.9, now=0.9, under_next=0.9, step=0.25) == 1.0
    assert pass_gate(0.1, now=0.0, under_next=0.0, step=0.25) == 0.0


def texts(progress: float) -> tuple[int, int]:
    """The lengths of the texts of a policy that cannot write fewer than 50 tokens."""
    return 50, 60


def test_a_limit_never_falls_below_what_the_policy_can_write() -> None:
    anneal, progress, limits = Anneal("gated", clip=(112, 41)), 0.0, []
    pace = anneal.pace(150)
    for _ in range(150):
        limits.append(anneal.at(progress)[1])
        now, under_next = (
            sum(length <= anneal.at(min(1.0, at))[1] for length in texts(at)) / 2 for at in (progress, progress + pace)
        )
        progress = pass_gate(progress, now, under_next, pace, floor=0.3)
    assert limits[0] == 112 and min(limits) == limits[-1] == 50


@given(st.lists(st.tuples(SHARE, SHARE), max_size=60), st.floats(0.001, 0.5), SHARE)
def test_a_gate_moves_by_one_step_at_most_and_stays_within_its_ends(
    shares: list[tuple[float, float]], step: float, floor: float
) -> None:
    progress = 0.0
    for now, under_next in shares:
        after = pass_gate(progress, now, under_next, step, floor)
        assert 0 <= after <= 1 and abs(after - progress) <= step + 1e-12
        assert after >= progress or now < floor
        assert after <= progress or under_next >= floor
        progress = after


def test_a_schedule_arrives_in_the_last_generation_step_of_its_share() -> None:
    assert Anneal().pace(11) == 0.1
    assert Anneal(share=0.5).pace(40) == 1 / 19
    assert Anneal(share=0.01).pace(40) == 1.0
    assert Anneal().pace(9, inner=3) == 1 / 2  # generations at steps 0, 3 and 6
    assert Anneal().pace(10, inner=3) == 1 / 3


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_success_rate_that_is_none_is_refused(share: float) -> None:
    for now, under_next in ((share, 0.5), (0.5, share)):
        with pytest.raises(ValueError, match="within 0 and 1"):
            pass_gate(0.5, now, under_next, 0.1)


def test_impossible_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="'linear', 'staged' or 'gated'"):
        Anneal("cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="from 1 token"):
        Anneal(clip=(100, 0))
    with pytest.raises(ValueError, match="share of the steps"):
        Anneal(share=0.0)
    with pytest.raises(ValueError, match="one stage"):
        staged([], 0.5)
