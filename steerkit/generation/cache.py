"""The KV cache: room for all positions to come, and prompts that begin alike."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

Prompt = tuple[int, ...]


def beginnings(prompts: Sequence[Prompt], worth: int) -> list[int]:
    """How many tokens of each prompt to forward once for all prompts that share them; all 0 where none is worth it.

    With beginnings of at most `b` tokens, of which `g` differ, and `r` tokens at most between a beginning and a
    prompt's last token, `g b + n r` tokens are forwarded in place of `n (width - 1)`: padding is forwarded too. Of all
    depths to which neighbours in sorted order agree, the cheapest is taken.

    Args:
        prompts: all different.
        worth: tokens that have to be saved: a second forward is not free.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    alike = [_common(prompts[i], prompts[j]) for i, j in pairwise(order)]
    best = [0] * len(prompts)
    cheapest = len(prompts) * (max(map(len, prompts)) - 1) - worth
    for depth in sorted(set(alike) - {0}):
        groups = [[order[0]]]
        shared = [len(prompts[order[0]])]
        for number, common in zip(order[1:], alike, strict=True):
            if common >= depth:
                groups[-1].append(number)
                shared[-1] = min(shared[-1], common)
            else:
                groups.append([number])
                shared.append(len(prompts[number]))
        longest = max(n for n, group in zip(shared, groups, strict=True) if len(group) > 1)
        found = [0] * len(prompts)
        for n, group in zip(shared, groups, strict=True):
            for number in group:
                found[number] = min(n, longest, len(prompts[number]) - 1)
        rest = max(len(prompt) - 1 - n for prompt, n in zip(prompts, found, strict=True))
        starts = {prompt[:n] for prompt, n in zip(prompts, found, strict=True)}
        cost = len(starts) * longest + len(prompts) * rest
        if cost <= cheapest:
            best, cheapest = found, cost
    return best


def _common(a: Prompt, b: Prompt) -> int:
    """How many tokens two prompts have in common from their start on."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Reserved(DynamicLayer):
    """A cache layer with room for all positions to come: a new token is written in place, nothing is copied."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def _reserve(self, like: Tensor) -> Tensor:
        return like.new_empty(*like.shape[:-2], self.capacity, like.shape[-1])

    def begin(self, other: DynamicLayer, rows: Tensor, columns: Tensor) -> None:
        """Take up another cache: row i, column j here is its row `rows[i, 0]`, column `columns[i, j]`."""
        assert not self.is_initialized and other.keys is not None and other.values is not None
        taken = [kept[rows, :, columns].transpose(1, 2) for kept in (other.keys, other.values)]
        self.update(*taken)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = self._reserve(key_states), self._reserve(value_states)
            start = 0
        else:
            start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[..., start:stop, :] = new
        keys, values = (room[..., :stop, :] for room in self.room)
        self.keys, self.values = keys, values
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if not self.is_initialized:
            return
        assert self.keys is not None and self.values is not None
        views, rooms = [], []
        for kept in (self.keys, self.values):
            room = kept.new_empty(len(beam_idx), kept.shape[1], self.capacity, kept.shape[-1])
            view = room[..., : kept.shape[-2], :]
            view.copy_(kept[beam_idx.to(kept.device)])
            views.append(view)
            rooms.append(room)
        self.keys, self.values = views
        self.room = rooms[0], rooms[1]
