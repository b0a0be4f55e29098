"""Hooks on decoder blocks and the modules in them: the only file that registers hooks. Each lives inside a `with`."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

Key = TypeVar("Key", bound=Hashable)
Side = Literal["input", "output"]


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


def change_output(module: nn.Module, change: Callable[[nn.Module, Any], Any]) -> Any:
    """Replace what a module returns by `change(module, output)`, until the handle that is returned is removed.

    For modules of a serving engine, which owns them and outlives every `with`; all else uses the contexts below.
    """
    return module.register_forward_hook(lambda hooked, _args, output: change(hooked, output))


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


@contextlib.contextmanager
def wrapped_method(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace a method of one object by `wrap(method)` inside the `with`; nothing happens if it has no such method.

    A wrapped method sees every call, also those that run no hooks: a guard of hooks that is not a hook.
    """
    method = getattr(owner, name, None)
    if method is None:
        yield
        return
    own = vars(owner).get(name)
    setattr(owner, name, functools.wraps(method)(wrap(method)))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextlib.contextmanager
def skipped(modules: Mapping[int, nn.Module]) -> Iterator[None]:
    """Let each block return the stream that enters it, without computing anything.

    Only for models whose blocks return a tensor; the caller verifies what follows.
    """

    def passing(_: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: args[0] if args else kwargs["hidden_states"]

    with contextlib.ExitStack() as stack:
        for module in modules.values():
            stack.enter_context(wrapped_method(module, "forward", passing))
        yield


@contextlib.contextmanager
def counted_forwards(model: nn.Module) -> Iterator[list[int]]:
    """Count the forwards of a model inside the `with`, from outside its hooks; yields a list with the count."""
    count = [0]

    def counting(forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            count[0] += 1
            return output

        return counted

    with wrapped_method(model, "forward", counting):
        yield count


@dataclass(frozen=True, eq=False)
class HookPoint:
    """Where a site of one block is read and written.

    With t the hooked tensor and h the block's input, the value of the site is `scale * t`, or `h + scale * t` where
    `adds`. A new value is written by changing t.

    Args:
        module: the module whose input or output holds t.
        side: which of the two.
        block: the block, whose input gives h and the shape.
        scale: what the block multiplies t by before it adds it to the stream.
        adds: whether the site is the sum (`resid_mid`).
        flat: whether t is `[batch * pos, width]`.
    """

    module: nn.Module
    side: Side
    block: nn.Module
    scale: float = 1.0
    adds: bool = False
    flat: bool = False

    def value(self, tensor: Tensor, entered: Tensor | None) -> Tensor:
        """The value of the site, `[batch, pos, width]`."""
        if self.flat:
            assert entered is not None
            tensor = tensor.unflatten(0, entered.shape[:2])
        if self.scale != 1:
            tensor = tensor * self.scale
        return tensor if not self.adds or entered is None else entered.to(tensor.device) + tensor

    def written(self, tensor: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """The hooked tensor for which the value is `new` instead of `old`; the same bits where both are equal."""
        if not self.adds and self.scale == 1:
            return new.reshape(tensor.shape)
        return tensor + ((new - old) / self.scale).to(tensor.dtype).reshape(tensor.shape)


@contextlib.contextmanager
def edit_points(points: Mapping[Key, HookPoint], edit: Callable[[Key, Tensor], Tensor | None]) -> Iterator[set[Key]]:
    """Replace the value of each point by `edit(key, value)`.

    Args:
        points: by key, for instance (site, layer).
        edit: gets the value `[batch, pos, width]`; returns a new tensor of this shape, or None for no change.

    Yields:
        The set of keys whose hooks have run, for `check_called`.

    Of several contexts the inner one acts first.
    """
    with _visiting(points, edit, edits=True) as called:
        yield called


@contextlib.contextmanager
def observe_points(points: Mapping[Key, HookPoint], observe: Callable[[Key, Tensor], None]) -> Iterator[set[Key]]:
    """Call `observe(key, value)` with the value of each point, after all edits of it, whatever the order of contexts.

    Yields:
        The set of keys whose hooks have run. The value may be the model's own tensor, which it may change in place
        later in the forward: copy what is kept.
    """
    with _visiting(points, observe, edits=False) as called:
        yield called


@contextlib.contextmanager
def _visiting(
    points: Mapping[Key, HookPoint], act: Callable[[Key, Tensor], Tensor | None], edits: bool
) -> Iterator[set[Key]]:
    called: set[Key] = set()
    entered: dict[Key, Tensor] = {}

    def visit(key: Key, point: HookPoint, tensor: Tensor) -> Tensor | None:
        called.add(key)
        old = point.value(tensor, entered.pop(key, None))
        new = act(key, old)
        return None if new is None else point.written(tensor, old, new)

    with contextlib.ExitStack() as stack:
        for key, point in points.items():
            # sums come after the summand of the same module, so that an edited sum is never read as summand
            rank = 2 * point.adds + (not edits)
            visitor = functools.partial(visit, key, point)
            stack.enter_context(_visitor(point.module, point.side, rank, visitor))
            if point.adds or point.flat:
                keep = functools.partial(entered.__setitem__, key)
                stack.enter_context(_visitor(point.block, "input", KEPT, keep))
        yield called


KEPT = 4
"""The rank of what keeps a block's input: after all edits of it."""
Visitors = list[tuple[int, int, Callable[[Tensor], Tensor | None]]]
_visitors: weakref.WeakKeyDictionary[nn.Module, dict[Side, tuple[Visitors, Any]]] = weakref.WeakKeyDictionary()
_order = count()


@contextlib.contextmanager
def _visitor(module: nn.Module, side: Side, rank: int, visit: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Let `visit` read, and replace, a module's input or output: by rank, and of equal rank the last to come first."""
    of_module = _visitors.setdefault(module, {})
    if side not in of_module:
        new: Visitors = []
        of_module[side] = new, _call_visitors(module, side, new)
    visitors, handle = of_module[side]
    entry = (rank, -next(_order), visit)
    visitors.append(entry)
    visitors.sort(key=lambda one: one[:2])
    try:
        yield
    finally:
        visitors.remove(entry)
        if not visitors:
            handle.remove()
            del of_module[side]


def _call_visitors(module: nn.Module, side: Side, visitors: Visitors) -> Any:
    """Hook a module's input or output, and return the handle."""

    def visited(stream: Tensor | None) -> Tensor | None:
        """The changed tensor; None where nothing changes."""
        if stream is None:
            raise TypeError(f"expected a tensor as {side} of {type(module).__name__}; got none. Load the model again.")
        before = stream
        for _, _, visit in tuple(visitors):
            new = visit(stream)
            stream = stream if new is None else new
        return None if stream is before else stream

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stream = visited(stream_of(args) if args else stream_of(kwargs.get("hidden_states")))
        if stream is None:
            return None
        return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream})

    def after(_: nn.Module, __: Any, out: Any) -> Any:
        stream = visited(stream_of(out))
        return None if stream is None else with_stream(out, stream)

    if side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after, prepend=True)


@contextlib.contextmanager
def observe_modules(
    modules: Mapping[Key, nn.Module],
    before: Callable[[Key, tuple[Any, ...], dict[str, Any]], None],
    after: Callable[[Key, Any], None],
) -> Iterator[None]:
    """Call `before(key, args, kwargs)` before and `after(key, output)` after each forward of these modules."""
    with contextlib.ExitStack() as stack:
        for key, module in modules.items():
            entering = module.register_forward_pre_hook(
                lambda _, args, kwargs, key=key: before(key, args, kwargs), with_kwargs=True
            )
            stack.callback(entering.remove)
            stack.callback(module.register_forward_hook(lambda _, __, out, key=key: after(key, out)).remove)
        yield


def check_called(called: Set[Any], hooked: Set[Any]) -> None:
    """`RuntimeError` unless the hooks of all these blocks, or (site, block), ran in a forward."""
    if missed := sorted(hooked - called):
        raise RuntimeError(
            f"expected the hooks of the blocks {sorted(hooked)} to run in this forward; those of {missed} did not. The "
            "blocks were replaced or compiled since loading, or the model calls `block.forward(...)`, which runs no "
            "hooks. Load the model again, or call the blocks themselves."
        )
