"""Who answers: requests in, replies out, whether a model in this process, a server or a rule stands behind it."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from steerkit.generation.engine import Row
from steerkit.generation.generate import decode, text_of
from steerkit.models.context import context_length
from steerkit.models.identity import describe
from steerkit.steering.watch import suspended
from steerkit.text.prompt import Prompt, encode_prompt


@dataclass(frozen=True)
class Request:
    """One call.

    Args:
        id: keys its random stream and names it in replies and logs; no two in a batch may be the same.
        prompt: a string, continued verbatim, or a list of chat messages.
    """

    id: str
    prompt: Prompt


@dataclass(frozen=True)
class Reply:
    """What came of one call.

    Args:
        id: the request's.
        text: what was answered; None where the call failed.
        tokens_in: tokens of the prompt as the model read it; None where whoever answered did not say.
        tokens_out: new tokens to this reply's own end, end-of-sequence included; None as above.
        finished: it ended by itself, and was not cut at `max_new_tokens`.
        error: why there is no text, in one line.
    """

    id: str
    text: str | None
    tokens_in: int | None
    tokens_out: int | None
    finished: bool
    error: str | None = None


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn; the defaults are the paper's evaluation (Yi, Mueller and Lee 2026, arXiv 2604.24881).

    Args:
        temperature: 0 is greedy.
        top_p: nucleus.
        max_new_tokens: where a reply is cut.
        seed: together with a request's id it decides the reply.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 1024
    seed: int = 0


class Answerer(Protocol):
    """Who answers: `LocalModel`, `training.server.Server`, `Rule`, or a function of yours with an `about`."""

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Reply]:
        """Replies as they are finished, in any order, exactly one per request; a failed call is a reply with `error`.

        Raises:
            ValueError: two requests with the same id.
        """

    def about(self) -> dict[str, Any]:
        """Provenance as plain data; never a key."""


def check_ids(requests: Sequence[Request]) -> None:
    """`ValueError` if two requests share an id: their replies could not be told apart."""
    twice = [name for name, count in Counter(request.id for request in requests).items() if count > 1]
    if twice:
        raise ValueError(f"expected requests with different ids; got {twice[0]!r} more than once. Number them.")


def seed_of(request: Request, sampling: Sampling) -> int:
    """A seed of 31 bits that depends on the sampling's seed and the request's id alone."""
    digest = hashlib.sha256(repr((sampling.seed, request.id)).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


@dataclass(frozen=True)
class LocalModel:
    """A model in this process: batched over one KV cache, a reply independent of what shares its batch.

    Random numbers are keyed by (seed, request id). Replies come batch by batch. What `with steering.on(model)` set when
    the call was made acts on every reply. A prompt that does not fit the context gives a reply with an error.

    Args:
        model: as `steerkit.load` returns it.
        tokenizer: its tokenizer; it needs a chat template for prompts that are messages.
        batch_rows: requests decoded at once; default by device, halved when a GPU's memory runs out.
    """

    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    batch_rows: int | None = None

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Reply]:
        """Replies, a batch at a time.

        Raises:
            ValueError: two requests with the same id, an empty prompt, messages without a chat template, a steering
                that does not fit, an impossible sampling.
        """
        check_ids(requests)
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
                f"got {len(row.prompt)} + {sampling.max_new_tokens}. Cut either."
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
            for place, done in batch:
                number = fitting[place]
                text = text_of(self.tokenizer, done)
                yield Reply(requests[number].id, text, len(rows[number].prompt), done.n_tokens, done.finished)

    def about(self) -> dict[str, Any]:
        """Checkpoint, fingerprints, dtype, chat template's hash, versions: see `steerkit.models.identity`."""
        return {"answerer": "local model", **describe(self.model, self.tokenizer)}


@dataclass(frozen=True)
class Rule:
    """A function that answers, for tests and simulations.

    Args:
        function: `(request, random numbers) -> text`; the numbers depend on (seed, request id) alone. Tokens are
            counted as words between white space, and nothing is cut: every reply is finished.
    """

    function: Callable[[Request, random.Random], str]

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Reply]:
        """Replies in the order of the requests; what the function raises, this raises."""
        check_ids(requests)
        return (self._reply(request, sampling) for request in requests)

    def _reply(self, request: Request, sampling: Sampling) -> Reply:
        prompt = request.prompt
        asked = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        text = self.function(request, random.Random(seed_of(request, sampling)))
        return Reply(request.id, text, sum(len(part.split()) for part in asked), len(text.split()), True)

    def about(self) -> dict[str, Any]:
        """The function's name."""
        function: Any = self.function
        name = getattr(function, "__qualname__", type(function).__name__)
        return {"answerer": "rule", "function": f"{getattr(function, '__module__', '?')}.{name}"}
