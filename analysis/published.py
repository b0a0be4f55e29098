"""Tables for `results/`: their metadata names a checkpoint without the path of one machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def published(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata with the name of each checkpoint in place of its absolute path, nested ones too.

    Example:
        >>> published({"checkpoint": "/models/small.gguf"})
        {'checkpoint': 'small.gguf'}
    """

    def named(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return published(value)
        is_path = key == "checkpoint" and isinstance(value, str) and Path(value).is_absolute()
        return Path(value).name if is_path else value

    return {key: named(key, value) for key, value in meta.items()}
