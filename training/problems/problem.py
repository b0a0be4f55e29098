"""Problems: questions with their right answers, read from and written to JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from steerkit.io.files import write_text
from steerkit.io.rows import read_rows
from training.problems.answers import KINDS as ANSWER_KINDS
from training.problems.answers import canonical

KINDS = (*ANSWER_KINDS, "open")
Kinds = str | Mapping[str, str]
"""The kind of all answers, or of the answers to each question."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Problem:
    """A question and its right answer.

    Args:
        id: unique name; a generated question has the same id in every draw.
        question: text of the question, with its options if it has some.
        gold: right answer in canonical form (`training.problems.answers`); None for an open question, and only there.
        kind: type of the answer, one of `KINDS`: `number`, `option`, `word`, `pair` or `open`.
        family: source of the problem, e.g. `arithmetic` or `bbh/web_of_lies`.

    Raises:
        ValueError: an empty question, an unknown kind, or a gold answer that is not canonical.

    Example:
        >>> Problem("sum/1", "What is 53 + 35?", "88", "number", "addition").gold
        '88'
    """

    id: str
    question: str
    gold: str | None
    kind: str
    family: str

    def __post_init__(self) -> None:
        if not isinstance(self.question, str) or not self.question.strip():
            raise ValueError(f"expected a question in words; got {self.question!r}. Pass a non-empty string.")
        if self.kind not in KINDS:
            raise ValueError(f"expected a kind of {KINDS}; got {self.kind!r}. Pass one of these.")
        if (self.kind == "open") != (self.gold is None):
            raise ValueError(
                f"expected None as gold answer of an open question only; got {self.gold!r} ({self.kind}). "
                "Pass the right answer, or kind='open'."
            )
        if self.gold is not None and self.gold != (wanted := canonical(str(self.gold), self.kind)):
            raise ValueError(
                f"expected the gold answer in canonical form, {wanted!r}; got {self.gold!r}. Pass the canonical form."
            )


def kind_for(kind: Kinds, question: str) -> str:
    """Return the kind of the answers to a question."""
    return kind if isinstance(kind, str) else kind[question]


def read_problems(path: str | Path) -> list[Problem]:
    """Read problems from JSON lines with the fields of `Problem` as keys.

    Only `question` is required. Without `gold` the question is open. `kind` is `number` by default, or `open` without a
    gold answer. `id` is by default the file's name and the row's number, `family` the file's name. A gold answer is
    brought into canonical form, so `1,000` and 1000 are `1000`.

    Raises:
        ValueError: an empty file, a row that is not a problem, or two with the same id; the message names file and row.

    Example:
        >>> write_problems("problems.jsonl", problems)
        >>> read_problems("problems.jsonl") == problems
        True
    """
    names = {field.name for field in fields(Problem)}
    stem = Path(path).stem

    def problem(number: int, row: Mapping[str, Any]) -> Problem:
        if unknown := sorted(set(row) - names):
            raise ValueError(f"expected keys among {sorted(names)}; got {unknown}. Rename or remove them.")
        gold = row.get("gold")
        kind = row.get("kind", "open" if gold is None else "number")
        if gold is not None and kind in ANSWER_KINDS:
            gold = canonical(str(gold), kind)
        return Problem(row.get("id", f"{stem}/{number}"), row["question"], gold, kind, row.get("family", stem))

    problems = problems_from_rows(path, read_rows(path, complete=True), {"question": str}, problem)
    seen: dict[str, int] = {}
    for number, one in enumerate(problems, 1):
        if not all(isinstance(text, str) for text in (one.id, one.family)):
            raise ValueError(f"{path}, row {number}: expected id and family as text; got {one.id!r}, {one.family!r}.")
        if one.id in seen:
            raise ValueError(
                f"{path}, row {number}: expected an id of its own; got {one.id!r}, that of row {seen[one.id]}. "
                "Rename it."
            )
        seen[one.id] = number
    return problems


def write_problems(path: str | Path, problems: Iterable[Problem]) -> None:
    """Write problems as JSON lines, atomically; `read_problems` returns equal ones."""
    write_text(path, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in problems))


def problems_from_rows(
    source: str | Path, rows: Any, columns: Mapping[str, type], problem: Callable[[int, Mapping[str, Any]], Problem]
) -> list[Problem]:
    """Return one problem per row after checking its columns.

    Args:
        source: file or data set that the errors name.
        rows: list of mappings, one per problem.
        columns: required keys and the type of each value.
        problem: `(row number from 1, row) -> problem`; it may raise ValueError.

    Raises:
        ValueError: no rows, or a row that is not a problem; the message names source and row.
    """
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"expected a list of at least one problem in {source}; found none. Check the file's layout.")
    wanted = ", ".join(f"{key}: {kind.__name__}" for key, kind in columns.items())
    problems = []
    for number, row in enumerate(rows, 1):
        try:
            if not isinstance(row, dict) or not all(isinstance(row.get(key), kind) for key, kind in columns.items()):
                raise ValueError(f"expected an object with {wanted}; got {row!r:.200}.")
            problems.append(problem(number, row))
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
    return problems
