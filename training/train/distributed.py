"""Distributed training: a mean over processes, and whole weights of a sharded model; see also `steerkit.io.ranks`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as distributed

from steerkit.io.ranks import is_distributed


def mean_over_processes(value: float) -> float:
    """Return the mean of a number over all processes; every process must make the call."""
    if not is_distributed():
        return value
    total = torch.tensor(value, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    distributed.all_reduce(total)
    return float(total) / distributed.get_world_size()


def process_count() -> int:
    """Return the number of processes that train together; torchrun says it before they have met."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def whole_weights(trainer: Any) -> Iterator[None]:
    """Gather all weights of the trained model in the first process inside the `with`; needed under FSDP only."""
    from torch.distributed.fsdp import FullyShardedDataParallel as Sharded

    wrapped = getattr(trainer, "model_wrapped", None)
    if not isinstance(wrapped, Sharded):
        yield
        return
    with Sharded.summon_full_params(wrapped, writeback=False, rank0_only=True, offload_to_cpu=True):
        yield
