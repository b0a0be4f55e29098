"""Judge: a verdict is read after the judge's thought; a missing one is reported, asked for again, and no NO."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from steerkit.io.rows import read_rows
from steerkit.text.tags import tags
from tests.tiny import tiny_tokenizer
from training.debates.answerers import Reply, Request, Rule, Sampling
from training.debates.judge import YesNo, parse_yes_no
from training.evaluate.methods import one_answer
from training.problems.problem import Problem
from training.toy.worlds import bare
from training.train.schedules import Anneal


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


def test_replies_cut_within_a_thought_are_no_verdicts_and_the_warning_names_the_option() -> None:
    cut = "<think>\nOkay, the user wants me to"
    with pytest.warns(UserWarning, match=r"got 2 of 2 without a verdict.*--judge-tokens\) than 8"):
        assert judge(cut, cut)([("q", "a"), ("q", "b")]) == [None, None]
    with pytest.warns(UserWarning, match="got 1 of 3 without a verdict"):
        assert judge("YES", cut, "NO")([("q", "a"), ("q", "b"), ("q", "c")]) == [True, None, False]


def test_a_response_is_judged_without_its_thought_and_does_not_pass_without_a_reply() -> None:
    seen: list[str] = []
    pairs = [("q", "<think>vile</think>kind"), ("q", "<think>vile, and cut"), ("q", "plain")]
    assert judge("YES", "NO", seen=seen)(pairs) == [True, False, False]
    assert [text.split("Response:\n")[1].split("\n")[0] for text in seen] == ["kind", "plain"]
    assert judge()(pairs[1:2]) == [False]


def test_a_failed_call_of_the_judge_is_repeated_once_and_then_a_missing_verdict() -> None:
    asked: list[list[str]] = []

    def answerer(requests, sampling):
        asked.append([request.id for request in requests])
        for request in requests:
            failed = request.id == "1" or (request.id == "0" and len(asked) == 1)
            yield Reply(request.id, None if failed else "YES", 1, 1, True, "HTTP 500" if failed else None)

    with pytest.warns(UserWarning, match="got 1 of 3 without a verdict, e.g. None"):
        assert YesNo(answerer, "Is it fine?")([("q", "a"), ("q", "b"), ("q", "c")]) == [True, None, True]
    assert asked == [["0", "1", "2"], ["0", "1"]]


@pytest.mark.filterwarnings("ignore")
def test_an_evaluation_without_any_verdict_is_an_error_that_names_the_option() -> None:
    questions = [Problem(f"open/{i}", f"Who led expedition {i}?", None, "open", "open") for i in range(2)]
    says = Rule(lambda request, rng: "Well")
    with pytest.raises(ValueError, match=r"got none on 2 answers.*--judge-tokens"):
        one_answer(questions, says, bare, Sampling(), YesNo(says, "Is it fine?"))


def rewarded(verdicts, folder: Path, **changed):
    """The reward function of steps of four completions whose judge gives these verdicts, step after step."""
    pytest.importorskip("trl", reason="the extra `train` is not installed")
    from training.train.grpo import GRPO, AnnealedReward

    given = iter(verdicts)
    tokenizer = tiny_tokenizer()
    setting = GRPO(**{"anneal": Anneal("linear", clip=(6, 6)), "generations": 4, "format": False, **changed})
    ends = frozenset({tokenizer.eos_token_id})
    reward = AnnealedReward(setting, tokenizer, folder, ends, judge=lambda pairs: next(given))
    texts = ("a", f"{tags()[0]}b", "c", "d")
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]

    def step(number: int) -> list[float]:
        return reward(
            completion_ids=ids, question=["who?"] * 4, gold=[""] * 4, kind=["open"] * 4,
            trainer_state=SimpleNamespace(global_step=number),
        )  # fmt: skip

    step.function = reward
    return step


@pytest.mark.parametrize("kind", ["linear", "gated"])
def test_a_step_without_any_verdict_trains_nothing_and_leaves_the_schedule_where_it_is(tmp_path, kind) -> None:
    none = [None] * 4
    step = rewarded([none, [True, True, False, None], none], tmp_path, anneal=Anneal(kind, clip=(99, 9)), format=True)
    step.function.progress = 0.5
    assert len(set(step(0))) == 1, "completions without a verdict have an advantage by their tags"
    assert step.function.progress == 0.5
    step(1)
    moved = step.function.progress
    assert (moved > 0.5) == (kind == "gated")
    step(2)
    assert step.function.progress == moved
    log = read_rows(tmp_path / "log.jsonl")
    assert [row["clip"] for row in log] == [None, 2 / 3, None] and log[0]["tags"] > 0


def test_a_completion_without_a_verdict_gets_the_mean_of_its_group_and_no_advantage(tmp_path) -> None:
    step = rewarded([[True, None, False, True]], tmp_path)
    assert step(0) == pytest.approx([1.0, 2 / 3, 0.0, 1.0])
    assert read_rows(tmp_path / "log.jsonl")[0]["judged"] == 0.75


def test_steps_without_any_verdict_end_a_training_only_if_there_are_three_in_a_row(tmp_path) -> None:
    nothing, some = [None] * 4, [True, None, None, None]
    step = rewarded([nothing, nothing, some, nothing, nothing, nothing], tmp_path)
    assert step(0) == [0.0] * 4 and step(1) == [0.0] * 4 and step(2) == [1.0] * 4
    step(3), step(4)
    with pytest.raises(ValueError, match="got none in 3 steps in a row"):
        step(5)
