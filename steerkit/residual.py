"""The residual stream: the only file that registers hooks. Every hook lives inside a `with`."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn


class Leave(Exception):
    """Raised inside a forward to leave it once the deepest layer is read; caught where that forward was begun."""


def stream_of(out: Any) -> Tensor | None:
    """The stream in a block's output: the tensor itself, or the first entry of a tuple or list.

    A named tuple has none: its blocks pass on several streams (Reformer's).
    """
    several = isinstance(out, tuple | list) and not hasattr(out, "_fields")
    first = out if isinstance(out, Tensor) else out[0] if several and out else None
    return first if isinstance(first, Tensor) else None


def with_stream(out: Any, stream: Tensor) -> Any:
    """A block's output with another stream in it, of the same type."""
    return stream if isinstance(out, Tensor) else type(out)((stream, *out[1:]))


@contextlib.contextmanager
def reading(
    modules: Mapping[int, nn.Module], see: Callable[[int, Tensor | None, Tensor | None], None]
) -> Iterator[None]:
    """Call `see(layer, entered, left)` after each block: the stream that went in, and the stream that came out.

    The hooks are appended, so they see what steering wrote, whichever of the two was entered first.
    """

    def hook(layer: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        see(layer, stream_of(args) if args else stream_of(kwargs.get("hidden_states")), stream_of(out))

    with contextlib.ExitStack() as stack:
        for layer, module in modules.items():
            handle = module.register_forward_hook(
                lambda _, args, kwargs, out, layer=layer: hook(layer, args, kwargs, out), with_kwargs=True
            )
            stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def writing(modules: Mapping[int, nn.Module], change: Callable[[int, Tensor], Tensor | None]) -> Iterator[set[int]]:
    """Replace the stream after each block by `change(layer, stream)`, a new tensor; None leaves it as it is.

    Yields the layers whose blocks have run, for the caller to see that those it steers did.
    The hooks are prepended: transformers keeps hooks of its own on the blocks once hidden states were asked for, and
    those must see the steered stream.
    """

    called: set[int] = set()

    def hook(layer: int, out: Any) -> Any:
        called.add(layer)
        stream = stream_of(out)
        if stream is None:
            raise TypeError(
                f"expected block {layer} to return a tensor or a tuple that begins with one; got {type(out)}."
            )
        changed = change(layer, stream)
        return None if changed is None else with_stream(out, changed)

    with contextlib.ExitStack() as stack:
        for layer, module in modules.items():
            handle = module.register_forward_hook(lambda _, __, out, layer=layer: hook(layer, out), prepend=True)
            stack.callback(handle.remove)
        yield called


@contextlib.contextmanager
def arriving(
    owner: nn.Module, look: Callable[[Mapping[str, Any]], None], done: Callable[[Any], None] | None = None
) -> Iterator[None]:
    """Call `look(arguments)` with the named arguments of each forward of `owner`, before any of its blocks runs.

    `done(output)` is called after each forward that went through.

    The cache's length is read here and nowhere else: inside a block it may or may not include the current chunk,
    depending on the kind of layer, and raises for recurrent ones.
    """
    signature = inspect.signature(owner.forward)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        look({**signature.bind_partial(*args).arguments, **kwargs})

    with contextlib.ExitStack() as stack:
        stack.callback(owner.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if done is not None:
            stack.callback(owner.register_forward_hook(lambda _, __, out: done(out)).remove)
        yield


def check_called(called: set[int], wanted: set[int]) -> None:
    """`RuntimeError` unless all blocks that are to be steered ran: the model was changed, or skips some."""
    if missed := sorted(wanted - called):
        raise RuntimeError(
            f"expected the blocks {sorted(wanted)} to run in this forward, so that they are steered; {missed} did not. "
            "The model's layers were changed or compiled since; load it anew."
        )
