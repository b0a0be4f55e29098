"""Requests shared by the processes of a run: each answers its part, and all receive every reply."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as distributed

from steerkit.io.ranks import rank_and_world
from training.debates.answerers import Answerer, Reply, Request, Sampling


@dataclass(frozen=True)
class Shared:
    """An answerer whose requests are divided among the processes that torchrun started; alone, it is the answerer.

    Every process makes the same call. Process r of w answers the requests r, r + w, ... A reply depends on its seed and
    its id, so the number of processes does not change the replies.

    Args:
        answerer: the answerer of this process.

    Example:
        >>> rows = one_answer(problems, Shared(LocalModel(*sk.load("runs/model"))), bare, Sampling())
    """

    answerer: Answerer

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Reply]:
        """Yield the replies to all requests, after every process has answered its part."""
        rank, processes = rank_and_world()
        mine = list(self.answerer(requests[rank::processes], sampling)) if requests[rank::processes] else []
        parts: list[list[Reply]] = [mine] * processes
        if processes > 1:
            distributed.all_gather_object(parts, mine)
        return iter([reply for part in parts for reply in part])

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the answerer; None where it has none in this process."""
        return getattr(self.answerer, "tokenizer", None)

    def about(self) -> dict[str, Any]:
        """Return the provenance of the answerer."""
        return self.answerer.about()
