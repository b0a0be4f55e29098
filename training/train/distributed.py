"""What several processes that train one model have to say to each other, besides `steerkit.io.ranks`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as distributed

from steerkit.io.ranks import several


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
