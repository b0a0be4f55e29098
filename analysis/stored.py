"""Scores on disk: rows that are known by a key and are computed once, so that a killed analysis resumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from steerkit.io.files import sha256
from steerkit.io.json import canonical_json
from steerkit.io.progress import progress
from steerkit.io.rows import append_rows, read_rows

T = TypeVar("T")
AT_ONCE = 192
"""Cases between two writes: about a minute of a model of 135 million parameters on one core."""


def stored_scores(
    path: Path | None, keys: Sequence[object], cases: Sequence[T], score: Callable[[Sequence[T]], Sequence[float]]
) -> list[float]:
    """Return the score of each case; those that the file has are not computed again.

    Args:
        path: JSON-lines file that grows; None keeps nothing.
        keys: what determines a case's score, as JSON, besides what the file belongs to.
        cases: one for each key.
        score: the scores of several cases.

    Example:
        >>> stored_scores(Path("lengths.jsonl"), ["a", "bc"], ["a", "bc"], lambda texts: [len(text) for text in texts])
        [1, 2]
    """
    hashes = [sha256(canonical_json(key)) for key in keys]
    known = {row["key"]: row["score"] for row in read_rows(path)} if path is not None and path.is_file() else {}
    first = {hashed: index for index, hashed in reversed(list(enumerate(hashes)))}
    missing = sorted(index for hashed, index in first.items() if hashed not in known)
    size = len(missing) if path is None else AT_ONCE
    with progress("scores", len(missing)) as advance:
        for start in range(0, len(missing), size or 1):
            some = missing[start : start + size]
            found = score([cases[index] for index in some])
            rows = [
                {"key": hashes[index], "score": repr(float(value))} for index, value in zip(some, found, strict=True)
            ]
            if path is not None:
                append_rows(path, rows)
            known |= {row["key"]: row["score"] for row in rows}
            advance(len(some))
    return [float(known[hashed]) for hashed in hashes]
