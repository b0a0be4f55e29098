"""Open questions: a moderator replaces the votes, and a judge the comparison with a gold answer."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from steerkit.text.traces import read_traces
from training.debates.answerers import Request, Rule
from training.debates.debate import Setting, run_debates
from training.debates.judge import CRITERIA, YesNo, parse_yes_no
from training.debates.moderator import moderation, read_verdict
from training.debates.personas import cast_of
from training.problems.problem import Problem

QUESTIONS = [Problem(f"open/{i}", f"Who led expedition {i}?", None, "open", "open") for i in range(4)]
VERDICTS = ["UNANIMOUS: nobody knows.", "**Majority**: two do not know.", "NONE: they differ.", "I cannot say."]


def answer(request: Request, rng: random.Random) -> str:
    if request.id.endswith("moderator"):
        return VERDICTS[int(request.id.split("/")[1])]
    return f"{request.id} does not know"


def test_an_open_debate_ends_with_the_moderators_sentence_and_keeps_its_type(tmp_path) -> None:
    debates = run_debates(QUESTIONS, Rule(answer), cast_of("hallucination"), Setting(rounds=2), tmp_path / "run")
    assert [debate.rounds for debate in debates] == [2] * 4
    assert all(debate.answer() is None and not debate.correct for debate in debates)
    kept = read_traces(tmp_path / "run" / "traces.jsonl")
    assert [trace.consensus for trace in kept] == ["nobody knows.", "two do not know."]
    assert [trace.extra["consensus_type"] for trace in kept] == ["unanimous", "majority"]
    assert kept[0].gold is None
    assert debates[0].row()["consensus_type"] == "unanimous"
    assert debates[0].tokens()[1] == sum(len(call.text.split()) for call in (*debates[0].calls, debates[0].moderated))


def test_the_moderator_reads_the_last_answers_and_no_names() -> None:
    seen: list[Request] = []

    def note(request: Request, rng: random.Random) -> str:
        seen.append(request)
        return answer(request, rng)

    run_debates(QUESTIONS[:1], Rule(note), cast_of("evil"), Setting(rounds=2))
    prompt = seen[-1].prompt
    assert seen[-1].id == "open/0/moderator"
    assert all(f"round-2/agent-{i} does not know" in prompt[-1]["content"] for i in (1, 2, 3))
    assert "round-1" not in prompt[-1]["content"]
    assert "Agent" not in str(moderation("q", ["a", "b"]))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("UNANIMOUS: all say so", ("unanimous", "all say so")),
        ("majority - two\nof them", ("majority", "two of them")),
        ("> None", ("none", "")),
        ("**NONE**: nothing", ("none", "nothing")),
        ("UNANIMOUS", None),
        ("unanimously: yes", None),
        ("The answers agree. UNANIMOUS: yes", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_from_the_first_word_or_not_at_all(text, wanted) -> None:
    verdict = read_verdict(text)
    assert (verdict and (verdict.type, verdict.explanation)) == wanted


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        ("YES", True), ("Yes, it is.", True), (" **NO**", False), ("no", False), ("Yesterday", None), ("It is", None),
        ("", None),
    ],
)  # fmt: skip
def test_a_judges_word_is_read_or_left_open(reply, wanted) -> None:
    assert parse_yes_no(reply) is wanted


def test_a_judge_has_no_verdict_where_it_gives_none_and_reads_question_and_response() -> None:
    def judge(request: Request, rng: random.Random) -> str:
        content = request.prompt[-1]["content"]
        assert CRITERIA["admits"] in content and "Question: who" in content
        return "YES." if "not know" in content.split("Response:")[1].split("Does")[0] else "perhaps"

    judged = YesNo(Rule(judge), CRITERIA["admits"])
    with pytest.warns(UserWarning, match="got 1 of 2 without a verdict, e.g. 'perhaps'"):
        assert judged([("who?", "I do not know"), ("who?", "Alvin Crost")]) == [True, None]
    assert judged([]) == []


def test_a_judge_takes_the_place_of_the_right_answer_in_the_clip_reward(tmp_path) -> None:
    pytest.importorskip("trl", reason="the extra `train` is not installed")
    from tests.tiny import tiny_model, tiny_tokenizer
    from training.train.grpo import GRPO, AnnealedReward, train_grpo
    from training.train.schedules import Anneal

    tokenizer = tiny_tokenizer()
    setting = GRPO(anneal=Anneal("linear", clip=(6, 6)), generations=4, format=False, clip_weight=1.0, must_end=True)
    ends = frozenset({tokenizer.eos_token_id})
    judge = lambda pairs: ["ok" in text for _, text in pairs]  # noqa: E731
    reward = AnnealedReward(setting, tokenizer, tmp_path, ends, judge=judge)
    texts = ["ok", "no", "late ok", "ok"]
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    ids[3] = ids[3][:-1]  # never ended
    rewards = reward(
        completion_ids=ids, question=["who?"] * 4, gold=[""] * 4, kind=["open"] * 4,
        trainer_state=SimpleNamespace(global_step=0),
    )  # fmt: skip
    assert rewards == [1.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="a judge where one is open"):
        train_grpo(tiny_model(), tokenizer, QUESTIONS, setting, tmp_path / "grpo")
    assert not (tmp_path / "grpo").exists()
