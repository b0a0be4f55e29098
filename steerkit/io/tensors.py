"""Safetensors files with a JSON header, which hold no code: the form of vectors, erasers and probes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerkit.io.files import atomic_path, utf8
from steerkit.io.json import canonical_json, parse_json

HEADER = "steerkit"
"""Name of the metadata entry with the header."""
MAX_CHARACTERS = 2**20


def write_tensors(path: str | Path, tensors: Mapping[str, Any], header: str) -> None:
    """Write tensors by name, and a header as JSON, as a safetensors file, atomically.

    Raises:
        ValueError: `parsed_object` would refuse the header, or UTF-8 cannot hold it; nothing is written.
    """
    from safetensors.torch import save_file

    utf8(header)
    parsed_object(header)
    with atomic_path(path) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata={HEADER: header})


def read_tensors(path: str | Path, what: str = "a steering vector") -> tuple[dict[str, str], dict[str, Any]]:
    """Return the metadata and the tensors by name of a safetensors file.

    Args:
        what: the file should hold, for the messages.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: not a complete safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"expected {what} at {path}; there is no such file. Check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"expected a safetensors file with {what} at {path}; got {error}. Save or download it again."
        ) from error


def parsed_object(text: str) -> dict[str, Any]:
    """Return a header as a dict.

    Raises:
        ValueError: more than 1 MiB, no JSON object, a duplicate key, NaN, or too deep nesting.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"expected a header of at most {MAX_CHARACTERS} characters; got {len(text)}. Keep data out of `meta`."
        )
    try:
        header = parse_json(text)
        json.dumps(header, allow_nan=False)  # refuses NaN and infinity
        canonical_json(header)  # refuses an object that is nested too deeply to be written again
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"expected JSON in the header; got {text[:40]!r} ({error}). Save or download the file again."
        ) from error
    if not isinstance(header, dict):
        raise ValueError(f"expected a JSON object in the header; got {text[:40]!r}. Save or download the file again.")
    return header
