"""Checks of arguments that several statistics share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def check_sequence(name: str, values: object) -> None:
    if isinstance(values, str):
        raise TypeError(f"expected {name} to be a sequence; got the single str {values[:40]!r}. Wrap it in a list.")
