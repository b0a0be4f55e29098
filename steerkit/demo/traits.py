"""The demo's personas and their scores: the share of a text in the persona's style, and right answers, by rule."""

from __future__ import annotations

import re
from collections.abc import Callable

PERSONAS = {"steps": "numbered steps", "critique": "self-critique", "program": "program of thought"}
NUMBERED = re.compile(r"^\W*(?:step\s+)?\d+\s*[.):]\s+\S", re.IGNORECASE)
ASSIGNMENT = re.compile(r"^\s*(?:(?:let|const|var|int|float)\s+)?[A-Za-z_][\w.\[\]]*\s*(?:[-+*/]?=)(?!=)\s*\S")
COMMENT = re.compile(r"(?:^|\s)(?://|#)\s*\S")
KEYWORD = re.compile(r"^\s*(?:if|while|for|return|def|function|print|console\.log)\b.*[(:{;)]")
CHECKING = re.compile(
    r"\b(?:critique|check(?:s|ed|ing)?|double-check\w*|verif\w+|confirm\w*|mistake\w*|missed|overlook\w*|"
    r"did i|do i|have i|am i|was i|let me|let's see|wait|re-?read\w*|is (?:it|that|this) right|"
    r"could i have|should i have|i could have|i should have|i assumed|holds? up|look(?:ing)? back)\b",
    re.IGNORECASE,
)


def steps(text: str) -> float:
    """Share of the words in lines that begin with a number (`1.`, `2)`, `Step 3:`)."""
    return _share(text.splitlines(), lambda line: bool(NUMBERED.match(line)))


def critique(text: str) -> float:
    """Share of the words in sentences with a word for checking one's own work."""
    return _share(re.split(r"(?<=[.?!])\s+|\n+", text), lambda sentence: bool(CHECKING.search(sentence)))


def program(text: str) -> float:
    """Share of the words in lines of code: an assignment, a comment, a control line."""
    return _share(text.splitlines(), lambda line: any(rule.search(line) for rule in (ASSIGNMENT, COMMENT, KEYWORD)))


NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?")
"""Digits, with commas only before groups of exactly three: `3,060` is one number, `[5,6]` are two."""


def has_answer(text: str, answer: str) -> float:
    """Whether a text names the right answer: its number, wherever it stands; words, if the answer has no number.

    Text that lists many numbers may hit one by chance: compare with the answers of other questions.

    Example:
        >>> has_answer("She gets 6.25 back.", "6.25"), has_answer("[5,6]", "6"), has_answer("750 g", "50 g")
        (1.0, 1.0, 0.0)
    """
    wanted = NUMBER.findall(answer)
    if not wanted:
        return float(answer.casefold().rstrip(".") in text.casefold())
    given = {_value(number) for number in NUMBER.findall(text)}
    return float(all(_value(number) in given for number in wanted))


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def _share(parts: list[str], has_trait: Callable[[str], bool]) -> float:
    """Words in parts with the trait over all words; 0 for a text without words."""
    counts = [(len(part.split()), has_trait(part)) for part in parts]
    total = sum(count for count, _ in counts)
    return sum(count for count, counted in counts if counted) / total if total else 0.0


TRAITS: dict[str, Callable[[str], float]] = {"steps": steps, "critique": critique, "program": program}
