"""Generation: many rows at once, each with its own prompt, steering and random stream, over one KV cache."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steerkit.blocks import unwrap
from steerkit.engine import Continuation, Engine, Row, in_batches
from steerkit.steering import Steering, taken_over
from steerkit.texts import Prompt, context_length, encode_prompt, render

NUCLEUS = 256


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    steering: Steering | Sequence[Steering | None] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_rows: int | None = None,
) -> list[str]:
    """Continue each prompt, steered or not; the texts in the order of the prompts.

    A text depends on the model, its prompt, its steering and the seed alone, not on its neighbours: prompts are
    left-padded with positions of their own, and random numbers are keyed by (seed, prompt, its how-manieth occurrence).

    Args:
        prompts: strings (verbatim) or lists of messages (rendered by the chat template).
        steering: one for all rows, or one (or None) per prompt; what `with steering.on(model)` set acts besides.
        temperature: 0 is greedy.
        top_p: nucleus (Holtzman et al. 2020): the fewest most likely tokens whose probability reaches top_p.
        batch_rows: rows decoded at once; default by device, halved when memory runs out.

    Raises:
        TypeError: a steering that is none.
        ValueError: no prompts, an empty or too long prompt, a steering that does not fit, an impossible setting, or
            logits that are not finite.
    """
    if isinstance(prompts, str | Mapping) or not len(prompts):
        raise ValueError(f"expected a non-empty list of prompts; got {prompts!r:.80}. Put them in a list.")
    with taken_over(model) as active:
        each = _per_row(steering, active, len(prompts))
        seen: Counter[str] = Counter()
        streams = []
        for prompt in prompts:
            text = render(tokenizer, prompt)
            streams.append((seed, text, seen[text]))
            seen[text] += 1
        rows = [Row(encode_prompt(tokenizer, prompt), row) for prompt, row in zip(prompts, each, strict=True)]
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        found = decode(model, tokenizer, rows, streams, **settings, batch_rows=batch_rows)
        texts = {number: text_of(tokenizer, continuation) for batch in found for number, continuation in batch}
    return [texts[number] for number in range(len(rows))]


def text_of(tokenizer: Any, continuation: Continuation) -> str:
    """The text of a continuation; special tokens are left out, added ordinary tokens (tags) stay."""
    return str(tokenizer.decode(continuation.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _per_row(
    steering: Steering | Sequence[Steering | None] | None, active: Sequence[Steering], count: int
) -> list[tuple[tuple[Steering, float], ...]]:
    shared = [one.rows(count) for one in (*active, *([steering] if isinstance(steering, Steering) else []))]
    rows = [tuple(column[i] for column in shared) for i in range(count)]
    if steering is None or isinstance(steering, Steering):
        return rows
    several = list(steering) if isinstance(steering, Sequence) else [steering]
    if stray := [one for one in several if not (one is None or isinstance(one, Steering))]:
        raise TypeError(
            f"expected a Steering, or a list with one (or None) per prompt; got {type(stray[0]).__name__}. Say "
            "Steering(vector, coefficient)."
        )
    if len(steering) != count:
        raise ValueError(f"expected one steering (or None) per prompt, {count}; got {len(steering)}. Pair them up.")
    return [row if one is None else (*row, *one.rows(1)) for row, one in zip(rows, steering, strict=True)]


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
) -> Iterator[list[tuple[int, Continuation]]]:
    """Decode rows batch by batch; yields each batch's `(row number, continuation)` as it is finished.

    Args:
        rows: prompts as ids, with their steerings.
        streams: per row, what its random numbers are keyed by; unused when greedy.

    Raises:
        ValueError: a prompt too long for the context, a steering that does not fit, a setting out of range, or logits
            that are not finite.
    """
    check_settings(model, rows, max_new_tokens, temperature, top_p, batch_rows)
    ends = ends_of(model, tokenizer)

    def work(engine: Engine, numbers: Sequence[int]) -> list[Continuation]:
        if temperature == 0:
            return engine.decode(max_new_tokens, ends, lambda logits, _, __: likeliest(logits))
        numbered = {streams[i]: random_stream(streams[i], max_new_tokens) for i in numbers}
        uniform = torch.from_numpy(np.stack([numbered[streams[i]] for i in numbers])).to(engine.device)
        return engine.decode(
            max_new_tokens, ends, lambda logits, alive, step: sample(logits, uniform[alive, step], temperature, top_p)
        )

    yield from in_batches(model, rows, max_new_tokens, work, batch_rows)


def check_settings(
    model: nn.Module, rows: Sequence[Row], new: int, temperature: float, top_p: float, batch_rows: int | None = None
) -> None:
    """`ValueError` for a setting of `decode` that is out of range, or a prompt that does not fit the context."""
    if not _is_count(new):
        raise ValueError(f"expected max_new_tokens to be an integer from 1; got {new!r}. Give another.")
    if batch_rows is not None and not _is_count(batch_rows):
        raise ValueError(f"expected batch_rows to be an integer from 1, or None; got {batch_rows!r}. Give another.")
    if not isinstance(temperature, Real) or not 0 <= temperature < float("inf"):
        raise ValueError(f"expected a finite temperature from 0 (greedy); got {temperature!r}. Give another.")
    if not isinstance(top_p, Real) or not 0 < top_p <= 1:
        raise ValueError(f"expected top_p above 0 and at most 1; got {top_p!r}. Give another.")
    limit = context_length(model)
    longest = max((len(row.prompt) for row in rows), default=0)
    if limit is not None and longest + new > limit:
        raise ValueError(
            f"expected prompt and new tokens within the model's context of {limit}; got {longest} + {new}. Cut either."
        )


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def ends_of(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text: those of the model's generation configuration and the tokenizer's."""
    configured = getattr(getattr(unwrap(model), "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, list | tuple) else [configured]
    return frozenset(i for i in (*several, getattr(tokenizer, "eos_token_id", None)) if i is not None)


def random_stream(key: Any, count: int) -> Float[np.ndarray, " count"]:
    """`count` uniform numbers in [0, 1) that depend on `key` alone: Philox, keyed by the SHA-256 of its text."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(count)


def likeliest(logits: Float[Tensor, "batch v"]) -> Int[Tensor, " batch"]:
    """The most likely token of each row; `ValueError` where a logit is NaN or infinite, which would be chosen first."""
    token = logits.argmax(-1)
    _check_finite(logits.gather(-1, token[:, None]))
    return token


def _check_finite(found: Tensor) -> None:
    if not torch.isfinite(found).all():
        raise ValueError(
            "expected finite logits; got NaN or infinity. Lower the coefficient, or load the model in bfloat16 or "
            "float32."
        )


def sample(
    logits: Float[Tensor, "batch v"], uniform: Float[Tensor, " batch"], temperature: float, top_p: float
) -> Int[Tensor, " batch"]:
    """One token per row by the inverse of the cumulative distribution at `uniform`.

    The distribution is softmax(logits / temperature), cut to its nucleus of `top_p`; it is summed in the order of the
    token ids, so that rows with nearly equal logits and the same number choose the same token. A token is in the
    nucleus if the probability of all likelier ones is below `top_p`; so are all that are as likely as its last.

    Raises:
        ValueError: a logit is NaN or infinite.
    """
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    _check_finite(probabilities[:, 0])  # one NaN makes a row of them
    if top_p < 1:
        likely, ids = probabilities.topk(min(NUCLEUS, probabilities.shape[-1]), dim=-1)
        least = _least_likely(likely, top_p)
        if likely.shape[-1] < probabilities.shape[-1] and bool((least <= likely[:, -1:]).any()):
            likely, ids = probabilities.sort(dim=-1, descending=True)
            least = _least_likely(likely, top_p)
        likely = torch.where(likely >= least, likely, 0).double()
        ids, order = ids.sort(dim=-1)
        weights = likely.gather(-1, order)
    else:
        weights, ids = probabilities.double(), None
    cumulative = weights.cumsum(-1)
    target = (uniform.to(cumulative) * cumulative[:, -1])[:, None]
    place = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[-1] - 1)
    return (place if ids is None else ids.gather(-1, place)).squeeze(-1)


def _least_likely(likely: Float[Tensor, "batch n"], top_p: float) -> Float[Tensor, "batch 1"]:
    """The probability of the nucleus' last token, given the likeliest ones in falling order."""
    wide = likely.double()
    last = (wide.cumsum(-1) - wide < top_p).sum(-1, keepdim=True) - 1
    return likely.gather(-1, last)
