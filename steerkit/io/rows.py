"""JSON-lines files that grow row by row and survive a killed process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from steerkit.io.files import read_bytes, utf8
from steerkit.io.json import jsonable, parse_json


def append_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a JSON-lines file and sync it to disk, so that they outlive the process.

    A torn last line (a write that was cut off) is dropped before the first new row is written; one that lacks only its
    newline is kept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(utf8(json.dumps(jsonable(row), ensure_ascii=False)) + b"\n" for row in rows)
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                whole, _, torn = file.read().rpartition(b"\n")
                if _is_row(torn):
                    data = b"\n" + data
                else:
                    file.truncate(len(whole) + 1 if whole else 0)
        file.seek(0, os.SEEK_END)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: str | Path, complete: bool = False) -> list[dict[str, Any]]:
    """Read a JSON-lines file of objects.

    Args:
        complete: refuse a torn last line (no newline at its end, and no whole object), which is left out otherwise: a
            log that was being written may end in one, a file that somebody gives should not.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: a whole line is not a JSON object; the message names file and line.
    """
    lines = read_bytes(path).split(b"\n")
    torn = lines.pop()  # what follows the last newline: nothing, a line that was cut off, or one written by hand
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if torn.strip() and (complete or _is_row(torn)):
        rows.append(_row(path, len(lines) + 1, torn))
    return rows


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _row(path: str | Path, number: int, line: bytes) -> dict[str, Any]:
    why = ""
    try:
        row = parse_json(line)
    except ValueError as error:
        row, why = None, f" ({error})"
    if not isinstance(row, dict):
        raise ValueError(
            f"expected a JSON object in {path}, line {number}; got {line[:80]!r}{why}. Mend or delete that line."
        )
    return row
