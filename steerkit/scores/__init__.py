"""Scores of texts: ROUGE-L, repetition, perplexity, KL divergence.

Modules are imported on first use.
"""

from __future__ import annotations

from typing import Any

__all__ = ["fluency", "judge", "text"]


def __getattr__(name: str) -> Any:
    import importlib

    if name in __all__:
        return importlib.import_module(f"steerkit.scores.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
