"""The engine: a batch of rows, each with its own prompt and steering, over one KV cache with shared prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from steerkit.generation.cache import ReservedLayer, min_saved_tokens, shared_prefix_lengths
from steerkit.generation.projections import Monitor, Reader, steered
from steerkit.generation.sampling import OVERFLOWED
from steerkit.models.blocks import find_blocks
from steerkit.models.cache_argument import cache_argument
from steerkit.models.model import accepts, device_of, unwrap
from steerkit.steering.positions import touches_prompt
from steerkit.steering.rows import RowSteering
from steerkit.steering.steering import Steering
from steerkit.text.tokens import pad

COMPACT_BELOW = 0.8  # a batch is compacted when at most this share of its rows is unfinished
Choose = Callable[[Float[Tensor, "batch vocabulary"], Int[Tensor, " batch"], int], Int[Tensor, " batch"]]
"""`choose(logits, row numbers, step)` returns the next token id of each row, `OVERFLOWED` where there is none."""


@dataclass(frozen=True)
class Row:
    """A prompt and what steers it.

    Args:
        prompt: token ids, at least one.
        steerings: each with one number as coefficient; applied in this order.
    """

    prompt: tuple[int, ...]
    steerings: tuple[Steering, ...] = ()


@dataclass(frozen=True)
class Continuation:
    """The new tokens of a row.

    Args:
        ids: new token ids without the end-of-sequence token.
        end: the end-of-sequence token, None where `max_new_tokens` was reached first.
        overflowed: whether logits after these ids were not finite, so that no token could be chosen.
        steered: at how many of the positions that decided these tokens (the last one of the prompt, and all tokens but
            the last) a steering acted; None where no row of the batch has a condition.
    """

    ids: tuple[int, ...]
    end: int | None
    overflowed: bool = False
    steered: int | None = None

    @property
    def finished(self) -> bool:
        """Whether an end-of-sequence token was generated."""
        return self.end is not None

    @property
    def all_ids(self) -> tuple[int, ...]:
        """The new token ids, the end-of-sequence token included where it was generated."""
        return self.ids if self.end is None else (*self.ids, self.end)

    @property
    def n_tokens(self) -> int:
        """Number of new tokens, the end-of-sequence token included; tokens of other rows in the batch do not count."""
        return len(self.all_ids)


def edits_prompt(steering: Steering) -> bool:
    """Whether a row's steering changes positions of the prompt before its last token."""
    return float(steering.coefficient) != 0 and touches_prompt(steering.positions)


def prompt_edit(steering: Steering) -> tuple[Any, ...]:
    """What a steering's effect on the prompt depends on: rows with equal ones share their prefill."""
    settings = (
        steering.site,
        steering.layer,
        steering.coefficient,
        steering.positions,
        steering.operation,
        steering.when,
    )
    return id(steering.vector), *settings


class Engine:
    """One batch: prompts left-padded to one width, prefilled except for their last token, with room for new tokens.

    Each distinct prompt is prefilled once (once per steering, where the prompt itself is steered), a prefix that
    several prompts share once for all of them, and the cache is copied to the rows. Absolute columns count from 0 at
    the left end of the padded batch; a prompt ends at column `width`.

    Args:
        rows: prompts and steerings; `check_rows` has accepted them.
        room: number of new tokens that the cache reserves room for.
        chunks: whether several tokens may be forwarded at once after the prompt (see `Exact`).
    """

    def __init__(self, model: nn.Module, rows: Sequence[Row], room: int, chunks: bool = True) -> None:
        self.model, self.rows, self.room, self.chunks = model, list(rows), room, chunks
        self.blocks = find_blocks(model)
        self.device = device_of(model)
        self.width = max(len(row.prompt) for row in rows)
        self.lengths = torch.tensor([len(row.prompt) for row in rows], device=self.device)
        self.takes_logits_to_keep = accepts(model, "logits_to_keep")
        self.cache_name = cache_argument(model) or "past_key_values"
        self.monitor: Reader | None = None
        self.compiled = RowSteering([], [])
        self.cache = DynamicCache(config=unwrap(model).config)
        self.cache.layers = [
            ReservedLayer(self.width + room) if type(layer) is DynamicLayer else layer for layer in self.cache.layers
        ]
        self.recurrent = bool(self.cache.layers) and not any(
            hasattr(layer, "get_seq_length") for layer in self.cache.layers
        )
        self._prefill()
        self.keep(range(len(rows)))

    def _prefill(self) -> None:
        """Forward every distinct prompt except for its last token, then copy the cache to the rows."""
        if self.width == 1:
            return
        keys = [
            (row.prompt, tuple(prompt_edit(one) for one in row.steerings if edits_prompt(one))) for row in self.rows
        ]
        index_of = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        first = [keys.index(key) for key in index_of]
        prompts = [self.rows[i].prompt for i in first]
        ids, mask, positions = pad(prompts, "left", self.device)
        start = 0 if any(steered for _, steered in index_of) else self._prefill_shared(prompts)
        chunk, upto = slice(start, self.width - 1), slice(self.width - 1)
        if start < self.width - 1:
            self._forward(self._compile(first), start, ids[:, chunk], mask[:, upto], positions[:, chunk], keep=1)
        if len(index_of) < len(keys):
            self._copy_rows([index_of[key] for key in keys])

    def _prefill_shared(self, prompts: Sequence[tuple[int, ...]]) -> int:
        """Forward prefixes that prompts share once; returns the column from which every prompt is still to be done."""
        if not self.chunks or not all(type(layer) is ReservedLayer for layer in self.cache.layers):
            return 0
        lengths = shared_prefix_lengths(prompts, min_saved_tokens(self.device.type))
        if not any(lengths):
            return 0
        prefixes = [prompt[:n] for prompt, n in zip(prompts, lengths, strict=True)]
        rows = {prefix: Row(prompt[: len(prefix) + 1]) for prefix, prompt in zip(prefixes, prompts, strict=True)}
        shared = Engine(self.model, list(rows.values()), 0)  # prefills all but the last token of a row
        index_of = {prefix: number for number, prefix in enumerate(rows)}
        start = self.width - 1 - max(len(prompt) - 1 - n for prompt, n in zip(prompts, lengths, strict=True))
        shifts = [len(prompt) - self.width + shared.width - 1 - n for prompt, n in zip(prompts, lengths, strict=True)]
        columns = torch.arange(start, device=self.device) + torch.tensor(shifts, device=self.device)[:, None]
        copied = torch.tensor([index_of[prefix] for prefix in prefixes], device=self.device)[:, None]
        layers: Any = zip(self.cache.layers, shared.cache.layers, strict=True)
        for layer, source in layers:
            layer.copy_from(source, copied, columns.clamp(min=0))  # columns left of a prompt are masked
        return start

    def _copy_rows(self, numbers: Sequence[int]) -> None:
        chosen: Any = torch.tensor(list(numbers), device=self.device)
        self.cache.reorder_cache(chosen)

    def keep(self, numbers: Sequence[int]) -> None:
        """Continue with these rows of the batch only."""
        decided: Tensor | None = None
        if len(numbers) < len(self.rows):
            self._copy_rows(numbers)
            decided = self.compiled.decisions()[list(numbers)]
            self.rows, self.lengths = [self.rows[i] for i in numbers], self.lengths[list(numbers)]
        self.mask = (
            torch.arange(self.width + self.room, device=self.device) >= (self.width - self.lengths)[:, None]
        ).long()
        self.compiled = self._compile(range(len(self.rows)), decided)

    def forward(self, ids: Int[Tensor, "batch pos"], start: int) -> Float[Tensor, "batch pos vocabulary"]:
        """Logits of a chunk whose first column is `start`; the last prompt token of a row is in column `width - 1`."""
        if ids.shape[1] > 1 and not self.chunks:
            return torch.cat([self.forward(ids[:, i : i + 1], start + i) for i in range(ids.shape[1])], dim=1)
        columns = torch.arange(start, start + ids.shape[1], device=self.device)
        positions = columns - (self.width - self.lengths)[:, None]
        return self._forward(self.compiled, start, ids, self.mask[:, : start + ids.shape[1]], positions, keep=0)

    def last_tokens(self) -> Int[Tensor, "batch 1"]:
        """The last token of each prompt: the first chunk to forward, at column `width - 1`."""
        return torch.tensor([[row.prompt[-1]] for row in self.rows], device=self.device)

    def decode(
        self, new: int, ends: frozenset[int], choose: Choose, monitor: Monitor | None = None
    ) -> list[Continuation]:
        """Up to `new` tokens per row, by `choose(logits, row numbers, step)`; rows that have ended leave the batch.

        Args:
            monitor: reads the stream at each new token, for which the last one of a row is forwarded too.
        """
        self.monitor = monitor
        out: list[list[int]] = [[] for _ in self.rows]
        ended: list[int | None] = [None] * len(out)
        overflowed: set[int] = set()
        steered: list[int | None] = [None] * len(out)
        alive = list(range(len(out)))
        token = self.last_tokens()
        for step in range(new + (monitor is not None)):
            logits = self.forward(token, self.width - 1 + step)[:, -1]
            if monitor is not None and step:  # what was forwarded are the tokens of the step before
                monitor.keep(alive)
            if step == new:
                break
            acted = self.compiled.steered()
            token = choose(logits, torch.tensor(alive, device=self.device), step)[:, None]
            needed = []
            for index, (number, chosen) in enumerate(zip(alive, token[:, 0].tolist(), strict=True)):
                if ended[number] is not None or number in overflowed:
                    continue
                if acted is not None:
                    steered[number] = (steered[number] or 0) + acted[index]
                if chosen == OVERFLOWED:
                    overflowed.add(number)
                    continue
                if chosen in ends:
                    ended[number] = chosen
                else:
                    out[number].append(chosen)
                if chosen not in ends or monitor is not None:
                    needed.append(index)
            if not needed:
                break
            token = token.clamp(min=0)  # rows that overflowed are forwarded until the batch is compacted
            if len(needed) <= COMPACT_BELOW * len(alive) and step + 1 < new:
                self.keep(needed)
                token, alive = token[needed], [alive[index] for index in needed]
        self.monitor = None
        return [
            Continuation(tuple(ids), ended[number], number in overflowed, steered[number])
            for number, ids in enumerate(out)
        ]

    def _compile(self, numbers: Sequence[int], decided: Tensor | None = None) -> RowSteering:
        prompts = [(self.width - len(self.rows[i].prompt), self.width) for i in numbers]
        return RowSteering([self.rows[i].steerings for i in numbers], prompts, decided=decided)

    def _forward(
        self, compiled: RowSteering, start: int, ids: Tensor, mask: Tensor, positions: Tensor, keep: int
    ) -> Float[Tensor, "batch pos vocabulary"]:
        """One steered forward over the cache; `keep` is the number of last positions with logits, 0 for all."""
        compiled.start = start
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask[:, -ids.shape[1] :] if self.recurrent else mask,
            self.cache_name: self.cache,
            "use_cache": True,
        }
        if self.blocks.positions:
            inputs["position_ids"] = positions.clamp(min=0)
        if keep and self.takes_logits_to_keep:
            inputs["logits_to_keep"] = keep
        with steered(self.model, self.blocks, compiled, self.monitor):
            logits: Tensor = self.model(**inputs).logits
        return logits
