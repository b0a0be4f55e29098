"""Batches of rows through the engine that fits the model, found once by comparison with plain forwards."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from steerkit.generation.cascade import CascadeEngine
from steerkit.generation.engine import Engine, Row
from steerkit.models.active import suspended
from steerkit.models.blocks import find_blocks
from steerkit.models.cache_argument import NAMES, cache_argument
from steerkit.models.context import check_switch, check_vocabulary, context_length
from steerkit.models.identity import fingerprint
from steerkit.models.kernels import running
from steerkit.models.model import RAISED, device_of, text_config, unwrap

BATCH_ROWS = {"cpu": 72, "cuda": 256}
SMALL_MODEL = 400_000_000
"""Parameters x rows: on a CPU, a batch of a model with few parameters grows up to it, or to `MOST_ROWS`."""
MOST_ROWS = 576
LOGIT_BYTES = {"cpu": 2**28, "cuda": 2**32}
"""Logits that a batch of scored texts holds at once."""
SCORED_ROWS = 96
SCORED_TOKENS = 768
"""A batch of scored texts has at least so many rows, and of short texts as many as make so many tokens.

A prompt is read once per batch, so that small batches of short texts would mostly read prompts.
"""
SHORT = 63
"""Rows with room for at most so many new tokens share batches; of others, those within a factor of 2."""
_fitting: weakref.WeakKeyDictionary[nn.Module, dict[bool, int]] = weakref.WeakKeyDictionary()
"""Model -> tokens (rows x (longest prompt + new tokens)) of half the smallest batch that did not fit into memory.

Apart for batches that hold the logits of all new tokens (True), which need more memory.
"""
Done = TypeVar("Done")


def in_batches(
    model: nn.Module,
    rows: Sequence[Row],
    room: int | Sequence[int],
    work: Callable[[Engine, Sequence[int]], Sequence[Done]],
    batch_rows: int | None = None,
    held: int | None = None,
) -> Iterator[list[tuple[int, Done]]]:
    """Run `work(engine, row numbers)` over all rows in batches; yields each batch's `(row number, result)` when done.

    Rows of similar room and prompt length share a batch (of equal prompt length, where the model cannot be padded), and
    equal prompts are neighbours. A batch that does not fit into memory is halved, and so are later ones of its size, in
    this call and in later calls with this model. The model is in eval mode, and steerings that
    `with steering.on(model)` set are suspended.

    Args:
        room: number of new tokens that the cache reserves room for, the same for all rows or one for each.
        held: where `work` holds the logits of the last token of the prompt and of all new tokens: the most of them,
            see `held_logits`.

    Raises:
        ValueError: see `check_rows` and `check_switch`.
    """
    padded = check_rows(model, rows).padded
    rooms = list(room) if isinstance(room, Sequence) else [int(room)] * len(rows)
    check_switch(model, (len(row.prompt) + new for row, new in zip(rows, rooms, strict=True)))
    size = batch_rows or default_rows(model)
    places = [(max(new, SHORT).bit_length(), len(row.prompt)) for row, new in zip(rows, rooms, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: (-places[i][0], -places[i][1], rows[i].prompt))
    by_length = groupby(order, key=lambda i: None if padded else places[i])
    queue = [batch for _, group in by_length for batch in _cut(group, rooms, size, held)][::-1]
    fitting = _fitting.setdefault(unwrap(model), {})
    while queue:
        numbers = queue.pop()
        widest = max(rooms[i] for i in numbers)
        width = max(len(rows[i].prompt) for i in numbers) + widest
        most = max(1, fitting.get(bool(held), len(numbers) * width) // width)
        if len(numbers) > most:
            queue += [numbers[i : i + most] for i in range(0, len(numbers), most)][::-1]
            continue
        try:
            with running(model), suspended(model), torch.inference_mode():  # not while the caller works on a batch
                done = work(engine_of(model)([rows[i] for i in numbers], widest), numbers)
        except torch.OutOfMemoryError:
            if len(numbers) == 1:
                raise
            fitting[bool(held)] = len(numbers) // 2 * width
            queue.append(numbers)
            continue
        yield list(zip(numbers, done, strict=True))


def _cut(group: Iterable[int], rooms: Sequence[int], size: int, held: int | None) -> list[list[int]]:
    """Row numbers in batches of at most `size` rows, and of at most `held` logits where that is given."""
    batches: list[list[int]] = []
    widest = 0
    for i in group:
        widest = max(widest, rooms[i] + 1)
        full = batches and (len(batches[-1]) == size or (held and (len(batches[-1]) + 1) * widest > held))
        if not batches or full:
            batches.append([])
            widest = rooms[i] + 1
        batches[-1].append(i)
    return batches


def default_rows(model: nn.Module) -> int:
    """Rows of a batch: as many as suit the device, on a CPU more of a small model.

    The Python of a decoding step costs the same for any number of rows; in a model of under a million parameters it
    is most of a step of 72 rows. Texts do not depend on the number.
    """
    device = device_of(model).type
    rows = BATCH_ROWS.get(device, BATCH_ROWS["cpu"])
    if device != "cpu":
        return rows
    parameters = sum(parameter.numel() for parameter in unwrap(model).parameters())
    return max(rows, min(MOST_ROWS, SMALL_MODEL // max(1, parameters)))


def held_logits(model: nn.Module, copies: int = 1) -> int:
    """The most tokens whose logits a batch holds at once, in `copies` of float32."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    return max(1, LOGIT_BYTES.get(device_of(model).type, LOGIT_BYTES["cpu"]) // (4 * vocabulary * copies))


def engine_of(model: nn.Module) -> Callable[[Sequence[Row], int], Engine]:
    """The engine that fits the model: called with rows that `check_rows` has accepted, and the room for new tokens."""
    ways = exact(model)
    return partial(CascadeEngine if ways.shared else Engine, model, chunks=ways.chunks)


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
    every = [one for row in rows for one in row.steerings]
    for steering in {(id(one.vector), one.site, one.foreign, id(one.when)): one for one in every}.values():
        steering.check(model, blocks, weights)
    check_vocabulary(model, [row.prompt for row in rows])
    return ways


@dataclass(frozen=True)
class Exact:
    """Which batched forwards give the logits of plain forwards, besides one token after the other over a cache.

    Args:
        padded: a left-padded batch; where it does not, only prompts of one length share a batch.
        chunks: several tokens at once after a prefill; where they do not, they are forwarded token by token.
        shared: `CascadeEngine`, which stores and attends a prompt once for all its rows.
    """

    padded: bool
    chunks: bool
    shared: bool


_exact: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Exact]] = weakref.WeakKeyDictionary()
UNEQUAL_PROMPTS = ((11, 12, 13, 14, 15, 16), (17, 18, 19))
EQUAL_PROMPTS = ((11, 12, 13, 14), (17, 18, 19, 20))
LONG_PROMPTS = (70, 45)  # lengths
NEW_TOKENS = (21, 22, 23)


def exact(model: nn.Module) -> Exact:
    """Find, once per model, device, data type and attention kernel, which batched forwards are exact.

    Short rows with a cache are compared with each row without.

    Models that count positions by the column cannot be padded on the left. Some recurrent layers lose their state
    between chunks of several tokens.

    Raises:
        ValueError: even token by token and without padding, the model with a cache differs from the model without: it
            takes no cache, or counts positions differently. Its texts would be wrong without an error.
    """
    base = unwrap(model)
    kernel = getattr(text_config(base), "_attn_implementation", None)
    state = (device_of(model).type, next(base.parameters()).dtype, kernel)
    known = _exact.setdefault(base, {})
    if state not in known:
        if cache_argument(base) is None:
            raise ValueError(
                f"expected a model that takes a KV cache; {type(base).__name__} takes none of {NAMES}. Steer its plain "
                "forwards with `steering.on(model)`."
            )
        reasons = []
        for prompts in (UNEQUAL_PROMPTS, EQUAL_PROMPTS):
            try:
                stepwise, chunked = _deviations(model, prompts, Engine)
            except RAISED as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                reasons.append(f"it raises {type(error).__name__}: {error}")
                continue
            limit = 1e-3 if next(base.parameters()).dtype in (torch.float32, torch.float64) else 0.1
            if stepwise <= limit:
                padded = prompts is UNEQUAL_PROMPTS
                known[state] = Exact(padded, chunked <= limit, padded and _can_share(model, limit))
                break
            reasons.append(f"they differ by {stepwise:.1e} relative to their norm")
        else:
            raise ValueError(
                f"expected a model whose logits with a cache are those of plain forwards; in {type(base).__name__}, "
                f"left-padded, {reasons[0]}; unpadded, {reasons[1]}. Steer its plain forwards with "
                "`steering.on(model)`."
            )
    return known[state]


def _can_share(model: nn.Module, limit: float) -> bool:
    """Whether `CascadeEngine` computes the same: ordinary attention on a CPU, of prompts longer than a block too."""
    base = unwrap(model)
    if device_of(model).type != "cpu" or not find_blocks(model).positions:
        return False
    if getattr(text_config(base), "_attn_implementation", None) != "sdpa":
        return False
    window = getattr(text_config(base), "sliding_window", None)
    longest = min(context_length(model) or LONG_PROMPTS[0], (window or 0) + LONG_PROMPTS[0])
    long = tuple(tuple(11 + i % 7 for i in range(min(n, longest - 8))) for n in LONG_PROMPTS)
    try:
        return all(max(_deviations(model, prompts, CascadeEngine)) <= limit for prompts in (UNEQUAL_PROMPTS, long))
    except RAISED as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False


def _deviations(model: nn.Module, prompts: Sequence[tuple[int, ...]], kind: type[Engine]) -> tuple[float, float]:
    """Relative deviation of a cached batch's logits from those of plain forwards: token by token, and in one chunk.

    As in a sweep, the first prompt is in the batch twice, rows leave it before the last token, and a prompt of two
    tokens follows: a model with a state outside its cache deviates there.
    """
    vocabulary = text_config(model).vocab_size
    new, *prompts = (tuple(i % vocabulary for i in ids) for ids in (NEW_TOKENS, *prompts))
    device = device_of(model)
    short = tuple(prompts[-1][:2])
    prompts = [*prompts, prompts[0]]
    last, left = len(new), list(range(1, len(prompts)))

    def off(logits: Tensor, truth: Tensor) -> float:
        return float(((logits - truth).norm(dim=-1) / truth.norm(dim=-1)).max())

    with running(model), torch.inference_mode():
        plain = [torch.tensor([(*prompt, *new)], device=device) for prompt in (*prompts[:-1], short)]
        logits = [model(input_ids=ids, use_cache=False).logits[:, -last - 1 :].float() for ids in plain]
        truth, short_truth = torch.cat([*logits[:-1], logits[0]]), logits[-1]
        stepwise: list[float] = []
        chunked: list[float] = []
        for rows, expected in ((prompts, truth), ([short], short_truth)):
            for step in (1, last + 1):
                engine = kind(model, [Row(prompt) for prompt in rows], last)
                chunk = torch.cat([engine.last_tokens(), torch.tensor([new] * len(rows), device=device)], dim=1)
                found, some = (stepwise if step == 1 else chunked), list(range(len(rows)))
                for i in range(0, last + 1, step):
                    if i == last and len(rows) > 1:
                        engine.keep(left)
                        some = left
                    part = engine.forward(chunk[some, i : i + step], engine.width - 1 + i)
                    found.append(off(part, expected[some, i : i + step]))
    return max(stepwise), max(chunked)
