"""Requests in chunks: the replies of a chunk are stored together, and no chunk begins that would end too late."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from steerkit.io.files import sha256
from steerkit.io.json import canonical_json
from steerkit.text.prompt import Prompt, PromptLike, encode_prompt, messages_of
from training.debates.answerers import Answerer, Reply, Request, Sampling, check_unique_ids


class TimeUp(Exception):
    """The next chunk would not end in time; the replies of all earlier chunks were given."""


@dataclass(frozen=True)
class Spent:
    """What a finished chunk took.

    Args:
        limit: token limit of its replies.
        seconds: time until its last reply was stored.
        tokens: new tokens of its replies together.
    """

    limit: int
    seconds: float
    tokens: int


@dataclass(frozen=True)
class Chunks:
    """An answerer that is asked chunk by chunk, prompts of similar length together.

    A chunk begins only if the longest earlier chunk of its token limit would fit into the time that is left. Without
    one, every reply is expected to reach the limit, at the speed of the slowest earlier chunk. The first chunk of all
    begins if any time is left.

    Args:
        answerer: the answerer.
        rows: requests in a chunk.
        deadline: value of `time.monotonic()` at which the last chunk should have ended; None for no limit.
        spent: the finished chunks.
    """

    answerer: Answerer
    rows: int
    deadline: float | None = None
    spent: list[Spent] = field(default_factory=list, repr=False)

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Reply]:
        """Yield the replies, chunk by chunk.

        Raises:
            ValueError: two requests with the same id; see also the answerer.
            TimeUp: the next chunk would not end in time.
        """
        check_unique_ids("requests", (request.id for request in requests))
        ids = {request.id: prompt_ids(self.tokenizer, request.prompt) for request in requests}
        ordered = sorted(requests, key=lambda request: (-len(ids[request.id]), ids[request.id]))
        for start in range(0, len(ordered), self.rows):
            chunk = ordered[start : start + self.rows]
            began = time.monotonic()
            if (
                self.deadline is not None
                and began + self.expected(len(chunk), sampling.max_new_tokens) >= self.deadline
            ):
                raise TimeUp
            tokens = 0
            for reply in self.answerer(chunk, sampling):
                tokens += reply.tokens_out or 0
                yield reply
            self.spent.append(Spent(sampling.max_new_tokens, time.monotonic() - began, tokens))

    def expected(self, rows: int, limit: int) -> float:
        """Return the seconds that a chunk of so many replies with this token limit is expected to take."""
        alike = [one.seconds for one in self.spent if one.limit == limit]
        if alike:
            return max(alike)
        return rows * limit * max((one.seconds / max(1, one.tokens) for one in self.spent), default=0.0)

    @property
    def model(self) -> Any:
        """Model of the answerer; None where it has none."""
        return getattr(self.answerer, "model", None)

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the answerer; None where it has none in this process."""
        return getattr(self.answerer, "tokenizer", None)

    def about(self) -> dict[str, Any]:
        """Return the provenance of the answerer."""
        return self.answerer.about()


def prompt_ids(tokenizer: Any, prompt: PromptLike) -> tuple[int, ...]:
    """Return the token ids of a prompt as the model reads them; without a tokenizer, the code points of its JSON."""
    if tokenizer is not None:
        return tuple(encode_prompt(tokenizer, prompt))
    is_text = isinstance(prompt, str | Prompt)
    return tuple(map(ord, str(prompt) if is_text else canonical_json(messages_of(prompt))))


def prompt_sha256(tokenizer: Any, prompt: PromptLike) -> str:
    """Return a hash of `prompt_ids`."""
    return sha256(canonical_json(prompt_ids(tokenizer, prompt)))
