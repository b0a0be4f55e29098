"""Server: answers from any OpenAI-compatible HTTP endpoint, with retries and a protected API key."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import ipaddress
import json
import logging
import math
import os
import queue
import random
import re
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC
from email.message import Message
from typing import Any
from urllib.parse import urlsplit

from steerkit.text.prompt import Prompt, messages_of
from training.debates.answerers import Reply, Request, Sampling, check_unique_ids, seed_of

LARGEST_ANSWER = 16 * 2**20  # bytes
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
RETRYABLE = frozenset({408, 409, 425, 429})  # client errors that a later attempt may not see; 5xx are retried too

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Server:
    """Answerer for an OpenAI-compatible server: vLLM, `transformers serve`, llama.cpp, Ollama, or a hosted one.

    Messages are sent to `/chat/completions`, strings verbatim to `/completions`. Each request carries a seed derived
    from (seed, request id). The server decides how it uses the seed and the other settings. For example,
    `transformers serve` decodes greedily unless the checkpoint's `generation_config.json` has `"do_sample": true`.

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
        >>> server = Server("http://127.0.0.1:8000/v1", "meta-llama/Llama-3.1-8B-Instruct")
        >>> replies = list(server([Request("q1", [{"role": "user", "content": "2+2?"}])], Sampling()))
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
        object.__setattr__(self, "base_url", _checked_url(self.base_url))
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

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Reply]:
        """Yield replies as they arrive; closing the iterator, or an exception in it, cancels all requests.

        Token counts are the server's `usage`; None if it reports none or the request failed. A reply without text that
        reached the token limit (a reasoning model cut short) has the text "" and is not finished. A reply without text
        for another reason is an error.

        Raises:
            ValueError: two requests with the same id, or a key that would be sent unencrypted to another machine.
        """
        check_unique_ids("requests", (request.id for request in requests))
        return self._replies(deque(requests), sampling, _Connections(self.base_url, self._key(), self.timeout_s))

    def about(self) -> dict[str, Any]:
        """Return address and model."""
        return {"answerer": "server", "base_url": self.base_url, "model": self.model}

    def _key(self) -> str | None:
        key = os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""
        if not key:
            return None
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"expected one line of ASCII in the variable {self.api_key_env}; got something else. Set it again."
            )
        parts = urlsplit(self.base_url)
        if parts.scheme == "http" and not _is_loopback(parts.hostname or "") and not self.key_over_plain_http:
            raise ValueError(
                f"expected https for a key that leaves this machine; got {self.base_url} and a key in "
                f"{self.api_key_env}. Use https, or pass api_key_env=None (no key) or key_over_plain_http=True."
            )
        return key

    def _replies(self, waiting: deque[Request], sampling: Sampling, connections: _Connections) -> Iterator[Reply]:
        count = len(waiting)
        results: queue.SimpleQueue[Reply | Exception] = queue.SimpleQueue()

        def work() -> None:
            while not connections.closed.is_set():
                try:
                    request = waiting.popleft()
                except IndexError:
                    return
                try:
                    results.put(self._reply(request, sampling, connections))
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

    def _reply(self, request: Request, sampling: Sampling, connections: _Connections) -> Reply:
        prompt = request.prompt
        chat = not isinstance(prompt, str | Prompt)
        path = "/chat/completions" if chat else "/completions"
        given = list(prompt.ids) if isinstance(prompt, Prompt) else prompt
        content: Any = {"messages": messages_of(given)} if chat else {"prompt": given}
        body = {
            "model": self.model,
            **content,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": seed_of(request, sampling),
            "stream": False,
        }
        data = json.dumps(body).encode()
        for attempt in range(1, self.attempts + 1):
            try:
                reply = _parse_reply(request.id, connections.post(path, data), chat, self.now())
                return replace(reply, text=connections.redact(reply.text or "", 16))
            except _Failure as failure:
                error = connections.error_line(f"POST {path}, attempt {attempt}: {failure}")
                if not failure.retryable or attempt == self.attempts or connections.closed.is_set():
                    return Reply(request.id, None, *failure.tokens, False, error)
                pause = FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1)
                pause = min(max(pause, failure.retry_after), LONGEST_WAIT_S)
            log.warning("request %s: %s; waiting %.1f s", request.id, error, pause)
            self.wait(connections.closed, pause)
        raise AssertionError("the last attempt returns")


def _checked_url(url: str) -> str:
    expected = "expected a base_url like http://127.0.0.1:8000/v1, without user, password, query or fragment"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        raise ValueError(f"{expected}; got an address that cannot be parsed. Correct the address.") from None
    if not valid or "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"{expected}; got {parts.scheme or 'no scheme'} and host {parts.hostname!r}. Correct the address."
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Failure(Exception):
    """An attempt without text.

    Args:
        message: what went wrong.
        retryable: whether another attempt may succeed.
        retry_after: seconds to wait before it, as the server asks.
        tokens: prompt tokens and new tokens that the attempt used.
    """

    def __init__(
        self,
        message: str,
        retryable: bool,
        retry_after: float = 0.0,
        tokens: tuple[int | None, int | None] = (None, None),
    ) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.retry_after = retry_after
        self.tokens = tokens


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: Message
    data: bytes


class _Connections:
    """Connections of one call of a `Server`: address, key, and the open sockets, which `close` shuts down."""

    def __init__(self, base_url: str, key: str | None, timeout_s: float) -> None:
        parts = urlsplit(base_url)
        self.host = parts.hostname or ""
        self.path = parts.path
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.timeout_s = timeout_s
        self.key = key
        self.closed = threading.Event()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def post(self, path: str, body: bytes) -> _Answer:
        """Send one request on a new connection; raise `_Failure` without a complete answer of limited size in time."""
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        late = threading.Event()
        connection = (
            http.client.HTTPSConnection(self.host, self.port, timeout=self.timeout_s, context=self.tls)
            if self.tls
            else http.client.HTTPConnection(self.host, self.port, timeout=self.timeout_s)
        )
        try:
            connection.connect()
            with self._closable(connection.sock, late):
                connection.request("POST", self.path + path, body, headers)
                with connection.getresponse() as response:
                    data = response.read(LARGEST_ANSWER + 1)
        except (OSError, http.client.HTTPException) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                raise _Failure(f"no whole answer within {self.timeout_s:g} s", retryable=True) from None
            retryable = not isinstance(error, ssl.SSLCertVerificationError)
            raise _Failure(f"{type(error).__name__}: {error}", retryable) from None
        finally:
            connection.close()
        if late.is_set():
            raise _Failure(f"no whole answer within {self.timeout_s:g} s", retryable=True)
        if len(data) > LARGEST_ANSWER:
            raise _Failure(f"expected an answer of at most {LARGEST_ANSWER} bytes; got more", retryable=False)
        if response.length:
            raise _Failure(f"the answer ended {response.length} bytes early", retryable=True)
        return _Answer(response.status, response.headers, data)

    @contextlib.contextmanager
    def _closable(self, connection: socket.socket, late: threading.Event) -> Iterator[None]:
        """Shut the connection down on `close` or after `timeout_s`, which sets `late`.

        A socket's own time-out applies to each read, so it never ends an answer that arrives byte by byte.
        """

        def end() -> None:
            late.set()
            _shut_down(connection)

        timer = threading.Timer(self.timeout_s, end)
        timer.daemon = True
        with self._lock:
            if self.closed.is_set():
                raise ConnectionAbortedError("interrupted")
            self._open.add(connection)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            with self._lock:
                self._open.discard(connection)

    def close(self) -> None:
        """Shut down all open connections and refuse new ones."""
        with self._lock:
            self.closed.set()
            for connection in self._open:
                _shut_down(connection)

    def error_line(self, message: str) -> str:
        """Return a message as one short printable line without the key."""
        message = self.redact(message)[:2000]
        return " ".join("".join(c if c.isprintable() else " " for c in message).split())[:300]

    def redact(self, text: str, shortest: int = 1) -> str:
        """Return a text without the key; a shorter key than `shortest` is a dummy and may be a word of the text."""
        return text.replace(self.key, "[key]") if self.key and len(self.key) >= shortest else text


def _shut_down(connection: socket.socket) -> None:
    """End the connection for the thread that reads from it."""
    with contextlib.suppress(OSError):  # SSLSocket.shutdown would remove the TLS state that the reader uses
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _parse_reply(name: str, answer: _Answer, chat: bool, now: float) -> Reply:
    """Return the reply in an answer; raise `_Failure` if it has none."""
    body = answer.data.decode(errors="replace")
    if 300 <= answer.status < 400:
        target = answer.headers.get("Location")
        raise _Failure(f"redirected ({answer.status}) to {target}; pass this as base_url if correct", retryable=False)
    if not 200 <= answer.status < 300:
        retryable = answer.status in RETRYABLE or answer.status >= 500
        raise _Failure(f"HTTP {answer.status}: {body}", retryable, _retry_after(answer.headers, now))
    try:
        value = json.loads(answer.data)
        choice = value["choices"][0]
        text = choice["message"].get("content") if chat else choice["text"]
        reason = choice.get("finish_reason")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise _Failure(f"expected JSON with a choice; got {body or 'nothing'}", retryable=True) from None
    usage = value.get("usage")
    tokens = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    if text is None and reason == "length":
        text = ""
    if not isinstance(text, str):
        message = f"expected a text; got {text!r:.80}, finish_reason {reason!r:.80}"
        raise _Failure(message, retryable=False, tokens=tokens)
    text = text.encode(errors="replace").decode()  # JSON can contain a lone surrogate, which UTF-8 cannot encode
    return Reply(name, text, *tokens, reason == "stop")


def _count(usage: Any, name: str) -> int | None:
    number = usage.get(name) if isinstance(usage, dict) else None
    return number if isinstance(number, int) and not isinstance(number, bool) and number >= 0 else None


def _retry_after(headers: Message, now: float) -> float:
    """Return the seconds in the `Retry-After` header, a number or a date; 0 without a valid one."""
    value = (headers.get("Retry-After") or "").strip()
    try:
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,9})?", value):
            return float(value)
        date = email.utils.parsedate_to_datetime(value)
        return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now)
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0
