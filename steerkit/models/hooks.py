"""Hooks on decoder blocks: the only file that registers hooks. Every hook lives inside a `with`."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn


class StopForward(Exception):
    """Raised inside a hook to end a forward after the deepest layer that is read; the forward's caller catches it."""


def stream_of(out: Any) -> Tensor | None:
    """The residual stream in a block's output: the tensor itself, or the first entry of a tuple or list.

    None if there is none, and for a named tuple: blocks that return one have several streams (Reformer's).
    """
    if isinstance(out, tuple | list) and not hasattr(out, "_fields"):
        out = out[0] if out else None
    return out if isinstance(out, Tensor) else None


def with_stream(out: Any, stream: Tensor) -> Any:
    """A block's output with its residual stream replaced by `stream`, of the same type as before."""
    return stream if isinstance(out, Tensor) else type(out)((stream, *out[1:]))


@contextlib.contextmanager
def observe_streams(
    modules: Mapping[int, nn.Module], observe: Callable[[int, Tensor | None, Tensor | None], None]
) -> Iterator[None]:
    """Call `observe(layer, entered, left)` after each block, with the streams before and after it.

    Args:
        modules: the blocks by layer.
        observe: gets the streams as `[batch, pos, d_model]`, or None where a block has no single stream.

    The hooks are appended, so they see the steered stream, independent of the order of the two contexts.
    """

    def hook(layer: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        observe(layer, stream_of(args) if args else stream_of(kwargs.get("hidden_states")), stream_of(out))

    with contextlib.ExitStack() as stack:
        for layer, module in modules.items():
            handle = module.register_forward_hook(
                lambda _, args, kwargs, out, layer=layer: hook(layer, args, kwargs, out), with_kwargs=True
            )
            stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def edit_streams(modules: Mapping[int, nn.Module], edit: Callable[[int, Tensor], Tensor | None]) -> Iterator[set[int]]:
    """Replace the stream after each block by `edit(layer, stream)`.

    Args:
        modules: the blocks by layer.
        edit: gets the stream `[batch, pos, d_model]`; returns a new tensor of this shape, or None for no change.

    Yields:
        The set of layers whose blocks have run, for `check_called`.

    Raises:
        TypeError: a block returns no single stream.

    The hooks are prepended: transformers keeps its own hooks on the blocks once hidden states were requested, and
    those must see the steered stream.
    """
    called: set[int] = set()

    def hook(layer: int, out: Any) -> Any:
        called.add(layer)
        stream = stream_of(out)
        if stream is None:
            raise TypeError(
                f"expected block {layer} to return a tensor or a tuple that begins with one; got {type(out)}. Load "
                "the model again, or pass another path of blocks."
            )
        edited = edit(layer, stream)
        return None if edited is None else with_stream(out, edited)

    with contextlib.ExitStack() as stack:
        for layer, module in modules.items():
            handle = module.register_forward_hook(lambda _, __, out, layer=layer: hook(layer, out), prepend=True)
            stack.callback(handle.remove)
        yield called


@contextlib.contextmanager
def observe_calls(
    owner: nn.Module, before: Callable[[Mapping[str, Any]], None], after: Callable[[Any], None] | None = None
) -> Iterator[None]:
    """Call `before(arguments)` before each forward of `owner`, and `after(output)` after each that did not raise.

    Args:
        owner: the module that runs the blocks.
        before: gets the arguments of the forward by name.
        after: gets the output of the forward.

    The length of the KV cache must be read in `before`. Inside a block it may or may not include the current chunk,
    depending on the kind of layer, and recurrent layers raise.
    """
    signature = inspect.signature(owner.forward)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before({**signature.bind_partial(*args).arguments, **kwargs})

    with contextlib.ExitStack() as stack:
        stack.callback(owner.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if after is not None:
            stack.callback(owner.register_forward_hook(lambda _, __, out: after(out)).remove)
        yield


def check_called(called: set[int], steered: set[int]) -> None:
    """`RuntimeError` unless every steered block ran: blocks that were replaced, compiled or skipped do not."""
    if missed := sorted(steered - called):
        raise RuntimeError(
            f"expected the steered blocks {sorted(steered)} to run in this forward; {missed} did not. The model's "
            "layers were changed or compiled since loading. Load the model again."
        )
