"""Matrix products through oneDNN while a model is trained: forward and backward, also those outside its layers.

In training weights change at every step, so nothing is packed: oneDNN reads them as they are. It is used on a CPU in
float32, where `kernels_of` says that it is the faster one.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from steerkit.models.kernels import kernels_of, multiply, use_kernels

SMALL = 1_000_000
"""Products of fewer multiplications stay with torch."""

aten = torch.ops.aten


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """`left @ right + bias`; None where oneDNN is not asked."""
    rows, inner = left.shape
    tensors = (left, right) if bias is None else (left, right, bias)
    if rows < 2 or rows * inner * right.shape[1] < SMALL:
        return None
    if any(x.dtype != torch.float32 or x.device.type != "cpu" for x in tensors):
        return None
    return multiply(left, right.t(), bias)


def _mm(left: Tensor, right: Tensor) -> Tensor | None:
    return _product(left, right)


def _mm_out(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor | None:
    found = _product(left, right)
    return None if found is None else out.copy_(found)


def _addmm(added: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor | None:
    if (beta, alpha) != (1, 1) or added.ndim != 1 or added.shape[0] != right.shape[1]:
        return None
    return _product(left, right, added)


def _addmm_in_place(added: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor | None:
    found = _product(left, right) if (beta, alpha) == (1, 1) else None
    return None if found is None else added.add_(found)


PRODUCTS: dict[Any, Callable[..., Tensor | None]] = {
    aten.mm.default: _mm,
    aten.mm.out: _mm_out,
    aten.addmm.default: _addmm,
    aten.addmm_.default: _addmm_in_place,
}


class _ThroughOneDNN(TorchDispatchMode):
    """Sends matrix products to oneDNN, below autograd: those of the backward pass too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = PRODUCTS.get(func)
        if product is not None and (found := product(*args, **kwargs)) is not None:
            return found
        return func(*args, **kwargs)


_running: ContextVar[_ThroughOneDNN | None] = ContextVar("running", default=None)
"""The mode of `fast_products` in this thread; torch keeps its modes per thread, too."""


@contextlib.contextmanager
def fast_products(model: nn.Module) -> Iterator[str]:
    """Compute matrix products through oneDNN inside the `with`, where `kernels_of(model)` is `"onednn"`.

    For `y = x W^T` these are the product itself, and in the backward pass `dx = dy W` and `dW = dy^T x`. Forwards
    without gradients use the model's kernels, as with `use_kernels`. From then on the process keeps freed memory, see
    `keep_freed_memory`.

    Yields:
        `"onednn"` or `"torch"`.

    Example:
        >>> with fast_products(model):
        ...     trainer.train()
    """
    chosen = kernels_of(model)
    if chosen == "torch":
        yield chosen
        return
    keep_freed_memory()
    mode = _ThroughOneDNN()
    with use_kernels(model), mode:
        outer = _running.set(mode)
        try:
            yield chosen
        finally:
            _running.reset(outer)


@cache
def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next step, instead of returning it to the system and asking again.

    Each step of training allocates and frees the same large tensors; new pages of the system cost about a tenth of a
    step. The setting holds until the process ends. Returns whether the C library has it (glibc).
    """
    settings = {"M_MMAP_THRESHOLD": (-3, 1 << 30), "M_TRIM_THRESHOLD": (-1, 1 << 30), "M_TOP_PAD": (-2, 200 << 20)}
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(ctypes.c_int(number), ctypes.c_int(value)) for number, value in settings.values())


@contextlib.contextmanager
def plain_products() -> Iterator[None]:
    """End `fast_products` for this `with`: for generation, whose many small operations it slows down."""
    mode = _running.get()
    if mode is None:
        yield
        return
    outer = _running.set(None)
    mode.__exit__(None, None, None)
    try:
        yield
    finally:
        mode.__enter__()
        _running.reset(outer)
