"""Scores, parts and vectors on disk that are computed once, so that a killed analysis resumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from steerkit.io.files import sha256
from steerkit.io.json import canonical_json, read_json, write_json
from steerkit.io.progress import progress
from steerkit.io.rows import append_rows, read_rows
from steerkit.vectors.vector import SteeringVector

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


def stored_parts(path: Path | None, keys: Sequence[object], make: Callable[[int], Any]) -> list[Any]:
    """Return the part of each key; those that the file has are not made again. Equal keys share a part.

    Args:
        path: JSON-lines file that grows by a line as soon as a part is made; None keeps nothing.
        keys: what determines a part, as JSON, besides what the file belongs to.
        make: gives the part of a key by the key's index, as JSON.

    Example:
        >>> stored_parts(Path("squares.jsonl"), [2, 3], lambda index: [(2, 3)[index] ** 2])
        [[4], [9]]
    """
    hashes = [sha256(canonical_json(key)) for key in keys]
    known = {row["key"]: row["part"] for row in read_rows(path)} if path is not None and path.is_file() else {}
    with progress("parts", len({*hashes} - known.keys())) as advance:
        for index, hashed in enumerate(hashes):
            if hashed in known:
                continue
            known[hashed] = make(index)
            if path is not None:
                append_rows(path, [{"key": hashed, "part": known[hashed]}])
            advance(1)
    return [known[hashed] for hashed in hashes]


def stored_vectors(folder: Path | None, make: Callable[[], Mapping[str, SteeringVector]]) -> dict[str, SteeringVector]:
    """Return the vectors in a folder; where it has none, those that `make` gives, which are stored.

    Activations may differ by rounding when they are read again. A sweep that is resumed needs equal vectors.

    Args:
        folder: their folder; None keeps nothing.
        make: gives the vectors by name.
    """
    if folder is None:
        return dict(make())
    index = folder / "names.json"
    if not index.is_file():
        made = dict(make())
        folder.mkdir(parents=True, exist_ok=True)
        for number, vector in enumerate(made.values()):
            vector.save(folder / f"{number}.safetensors")
        write_json(index, list(made))
        return made
    return {name: SteeringVector.load(folder / f"{number}.safetensors") for number, name in enumerate(read_json(index))}
