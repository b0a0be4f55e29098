"""The engine for ordinary attention on a CPU: each distinct prompt is stored and attended once for all its rows.

A row's query attends two sets of keys: those of its prompt, which other rows share, and its own new ones. Both parts
are softmaxes of their own, put together by their log-sum-exp (as in cascade attention):

    o = (exp(l_1) o_1 + exp(l_2) o_2) / (exp(l_1) + exp(l_2)).

No number depends on the other rows of the batch. torch's attention computes blocks of queries by matrix products, whose
rounding depends on the sizes of the matrices only. Here the sizes depend on a row's own prompt and step: queries are
padded to whole blocks, keys of a prompt to whole blocks of their own number, and nothing is padded on the left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

from steerkit.generation.cache import shared_prefix_lengths
from steerkit.generation.engine import MIN_SAVED_TOKENS, Engine, Row, edits_prompt, prompt_edit
from steerkit.models.hooks import check_called, edit_streams
from steerkit.models.model import text_config
from steerkit.steering.rows import RowSteering

NAME = "steerkit_shared"
BLOCK = 32
"""Queries that torch's attention multiplies at once; prompts are shared, and padded, in multiples of this."""
SPAN = 160
"""Queries per call: from 192 on, torch multiplies larger blocks at once."""
NOT_COMPUTED = ("softcap", "s_aux", "position_bias", "head_mask", "alibi", "sinks")


def whole_blocks(count: int) -> int:
    """The smallest multiple of `BLOCK` that is at least `count`."""
    return -(-count // BLOCK) * BLOCK


@dataclass
class _Bucket:
    """Prompts whose keys fill the same number of blocks.

    Args:
        prompts: their numbers, a range, since prompts are ordered by length.
        width: keys that are attended, a multiple of `BLOCK`.
        rows: numbers of the rows that continue these prompts.
        slots: for each prompt and padded slot, which of the queries of all rows stands there.
        places: for each of these rows' queries its place in the slots.
        hidden: 0 for the keys of a prompt, minus infinity for its padding; None without padding.
    """

    prompts: slice
    width: int
    rows: Tensor
    slots: Tensor
    places: Tensor
    hidden: Tensor | None


@dataclass
class Shared:
    """The keys and values of a batch, layer by layer, and what is being forwarded.

    Args:
        lengths: keys of each distinct prompt, ascending: its tokens without the last.
        prompt_of: the prompt of each row.
        room: new keys of a row that room is reserved for.
    """

    lengths: list[int]
    prompt_of: list[int]
    room: int
    prompts: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    own: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    filling: tuple[slice, int] | None = None  # the prompts that are being forwarded, and their first position
    start: int = 0  # new keys so far
    buckets: list[_Bucket] = field(default_factory=list)
    groups: int = 0  # queries per head of the keys, for which the buckets were made
    masks: dict[Any, Tensor] = field(default_factory=dict)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Float[Tensor, "row head pos d"]:
        """Store the new keys and values of a layer, and attend to all that a query sees."""
        if self.filling is not None:
            return self._fill(layer, q, k, v, scale, window)
        if layer not in self.own:
            shape = (k.shape[0], k.shape[1], max(self.room + 1, k.shape[2]), k.shape[3])
            self.own[layer] = k.new_empty(shape), v.new_empty(*shape[:3], v.shape[3])
        stop = self.start + k.shape[2]
        for kept, new in zip(self.own[layer], (k, v), strict=True):
            kept[:, :, self.start : stop] = new
        out, log_sum = self._own(layer, q, stop, scale, window)
        if not self.lengths[-1]:
            return out
        of_prompt, log_sum_of_prompt = self._of_prompts(layer, q, scale, window)
        top = torch.maximum(log_sum, log_sum_of_prompt)
        first, second = (log_sum_of_prompt - top).exp(), (log_sum - top).exp()
        total = first + second
        merged = of_prompt * (first / total)[..., None] + out * (second / total)[..., None]
        return merged.to(q.dtype)

    def _fill(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Float[Tensor, "prompt head pos d"]:
        """Causal attention within prompts, one block of queries after the other."""
        assert self.filling is not None
        which, start = self.filling
        if layer not in self.prompts:
            shape = (len(self.lengths), k.shape[1], whole_blocks(self.lengths[-1]), k.shape[3])
            self.prompts[layer] = k.new_zeros(shape), v.new_zeros(*shape[:3], v.shape[3])
        keys, values = (kept[which] for kept in self.prompts[layer])
        stop = start + k.shape[2]
        keys[:, :, start:stop], values[:, :, start:stop] = k, v
        out = q.new_empty(*q.shape[:3], v.shape[3])
        groups = q.shape[1] // k.shape[1]
        for begin in range(start, stop, BLOCK):
            end, chunk = begin + BLOCK, slice(begin - start, begin - start + BLOCK)
            block = q[:, :, chunk].reshape(q.shape[0], k.shape[1], groups * BLOCK, q.shape[3])
            mask = self._causal(begin, groups, window, q.dtype)
            found, _ = _softmax_part(block, keys[:, :, :end], values[:, :, :end], scale, mask)
            out[:, :, chunk] = found.reshape(*q.shape[:2], BLOCK, v.shape[3])
        return out

    def _causal(self, begin: int, groups: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """The mask of a block of queries at `begin` over all keys up to its end."""
        key = begin, groups, window
        if key not in self.masks:
            queries = torch.arange(begin, begin + BLOCK)[:, None]
            keys = torch.arange(begin + BLOCK)
            seen = keys <= queries
            if window is not None:
                seen &= keys > queries - window
            mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)
            self.masks[key] = mask.repeat(groups, 1)[None, None]
        return self.masks[key]

    def _own(self, layer: int, q: Tensor, stop: int, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
        """Attention to the rows' own keys: output and log-sum-exp."""
        keys, values = self.own[layer]
        rows, heads, steps, _ = q.shape
        groups = heads // keys.shape[1]
        first = 0 if window is None else max(0, self.start - window + 1)
        keys, values = keys[:, :, first:stop], values[:, :, first:stop]
        mask = None
        if steps > 1:
            queries = torch.arange(self.start, stop)[:, None]
            numbers = torch.arange(first, stop)
            seen = numbers <= queries
            if window is not None:
                seen &= numbers > queries - window
            mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, -torch.inf).repeat(groups, 1)[None, None]
        block = q.reshape(rows, keys.shape[1], groups * steps, q.shape[3])
        out, log_sum = _softmax_part(block, keys, values, scale, mask)
        return out.reshape(rows, heads, steps, -1), log_sum.reshape(rows, heads, steps)

    def _of_prompts(self, layer: int, q: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
        """Attention of all rows to the keys of their prompts: output and log-sum-exp."""
        keys, values = self.prompts[layer]
        rows, heads, steps, d = q.shape
        kv_heads = keys.shape[1]
        per_row = heads // kv_heads * steps
        if self.groups != per_row:
            self._arrange(per_row)
        flat = q.reshape(rows, kv_heads, per_row, d).transpose(0, 1).reshape(kv_heads, rows * per_row, d)
        out = q.new_zeros(kv_heads, rows * per_row, values.shape[3])
        log_sum = torch.full((kv_heads, rows * per_row), -torch.inf, dtype=torch.float32)
        for bucket in self.buckets:
            mask, dead = self._seen(bucket, steps, per_row, window)
            spread = flat[:, bucket.slots].transpose(0, 1)
            shown, held = (kept[bucket.prompts, :, : bucket.width] for kept in (keys, values))
            found, logs = _softmax_part(spread, shown, held, scale, mask)
            found, logs = found.transpose(0, 1).flatten(1, 2), logs.transpose(0, 1).flatten(1, 2)
            if dead is not None:
                found, logs = found.masked_fill(dead[:, None], 0.0), logs.masked_fill(dead, -torch.inf)
            out[:, bucket.rows], log_sum[:, bucket.rows] = found[:, bucket.places], logs[:, bucket.places]
        shape = (kv_heads, rows, heads // kv_heads, steps)
        out = out.view(*shape, -1).transpose(0, 1).reshape(rows, heads, steps, -1)
        return out, log_sum.view(shape).transpose(0, 1).reshape(rows, heads, steps)

    def _seen(
        self, bucket: _Bucket, steps: int, per_row: int, window: int | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The mask of a bucket's keys, and which of its queries see none of them."""
        lengths = torch.tensor(self.lengths[bucket.prompts])
        if window is None or int(lengths.max()) + self.start + steps <= window:
            return bucket.hidden, None
        step = torch.arange(per_row) % steps
        at = lengths[:, None] + self.start + step[torch.arange(bucket.slots.shape[1]) % per_row]
        numbers = torch.arange(bucket.width)
        seen = (numbers > at[..., None] - window) & (numbers < lengths[:, None, None])
        dead = ~seen.any(-1)
        seen[..., 0] |= dead  # a query needs a key; its output is dropped
        mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
        return mask[:, None], dead.flatten()

    def _arrange(self, per_row: int) -> None:
        """Put the queries of the rows into slots by prompt, in whole blocks."""
        self.groups, self.buckets = per_row, []
        widths = [whole_blocks(length) for length in self.lengths]
        for width in sorted(set(widths) - {0}):
            first = widths.index(width)
            prompts = slice(first, first + widths.count(width))
            numbers = range(prompts.start, prompts.stop)
            members = [[row for row, prompt in enumerate(self.prompt_of) if prompt == one] for one in numbers]
            if not any(members):
                continue
            size = whole_blocks(max(map(len, members)) * per_row)
            slots = torch.zeros(len(members), size, dtype=torch.long)
            rows, places = [], []
            for number, one in enumerate(members):
                queries = [row * per_row + i for row in one for i in range(per_row)]
                slots[number, : len(queries)] = torch.tensor(queries, dtype=torch.long)
                rows += queries
                places += [number * size + i for i in range(len(queries))]
            lengths = torch.tensor(self.lengths[prompts])
            padding = torch.arange(width) >= lengths[:, None]
            hidden = (
                torch.zeros(padding.shape).masked_fill(padding, -torch.inf)[:, None, None] if padding.any() else None
            )
            self.buckets.append(_Bucket(prompts, width, torch.tensor(rows), slots, torch.tensor(places), hidden))

    def keep(self, numbers: Sequence[int]) -> None:
        """Continue with these rows; the prompts stay."""
        chosen = torch.tensor(list(numbers))
        for layer, parts in self.own.items():
            kept = []
            for part in parts:
                new = part.new_empty(len(chosen), *part.shape[1:])
                new[:, :, : self.start] = part[chosen, :, : self.start]
                kept.append(new)
            self.own[layer] = kept[0], kept[1]
        self.prompt_of, self.groups = [self.prompt_of[i] for i in numbers], 0


def _softmax_part(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None
) -> tuple[Float[Tensor, "b h pos d"], Float[Tensor, "b h pos"]]:
    """`softmax(q k^T scale + mask) v` and the log of the softmax's denominator, in calls of at most `SPAN` queries."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if mask is not None:
        mask = mask.to(q.dtype).expand(q.shape[0], 1, q.shape[2], k.shape[2])
    if q.shape[2] <= SPAN or q.shape[2] % BLOCK:
        out, log_sum = attend(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
        return out, log_sum
    parts = []
    for i in range(0, q.shape[2], SPAN):
        queries = slice(i, i + SPAN)
        seen = None if mask is None else mask[:, :, queries]
        parts.append(attend(q[:, :, queries], k, v, 0.0, False, attn_mask=seen, scale=scale))
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([log_sum for _, log_sum in parts], dim=2)


# In the model's place of attention

_RUNNING: list[Shared] = []


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' interface of an attention function."""
    if attention_mask is not None or any(kwargs.get(name) is not None for name in NOT_COMPUTED):
        raise NotImplementedError("attention with a mask, a soft cap, sinks or a bias of its own")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    layer: Any = module.layer_idx
    out = _RUNNING[-1].attend(int(layer), query, key, value, scale, sliding_window)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


class _Passing(DynamicLayer):
    """A cache layer that keeps nothing: `Shared` does."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0


@contextlib.contextmanager
def _attending(model: nn.Module, shared: Shared) -> Iterator[None]:
    """Attention by `Shared` inside the `with`."""
    config = text_config(model)
    before = config._attn_implementation
    config._attn_implementation = NAME
    _RUNNING.append(shared)
    try:
        yield
    finally:
        _RUNNING.pop()
        config._attn_implementation = before


class SharedEngine(Engine):
    """`Engine` with prompts that are stored once, for models and machines where `exact` has found that it fits."""

    def _prefill(self) -> None:
        """Forward every distinct prompt except for its last token, right-padded to whole blocks."""
        self.cache = DynamicCache(config=text_config(self.model))
        self.cache.layers = [_Passing() for _ in self.cache.layers]
        keys = [
            (row.prompt, tuple(prompt_edit(one) for one in row.steerings if edits_prompt(one))) for row in self.rows
        ]
        order = sorted(dict.fromkeys(keys), key=lambda key: (len(key[0]), key[0]))
        number_of = {key: number for number, key in enumerate(order)}
        first = [keys.index(key) for key in order]
        lengths = [len(prompt) - 1 for prompt, _ in order]
        self.shared = Shared(lengths, [number_of[key] for key in keys], self.room)
        starts = [0] * len(order) if any(steered for _, steered in order) else self._forward_beginnings(order)
        begin = 0
        while begin < len(order):  # neighbours with the same start are forwarded at once
            end = begin + 1
            while end < len(order) and starts[end] == starts[begin]:
                end += 1
            self._fill(slice(begin, end), starts[begin], [self.rows[i] for i in first[begin:end]])
            begin = end

    def _forward_beginnings(self, order: Sequence[tuple[tuple[int, ...], Any]]) -> list[int]:
        """Forward beginnings that prompts share once, in whole blocks; returns where each prompt is to be continued."""
        prompts = [prompt for prompt, _ in order]
        none = [0] * len(prompts)
        if len(prompts) < 2:
            return none
        saved = MIN_SAVED_TOKENS["cpu"]
        starts = [n // BLOCK * BLOCK for n in shared_prefix_lengths(prompts, saved)]
        beginnings = {prompt[:n]: None for prompt, n in zip(prompts, starts, strict=True) if n}
        if len(beginnings) == sum(n > 0 for n in starts):
            return none
        rows = [Row((*beginning, prompts[0][0])) for beginning in beginnings]
        source = SharedEngine(self.model, rows, 0).shared
        ordered = sorted(beginnings, key=lambda beginning: (len(beginning), beginning))
        for layer, parts in source.prompts.items():
            shape = (len(prompts), parts[0].shape[1], whole_blocks(self.shared.lengths[-1]))
            copies = tuple(part.new_zeros(*shape, part.shape[3]) for part in parts)
            for number, (prompt, n) in enumerate(zip(prompts, starts, strict=True)):
                if n:
                    for copy, part in zip(copies, parts, strict=True):
                        copy[number, :, :n] = part[ordered.index(prompt[:n]), :, :n]
            self.shared.prompts[layer] = copies[0], copies[1]
        return starts

    def _fill(self, which: slice, start: int, rows: Sequence[Row]) -> None:
        """Forward prompts from a position on that they share."""
        longest = max(len(row.prompt) - 1 for row in rows)
        if longest <= start:
            return
        stop = start + whole_blocks(longest - start)
        ids = torch.zeros(len(rows), stop - start, dtype=torch.long)
        for number, row in enumerate(rows):
            part = row.prompt[start:-1]
            ids[number, : len(part)] = torch.tensor(part, dtype=torch.long)
        positions = torch.arange(start, stop).clamp(max=longest - 1).expand(len(rows), -1)
        compiled = RowSteering([row.steerings for row in rows], [(0, len(row.prompt)) for row in rows], start)
        self.shared.filling = which, start
        try:
            self._call(compiled, ids, positions, keep=1)
        finally:
            self.shared.filling = None

    def _copy_rows(self, numbers: Sequence[int]) -> None:
        self.shared.keep(numbers)

    def _forward(
        self, compiled: RowSteering, start: int, ids: Tensor, mask: Tensor, positions: Tensor, keep: int
    ) -> Float[Tensor, "batch pos vocabulary"]:
        compiled.start = start
        self.shared.start = start - (self.width - 1)
        logits = self._call(compiled, ids, positions, keep)
        self.shared.start += ids.shape[1]
        return logits

    def _call(self, compiled: RowSteering, ids: Tensor, positions: Tensor, keep: int) -> Tensor:
        """One steered forward of these tokens at these positions."""
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": positions,
            self.cache_name: self.cache,
            "use_cache": True,
        }
        if keep and self.takes_logits_to_keep:
            inputs["logits_to_keep"] = keep
        modules = {layer: self.blocks.modules[layer] for layer in compiled.layers}
        with _attending(self.model, self.shared), edit_streams(modules, compiled.edit) as ran:
            logits: Tensor = self.model(**inputs).logits
        check_called(ran, set(compiled.layers))
        return logits
