"""Ranks: several processes that torchrun started as one run, and what only the first of them does."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as distributed

Result = TypeVar("Result")
BARRIER_TIMEOUT = timedelta(days=2)  # the other ranks wait at a barrier while the first one works alone


def is_distributed() -> bool:
    """Whether this process is one of several; the first call sets up their process group."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), timeout=BARRIER_TIMEOUT)
    return True


def rank_and_world() -> tuple[int, int]:
    """The rank of this process and the number of processes; `(0, 1)` for a single process."""
    return (distributed.get_rank(), distributed.get_world_size()) if is_distributed() else (0, 1)


def is_first() -> bool:
    """Whether this is the first process, or the only one: the one that writes files."""
    return rank_and_world()[0] == 0


def barrier() -> None:
    """Wait until all processes have called this.

    Raises:
        RuntimeError: a process has ended before it came to the barrier.
    """
    if is_distributed():
        try:
            distributed.barrier()
        except RuntimeError as error:
            rank, world = rank_and_world()
            raise RuntimeError(
                f"expected all {world} processes at a barrier; got fewer: rank {rank} waits for a process that has "
                "ended. Run the same command again: it resumes from what is on disk."
            ) from error


def in_first_process(work: Callable[[], Result]) -> Result | None:
    """Run `work()` in the first process while the others wait; its result there, None in the others."""
    result = work() if is_first() else None
    barrier()
    return result
