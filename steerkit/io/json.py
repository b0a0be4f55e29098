"""JSON: canonical text that can be hashed, strict reading, atomic writing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from steerkit.io.files import read_bytes, write_text


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text, so it can be hashed and compared."""
    return json.dumps(jsonable(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def jsonable(value: Any) -> Any:
    """`value` in JSON's own types; NaN and infinities become null, paths and other objects their text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        if hasattr(value, "tolist"):
            return jsonable(value.tolist())
        return [jsonable(v) for v in value]
    if hasattr(value, "item"):
        return jsonable(value.item())
    return str(value)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinities become null."""
    write_text(path, json.dumps(jsonable(value), indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; `ValueError` naming the file and the place where it is not JSON."""
    data = read_bytes(path)
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}; got something else ({error}). Mend or delete the file.") from error


def parse_json(data: str | bytes) -> Any:
    """A JSON text, in UTF-8 with or without a byte order mark, as Python's own types.

    Raises:
        ValueError: no JSON, a key that stands twice in one object (one of the two would be lost), or too deep a nest.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r:.80} stands twice")
    return found
