"""Rewards: hand-worked numbers, and which box counts."""

from __future__ import annotations

import pytest

from steerkit.text.tags import tags
from training.train.rewards import KEPT, Completion, clip_reward, format_reward, tag_weights, weighted_format

WEIGHTS = tag_weights()


def decode(ids) -> str:
    return "".join(map(chr, ids))


def completion_of(text: str, finished: bool = True) -> Completion:
    return Completion((*map(ord, text), *([0] if finished else [])), finished)


def test_all_ten_tags_are_worth_three_and_two_tenths() -> None:
    assert format_reward("\n".join(tags()), WEIGHTS) == pytest.approx(9 * 0.3 + 0.5)


def test_a_tag_counts_once_and_an_unknown_one_not_at_all() -> None:
    text = "<|Agent 1 Solution|>: a <|Agent 1 Solution|>: b <|Agent 7 Solution|>: c <|Consensus|>"
    assert format_reward(text, WEIGHTS) == pytest.approx(0.3 + 0.5)
    assert format_reward("no debate", WEIGHTS) == 0


def test_the_weight_decays_all_tags_but_those_kept() -> None:
    text = "\n".join(tags())
    assert weighted_format(text, WEIGHTS, 0.5) == pytest.approx(1.6)
    assert weighted_format(text, WEIGHTS, 0.5, kept=KEPT) == pytest.approx(0.5 * 2.4 + 0.8)


def test_two_agents_and_one_round_have_five_tags() -> None:
    assert set(tag_weights(2, 1)) == {
        "<|Round 1 - Initial Solutions|>", "<|Agent 1 Solution|>", "<|Agent 2 Solution|>", "<|Consensus|>",
        "<|endofdebate|>",
    }  # fmt: skip


CLIPPED = [  # text, finished, clip, options, reward
    (r"\boxed{14}", True, 11, {"must_end": True}, 1.0),
    (r"\boxed{14}", True, 10, {"must_end": True}, 0.0),  # the end-of-sequence token is the eleventh
    (r"\boxed{14}", False, 10, {"must_end": True}, 0.0),  # never ended
    (r"\boxed{14}", False, 10, {}, 1.0),
    (r"\boxed{14} and more of it", True, 10, {}, 1.0),
    (r"\boxed{14} and more of it", True, 9, {}, 0.0),  # the box is cut
    (r"\boxed{9} \boxed{14}", True, 99, {}, 1.0),
    (r"\boxed{14} \boxed{9}", True, 99, {}, 0.0),
    (r"\boxed{14} \boxed{9}", True, 99, {"box": "first"}, 1.0),
    (r"\boxed{14} \boxed{9}", False, 10, {}, 1.0),  # the last box within the first ten tokens
    (r"\boxed{14.0}", True, 99, {"must_end": True}, 1.0),
    ("14", True, 99, {}, 0.0),
    ("", True, 99, {}, 0.0),
]


@pytest.mark.parametrize(("text", "finished", "clip", "options", "reward"), CLIPPED)
def test_the_clip_reward_asks_for_the_right_box_within_the_clip(text, finished, clip, options, reward) -> None:
    assert clip_reward(completion_of(text, finished), clip, decode, "14", "number", **options) == reward
