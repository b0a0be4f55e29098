"""Server: answers from any OpenAI-compatible HTTP endpoint, with retries and a protected API key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from steerkit.io.chat import LONGEST_WAIT_S, ChatServer
from steerkit.io.http import Connections, Failure, read_key
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
        """Return address, model, and the model that the server reports.

        The address is not part of a run's identity: a server that comes back on another port resumes the run.
        `reported` has `id` and `root` of this model in the answer to `GET /models`; it is None if the server has no
        such list, or lists several models but not this one.

        Raises:
            ConnectionError: the server does not answer.
        """
        return {
            "answerer": "server",
            "base_url": self.base_url,
            "model": self.model,
            "reported": self._reported(),
        }

    def _reported(self) -> dict[str, Any] | None:
        key = read_key(self.api_key_env, self.base_url, self.key_over_plain_http)
        connections = Connections(self.base_url, key, min(self.timeout_s, LONGEST_WAIT_S))
        try:
            answer = connections.send("GET", "/models")
        except Failure as failure:
            raise ConnectionError(
                f"expected a server at {self.base_url}; got {connections.error_line(str(failure))}. Start it, or "
                "correct the address."
            ) from None
        finally:
            connections.close()
        try:
            listed = json.loads(answer.data)["data"] if answer.status == 200 else []
            own = [model for model in listed if model["id"] == self.model] or listed
            if len(own) != 1:
                return None
            texts = {name: own[0].get(name) for name in ("id", "root")}
            return {name: text and connections.redact(str(text))[:200] for name, text in texts.items()}
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            return None


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
