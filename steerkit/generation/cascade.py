"""Cascade attention: the engine for ordinary attention on a CPU, which stores and attends each distinct prompt once.

A row's query attends two sets of keys: those of its prompt, which other rows share, and its own new ones. Both parts
are softmaxes of their own, put together by their log-sum-exp:

    o = (exp(l_1) o_1 + exp(l_2) o_2) / (exp(l_1) + exp(l_2)).

No number depends on the other rows of the batch. torch's attention multiplies blocks of queries by matrices of keys,
whose rounding depends on the sizes of these matrices, but not on the number of queries where that is a multiple of 4.
So queries are padded to such multiples, the keys of a prompt to whole blocks of their own, and nothing on the left: the
sizes depend on a row's own prompt and step.

Source: Juravsky et al. 2024, "Hydragen"; Ye et al. 2024, "Cascade Inference".
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

from steerkit.generation.cache import min_saved_tokens, shared_prefix_lengths
from steerkit.generation.engine import Engine, Row, edits_prompt, prompt_edit
from steerkit.generation.projections import steered
from steerkit.models.model import text_config
from steerkit.steering.rows import RowSteering

NAME = "steerkit_cascade"
BLOCK = 32
"""Queries that torch's attention multiplies at once. Keys of prompts are padded to multiples of this."""
FEW = 4
"""Queries are padded to multiples of this: the rounding of fewer depends on where they are in memory."""
SPAN = 160
"""Queries per call: from 192 on, torch multiplies larger blocks at once."""
FILLED_TOKENS = 2048
"""Prompt tokens per forward, so that the memory of a forward does not grow with the number of prompts."""
NOT_COMPUTED = ("softcap", "s_aux", "position_bias", "head_mask", "alibi", "sinks")


def whole_blocks(count: int) -> int:
    """The smallest multiple of `BLOCK` that is at least `count`."""
    return -(-count // BLOCK) * BLOCK


@dataclass(frozen=True)
class _Group:
    """Prompts of one bucket that are being forwarded from the same position on.

    Args:
        prompts: their places in the bucket, and the bucket's number.
        start: the position of the first place: a whole number of blocks.
        offset: places before the first token that is forwarded, whose keys are there already.
        tokens: for each prompt and place, padded to whole blocks, the index of the forwarded token.
        back: which of these places, flattened, hold tokens and not padding.
        numbers: which of the forwarded tokens these are.
    """

    bucket: int
    prompts: slice
    start: int
    offset: int
    tokens: Int[Tensor, "prompt pos"]
    back: Int[Tensor, " token"]
    numbers: Int[Tensor, " token"]


@dataclass
class _Bucket:
    """Prompts whose keys fill the same number of blocks, and the rows that continue them.

    Args:
        lengths: keys of each prompt, without padding.
        width: keys that are attended: `lengths` rounded up to a whole number of blocks.
        hidden: 0 for the keys of a prompt, minus infinity for its padding; None without padding.
        rows: the rows that continue these prompts, a slice where they are neighbours.
        take: for each prompt and place the index of its row; None if that is the order of `rows`.
        back: the index of each of `rows` in `take`.
        count: places per prompt.
        block: room for the queries of these places, padded to a multiple of `FEW`.
    """

    lengths: list[int]
    width: int
    hidden: Tensor | None
    rows: Any = None
    take: Tensor | None = None
    back: Tensor | None = None
    count: int = 0
    block: Tensor | None = None


class Cascade:
    """The keys and values of a batch, layer by layer, and attention to them.

    Args:
        lengths: keys of each distinct prompt, descending: its tokens without the last.
        prompt_of: the prompt of each row.
        room: new keys of a row that room is reserved for.
    """

    def __init__(self, lengths: Sequence[int], prompt_of: Sequence[int], room: int) -> None:
        self.room, self.start = room, 0  # new keys so far
        self.filling: list[_Group] | None = None  # the prompts that are being forwarded
        self.buckets = [_bucket(list(some)) for _, some in groupby(lengths, whole_blocks)]
        self.prompts: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.own: dict[int, tuple[Tensor, Tensor]] = {}
        self.masks: dict[tuple[Any, ...], Tensor] = {}  # the widest of each kind
        self.rows = len(prompt_of)
        self._arrange(list(prompt_of))

    def place(self, prompt: int) -> tuple[int, int]:
        """The bucket of a prompt, and its place there."""
        for number, bucket in enumerate(self.buckets):
            if prompt < len(bucket.lengths):
                return number, prompt
            prompt -= len(bucket.lengths)
        raise IndexError(prompt)

    def stored(self, layer: int, like: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The keys and values of the prompts of each bucket, `[prompt, head, pos, d]`."""
        if layer not in self.prompts:
            self.prompts[layer] = [
                tuple(x.new_zeros(len(b.lengths), x.shape[1], b.width, x.shape[3]) for x in like)  # type: ignore[misc]
                for b in self.buckets
            ]
        return self.prompts[layer]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Float[Tensor, "row head pos d"]:
        """Store the new keys and values of a layer, and attend to all that a query sees."""
        if self.filling is not None:
            return self._fill(layer, q, k, v, scale, window)
        rows, heads, steps, d = q.shape
        kv_heads = k.shape[1]
        if layer not in self.own:
            shape = rows, kv_heads, max(self.room + 1, steps)
            self.own[layer] = k.new_empty(*shape, d), v.new_empty(*shape, v.shape[3])
        stop = self.start + steps
        for kept, new in zip(self.own[layer], (k, v), strict=True):
            kept[:, :, self.start : stop] = new
        q = q.reshape(rows, kv_heads, heads // kv_heads * steps, d)
        out, log_sum = self._to_own(layer, q, steps, scale, window)
        for number, bucket in enumerate(self.buckets):
            if bucket.width and bucket.count:
                out = self._to_prompts(layer, number, q, out, log_sum, steps, scale, window)
        return out.reshape(rows, heads, steps, -1)

    def _fill(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """Causal attention within prompts, one block of queries after the other."""
        assert self.filling is not None
        groups = q.shape[1] // k.shape[1]
        flat_q, flat_k, flat_v = (x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (q, k, v))
        out = flat_q.new_zeros(*flat_q.shape[:2], v.shape[3])
        for group in self.filling:
            many, length = group.tokens.shape
            keys, values = (part[group.prompts] for part in self.stored(layer, (k, v))[group.bucket])
            stop = group.start + length
            new = group.tokens[:, group.offset :]
            keys[:, :, group.start + group.offset : stop] = flat_k[new].transpose(1, 2)
            values[:, :, group.start + group.offset : stop] = flat_v[new].transpose(1, 2)
            queries = flat_q[group.tokens].unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4)
            causal = self._causal(BLOCK, stop, groups, window, q.dtype)
            found = []
            for begin in range(0, length, BLOCK):
                block = queries[:, :, :, begin : begin + BLOCK].reshape(many, k.shape[1], groups * BLOCK, -1)
                end = group.start + begin + BLOCK
                mask = causal[..., stop - end :]
                part, _ = _softmax_part(block, keys[:, :, :end], values[:, :, :end], scale, mask)
                found.append(part.unflatten(2, (groups, BLOCK)).permute(0, 3, 1, 2, 4))
            together = torch.cat(found, dim=1).reshape(many * length, *out.shape[1:])
            out[group.numbers] = together[group.back]
        return out.view(q.shape[0], q.shape[2], *out.shape[1:]).transpose(1, 2)

    def _causal(self, queries: int, keys: int, groups: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """The mask of the last `queries` of `keys` tokens, for each of `groups` heads.

        It depends on the distance to the last token alone: the last columns of a mask are the mask of fewer keys.
        """
        key = queries, groups, window, dtype
        if key not in self.masks or self.masks[key].shape[3] < keys:
            back = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
            hidden = (back < 0) if window is None else (back < 0) | (back >= window)
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)
            self.masks[key] = mask.repeat(groups, 1)[None, None]
        return self.masks[key][..., self.masks[key].shape[3] - keys :]

    def _to_own(self, layer: int, q: Tensor, steps: int, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
        """Attention to the rows' own keys: output and log-sum-exp."""
        stop = self.start + steps
        first = 0 if window is None else max(0, self.start - window + 1)
        keys, values = (kept[:, :, first:stop] for kept in self.own[layer])
        m = q.shape[2]
        extra = -m % FEW
        mask = None
        if steps > 1:
            mask = self._causal(steps, stop - first, m // steps, window, q.dtype)
            mask = nn.functional.pad(mask, (0, 0, 0, extra))
        out, log_sum = _softmax_part(nn.functional.pad(q, (0, 0, 0, extra)), keys, values, scale, mask)
        return out[:, :, :m], log_sum[:, :, :m]

    def _to_prompts(
        self,
        layer: int,
        number: int,
        q: Float[Tensor, "row head query d"],
        out: Float[Tensor, "row head query d"],
        log_sum: Float[Tensor, "row head query"],
        steps: int,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Add attention of a bucket's rows to the keys of their prompts to attention to their own."""
        bucket = self.buckets[number]
        keys, values = self.prompts[layer][number]
        _, heads, m, d = q.shape
        shape = len(bucket.lengths), bucket.count
        places = bucket.count * m
        padded = places + -places % FEW
        if bucket.block is None or bucket.block.shape[2] != padded or bucket.block.dtype != q.dtype:
            bucket.block = q.new_zeros(shape[0], heads, padded, d)
        chosen = bucket.rows if bucket.take is None else bucket.take
        own, own_log, queries = (x[chosen].unflatten(0, shape).transpose(1, 2) for x in (out, log_sum, q))
        bucket.block[:, :, :places].unflatten(2, (bucket.count, m)).copy_(queries)
        mask, blind = self._seen(bucket, steps, m, window)
        found, logs = _softmax_part(bucket.block, keys, values, scale, mask)
        if blind is not None:
            logs = logs.masked_fill(blind, -torch.inf)
        found, logs = (x[:, :, :places].unflatten(2, (bucket.count, m)) for x in (found, logs))
        # softmax over rows of two: an exp of many numbers rounds the last few of them in another way
        share = torch.stack((logs, own_log), dim=-1).softmax(-1).to(own.dtype)
        merged = (found * share[..., :1]).add_(own * share[..., 1:])
        merged = merged.transpose(1, 2).flatten(0, 1)
        if bucket.back is None and bucket.rows == slice(0, len(out)):
            return merged
        out[bucket.rows] = merged if bucket.back is None else merged[bucket.back]
        return out

    def _seen(self, bucket: _Bucket, steps: int, m: int, window: int | None) -> tuple[Tensor | None, Tensor | None]:
        """The mask of a bucket's keys, and which queries see none of them: these are given one, with no weight."""
        if window is None or bucket.lengths[0] + self.start + steps <= window:
            return bucket.hidden, None
        lengths = torch.tensor(bucket.lengths)
        assert bucket.block is not None
        step = torch.arange(bucket.block.shape[2]) % m % steps
        at = lengths[:, None] + self.start + step
        numbers = torch.arange(bucket.width)
        seen = (numbers > at[..., None] - window) & (numbers < lengths[:, None, None])
        blind = ~seen.any(-1)
        seen[..., 0] |= blind
        return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None], blind[:, None]

    def _arrange(self, prompt_of: list[int]) -> None:
        """Find for each bucket the rows that continue its prompts."""
        self._prompt_of = prompt_of
        first = 0
        for bucket in self.buckets:
            numbers = range(first, first + len(bucket.lengths))
            first = numbers.stop
            members = [[row for row, prompt in enumerate(prompt_of) if prompt == one] for one in numbers]
            rows = sorted(row for one in members for row in one)
            bucket.count, bucket.block = max(map(len, members)), None
            even = rows == [row for one in members for row in one] and len({len(one) for one in members}) == 1
            together = bool(rows) and rows == list(range(rows[0], rows[-1] + 1))
            bucket.rows = slice(rows[0], rows[-1] + 1) if together else torch.tensor(rows, dtype=torch.long)
            if even and together:
                bucket.take = bucket.back = None
                continue
            places = [(one + [0] * bucket.count)[: bucket.count] for one in members]
            where = {
                row: i * bucket.count + j
                for i, (one, had) in enumerate(zip(places, members, strict=True))
                for j, row in enumerate(one[: len(had)])
            }
            bucket.take = torch.tensor(places, dtype=torch.long).flatten()
            bucket.back = torch.tensor([where[row] for row in rows], dtype=torch.long)

    def keep(self, numbers: Sequence[int]) -> None:
        """Continue with these rows. Prompts that none of them continues are dropped."""
        chosen = torch.tensor(list(numbers))
        for layer, parts in self.own.items():
            kept = []
            for part in parts:
                new = part.new_empty(len(chosen), *part.shape[1:])
                new[:, :, : self.start] = part[:, :, : self.start][chosen]
                kept.append(new)
            self.own[layer] = kept[0], kept[1]
        prompt_of = [self._prompt_of[i] for i in numbers]
        alive = sorted(set(prompt_of))
        places = [self.place(prompt) for prompt in alive]
        if len(alive) < sum(len(bucket.lengths) for bucket in self.buckets):
            kept_of = {b: [place for bucket, place in places if bucket == b] for b in sorted({b for b, _ in places})}
            for layer, stored in self.prompts.items():
                self.prompts[layer] = [(stored[b][0][some], stored[b][1][some]) for b, some in kept_of.items()]
            self.buckets = [_bucket([self.buckets[b].lengths[i] for i in some]) for b, some in kept_of.items()]
        number_of = {prompt: number for number, prompt in enumerate(alive)}
        self._arrange([number_of[prompt] for prompt in prompt_of])


def _bucket(lengths: list[int]) -> _Bucket:
    width = whole_blocks(lengths[0])
    padding = torch.arange(width) >= torch.tensor(lengths)[:, None]
    hidden = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)[:, None, None] if padding.any() else None
    return _Bucket(lengths, width, hidden)


def _softmax_part(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None
) -> tuple[Float[Tensor, "b h pos d"], Float[Tensor, "b h pos"]]:
    """`softmax(q k^T scale + mask) v` and the log of the softmax's denominator, in calls of at most `SPAN` queries."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if mask is not None:
        mask = mask.to(q.dtype).expand(q.shape[0], 1, q.shape[2], k.shape[2])
    if q.shape[2] <= SPAN:
        out, log_sum = attend(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
        return out, log_sum
    parts = []
    for i in range(0, q.shape[2], SPAN):
        queries = slice(i, i + SPAN)
        seen = None if mask is None else mask[:, :, queries]
        parts.append(attend(q[:, :, queries], k, v, 0.0, False, attn_mask=seen, scale=scale))
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([log_sum for _, log_sum in parts], dim=2)


# In the model's place of attention

_running: ContextVar[Cascade] = ContextVar("running")
"""The cascade of the model that runs. Each thread has its own: other models may run in other threads."""


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
    window = None
    if attention_mask is not None and attention_mask.dtype == WINDOW and attention_mask.numel() == 1:
        window, attention_mask = int(attention_mask), None
    if attention_mask is not None or any(kwargs.get(name) is not None for name in NOT_COMPUTED):
        raise NotImplementedError("attention with a mask, a soft cap, sinks or a bias of its own")
    if window != sliding_window:
        raise NotImplementedError(f"attention whose mask has the window {window} and whose layer has {sliding_window}")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    layer: Any = module.layer_idx
    out = _running.get().attend(int(layer), query, key, value, scale, sliding_window)
    return out.transpose(1, 2).contiguous(), None


WINDOW = torch.float64
"""The data type of a mask that stands for a sliding window: one number, its size."""


def _mask(
    *args: Any, mask_function: Callable[..., Any] | None = None, local_size: int | None = None, **kwargs: Any
) -> Tensor | None:
    """transformers' interface of a mask function: nothing for causal attention, the size of a sliding window.

    Raises:
        NotImplementedError: another pattern, such as chunks.
    """
    if mask_function is None:
        raise NotImplementedError("a mask without its function")
    far = 10**6 if local_size is None else local_size
    queries, keys = torch.tensor([[0, 3, 3, far - 1, far, far], [1, 4, 3, 0, 1, 0]])
    zero = torch.zeros_like(queries)
    seen = torch.as_tensor(mask_function(zero, zero, queries, keys)).tolist()
    if seen != [False, False, True, True, True, local_size is None]:
        raise NotImplementedError("attention that is neither causal nor causal in a sliding window")
    return None if local_size is None else torch.full((1, 1, 1, 1), local_size, dtype=WINDOW)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


class _Passing(DynamicLayer):
    """A cache layer that keeps nothing: `Cascade` does."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0


@contextlib.contextmanager
def _attending(model: nn.Module, cascade: Cascade) -> Iterator[None]:
    """Attention by `Cascade` inside the `with`."""
    if "torch._dynamo" in sys.modules:  # layers may be compiled one by one: attention is called, not compiled
        AttentionInterface.register(NAME, torch.compiler.disable(_attention))
    config = text_config(model)
    before = config._attn_implementation
    config._attn_implementation = NAME
    outer = _running.set(cascade)
    try:
        yield
    finally:
        _running.reset(outer)
        config._attn_implementation = before


Key = tuple[tuple[int, ...], tuple[Any, ...]]
"""A prompt, and what edits it."""


class CascadeEngine(Engine):
    """`Engine` with prompts that are stored once, for models and machines where `exact` has found that it fits."""

    def _prefill(self) -> None:
        """Forward every distinct prompt except for its last token."""
        self.cache = DynamicCache(config=text_config(self.model))
        self.cache.layers = [_Passing() for _ in self.cache.layers]
        keys: list[Key] = [
            (row.prompt, tuple(prompt_edit(one) for one in row.steerings if edits_prompt(one))) for row in self.rows
        ]
        order = sorted(dict.fromkeys(keys), key=lambda key: (-len(key[0]), key[0]))
        number_of = {key: number for number, key in enumerate(order)}
        self.cascade = Cascade([len(p) - 1 for p, _ in order], [number_of[key] for key in keys], self.room)
        first = dict(zip(reversed(keys), reversed(self.rows), strict=True))
        edited = any(edit for _, edit in order)
        starts = [0] * len(order) if edited else self._forward_beginnings([prompt for prompt, _ in order])
        some: list[int] = []
        tokens = 0
        for number, start in enumerate(starts):
            count = len(order[number][0]) - 1 - start
            if some and tokens + count > FILLED_TOKENS:
                self._fill(some, starts, [first[order[i]] for i in some], edited)
                some, tokens = [], 0
            if count:
                some.append(number)
                tokens += count
        if some:
            self._fill(some, starts, [first[order[i]] for i in some], edited)

    def _forward_beginnings(self, prompts: Sequence[tuple[int, ...]]) -> list[int]:
        """Forward beginnings that prompts share once; returns where each prompt is to be continued."""
        none = [0] * len(prompts)
        if len(prompts) < 2:
            return none
        starts = shared_prefix_lengths(prompts, min_saved_tokens("cpu"))
        beginnings = sorted(
            {prompt[:n] for prompt, n in zip(prompts, starts, strict=True) if n}, key=lambda p: (-len(p), p)
        )
        if len(beginnings) == sum(n > 0 for n in starts):
            return none
        source = CascadeEngine(self.model, [Row((*beginning, prompts[0][0])) for beginning in beginnings], 0).cascade
        number_of = {beginning: number for number, beginning in enumerate(beginnings)}
        for layer, parts in source.prompts.items():
            stored = self.cascade.stored(layer, parts[0])
            for number, (prompt, n) in enumerate(zip(prompts, starts, strict=True)):
                if n:
                    bucket, place = self.cascade.place(number)
                    from_bucket, from_place = source.place(number_of[prompt[:n]])
                    for copy, part in zip(stored[bucket], parts[from_bucket], strict=True):
                        copy[place, :, :n] = part[from_place, :, :n]
        return starts

    def _fill(self, numbers: Sequence[int], starts: Sequence[int], rows: Sequence[Row], edited: bool) -> None:
        """Forward prompts from where they are to be continued, one after the other in one row; padded if edited."""
        parts = [row.prompt[starts[i] : -1] for i, row in zip(numbers, rows, strict=True)]
        places = [(*self.cascade.place(i), starts[i]) for i in numbers]
        if edited:
            longest = max(map(len, parts))
            ids = torch.tensor([[*part, *part[:1] * (longest - len(part))] for part in parts])
            positions = torch.arange(longest).expand(len(parts), -1)
            offsets = [i * longest for i in range(len(parts))]
            steerings = [row.steerings for row in rows]
            compiled = RowSteering(steerings, [(0, len(row.prompt)) for row in rows])
        else:
            ids = torch.tensor([[token for part in parts for token in part]])
            positions = torch.tensor(
                [[starts[i] + j for i, part in zip(numbers, parts, strict=True) for j in range(len(part))]]
            )
            offsets = [sum(map(len, parts[:i])) for i in range(len(parts))]
            compiled = RowSteering([()], [(0, ids.shape[1])])
        groups = []
        each = list(zip(places, parts, offsets, strict=True))
        shift = {id(one): one[0][1] - i for i, one in enumerate(each)}  # equal for neighbours in the bucket
        for (bucket, start, _), some in groupby(each, key=lambda one: (one[0][0], one[0][2], shift[id(one)])):
            members = list(some)
            first, last = members[0][0][1], members[-1][0][1]
            skipped = start % BLOCK  # a block is attended as if all its tokens were forwarded: its sizes are the same
            length = whole_blocks(skipped + max(len(part) for _, part, _ in members))
            tokens = torch.zeros(len(members), length, dtype=torch.long)
            places_of = []
            for i, (_, part, offset) in enumerate(members):
                tokens[i, skipped : skipped + len(part)] = torch.arange(offset, offset + len(part))
                places_of.append(i * length + skipped + torch.arange(len(part)))
            back = torch.cat(places_of)
            prompts = slice(first, last + 1)
            groups.append(_Group(bucket, prompts, start - skipped, skipped, tokens, back, tokens.flatten()[back]))
        self.cascade.filling = groups
        try:
            self._call(compiled, ids, positions, keep=1)
        finally:
            self.cascade.filling = None
            self.cascade.masks.clear()

    def _copy_rows(self, numbers: Sequence[int]) -> None:
        self.cascade.keep(numbers)

    def _forward(
        self, compiled: RowSteering, start: int, ids: Tensor, mask: Tensor, positions: Tensor, keep: int
    ) -> Float[Tensor, "batch pos vocabulary"]:
        compiled.start = start
        self.cascade.start = start - (self.width - 1)
        logits = self._call(compiled, ids, positions, keep)
        self.cascade.start += ids.shape[1]
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
        with _attending(self.model, self.cascade), steered(self.model, self.blocks, compiled, self.monitor):
            logits: Tensor = self.model(**inputs).logits
        return logits
