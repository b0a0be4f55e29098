"""Wrong answers, verdicts, options and turns."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from steerkit.text import traces
from steerkit.text.traces import DebateTrace, Turn
from training.debates.answerers import Rule
from training.debates.judge import YesNo, parse_yes_no
from training.problems import answers
from training.problems.answers import read_answer
from training.problems.benchmarks import load_mmlu_pro

Read = Callable[[str, str], str | None]


def check_a_multiplier_is_not_dropped(read: Read) -> None:
    for text in ("2 lakh", "3 gross", "5 grand", r"2\text{ crore}", r"\$5\text{m}"):
        assert read(rf"\boxed{{{text}}}", "number") is None
    assert read(r"\boxed{18 dollars}", "number") == "18"


LISTED = re.compile(r"(?i:million|billion|thousand|hundred|dozen|and|or|half)s?|[kKMBT]")


def drops_what_is_not_listed(text: str, kind: str) -> str | None:
    with mock.patch.object(answers, "_is_known", lambda word: not LISTED.fullmatch(word)):
        return read_answer(text, kind)


def check_two_options_are_no_answer(read: Read) -> None:
    for text in ("A) 5, C) 7", r"\text{A. 5 or C. 7}", "(A) or (C)", "(A) is wrong; (C)"):
        assert read(rf"\boxed{{{text}}}", "option") is None
    assert read(r"\boxed{(C) interference}", "option") == "C"


def first_letter(text: str, kind: str) -> str | None:
    found = re.search(r"\b[A-J]\b", text)
    return found and found.group()


CUT = r"<think>First I get \boxed{5}. No wait, that is wrong, let me"
THOUGHT = r"<think>maybe \boxed{5}</think> The answer is **12**."
BOXED = r"<think>maybe \boxed{5}</think> \boxed{12}"


def check_a_box_in_a_thought_is_no_answer(read: Read) -> None:
    assert [read(text, "number") for text in (CUT, THOUGHT, BOXED)] == [None, None, "12"]


def last_box_of_everything(text: str, kind: str) -> str | None:
    return read_answer(re.sub("</?think>", "", text), kind)


Pairs = Sequence[tuple[str, str]]
PAIRS = [("q", "a"), ("q", "b"), ("q", "c")]
JUDGE = YesNo(Rule(lambda request, rng: ("YES", "NO", "<think>\nOkay, the user")[int(request.id)]), "Is it fine?")


def check_a_missing_verdict_is_not_a_no(judge: Callable[[Pairs], Sequence[bool | None]]) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert list(judge(PAIRS)) == [True, False, None]
    assert len(said) == 1 and "1 of 3" in str(said[0].message)


def missing_counts_as_no(pairs: Pairs) -> list[bool]:
    return [parse_yes_no(("YES", "NO", "<think>\nOkay, the user")[i]) is True for i in range(len(pairs))]


def check_white_space_does_not_give_the_option_away(load: Callable[[Path], str], folder: Path) -> None:
    folder.mkdir(parents=True)
    row = {"question_id": 1, "question": "2 + 3?", "options": ["N/A", "4", " 5"], "answer": "C", "answer_index": 2}
    (folder / "test.jsonl").write_text(json.dumps(row) + "\n")
    assert load(folder / "test.jsonl").splitlines()[2:] == ["(A) 4", "(B) 5"]


def options_of(path: Path) -> str:
    return load_mmlu_pro(path)[0].question


def options_verbatim(path: Path) -> str:
    row = json.loads(path.read_text())
    lines = [f"({letter}) {option}" for letter, option in zip("ABC", row["options"], strict=True)]
    return "\n".join([row["question"], "Options:", *lines])


TRACE = DebateTrace.of("q", [Turn(1, 1, "one"), Turn(2, 1, "two"), Turn(3, 1, "three")], "yes").text


def check_no_turn_has_the_words_of_another(turns: Callable[[str], Sequence[Turn]]) -> None:
    for tag in ("<|agent 2 solution|>", "<| Agent 2 Solution |>", "<|Agent 2 Solution>", "<|Agent 2 Solution|>"):
        try:
            found = turns(TRACE.replace("<|Agent 2 Solution|>", tag))
        except ValueError:
            continue
        assert [(turn.agent, turn.text) for turn in found] == [(1, "one"), (2, "two"), (3, "three")]


def parsed(text: str) -> Sequence[Turn]:
    return DebateTrace("q", text).turns


def parsed_with_any_tag_missing(text: str) -> Sequence[Turn]:
    with mock.patch.object(traces, "misspelt_tag", lambda _: None), mock.patch.object(traces, "_check_agent"):
        return DebateTrace("q", text).turns


def without_folder(check: Callable[[Any], None]) -> Callable[[Any, Path], None]:
    return lambda implementation, _: check(implementation)


SILENT: dict[str, tuple[Callable[[Any, Path], None], Any, Any]] = {
    "a number with an unknown multiplier is no bare number": (
        without_folder(check_a_multiplier_is_not_dropped),
        read_answer,
        drops_what_is_not_listed,
    ),
    "two options are no answer": (without_folder(check_two_options_are_no_answer), read_answer, first_letter),
    "a box in a thought is no answer": (
        without_folder(check_a_box_in_a_thought_is_no_answer),
        read_answer,
        last_box_of_everything,
    ),
    "a missing verdict is not a NO": (
        without_folder(check_a_missing_verdict_is_not_a_no),
        JUDGE,
        missing_counts_as_no,
    ),
    "options are written alike": (check_white_space_does_not_give_the_option_away, options_of, options_verbatim),
    "a misspelt tag gives no turn to another agent": (
        without_folder(check_no_turn_has_the_words_of_another),
        parsed,
        parsed_with_any_tag_missing,
    ),
}
