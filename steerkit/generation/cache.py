"""The KV cache: layers with room for all new tokens, and prefixes that several prompts share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

PromptIds = tuple[int, ...]
MIN_SAVED_TOKENS = {"cpu": 256, "cuda": 4096}
"""A shared prefix must save this many tokens; on a GPU not measured."""


def min_saved_tokens(device_type: str) -> int:
    """`MIN_SAVED_TOKENS` of a kind of device."""
    return MIN_SAVED_TOKENS.get(device_type, MIN_SAVED_TOKENS["cuda"])


def shared_prefix_lengths(prompts: Sequence[PromptIds], min_saved: int) -> list[int]:
    """How many tokens of each prompt to forward once for all prompts that share them; all 0 where it does not pay.

    With prefixes of at most `b` tokens, of which `g` differ, and at most `r` tokens between a prefix and the last token
    of a prompt, `g b + n r` tokens are forwarded instead of `n (width - 1)`, since padding is forwarded too. Of all
    depths to which neighbours in sorted order agree, the cheapest is taken.

    Args:
        prompts: token ids, all different.
        min_saved: tokens that must be saved, since a second forward has a cost of its own.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    agreements = [_common_length(prompts[i], prompts[j]) for i, j in pairwise(order)]
    best = [0] * len(prompts)
    lowest_cost = len(prompts) * (max(map(len, prompts)) - 1) - min_saved
    for depth in sorted(set(agreements) - {0}):
        groups = [[order[0]]]
        shared = [len(prompts[order[0]])]
        for number, agreement in zip(order[1:], agreements, strict=True):
            if agreement >= depth:
                groups[-1].append(number)
                shared[-1] = min(shared[-1], agreement)
            else:
                groups.append([number])
                shared.append(len(prompts[number]))
        longest = max(n for n, group in zip(shared, groups, strict=True) if len(group) > 1)
        lengths = [0] * len(prompts)
        for n, group in zip(shared, groups, strict=True):
            for number in group:
                lengths[number] = min(n, longest, len(prompts[number]) - 1)
        rest = max(len(prompt) - 1 - n for prompt, n in zip(prompts, lengths, strict=True))
        prefixes = {prompt[:n] for prompt, n in zip(prompts, lengths, strict=True)}
        cost = len(prefixes) * longest + len(prompts) * rest
        if cost <= lowest_cost:
            best, lowest_cost = lengths, cost
    return best


def _common_length(first: PromptIds, second: PromptIds) -> int:
    """How many tokens two prompts share from their start."""
    differing = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differing, min(len(first), len(second)))


class ReservedLayer(DynamicLayer):
    """A cache layer with room for all new tokens: a token is written in place, nothing is copied.

    Args:
        capacity: number of positions that room is reserved for.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def _reserve(self, like: Tensor) -> Tensor:
        return like.new_empty(*like.shape[:-2], self.capacity, like.shape[-1])

    def copy_from(self, source: DynamicLayer, rows: Tensor, columns: Tensor) -> None:
        """Start as a copy of another layer: row i, column j is its row `rows[i, 0]`, column `columns[i, j]`.

        The indices may be on another device than the layer, as under a device map.
        """
        assert not self.is_initialized and source.keys is not None and source.values is not None
        device = source.keys.device
        rows, columns = rows.to(device), columns.to(device)
        copied = [kept[rows, :, columns].transpose(1, 2) for kept in (source.keys, source.values)]
        self.update(*copied)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states of new positions; returns keys and values of all positions so far."""
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
        """Keep the rows `beam_idx`, in that order, with the same capacity."""
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
