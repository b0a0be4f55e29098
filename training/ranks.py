"""Several processes of one run, as `torchrun` starts them: who is first, and who waits for whom."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as distributed

Result = TypeVar("Result")
PATIENCE = timedelta(days=2)  # the others wait this long while the first holds debates


def several() -> bool:
    """Whether this is one process of several; the group they talk in is set up on the first call."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    return True


def is_first() -> bool:
    """Whether this is the first process, or the only one: the one that writes."""
    return not several() or distributed.get_rank() == 0


def first_alone(work: Callable[[], Result]) -> Result | None:
    """`work()` in the first process while the others wait; its result there, and None elsewhere."""
    found = work() if is_first() else None
    if several():
        distributed.barrier()
    return found


def mean(value: float) -> float:
    """The mean of a number over all processes."""
    if not several():
        return value
    total = torch.tensor(value, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    distributed.all_reduce(total)
    return float(total) / distributed.get_world_size()


@contextlib.contextmanager
def whole_weights(trainer: Any) -> Iterator[None]:
    """All of a trained model's weights in the first process inside the `with`, also where FSDP has sharded them."""
    from torch.distributed.fsdp import FullyShardedDataParallel as Sharded

    wrapped = getattr(trainer, "model_wrapped", None)
    if not isinstance(wrapped, Sharded):
        yield
        return
    with Sharded.summon_full_params(wrapped, writeback=False, rank0_only=True, offload_to_cpu=True):
        yield
