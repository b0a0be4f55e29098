"""Chat: completions of an OpenAI-compatible server, several at a time, with retries and a protected key."""

from __future__ import annotations

import json
import logging
import math
import queue
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from steerkit.io.http import RETRYABLE, Answer, Connections, Failure, checked_url, read_key, retry_after

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """Result of one request.

    Args:
        id: id of the request.
        text: generated text; None if the request failed.
        tokens_in: prompt tokens as the model read them; None if not reported.
        tokens_out: new tokens up to this reply's own end, end-of-sequence included; None if not reported.
        finished: whether the model ended the reply; False if it was cut at the token limit.
        error: reason of the failure in one line; None on success.
    """

    id: str
    text: str | None
    tokens_in: int | None
    tokens_out: int | None
    finished: bool
    error: str | None = None


@dataclass(frozen=True)
class ChatServer:
    """An OpenAI-compatible server: vLLM, `transformers serve`, llama.cpp, Ollama, or a hosted one.

    An attempt is retried after status 408, 409, 425, 429 or 5xx, a lost connection, a time-out, or an incomplete or
    malformed answer. Waits double from 1 s; a `Retry-After` header is followed up to 60 s. Redirects are not followed,
    and no proxy is used.

    The key is read from the environment when a call begins and sent only in the header to `base_url`. It is in no
    attribute, reply, error or log.

    Args:
        base_url: e.g. `http://127.0.0.1:8000/v1`; `/v1` is added if the URL has no path.
        model: name of the model on the server.
        api_key_env: environment variable with the key; no key is sent if it is unset or this is None.
        concurrency: maximum number of simultaneous requests.
        timeout_s: seconds for one attempt, from the connection to the last byte.
        attempts: maximum number of attempts per request.
        key_over_plain_http: send the key unencrypted to another machine.
        wait: `(interrupted, seconds)`: blocks until the time is over or the event is set.
        now: returns seconds since 1970, for a `Retry-After` that is a date.

    Raises:
        ValueError: an invalid base_url, variable name or number.

    Example:
        >>> server = ChatServer("http://127.0.0.1:8000/v1", "meta-llama/Llama-3.1-8B-Instruct")
        >>> body = {"messages": [{"role": "user", "content": "2+2?"}], "max_tokens": 8}
        >>> replies = list(server.complete([("q1", body)]))
    """

    base_url: str
    model: str
    api_key_env: str | None = field(default="OPENAI_API_KEY", repr=False)
    concurrency: int = 8
    timeout_s: float = 600.0
    attempts: int = 5
    key_over_plain_http: bool = False
    wait: Callable[[threading.Event, float], object] = field(default=threading.Event.wait, repr=False)
    now: Callable[[], float] = field(default=time.time, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_url", checked_url(self.base_url))
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError(
                "expected api_key_env to be the name of an environment variable; got something else, not shown here as "
                "it may be the key itself. Export the key in a variable and pass the variable's name."
            )
        if self.concurrency < 1 or self.attempts < 1 or not 0 < self.timeout_s < math.inf:
            raise ValueError(
                "expected concurrency and attempts from 1 and a finite timeout_s above 0; "
                f"got {self.concurrency!r}, {self.attempts!r} and {self.timeout_s!r}. Pass larger numbers."
            )

    def complete(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[Reply]:
        """Yield replies as they arrive; closing the iterator, or an exception in it, cancels all requests.

        A body with `messages` is sent to `/chat/completions`, one with `prompt` to `/completions`. Token counts are the
        server's `usage`; None if it reports none or the request failed. A reply without text that reached the token
        limit (a reasoning model cut short) has the text "" and is not finished. A reply without text for another reason
        is an error.

        Args:
            requests: `(id, body)` with distinct ids and bodies without the model's name.

        Raises:
            ValueError: a key that would be sent unencrypted to another machine.
        """
        key = read_key(self.api_key_env, self.base_url, self.key_over_plain_http)
        return self._replies(deque(requests), Connections(self.base_url, key, self.timeout_s))

    def _replies(self, waiting: deque[tuple[str, Mapping[str, Any]]], connections: Connections) -> Iterator[Reply]:
        count = len(waiting)
        results: queue.SimpleQueue[Reply | Exception] = queue.SimpleQueue()

        def work() -> None:
            while not connections.closed.is_set():
                try:
                    name, body = waiting.popleft()
                except IndexError:
                    return
                try:
                    results.put(self._reply(name, body, connections))
                except Exception as error:
                    results.put(error)

        try:
            for _ in range(min(self.concurrency, count)):
                threading.Thread(target=work, daemon=True).start()
            for _ in range(count):
                reply = results.get()
                if isinstance(reply, Exception):
                    raise reply
                yield reply
        finally:
            connections.close()

    def _reply(self, name: str, body: Mapping[str, Any], connections: Connections) -> Reply:
        chat = "messages" in body
        path = "/chat/completions" if chat else "/completions"
        data = json.dumps({"model": self.model, **body, "stream": False}).encode()
        for attempt in range(1, self.attempts + 1):
            try:
                reply = _parse_reply(name, connections.post(path, data), chat, self.now())
                return replace(reply, text=connections.redact(reply.text or "", 16))
            except Failure as failure:
                error = connections.error_line(f"POST {path}, attempt {attempt}: {failure}")
                if not failure.retryable or attempt == self.attempts or connections.closed.is_set():
                    return Reply(name, None, *failure.tokens, False, error)
                pause = FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1)
                pause = min(max(pause, failure.retry_after), LONGEST_WAIT_S)
            log.warning("request %s: %s; waiting %.1f s", name, error, pause)
            self.wait(connections.closed, pause)
        raise AssertionError("the last attempt returns")


def _parse_reply(name: str, answer: Answer, chat: bool, now: float) -> Reply:
    """Return the reply in an answer; raise `Failure` if it has none."""
    body = answer.data.decode(errors="replace")
    if 300 <= answer.status < 400:
        target = answer.headers.get("Location")
        raise Failure(f"redirected ({answer.status}) to {target}; pass this as base_url if correct", retryable=False)
    if not 200 <= answer.status < 300:
        retryable = answer.status in RETRYABLE or answer.status >= 500
        raise Failure(f"HTTP {answer.status}: {body}", retryable, retry_after(answer.headers, now))
    try:
        value = json.loads(answer.data)
        choice = value["choices"][0]
        text = choice["message"].get("content") if chat else choice["text"]
        reason = choice.get("finish_reason")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise Failure(f"expected JSON with a choice; got {body or 'nothing'}", retryable=True) from None
    usage = value.get("usage")
    tokens = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    if text is None and reason == "length":
        text = ""
    if not isinstance(text, str):
        message = f"expected a text; got {text!r:.80}, finish_reason {reason!r:.80}"
        raise Failure(message, retryable=False, tokens=tokens)
    text = text.encode(errors="replace").decode()  # JSON can contain a lone surrogate, which UTF-8 cannot encode
    return Reply(name, text, *tokens, reason == "stop")


def _count(usage: Any, name: str) -> int | None:
    number = usage.get(name) if isinstance(usage, dict) else None
    return number if isinstance(number, int) and not isinstance(number, bool) and number >= 0 else None
