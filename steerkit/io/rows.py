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
    """Append rows to a JSON-lines file and sync it to disk, so that they survive the end of the process.

    An incomplete last line (a write that was cut off) is dropped before the first new row is written. A complete one
    that lacks only its newline is kept.

    Raises:
        ValueError: a string that UTF-8 cannot hold; nothing is written.

    Example: `append_rows("rows.jsonl", [{"key": 1, "text": "a"}])`
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
                complete, _, last = file.read().rpartition(b"\n")
                if _is_row(last):
                    data = b"\n" + data
                else:
                    file.truncate(len(complete) + 1 if complete else 0)
        file.seek(0, os.SEEK_END)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: str | Path, complete: bool = False) -> list[dict[str, Any]]:
    """Read a JSON-lines file of objects.

    Args:
        complete: True raises on an incomplete last line (no newline, and no complete object); False drops that line.
            Pass True for input files. A log of an interrupted run may end in such a line.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: a complete line is not a JSON object; the message names file and line.
    """
    lines = read_bytes(path).split(b"\n")
    last = lines.pop()  # after the last newline: empty, a line that was cut off, or one without its newline
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if last.strip() and (complete or _is_row(last)):
        rows.append(_row(path, len(lines) + 1, last))
    return rows


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _row(path: str | Path, number: int, line: bytes) -> dict[str, Any]:
    reason = ""
    try:
        row = parse_json(line)
    except ValueError as error:
        row = None
        reason = f" ({error})"
    if not isinstance(row, dict):
        raise ValueError(
            f"expected a JSON object in {path}, line {number}; got {line[:80]!r}{reason}. Correct or delete that line."
        )
    return row
