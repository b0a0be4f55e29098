"""Server: answers from any OpenAI-compatible HTTP endpoint, with retries and a protected API key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from steerkit.io.chat import ChatServer
from steerkit.text.prompt import Prompt, messages_of
from training.debates.answerers import Reply, Request, Sampling, check_unique_ids, seed_of


@dataclass(frozen=True)
class Server(ChatServer):
    """Answerer for an OpenAI-compatible server; arguments, retries and the key are those of `ChatServer`.

    Messages are sent to `/chat/completions`, strings verbatim to `/completions`. Each request carries a seed derived
    from (seed, request id). The server decides how it uses the seed and the other settings. For example,
    `transformers serve` decodes greedily unless the checkpoint's `generation_config.json` has `"do_sample": true`.

    Example:
        >>> server = Server("http://127.0.0.1:8000/v1", "meta-llama/Llama-3.1-8B-Instruct")
        >>> replies = list(server([Request("q1", [{"role": "user", "content": "2+2?"}])], Sampling()))
    """

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Reply]:
        """Yield replies as they arrive; see `ChatServer.complete`.

        Raises:
            ValueError: two requests with the same id, or a key that would be sent unencrypted to another machine.
        """
        check_unique_ids("requests", (request.id for request in requests))
        return self.complete([(request.id, _body(request, sampling)) for request in requests])

    def about(self) -> dict[str, Any]:
        """Return address and model."""
        return {"answerer": "server", "base_url": self.base_url, "model": self.model}


def _body(request: Request, sampling: Sampling) -> dict[str, Any]:
    prompt = request.prompt
    given = list(prompt.ids) if isinstance(prompt, Prompt) else prompt
    chat = not isinstance(prompt, str | Prompt)
    content: dict[str, Any] = {"messages": messages_of(given)} if chat else {"prompt": given}
    return {
        **content,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "seed": seed_of(request, sampling),
    }
