"""The engine: a batch of rows, each with its own prompt and steering, over one KV cache with shared prefill."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from steerkit.generation.cache import ReservedLayer, shared_prefix_lengths
from steerkit.generation.sampling import OVERFLOWED
from steerkit.models.blocks import find_blocks
from steerkit.models.cache_argument import NAMES, cache_argument
from steerkit.models.context import check_vocabulary
from steerkit.models.hooks import check_called, edit_streams
from steerkit.models.identity import fingerprint
from steerkit.models.kernels import running
from steerkit.models.model import accepts, device_of, text_config, unwrap
from steerkit.steering.positions import touches_prompt
from steerkit.steering.rows import RowSteering
from steerkit.steering.steering import Steering
from steerkit.steering.watch import suspended
from steerkit.text.tokens import pad

BATCH_ROWS = {"cpu": 96, "cuda": 256}
MIN_SAVED_TOKENS = {"cpu": 256, "cuda": 4096}  # a shared prefix must save this many; on a GPU not measured
COMPACT_BELOW = 0.8  # a batch is compacted when at most this share of its rows is unfinished
Done = TypeVar("Done")
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
    """

    ids: tuple[int, ...]
    end: int | None
    overflowed: bool = False

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


def in_batches(
    model: nn.Module,
    rows: Sequence[Row],
    room: int,
    work: Callable[[Engine, Sequence[int]], Sequence[Done]],
    batch_rows: int | None = None,
) -> Iterator[list[tuple[int, Done]]]:
    """Run `work(engine, row numbers)` over all rows in batches; yields each batch's `(row number, result)` when done.

    Rows of similar prompt length share a batch (of equal length, where the model cannot be padded), and equal prompts
    are neighbours. A batch that does not fit into memory is halved. The model is in eval mode, and steerings that
    `with steering.on(model)` set are suspended.

    Args:
        room: number of new tokens that the cache reserves room for.

    Raises:
        ValueError: see `check_rows`.
    """
    padded = check_rows(model, rows).padded
    size = batch_rows or BATCH_ROWS.get(device_of(model).type, 96)
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].prompt), rows[i].prompt))
    by_length = groupby(order, key=lambda i: None if padded else len(rows[i].prompt))
    groups = [list(group) for _, group in by_length]
    queue = [group[i : i + size] for group in groups for i in range(0, len(group), size)][::-1]
    with running(model):
        while queue:
            numbers = queue.pop()
            try:
                with suspended(model), torch.inference_mode():
                    done = work(Engine(model, [rows[i] for i in numbers], room), numbers)
            except torch.OutOfMemoryError:
                if len(numbers) == 1:
                    raise
                queue += [numbers[len(numbers) // 2 :], numbers[: len(numbers) // 2]]
                continue
            yield list(zip(numbers, done, strict=True))


def check_rows(model: nn.Module, rows: Sequence[Row]) -> Exact:
    """Check rows before anything runs; returns how the model can be batched exactly.

    Raises:
        ValueError: a steering that does not fit the model, a token that the model does not have, or a model whose
            cached forward differs from its plain one.
    """
    blocks = find_blocks(model)
    with suspended(model):
        ways = exact(model)
    weights = fingerprint(model)
    for steering in {(id(one.vector), one.foreign): one for row in rows for one in row.steerings}.values():
        steering.check(model, blocks, weights)
    check_vocabulary(model, [row.prompt for row in rows])
    return ways


def _edits_prompt(steering: Steering) -> bool:
    """Whether a row's steering changes positions of the prompt before its last token."""
    return float(steering.coefficient) != 0 and touches_prompt(steering.positions)


def _prompt_edit(steering: Steering) -> tuple[Any, ...]:
    """What a steering's effect on the prompt depends on: rows with equal ones share their prefill."""
    return id(steering.vector), steering.layer, steering.coefficient, steering.positions, steering.operation


class Engine:
    """One batch: prompts left-padded to one width, prefilled except for their last token, with room for new tokens.

    Each distinct prompt is prefilled once (once per steering, where the prompt itself is steered), a prefix that
    several prompts share once for all of them, and the cache is copied to the rows. Absolute columns count from 0 at
    the left end of the padded batch; a prompt ends at column `width`.

    Args:
        rows: prompts and steerings; `check_rows` has accepted them.
        room: number of new tokens that the cache reserves room for.
    """

    def __init__(self, model: nn.Module, rows: Sequence[Row], room: int) -> None:
        self.model, self.rows, self.room = model, list(rows), room
        self.blocks = find_blocks(model)
        self.device = device_of(model)
        self.width = max(len(row.prompt) for row in rows)
        self.lengths = torch.tensor([len(row.prompt) for row in rows], device=self.device)
        self.takes_logits_to_keep = accepts(model, "logits_to_keep")
        self.cache_name = cache_argument(model) or "past_key_values"
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
            (row.prompt, tuple(_prompt_edit(one) for one in row.steerings if _edits_prompt(one))) for row in self.rows
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
        ways = _exact.get(unwrap(self.model))
        if ways is None or not ways.chunks or not all(type(layer) is ReservedLayer for layer in self.cache.layers):
            return 0
        lengths = shared_prefix_lengths(prompts, MIN_SAVED_TOKENS.get(self.device.type, MIN_SAVED_TOKENS["cuda"]))
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
        if len(numbers) < len(self.rows):
            self._copy_rows(numbers)
            self.rows, self.lengths = [self.rows[i] for i in numbers], self.lengths[list(numbers)]
        self.mask = (
            torch.arange(self.width + self.room, device=self.device) >= (self.width - self.lengths)[:, None]
        ).long()
        self.compiled = self._compile(range(len(self.rows)))

    def forward(self, ids: Int[Tensor, "batch pos"], start: int) -> Float[Tensor, "batch pos vocabulary"]:
        """Logits of a chunk whose first column is `start`; the last prompt token of a row is in column `width - 1`."""
        if ids.shape[1] > 1 and (ways := _exact.get(unwrap(self.model))) and not ways.chunks:
            return torch.cat([self.forward(ids[:, i : i + 1], start + i) for i in range(ids.shape[1])], dim=1)
        columns = torch.arange(start, start + ids.shape[1], device=self.device)
        positions = columns - (self.width - self.lengths)[:, None]
        return self._forward(self.compiled, start, ids, self.mask[:, : start + ids.shape[1]], positions, keep=0)

    def last_tokens(self) -> Int[Tensor, "batch 1"]:
        """The last token of each prompt: the first chunk to forward, at column `width - 1`."""
        return torch.tensor([[row.prompt[-1]] for row in self.rows], device=self.device)

    def decode(self, new: int, ends: frozenset[int], choose: Choose) -> list[Continuation]:
        """Up to `new` tokens per row, by `choose(logits, row numbers, step)`; rows that have ended leave the batch."""
        out: list[list[int]] = [[] for _ in self.rows]
        ended: list[int | None] = [None] * len(out)
        overflowed: set[int] = set()
        alive = list(range(len(out)))
        token = self.last_tokens()
        for step in range(new):
            logits = self.forward(token, self.width - 1 + step)[:, -1]
            token = choose(logits, torch.tensor(alive, device=self.device), step)[:, None]
            unfinished = []
            for index, (number, chosen) in enumerate(zip(alive, token[:, 0].tolist(), strict=True)):
                if ended[number] is not None or number in overflowed:
                    continue
                if chosen == OVERFLOWED:
                    overflowed.add(number)
                elif chosen in ends:
                    ended[number] = chosen
                else:
                    out[number].append(chosen)
                    unfinished.append(index)
            if not unfinished:
                break
            token = token.clamp(min=0)  # rows that overflowed are forwarded until the batch is compacted
            if len(unfinished) <= COMPACT_BELOW * len(alive) and step + 1 < new:
                self.keep(unfinished)
                token, alive = token[unfinished], [alive[index] for index in unfinished]
        return [
            Continuation(tuple(ids), ended[number], overflowed=number in overflowed) for number, ids in enumerate(out)
        ]

    def _compile(self, numbers: Sequence[int]) -> RowSteering:
        prompts = [(self.width - len(self.rows[i].prompt), self.width) for i in numbers]
        return RowSteering([self.rows[i].steerings for i in numbers], prompts)

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
        modules = {layer: self.blocks.modules[layer] for layer in compiled.layers}
        with edit_streams(modules, compiled.edit) as ran:
            logits: Tensor = self.model(**inputs).logits
        check_called(ran, set(compiled.layers))
        return logits


@dataclass(frozen=True)
class Exact:
    """Which batched forwards give the logits of plain forwards, besides one token after the other over a cache.

    Args:
        padded: a left-padded batch; where it does not, only prompts of one length share a batch.
        chunks: several tokens at once after a prefill; where they do not, they are forwarded token by token.
    """

    padded: bool
    chunks: bool


_exact: weakref.WeakKeyDictionary[nn.Module, Exact] = weakref.WeakKeyDictionary()
UNEQUAL_PROMPTS = ((11, 12, 13, 14, 15, 16), (17, 18, 19))
EQUAL_PROMPTS = ((11, 12, 13, 14), (17, 18, 19, 20))
NEW_TOKENS = (21, 22, 23)


def exact(model: nn.Module) -> Exact:
    """Find, once per model, which batched forwards are exact: short rows with a cache against each row without.

    Models that count positions by the column cannot be padded on the left. Some recurrent layers lose their state
    between chunks of several tokens.

    Raises:
        ValueError: even token by token and without padding, the model with a cache differs from the model without: it
            takes no cache, or counts positions differently. Its texts would be wrong without an error.
    """
    base = unwrap(model)
    if base not in _exact:
        if cache_argument(base) is None:
            raise ValueError(
                f"expected a model that takes a KV cache; {type(base).__name__} takes none of {NAMES}. Steer its plain "
                "forwards with `steering.on(model)`."
            )
        reasons = []
        for prompts in (UNEQUAL_PROMPTS, EQUAL_PROMPTS):
            try:
                stepwise, chunked = _deviations(model, prompts)
            except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                reasons.append(f"it raises {type(error).__name__}: {error}")
                continue
            limit = 1e-3 if next(base.parameters()).dtype in (torch.float32, torch.float64) else 0.1
            if stepwise <= limit:
                _exact[base] = Exact(prompts is UNEQUAL_PROMPTS, chunked <= limit)
                break
            reasons.append(f"they differ by {stepwise:.1e} relative to their norm")
        else:
            raise ValueError(
                f"expected a model whose logits with a cache are those of plain forwards; in {type(base).__name__}, "
                f"left-padded, {reasons[0]}; unpadded, {reasons[1]}. Steer its plain forwards with "
                "`steering.on(model)`."
            )
    return _exact[base]


def _deviations(model: nn.Module, prompts: Sequence[tuple[int, ...]]) -> tuple[float, float]:
    """Relative deviation of a cached batch's logits from those of plain forwards: token by token, and in one chunk."""
    vocabulary = text_config(model).vocab_size
    new, *prompts = (tuple(i % vocabulary for i in ids) for ids in (NEW_TOKENS, *prompts))
    device = device_of(model)
    deviations = []
    with running(model), torch.inference_mode():
        plain = [torch.tensor([(*prompt, *new)], device=device) for prompt in prompts]
        truth = torch.cat([model(input_ids=ids, use_cache=False).logits[:, -len(new) - 1 :] for ids in plain]).float()
        for step in (1, len(new) + 1):
            engine = Engine(model, [Row(prompt) for prompt in prompts], len(new))
            chunk = torch.cat([engine.last_tokens(), torch.tensor([new] * len(prompts), device=device)], dim=1)
            starts = range(0, chunk.shape[1], step)
            parts = [engine.forward(chunk[:, i : i + step], engine.width - 1 + i) for i in starts]
            off = (torch.cat(parts, dim=1) - truth).norm(dim=-1) / truth.norm(dim=-1)
            deviations.append(float(off.max()))
    return deviations[0], deviations[1]
