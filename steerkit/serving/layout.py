"""Layout: where the blocks of a served model are, and what part of a block's output is the stream.

vLLM's blocks return the stream in several forms: as two summands (hidden, residual), as a pair whose first part alone
is the stream, or as one tensor. Adding a vector to the first tensor is right for all of them; to read the stream, which
`ablate` and capture do, the form must be known. A probe decides: in a dummy run the last block's output is replaced by
fixed random tensors, and what follows the last block must not tell apart two outputs that are the same stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steerkit.models.hooks import change_output

Form = Literal["sum", "first", "tensor"]


class UnknownLayout(RuntimeError):
    """The model's blocks could not be found, or what they return could not be told."""


@dataclass(frozen=True)
class Layout:
    """The blocks of a model.

    Args:
        blocks: in their order.
        form: `sum`: a block returns two summands of the stream; `first`: a tuple whose first part is the stream;
            `tensor`: the stream.
    """

    blocks: tuple[nn.Module, ...]
    form: Form

    def split(self, output: Any) -> tuple[Tensor, Tensor | None]:
        """What a block returned, as the tensor to be changed and the other summand of the stream, if there is one."""
        if self.form == "tensor":
            return output, None
        return output[0], output[1] if self.form == "sum" else None

    def joined(self, output: Any, hidden: Tensor) -> Any:
        """What a block returned, with another first tensor."""
        return hidden if self.form == "tensor" else (hidden, *output[1:])


def find_blocks(model: nn.Module, n_layers: int) -> tuple[nn.Module, ...]:
    """The decoder blocks: the one list of `n_layers` modules of the same kind that lies nearest to the root.

    Raises:
        UnknownLayout: there is no such list, or several at the same depth.
    """
    lists = [
        (name.count("."), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    nearest = [entry for entry in lists if entry[0] == min(lists, key=lambda one: one[0])[0]] if lists else []
    if len(nearest) != 1:
        names = [name for _, name, _ in lists]
        raise UnknownLayout(
            f"expected one list of {n_layers} blocks in {type(model).__name__}; got {names or 'none'}. This model "
            "cannot be steered through vLLM; use steerkit's own engine."
        )
    return tuple(nearest[0][2])


def probe(blocks: tuple[nn.Module, ...], run: Callable[[], Tensor]) -> Layout:
    """The layout of a model, found by running it.

    Args:
        blocks: see `find_blocks`.
        run: runs the model on a few tokens, without compilation, and returns what follows the last block.

    Raises:
        UnknownLayout: the last block's output has another form, or neither reading of a pair fits.
    """
    seen: list[Any] = []

    def keep(output: Any) -> Any:
        seen.append(output)
        return output

    with _replaced(blocks[-1], keep):
        run()
    output = seen[-1]
    if isinstance(output, Tensor):
        layout = Layout(blocks, "tensor")
    elif isinstance(output, tuple) and isinstance(output[0], Tensor):
        layout = Layout(blocks, _form_of_pair(blocks[-1], output, run))
    else:
        raise UnknownLayout(
            f"expected a block that returns a tensor or a tuple of them; {type(blocks[-1]).__name__} returned "
            f"{type(output).__name__}. This model cannot be steered through vLLM; use steerkit's own engine."
        )
    _check_arrival(layout, run)
    return layout


def _form_of_pair(block: nn.Module, output: tuple[Any, ...], run: Callable[[], Tensor]) -> Form:
    if len(output) < 2 or not isinstance(output[1], Tensor):
        return "first"
    hidden, residual = _random_like(output[0], 0), _random_like(output[1], 1)
    zero = torch.zeros_like(residual)

    def after(first: Tensor, second: Tensor) -> Tensor:
        with _replaced(block, lambda out: (first.clone(), second.clone(), *out[2:])):
            return run()

    pair = after(hidden, residual)
    fits = {"sum": _close(pair, after(hidden + residual, zero)), "first": _close(pair, after(hidden, zero))}
    found = [form for form, fit in fits.items() if fit]
    if len(found) != 1:
        raise UnknownLayout(
            f"expected {type(block).__name__} to return two summands of the stream, or the stream first; what follows "
            f"it agrees with {found or 'neither'}. Steer this model by steerkit's own engine."
        )
    return "sum" if found == ["sum"] else "first"


def _check_arrival(layout: Layout, run: Callable[[], Tensor]) -> None:
    """Check that what is added to a block's output reaches what follows it, and that adding nothing changes nothing."""
    block = layout.blocks[-1]
    fixed: list[Any] = []

    def hold(output: Any) -> Any:
        hidden, residual = layout.split(output)
        fixed.append(_random_like(hidden, 2))
        other = output if layout.form == "tensor" else (hidden, *(_random_like(hidden, 3),), *output[2:])
        return layout.joined(other if residual is not None else output, fixed[-1].clone())

    def after(change: Callable[[Tensor], Tensor]) -> Tensor:
        def replace(output: Any) -> Any:
            held = hold(output)
            return layout.joined(held, change(layout.split(held)[0]))

        with _replaced(block, replace):
            return run()

    plain, again, pushed = after(lambda h: h), after(lambda h: h + 0.0 * h), after(lambda h: h + _random_like(h, 4))
    if not torch.equal(plain, again) or _close(plain, pushed):
        raise UnknownLayout(
            f"expected a change of {type(block).__name__}'s output to reach what follows it, and no other; it did not. "
            "This model cannot be steered through vLLM; use steerkit's own engine."
        )


def _random_like(tensor: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator).to(tensor)


def _close(first: Tensor, second: Tensor) -> bool:
    tolerance = 1e-4 if first.dtype is torch.float32 else 3e-2
    wide, other = first.float(), second.float()
    return bool((wide - other).norm() <= tolerance * other.norm())


@contextlib.contextmanager
def _replaced(block: nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    """Change what a block returns inside the `with`."""
    handle = change_output(block, lambda _module, output: change(output))
    try:
        yield
    finally:
        handle.remove()
