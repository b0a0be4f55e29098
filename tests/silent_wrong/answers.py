"""Answers, traces and verdicts that are read from what does not say them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steerkit.text.tags import END, TAG, agent_tag, round_tag
from steerkit.text.traces import DebateTrace
from training.debates.answerers import Rule
from training.debates.judge import YesNo, parse_yes_no
from training.problems.answers import read_answer
from training.problems.benchmarks import load_mmlu_pro

Read = Callable[[str, str], str | None]


def check_an_unknown_multiplier_is_no_unit(read: Read) -> None:
    assert read(r"\boxed{3 apples}", "number") == "3"
    for word in ("lakh", "crore", "gross", "hundredweight"):
        assert read(rf"\boxed{{3 {word}}}", "number") is None


def any_word_is_a_unit(text: str, kind: str) -> str | None:
    found = re.search(r"\\boxed\{(\d+) [a-z]+\}", text)
    return found[1] if found else None


def check_two_letters_are_no_answer(read: Read) -> None:
    assert read(r"\boxed{A) 5}", "option") == "A"
    for box in ("A) 5, C) 7", r"\text{A. 5 or C. 7}", "(A) or (C)"):
        assert read(rf"\boxed{{{box}}}", "option") is None


def the_first_letter(text: str, kind: str) -> str | None:
    found = re.search(r"\\boxed\{(?:\\text\{)?\(?([A-J])[).]", text)
    return found[1] if found else None


def check_a_thought_has_no_answer(read: Read) -> None:
    assert read(r"<think>\boxed{5}</think>\boxed{12}", "number") == "12"
    assert read(r"<think>\boxed{5}", "number") is None
    assert read(r"<think>\boxed{5}</think> It is **12**.", "number") is None


def the_last_box(text: str, kind: str) -> str | None:
    found = re.findall(r"\\boxed\{(\d+)\}", text)
    return found[-1] if found else None


def check_options_are_written_alike(load: Callable[[Path], Any], folder: Path) -> None:
    folder.mkdir(parents=True)
    file = folder / "m.jsonl"
    file.write_text(
        '{"question_id": 1, "question": "q", "options": ["4", " 5", "6"], "answer": "B", "answer_index": 1}\n'
    )
    lines = load(file)[0].question.splitlines()[-3:]
    assert len({line[3:5].count(" ") for line in lines}) == 1


def as_they_are(path: Path) -> Any:
    from dataclasses import replace

    (problem,) = load_mmlu_pro(path)
    return [replace(problem, question=problem.question.replace("(B) 5", "(B)  5"))]


def check_a_misspelt_tag_is_refused(turns: Callable[[str], list[Any]]) -> None:
    good = f"{round_tag(1)}\n\n{agent_tag(1, 1)}: a\n\n{agent_tag(2, 1)}: b\n\n{END}"
    assert len(turns(good)) == 2
    for wrong in (good.replace("Agent 2 Solution", "agent 2 solution"), good.replace("<|Agent 1", "<| Agent 1")):
        with pytest.raises(ValueError, match="expected tags as in"):
            turns(wrong)


def of_a_trace(text: str) -> list[Any]:
    return list(DebateTrace("q", text).turns)


def between_tags(text: str) -> list[Any]:
    return [tag for tag in TAG.finditer(text) if tag["agent"]]


def check_a_judge_without_a_verdict_is_noticed(verdicts: Callable[[Any], list[bool]]) -> None:
    with pytest.raises(ValueError, match="begin with YES or NO"):
        verdicts(Rule(lambda request, rng: "<think>The user asks whether"))


def judged(answerer: Any) -> list[bool]:
    return YesNo(answerer, "Is it fine?")([("q", "a"), ("q", "b")])


def no_yes_is_a_no(answerer: Any) -> list[bool]:
    from training.debates.answerers import Request, Sampling

    replies = answerer([Request("0", "a"), Request("1", "b")], Sampling())
    return [parse_yes_no(reply.text) is True for reply in replies]


def plain(check: Callable[[Any], None]) -> Callable[[Any, Path], None]:
    return lambda implementation, _: check(implementation)


SILENT: dict[str, tuple[Callable[[Any, Path], None], Any, Any]] = {
    "an unknown multiplier is no unit": (
        plain(check_an_unknown_multiplier_is_no_unit), read_answer, any_word_is_a_unit
    ),
    "two letters are no answer": (plain(check_two_letters_are_no_answer), read_answer, the_first_letter),
    "a thought has no answer": (plain(check_a_thought_has_no_answer), read_answer, the_last_box),
    "options are written alike": (check_options_are_written_alike, load_mmlu_pro, as_they_are),
    "a misspelt tag is refused": (plain(check_a_misspelt_tag_is_refused), of_a_trace, between_tags),
    "a judge without a verdict is noticed": (
        plain(check_a_judge_without_a_verdict_is_noticed), judged, no_yes_is_a_no
    ),
}  # fmt: skip
