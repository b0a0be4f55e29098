"""Controls of what a debate adds: turns of other questions, right answers alone, equal tokens."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest

from steerkit.text.tags import tags
from steerkit.text.tokens import encode
from tests.tiny import tiny_tokenizer
from tests.training.test_training import traces
from training.debates.answerers import Reply, Sampling
from training.problems.problem import Problem
from training.train.checkpoints import with_tags
from training.train.controls import gold_answers, right_answers, with_equal_tokens, with_foreign_turns
from training.train.sft import SFT, examples


def test_foreign_turns_are_those_of_other_questions_and_all_else_stays() -> None:
    held = traces()
    foreign = with_foreign_turns(held, seed=3)
    for before, after in zip(held, foreign, strict=True):
        assert (after.question, after.consensus, after.gold) == (before.question, before.consensus, before.gold)
        assert [(t.agent, t.round) for t in after.turns] == [(t.agent, t.round) for t in before.turns]
    for agent, number in {(t.agent, t.round) for trace in held for t in trace.turns}:
        texts = [[t.text for t in trace.turns if (t.agent, t.round) == (agent, number)] for trace in held]
        new = [[t.text for t in trace.turns if (t.agent, t.round) == (agent, number)] for trace in foreign]
        assert Counter(map(tuple, texts)) == Counter(map(tuple, new))
        owners = [i for i, one in enumerate(texts) if one]
        if len(set(map(tuple, texts))) == len(texts) > 1:
            assert all(texts[i] != new[i] for i in owners)
    assert with_foreign_turns(held, seed=3) == foreign != with_foreign_turns(held, seed=4)


def test_the_first_right_answer_is_kept_and_read_again(tmp_path) -> None:
    problems = [Problem(f"p{i}", f"{i}+0", str(i), "number", "addition") for i in range(3)]

    def answerer(requests, sampling):
        for request in requests:
            number, sample = request.id.removeprefix("p").split("/")
            right = (number, sample) in (("0", "1"), ("0", "2"), ("1", "0"))
            yield Reply(request.id, f"try {sample} \\boxed{{{number if right else 9}}}", 1, 1, True)

    ask = lambda problem: problem.question  # noqa: E731
    file = tmp_path / "right.jsonl"
    found = right_answers(problems, answerer, ask, Sampling(), 3, file)
    assert [(trace.question, trace.turns[0].text) for trace in found] == [
        ("0+0", "try 1 \\boxed{0}"), ("1+0", "try 0 \\boxed{1}")
    ]  # fmt: skip
    assert right_answers(problems, lambda *_: 1 / 0, ask, Sampling(), 3, file) == found
    rows = examples(found, SFT(target="first"))
    assert [row["completion"] for row in rows] == ["try 1 \\boxed{0}", "try 0 \\boxed{1}"]


def test_a_control_on_short_targets_has_as_many_tokens_in_a_batch() -> None:
    held = traces()
    tokenizer = with_tags(tiny_tokenizer(), tags())
    setting = SFT(batch=4, micro_batch=4)
    other = with_equal_tokens(setting, held, replace(setting, target="answer"), held, tokenizer, "number")

    def tokens(of: SFT) -> float:
        rows = examples(held, of)
        return of.batch * sum(len(encode(tokenizer, row["completion"])) + 1 for row in rows) / len(rows)

    assert other.batch % other.micro_batch == 0 and other.batch > setting.batch
    assert abs(tokens(other) / tokens(setting) - 1) < 0.05
    assert other.steps == 6  # three epochs of eight traces, four at a time
    assert with_equal_tokens(setting, held, setting, held, tokenizer, "number") == replace(setting, steps=6)
    fixed = replace(setting, steps=7)
    assert with_equal_tokens(fixed, held, replace(fixed, target="answer"), held, tokenizer, "number").steps == 7


def test_shuffled_traces_are_shortened_as_the_original_ones_are() -> None:
    held = traces(60)
    foreign = with_foreign_turns(held, seed=1)
    for cut_to in ("answers", "revision", "turn"):
        setting = SFT(structure_dropout=0.5, cut_to=cut_to, seed=3)
        own, shuffled = examples(held, setting), examples(foreign, setting, cut_like=held)
        tags_of = [[re.findall(r"<\|.*?\|>", row["completion"]) for row in rows] for rows in (own, shuffled)]
        assert tags_of[0] == tags_of[1] and 15 < sum(len(found) < 10 for found in tags_of[1]) < 45
        assert all(a["completion"] != b["completion"] for a, b in zip(own, shuffled, strict=True))
        alone = examples(foreign, setting)
        assert cut_to == "turn" or [row["completion"] for row in alone] != [row["completion"] for row in shuffled]
    with pytest.raises(ValueError, match="two traces or more"):
        with_foreign_turns(held[:1])
    with pytest.raises(ValueError, match="shorter"):
        examples(foreign, SFT(), cut_like=held[:3])


def test_gold_answers_are_learnt_as_a_box() -> None:
    problems = [Problem(f"p{i}", f"{i}+0", str(i), "number", "addition") for i in range(3)]
    rows = examples(gold_answers(problems), SFT(target="gold"))
    assert [(row["prompt"], row["completion"]) for row in rows] == [
        (f"Problem: {i}+0\n\n", f"\\boxed{{{i}}}") for i in range(3)
    ]


def test_a_right_answer_with_a_tag_in_it_is_passed_over_and_none_at_all_is_an_error(tmp_path) -> None:
    problem = Problem("p0", "0+0", "0", "number", "addition")
    texts = {"p0/0": "<|Consensus|> \\boxed{0}", "p0/1": "so \\boxed{0}"}

    def answerer(requests, sampling):
        return [Reply(request.id, texts.get(request.id, "\\boxed{9}"), 1, 1, True) for request in requests]

    ask = lambda one: one.question  # noqa: E731
    (trace,) = right_answers([problem], answerer, ask, Sampling(), 3, tmp_path / "right.jsonl")
    assert trace.turns[0].text == "so \\boxed{0}"
    texts.clear()
    with pytest.raises(ValueError, match="expected a right answer"):
        right_answers([problem], answerer, ask, Sampling(), 3, tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def test_a_right_box_in_a_thought_that_the_prompt_opened_is_no_right_answer(tmp_path) -> None:
    problem = Problem("p0", "0+0", "0", "number", "addition")
    texts = {"p0/0": "maybe \\boxed{0}, but", "p0/1": "well</think>\\boxed{0}"}

    class Thinking:
        tokenizer = tiny_tokenizer()

        def __call__(self, requests, sampling):
            return [Reply(request.id, texts[request.id], 1, 1, True) for request in requests]

    Thinking.tokenizer.chat_template = "{{ messages[0]['content'] }}<think>"
    ask = lambda one: [{"role": "user", "content": one.question}]  # noqa: E731
    (trace,) = right_answers([problem], Thinking(), ask, Sampling(), 2, tmp_path / "right.jsonl")
    assert trace.turns[0].text == texts["p0/1"]
