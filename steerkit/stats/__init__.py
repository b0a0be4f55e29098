"""Statistics without a model: intervals and p-values, areas under curves, multiple comparisons.

Modules are imported on first use.
"""

from __future__ import annotations

from typing import Any

__all__ = ["areas", "controls", "latex", "mean", "multiple", "paired", "seeds"]


def __getattr__(name: str) -> Any:
    import importlib

    if name in __all__:
        return importlib.import_module(f"steerkit.stats.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
