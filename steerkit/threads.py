"""Two forwards side by side on a CPU, where that cannot change a number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _modules

Item = TypeVar("Item")
Result = TypeVar("Result")


def depends_on_thread(model: nn.Module) -> bool:
    """Whether two forwards in two threads might differ from one after the other, as far as can be told before any.

    They might with weights outside the CPU, a hook on any module (it may keep a state between calls), autocast or a
    mode of torch's (both belong to the thread that entered them), or gradients that a caller may want.
    """
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    everywhere = bool(_modules._global_forward_hooks or _modules._global_forward_pre_hooks)
    modes = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
    elsewhere = any(weight.device.type != "cpu" for weight in (*model.parameters(), *model.buffers()))
    return hooked or everywhere or elsewhere or modes > 0 or torch.is_autocast_enabled("cpu")


class Watched:
    """A model's state, to see whether a forward leaves traces in it: attributes bound anew, buffers written to."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self._state()

    def _state(self) -> list[tuple[Any, Any]]:
        return [(value, _version(value)) for m in self.model.modules() for value in _values(m)]

    def unchanged(self) -> bool:
        """Whether every module holds the very objects it held, none of them written to."""
        now = self._state()
        pairs = zip(self.before, now, strict=False)
        return len(now) == len(self.before) and all(a is b and u == v for (a, u), (b, v) in pairs)


def _values(module: nn.Module) -> Iterator[Any]:
    yield from (value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules"))
    yield from module._parameters.values()
    yield from module._buffers.values()


def _version(value: Any) -> Any:
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    return len(value) if isinstance(value, list | dict | set) else None


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`map(work, items)` in two threads, each with half of torch's; in order, two items at a time."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(2, "steerkit", initializer=torch.set_num_threads, initargs=(threads // 2,))
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)
