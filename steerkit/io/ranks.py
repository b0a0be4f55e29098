"""Several processes of one run, as `torchrun` starts them: who does what, who is first, and who waits for whom."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as distributed

Result = TypeVar("Result")
PATIENCE = timedelta(days=2)  # the others wait this long while the first works alone


def several() -> bool:
    """Whether this is one process of several; the group they talk in is set up on the first call."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    return True


def place() -> tuple[int, int]:
    """This process' rank, and how many there are: `(0, 1)` for one alone."""
    return (distributed.get_rank(), distributed.get_world_size()) if several() else (0, 1)


def is_first() -> bool:
    """Whether this is the first process, or the only one: the one that writes."""
    return place()[0] == 0


def wait() -> None:
    """Until all processes are here.

    Raises:
        RuntimeError: one of them has ended.
    """
    if several():
        try:
            distributed.barrier()
        except RuntimeError as error:
            rank, world = place()
            raise RuntimeError(
                f"expected all {world} processes to go on; rank {rank} waits for one that has ended. What was finished "
                "is on disk: the same command goes on there."
            ) from error


def first_alone(work: Callable[[], Result]) -> Result | None:
    """`work()` in the first process while the others wait; its result there, and None elsewhere."""
    found = work() if is_first() else None
    wait()
    return found
