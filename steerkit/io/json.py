"""JSON: canonical text that can be hashed, strict reading, atomic writing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from steerkit.io.files import read_bytes, write_text


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text, so it can be hashed and compared.

    Example: `canonical_json({"b": 1, "a": [2.5]})` is `'{"a":[2.5],"b":1}'`.
    """
    return json.dumps(jsonable(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def short_json(value: Any, width: int = 120) -> str:
    """Canonical JSON of at most `width` characters, for messages; longer text is cut and its length is given."""
    text = canonical_json(value)
    return text if len(text) <= width else f"{text[: width - 12]}... ({len(text)} characters)"


def jsonable(value: Any) -> Any:
    """`value` in JSON's own types; NaN and infinities become null, paths and other objects become strings."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        if hasattr(value, "tolist"):
            return jsonable(value.tolist())
        return [jsonable(entry) for entry in value]
    if hasattr(value, "item"):
        return jsonable(value.item())
    return str(value)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinities become null."""
    write_text(path, json.dumps(jsonable(value), indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file, in UTF-8 with or without a byte order mark.

    Raises:
        FileNotFoundError, IsADirectoryError: `path` is no file.
        ValueError: the file is not JSON; the message names the file and the reason.
    """
    data = read_bytes(path)
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(
            f"expected JSON in {path}; got something else ({error}). Correct or delete the file."
        ) from error


DEEPEST = 100


def parse_json(data: str | bytes) -> Any:
    """Parse a JSON text, in UTF-8 with or without a byte order mark, into Python's own types.

    Raises:
        ValueError: no JSON, a duplicate key in an object (one of the two values would be lost), or too deep nesting.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        parsed = json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if text.count("[") + text.count("{") > DEEPEST and depth_of(parsed) > DEEPEST:
        raise ValueError("it is nested too deeply")
    return parsed


def depth_of(value: Any) -> int:
    """How many lists and objects of a JSON value are inside one another; Python's own limit depends on the caller."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object as a dict; `ValueError` for a duplicate key.

    Example: `json.loads(text, object_pairs_hook=unique_keys)`
    """
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key {duplicate!r:.80}")
    return result
