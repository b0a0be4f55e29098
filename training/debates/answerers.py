"""Answerers: requests in, replies out, by a model in this process, by a server, or by a rule."""

from __future__ import annotations

import gc
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

import steerkit as sk
from steerkit.generation.engine import Row
from steerkit.generation.generate import decode, text_of
from steerkit.io.chat import Reply as Reply
from steerkit.models.active import suspended
from steerkit.models.context import context_length
from steerkit.models.identity import describe
from steerkit.text.prompt import Prompt, PromptLike, encode_prompt, messages_of
from training.settings import check_fields, check_top_p


@dataclass(frozen=True)
class Request:
    """One prompt to answer.

    Args:
        id: unique within a batch; it keys the request's random stream and names it in replies and logs.
        prompt: a string, continued verbatim, or a list of chat messages.
    """

    id: str
    prompt: PromptLike


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; the defaults are the paper's evaluation (Yi, Mueller and Lee 2026, arXiv 2604.24881).

    Args:
        temperature: softmax temperature; 0 is greedy.
        top_p: probability mass of the nucleus, above 0.
        max_new_tokens: maximum length of a reply in tokens.
        seed: the seed and a request's id together determine the reply.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", int(self.seed))  # a numpy integer has another text, and keys other numbers
        check_fields(self, temperature=0, max_new_tokens=1)
        check_top_p(self.top_p)


class Answerer(Protocol):
    """Interface of `LocalModel`, `training.debates.server.Server` and `Rule`.

    A function with an attribute `about` is an answerer too.
    """

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Reply]:
        """Yield one reply per request as it finishes, in any order; a failed request is a reply with `error`.

        Raises:
            ValueError: two requests with the same id.
        """

    def about(self) -> dict[str, Any]:
        """Return provenance as plain data, without any API key."""


def check_unique_ids(noun: str, ids: Iterable[str]) -> None:
    """Check that no id occurs twice.

    Args:
        noun: plural noun for the error, e.g. `"requests"`.
        ids: the ids.

    Raises:
        ValueError: a duplicate id.
    """
    duplicates = [name for name, count in Counter(ids).items() if count > 1]
    if duplicates:
        raise ValueError(
            f"expected {noun} with different ids; got {duplicates[0]!r} more than once. Pass a unique id for each."
        )


def seed_of(request: Request, sampling: Sampling) -> int:
    """Return a 31-bit seed that depends only on the sampling's seed and the request's id."""
    digest = hashlib.sha256(repr((sampling.seed, request.id)).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def loaded(checkpoint: Any, **how: Any) -> tuple[Any, Any]:
    """`steerkit.load` after the memory of trainers that have ended is freed: they refer to themselves.

    Example:
        >>> model, tokenizer = loaded("runs/sft/checkpoint")
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return sk.load(checkpoint, **how)


def one_at_a_time(load: Callable[[Any], LocalModel]) -> Callable[[Any], LocalModel]:
    """A function that loads a checkpoint, or returns the last one again; another one is forgotten before the load.

    Example:
        >>> answerer = one_at_a_time(lambda checkpoint: LocalModel(*loaded(checkpoint)))
    """
    held: dict[str, LocalModel] = {}

    def get(checkpoint: Any) -> LocalModel:
        if str(checkpoint) not in held:
            held.clear()
            held[str(checkpoint)] = load(checkpoint)
        return held[str(checkpoint)]

    return get


@dataclass(frozen=True)
class LocalModel:
    """A model in this process, decoded in batches over one KV cache.

    Random numbers are keyed by (seed, request id), so a reply does not depend on the rest of its batch. Replies arrive
    batch by batch. A steering that is active when the call is made (`with steering.on(model)`) applies to every reply.
    A prompt that exceeds the context gives a reply with an error.

    Args:
        model: as returned by `steerkit.load`.
        tokenizer: the model's tokenizer; prompts that are messages need its chat template.
        batch_rows: requests decoded at once; default by device and size of the model, halved when memory runs out.

    Example:
        >>> answerer = LocalModel(*sk.load("runs/model"))
        >>> [reply.text for reply in answerer([Request("q1", "Problem: 2+2\\n\\n")], Sampling(max_new_tokens=20))]
    """

    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    batch_rows: int | None = None

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Reply]:
        """Yield the replies, one batch at a time.

        Raises:
            ValueError: two requests with the same id, an empty prompt, messages without a chat template, an active
                steering that does not fit the model, or invalid sampling settings.
        """
        check_unique_ids("requests", (request.id for request in requests))
        with suspended(self.model) as active:
            steerings = tuple(one for steering in active for one in steering.per_row(1))
        rows = [Row(encode_prompt(self.tokenizer, request.prompt), steerings) for request in requests]
        return self._replies(requests, rows, sampling)

    def _replies(self, requests: Sequence[Request], rows: Sequence[Row], sampling: Sampling) -> Iterator[Reply]:
        limit = context_length(self.model)
        fitting = []
        for number, row in enumerate(rows):
            if limit is None or len(row.prompt) + sampling.max_new_tokens <= limit:
                fitting.append(number)
                continue
            error = (
                f"expected prompt and new tokens within the model's context of {limit}; "
                f"got {len(row.prompt)} + {sampling.max_new_tokens}. Shorten the prompt or reduce max_new_tokens."
            )
            yield Reply(requests[number].id, None, len(row.prompt), 0, False, error)
        batches = decode(
            self.model,
            self.tokenizer,
            [rows[number] for number in fitting],
            [(sampling.seed, requests[number].id, 0) for number in fitting],
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            batch_rows=self.batch_rows,
        )
        for batch in batches:
            for index, completion in batch:
                number = fitting[index]
                if completion.overflowed:
                    error = "expected finite logits; got NaN or infinity. Load the model in bfloat16 or float32."
                    yield Reply(requests[number].id, None, len(rows[number].prompt), 0, False, error)
                    continue
                text = text_of(self.tokenizer, completion)
                tokens_in = len(rows[number].prompt)
                yield Reply(requests[number].id, text, tokens_in, completion.n_tokens, completion.finished)

    def about(self) -> dict[str, Any]:
        """Return checkpoint, fingerprints, dtype, template hash and versions (`steerkit.models.identity`)."""
        return {"answerer": "local model", **describe(self.model, self.tokenizer)}


@dataclass(frozen=True)
class Rule:
    """An answerer that calls a Python function, for tests and simulations.

    Args:
        function: `(request, random generator) -> text`; the generator is seeded by (seed, request id) only. Tokens are
            counted as words separated by white space. No reply is cut: every reply is finished.

    Example:
        >>> rule = Rule(lambda request, rng: rf"\\boxed{{{rng.randint(1, 6)}}}")
        >>> replies = list(rule([Request("q1", "Roll a die.")], Sampling()))
    """

    function: Callable[[Request, random.Random], str]

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Reply]:
        """Yield the replies in the order of the requests; exceptions of the function are passed on."""
        check_unique_ids("requests", (request.id for request in requests))
        return (self._reply(request, sampling) for request in requests)

    def _reply(self, request: Request, sampling: Sampling) -> Reply:
        prompt = request.prompt
        is_text = isinstance(prompt, str | Prompt)
        texts = [str(prompt)] if is_text else [message["content"] for message in messages_of(prompt)]
        text = self.function(request, random.Random(seed_of(request, sampling)))
        return Reply(request.id, text, sum(len(part.split()) for part in texts), len(text.split()), True)

    def about(self) -> dict[str, Any]:
        """Return the function's name."""
        function: Any = self.function
        name = getattr(function, "__qualname__", type(function).__name__)
        return {"answerer": "rule", "function": f"{getattr(function, '__module__', '?')}.{name}"}
