"""The checker that the tests put on every function of the library: shapes and dtypes of tensors, nothing else.

Arguments of a wrong type must reach the library, whose own error is under test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from beartype import beartype

F = TypeVar("F", bound=Callable[..., object])


def checked(function: F) -> F:
    """`function`, type-checked where its annotation is a jaxtyping shape."""
    notes = getattr(function, "__annotations__", {})
    function.__annotations__ = {name: note for name, note in notes.items() if is_shape(note)}
    return beartype(function)


def is_shape(note: object) -> bool:
    """Whether an annotation is one shape, and not a choice that has one among others."""
    return any(mark in str(note) for mark in ("Float[", "Int[", "jaxtyping")) and " | " not in str(note)
