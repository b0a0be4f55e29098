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
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Problem:
    """A question and what is known of its answer.

    Args:
        id: names the problem; a generated question has the same id wherever it is drawn.
        question: what is asked, with the options where there are some.
        gold: the right answer in canonical form (`training.answers`); None for an open question and no other.
        kind: what the answer is, one of `KINDS`: `number`, `option`, `word`, `pair` or `open`.
        family: where the problem comes from, e.g. `arithmetic` or `bbh/web_of_lies`.

    Raises:
        ValueError: an empty question, a kind that does not exist, or a gold answer that is not canonical.
    """

    id: str
    question: str
    gold: str | None
    kind: str
    family: str

    def __post_init__(self) -> None:
        if not isinstance(self.question, str) or not self.question.strip():
            raise ValueError(f"expected a question in words; got {self.question!r}.")
        if self.kind not in KINDS:
            raise ValueError(f"expected a kind of {KINDS}; got {self.kind!r}.")
        if (self.kind == "open") != (self.gold is None):
            raise ValueError(f"expected None as gold answer of an open question only; got {self.gold!r} ({self.kind}).")
        if self.gold is not None and self.gold != (wanted := canonical(str(self.gold), self.kind)):
            raise ValueError(f"expected the gold answer in canonical form, {wanted!r}; got {self.gold!r}.")


def read_problems(path: str | Path) -> list[Problem]:
    """Read problems from JSON lines with `Problem`'s fields as keys.

    Raises:
        ValueError: no problems, or a line that is none; the message names file and row.
    """
    names = {field.name for field in fields(Problem)}

    def problem(number: int, row: Mapping[str, Any]) -> Problem:
        if set(row) != names:
            raise ValueError(f"expected the keys {sorted(names)}; got {sorted(row)}.")
        return Problem(**row)

    columns = {"id": str, "question": str, "kind": str, "family": str}
    return _read(path, read_rows(path, complete=True), columns, problem)


def write_problems(path: str | Path, problems: Iterable[Problem]) -> None:
    """Write problems as JSON lines, atomically; `read_problems` gives back equal ones."""
    write_text(path, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in problems))


def _read(
    source: str | Path, rows: Any, columns: Mapping[str, type], problem: Callable[[int, Mapping[str, Any]], Problem]
) -> list[Problem]:
    """A problem per row, counted from 1, once its columns are checked; a row that is refused is named."""
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"expected a list of at least one problem in {source}; found none. Look at its layout.")
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
