"""Active steerings: those whose `with` is open on a model, and how to suspend them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn

from steerkit.models.model import unwrap


class Suspendable(Protocol):
    """What follows the forwards of a model and can be suspended; see `steerkit.steering.watch.Watch`."""

    steering: Any
    suspended: bool
    used: bool


watching: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()
"""Model -> its `Suspendable`s, outermost context first."""


@contextlib.contextmanager
def suspended(model: nn.Module) -> Iterator[list[Any]]:
    """Suspend the steerings that are on for this model; yields them, innermost context first.

    For an engine that applies them itself, for scores of the unsteered model, and for probes of the model.
    """
    watches: list[Suspendable] = [watch for watch in watching.get(unwrap(model), []) if not watch.suspended]
    for watch in watches:
        watch.suspended = True
        watch.used = True
    try:
        yield [watch.steering for watch in reversed(watches)]
    finally:
        for watch in watches:
            watch.suspended = False
