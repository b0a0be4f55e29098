"""Versions of the packages that results can depend on."""

from __future__ import annotations

import contextlib
import functools
import platform
from importlib import metadata

PACKAGES = ("imad-steerkit", "torch", "transformers", "peft", "tokenizers", "numpy", "pandas")


def versions() -> dict[str, str]:
    """The versions of Python and of the installed packages in `PACKAGES`, by name."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    result = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            result[package] = metadata.version(package)
    return result
