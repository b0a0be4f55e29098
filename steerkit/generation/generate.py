"""Generation: many rows at once, each with its own prompt, steering and random stream, over one KV cache."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, overload

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from steerkit.capture.activations import Layer
from steerkit.generation.batches import in_batches
from steerkit.generation.engine import Choose, Continuation, Engine, Row
from steerkit.generation.projections import Monitor
from steerkit.generation.sampling import likeliest, random_stream, sample
from steerkit.models.active import suspended
from steerkit.models.context import context_length
from steerkit.models.ends import ends_of
from steerkit.models.model import widest_float
from steerkit.steering.dose import median_norms, with_coefficients
from steerkit.steering.steering import Steering, steerings_per_row
from steerkit.text.prompt import PromptLike, listed, render
from steerkit.text.tokens import decode as decode_ids
from steerkit.vectors.vector import SteeringVector


@dataclass(frozen=True)
class Generation:
    """One generated continuation.

    Args:
        text: decoded from the ids as continuation of the prompt; special tokens are left out.
        ids: the generated token ids, the end-of-sequence token included where it was generated.
        finish_reason: `"stop"` where an end-of-sequence token was generated, `"length"` at `max_new_tokens`.
        log_probs: natural logarithm of each token's probability under the steered model, at temperature 1 and without
            a nucleus; one per id.
        projections: name of a watched vector -> a table with one row per id: token_id, token, before and after (see
            `generate`).
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    log_probs: tuple[float, ...]
    projections: Mapping[str, pd.DataFrame] = field(default_factory=dict, compare=False, repr=False)


@overload
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[PromptLike],
    *,
    max_new_tokens: int,
    steering: Steering | Sequence[Steering | None] | None = ...,
    temperature: float = ...,
    top_p: float = ...,
    seed: int = ...,
    batch_rows: int | None = ...,
    chat_template_kwargs: Mapping[str, Any] | None = ...,
    return_details: Literal[False] = ...,
    watch: None = ...,
    norms: Mapping[Layer, float] | None = ...,
) -> list[str]: ...


@overload
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[PromptLike],
    *,
    max_new_tokens: int,
    steering: Steering | Sequence[Steering | None] | None = ...,
    temperature: float = ...,
    top_p: float = ...,
    seed: int = ...,
    batch_rows: int | None = ...,
    chat_template_kwargs: Mapping[str, Any] | None = ...,
    return_details: Literal[True],
    watch: Mapping[str, SteeringVector] | None = ...,
    norms: Mapping[Layer, float] | None = ...,
) -> list[Generation]: ...


@overload
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[PromptLike],
    *,
    max_new_tokens: int,
    steering: Steering | Sequence[Steering | None] | None = ...,
    temperature: float = ...,
    top_p: float = ...,
    seed: int = ...,
    batch_rows: int | None = ...,
    chat_template_kwargs: Mapping[str, Any] | None = ...,
    return_details: bool = ...,
    watch: Mapping[str, SteeringVector],
    norms: Mapping[Layer, float] | None = ...,
) -> list[Generation]: ...


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[PromptLike],
    *,
    max_new_tokens: int,
    steering: Steering | Sequence[Steering | None] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_rows: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    return_details: bool = False,
    watch: Mapping[str, SteeringVector] | None = None,
    norms: Mapping[Layer, float] | None = None,
) -> list[str] | list[Generation]:
    """Continue each prompt, steered or not; the texts in the order of the prompts.

    A text depends on the model, its prompt, its steering (with a dose also on the norms) and the seed alone, not on the
    other rows: prompts are left-padded with positions of their own, and random numbers are keyed by (seed, prompt,
    occurrence index). To pair samples with and without steering, call `generate` once for each: both then draw the same
    numbers. In one call, the second occurrence of a prompt draws others than the first.
    Of the model's generation configuration only the end tokens are used: repetition penalties, suppressed tokens, a
    top_k or other sampling settings there have no effect.
    Two models may generate in two threads. One model is used by one thread at a time.

    Args:
        prompts: strings (verbatim), lists of messages (rendered by the chat template), or `Prompt`s.
        steering: one for all rows, or one (or None) per prompt; steerings that `with steering.on(model)` set are
            applied too.
        temperature: 0 is greedy.
        top_p: nucleus (Holtzman et al. 2020): the fewest most likely tokens whose probability reaches top_p.
        batch_rows: rows decoded at once; default by device and size of the model, halved when memory runs out.
        chat_template_kwargs: further arguments of the chat template, e.g. `{"enable_thinking": False}`.
        return_details: return a `Generation` per prompt: text, ids, finish reason, log-probabilities.
        watch: name -> vector with one layer; implies `return_details`. `Generation.projections[name]` has, for each
            generated token, the projection `h . v / |v|` on the unit direction, with h the stream after that layer's
            block at the token itself: `before` and `after` the steering of that layer is applied. Pushes at lower
            layers and at earlier tokens are in both. The stream at the last token of the prompt, where the first new
            token is decided, belongs to no generated token; `sk.project` reads it. The last token is forwarded once
            more, and no text changes. Vectors of other weights are allowed, as for `sk.project`.
        norms: norm of the stream per layer, for steerings with a `dose`, e.g. `result.meta["stream_norms"]` of a sweep.
            Default: the prompts are first continued without steering by the same settings, and the norm is the median
            over the steered positions of all of them, see `steerkit.steering.dose.median_norms`. The coefficient of a
            dose, and so a text, then depends on all prompts of the call; pass norms for one that does not.

    Returns:
        One text per prompt, or one `Generation` with `return_details=True` or `watch`.

    Raises:
        TypeError: an entry of `steering` that is not a Steering.
        ValueError: no prompts, an empty or too long prompt, a steering or watched vector that does not fit, a setting
            out of range, or logits that are not finite in one of the rows.

    Example:
        >>> steering = sk.Steering(vector, 1.5, layer=14)
        >>> sk.generate(model, tokenizer, ["The sea is"], max_new_tokens=20, steering=steering)
        >>> found = sk.generate(model, tokenizer, ["The sea is"], max_new_tokens=20, watch={"mood": vector.at(16)})
        >>> found[0].projections["mood"]["before"].mean()
    """
    prompts = listed(prompts)
    seed = checked_seed(seed)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "batch_rows": batch_rows,
    }
    if watch is not None:
        Monitor(watch, 0).check(model)
    with suspended(model) as active:
        each = steerings_per_row(steering, active, len(prompts))
        seen: Counter[tuple[int, ...]] = Counter()
        streams, rows = [], []
        for one, row in zip(prompts, each, strict=True):
            prompt = render(tokenizer, one, chat_template_kwargs)
            streams.append((seed, prompt.text, seen[prompt.ids]))
            seen[prompt.ids] += 1
            rows.append(Row(prompt.ids, row))

        @functools.cache
        def unsteered() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
            plain = [Row(row.prompt) for row in rows]
            batches = decode(model, tokenizer, plain, streams, **settings)
            written = {number: continuation.all_ids for batch in batches for number, continuation in batch}
            return [(row.prompt, written[number]) for number, row in enumerate(plain)]

        def measured(positions: str, operation: str, site: str) -> Mapping[Layer, float]:
            return median_norms(model, unsteered(), None, positions, operation, site) if norms is None else norms

        each = with_coefficients(each, measured)
        rows = [Row(row.prompt, several) for row, several in zip(rows, each, strict=True)]
        log_probs: list[list[float]] | None = [[] for _ in rows] if return_details or watch is not None else None
        read: dict[int, list[list[list[float]]]] = {}
        found = decode(
            model,
            tokenizer,
            rows,
            streams,
            **settings,
            log_probs=log_probs,
            watch=watch,
            read=read,
        )
        done = {number: continuation for batch in found for number, continuation in batch}
    if overflowed := sorted(number for number, continuation in done.items() if continuation.overflowed):
        raise ValueError(
            f"expected finite logits; got NaN or infinity for the prompts {overflowed[:8]}. Lower the coefficient, or "
            "load the model in bfloat16 or float32."
        )
    if log_probs is None:
        return [text_of(tokenizer, done[number]) for number in range(len(rows))]
    names = list(watch or {})
    return [_details(tokenizer, done[i], log_probs[i], names, read.get(i, [])) for i in range(len(rows))]


def text_of(tokenizer: Any, continuation: Continuation) -> str:
    """The text of a continuation; special tokens are left out, added ordinary tokens (tags) stay."""
    return decode_ids(tokenizer, continuation.ids)


def _details(
    tokenizer: Any,
    continuation: Continuation,
    log_probs: Sequence[float],
    names: Sequence[str],
    read: Sequence[Sequence[Sequence[float]]],
) -> Generation:
    ids = continuation.all_ids
    reason: Literal["stop", "length"] = "stop" if continuation.finished else "length"
    tokens = pd.DataFrame({"token_id": ids, "token": [tokenizer.decode([token]) for token in ids]})
    projections = {}
    for number, name in enumerate(names):
        before, after = zip(*(token[number] for token in read[: len(ids)]), strict=True)
        projections[name] = tokens.assign(before=before, after=after)
    return Generation(text_of(tokenizer, continuation), ids, reason, tuple(log_probs[: len(ids)]), projections)


def decode(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    streams: Sequence[Any],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_rows: int | None = None,
    log_probs: Sequence[list[float]] | None = None,
    watch: Mapping[str, SteeringVector] | None = None,
    read: dict[int, list[list[list[float]]]] | None = None,
) -> Iterator[list[tuple[int, Continuation]]]:
    """Decode rows batch by batch; yields each batch's `(row number, continuation)` as it is finished.

    Args:
        rows: prompts as ids, with their steerings.
        streams: per row, what its random numbers are keyed by; unused when greedy.
        log_probs: per row, a list that the log-probabilities of its tokens are appended to (further entries may follow
            those of a row that has ended).
        watch: name -> vector with one layer, see `generate`.
        read: gets for each row `[token][vector][before, after]`, with further entries as in `log_probs`.

    Raises:
        ValueError: a prompt too long for the context, a steering that does not fit, or a setting out of range.
    """
    check_settings(model, rows, max_new_tokens, temperature, top_p, batch_rows)
    ends = ends_of(model, tokenizer)

    def work(engine: Engine, numbers: Sequence[int]) -> list[Continuation]:
        keys = [] if temperature == 0 else [streams[i] for i in numbers]
        choose = _chooser(keys, max_new_tokens, temperature, top_p, engine.device)
        if log_probs is not None:
            choose = _recording(choose, [log_probs[i] for i in numbers])
        monitor = None if watch is None else Monitor(watch, len(numbers))
        done = engine.decode(max_new_tokens, ends, choose, monitor)
        if monitor is not None and read is not None:
            read.update(zip(numbers, monitor.rows, strict=True))
        return done

    yield from in_batches(model, rows, max_new_tokens, work, batch_rows)


def _chooser(
    streams: Sequence[Any], max_new_tokens: int, temperature: float, top_p: float, device: torch.device
) -> Choose:
    """How the next token of each row of a batch is chosen: the likeliest, or sampled with the row's random stream."""
    if temperature == 0:
        return lambda logits, rows, step: likeliest(logits)
    numbers = {stream: random_stream(stream, max_new_tokens) for stream in dict.fromkeys(streams)}
    uniform = torch.from_numpy(np.stack([numbers[stream] for stream in streams]))
    uniform = uniform.to(device, widest_float(device))
    return lambda logits, rows, step: sample(logits, uniform[rows, step], temperature, top_p)


def _recording(choose: Choose, log_probs: Sequence[list[float]]) -> Choose:
    """`choose`, which also appends each chosen token's log-probability to its row's list."""
    for row in log_probs:
        row.clear()  # a batch that ran out of memory is repeated

    def choose_and_record(logits: Tensor, rows: Tensor, step: int) -> Tensor:
        token = choose(logits, rows, step)
        scores = logits.float().log_softmax(-1).gather(-1, token.clamp(min=0)[:, None])[:, 0]
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
            log_probs[row].append(score)
        return token

    return choose_and_record


def check_settings(
    model: nn.Module, rows: Sequence[Row], new: int, temperature: float, top_p: float, batch_rows: int | None = None
) -> None:
    """`ValueError` for a setting of `decode` that is out of range, or a prompt that does not fit the context."""
    check_numbers(new, temperature, top_p, batch_rows)
    check_room(rows, new, context_length(model))


def check_numbers(new: int, temperature: float, top_p: float, batch_rows: int | None = None) -> None:
    """`ValueError` for a setting of `decode` that is out of range."""
    if not _is_count(new):
        raise ValueError(f"expected max_new_tokens to be an integer from 1; got {new!r}. Pass another value.")
    if batch_rows is not None and not _is_count(batch_rows):
        raise ValueError(
            f"expected batch_rows to be an integer from 1, or None; got {batch_rows!r}. Pass another value."
        )
    if not isinstance(temperature, Real) or not 0 <= temperature < float("inf"):
        raise ValueError(f"expected a finite temperature from 0 (greedy); got {temperature!r}. Pass another value.")
    if not isinstance(top_p, Real) or not 0 < top_p <= 1:
        raise ValueError(f"expected top_p above 0 and at most 1; got {top_p!r}. Pass another value.")


def check_room(rows: Sequence[Row], new: int, limit: int | None) -> None:
    """`ValueError` for a prompt that does not fit a context of `limit` tokens together with the new ones."""
    longest = max((len(row.prompt) for row in rows), default=0)
    if limit is not None and longest + new > limit:
        raise ValueError(
            f"expected prompt and new tokens within the model's context of {limit}; got {longest} + {new}. "
            "Shorten either."
        )


def checked_seed(seed: Any) -> int:
    """The seed as a Python integer, so that a numpy integer draws the same numbers; `ValueError` for anything else."""
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise ValueError(f"expected an integer seed; got {seed!r}. Pass another value.")
    return int(seed)


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
