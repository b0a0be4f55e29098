"""Judge: a verdict is read after the judge's thought, and a missing one is reported and is not a NO."""

from __future__ import annotations

import random

import pytest

from training.debates.answerers import Request, Rule
from training.debates.judge import YesNo, parse_yes_no


def judge(*replies: str, seen: list[str] | None = None) -> YesNo:
    given = iter(replies)

    def answer(request: Request, rng: random.Random) -> str:
        if seen is not None:
            seen.append(request.prompt[-1]["content"])
        return next(given)

    return YesNo(Rule(answer), "Is it fine?")


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("<think>\nYes, it seems</think>\n\nNO", False),
        ("it seems fine</think>Yes.", True),
        ("<think>\nOkay, the user wants me to", None),
        ("<think>no</think>", None),
        ("YES or NO", None),
        ("Yes/No", None),
        ("**YES** | **NO**", None),
        ("Yes, or nearly so", True),
    ],
)
def test_a_verdict_is_the_one_word_after_a_thought(reply: str, verdict: bool | None) -> None:
    assert parse_yes_no(reply) is verdict


def test_replies_cut_within_a_thought_are_no_verdicts_and_an_error_if_there_is_no_other() -> None:
    cut = "<think>\nOkay, the user wants me to"
    with pytest.raises(ValueError, match=r"got 2 of 2 without a verdict.*max_new_tokens than 8"):
        judge(cut, cut)([("q", "a"), ("q", "b")])
    with pytest.warns(UserWarning, match="got 1 of 3 without a verdict"):
        assert judge("YES", cut, "NO")([("q", "a"), ("q", "b"), ("q", "c")]) == [True, None, False]


def test_a_response_is_judged_without_its_thought_and_does_not_pass_without_a_reply() -> None:
    seen: list[str] = []
    pairs = [("q", "<think>vile</think>kind"), ("q", "<think>vile, and cut"), ("q", "plain")]
    assert judge("YES", "NO", seen=seen)(pairs) == [True, False, False]
    assert [text.split("Response:\n")[1].split("\n")[0] for text in seen] == ["kind", "plain"]
    assert judge()(pairs[1:2]) == [False]
