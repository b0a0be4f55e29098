"""A server that answers: any with OpenAI's chat interface, over HTTP, with retries and a guarded key."""

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

from training.debates.answerers import Reply, Request, Sampling, check_ids, seed_of

LARGEST_ANSWER = 16 * 2**20  # bytes
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
PASSING = frozenset({408, 409, 425, 429})  # client errors that may be gone the next time

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Server:
    """A server with OpenAI's interface: vLLM, `transformers serve`, llama.cpp, Ollama, or a hosted one.

    Messages go to `/chat/completions`, a string goes verbatim to `/completions`. Each request carries a seed made of
    (seed, request id). What is made of it and of the other settings is up to the server: `transformers serve` is greedy
    at any temperature unless the checkpoint's `generation_config.json` says `"do_sample": true`.

    What may pass is tried again with growing waits and with `Retry-After` heeded up to 60 s: status 408, 409, 425, 429
    and 5xx, lost connections, time-outs, answers that are half or not as agreed. Redirects are not followed, and no
    proxy is used.

    The key is read from the environment when a call begins; it is sent in the header to this address only, and stands
    in no attribute, reply, error or log.

    Args:
        base_url: e.g. `http://127.0.0.1:8000/v1`; `/v1` is added where it has no path.
        model: the server's name for it.
        api_key_env: the environment variable that holds the key; no key is sent if it is unset or this is None.
        concurrency: calls under way at most.
        timeout_s: seconds for one attempt, from being connected to the last byte.
        attempts: tries per request.
        key_over_plain_http: send the key unencrypted to another machine.
        wait: `(interrupted, seconds)`: rests until the time is over or the event is set.
        now: seconds since 1970, for a `Retry-After` that is a date.

    Raises:
        ValueError: a base_url, a variable's name or a number that cannot be meant.
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
                "it may be the key itself. Put the key into a variable and give the variable's name."
            )
        if self.concurrency < 1 or self.attempts < 1 or not 0 < self.timeout_s < math.inf:
            raise ValueError(
                "expected concurrency and attempts from 1 and a finite timeout_s above 0; "
                f"got {self.concurrency!r}, {self.attempts!r} and {self.timeout_s!r}."
            )

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Reply]:
        """Replies as they come. Closing the iterator, or an exception in it, ends the calls under way and begins none.

        Token counts are the server's `usage`, None where it gives none or the call failed. No text because all tokens
        went elsewhere (a reasoning model cut short) is the text "", not finished; for another cause it is an error.

        Raises:
            ValueError: two requests with the same id; a key that would go unencrypted to another machine.
        """
        check_ids(requests)
        return self._replies(deque(requests), sampling, _Wire(self.base_url, self._key(), self.timeout_s))

    def about(self) -> dict[str, Any]:
        """Address and model."""
        return {"answerer": "server", "base_url": self.base_url, "model": self.model}

    def _key(self) -> str | None:
        key = os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""
        if not key:
            return None
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"expected one line of ASCII in the variable {self.api_key_env}; got something else.")
        parts = urlsplit(self.base_url)
        if parts.scheme == "http" and not _is_loopback(parts.hostname or "") and not self.key_over_plain_http:
            raise ValueError(
                f"expected https for a key that leaves this machine; got {self.base_url} and a key in "
                f"{self.api_key_env}. Use https, or api_key_env=None to send none, or key_over_plain_http=True."
            )
        return key

    def _replies(self, waiting: deque[Request], sampling: Sampling, wire: _Wire) -> Iterator[Reply]:
        count = len(waiting)
        done: queue.SimpleQueue[Reply | Exception] = queue.SimpleQueue()

        def work() -> None:
            while not wire.down.is_set():
                try:
                    request = waiting.popleft()
                except IndexError:
                    return
                try:
                    done.put(self._reply(request, sampling, wire))
                except Exception as error:
                    done.put(error)

        try:
            for _ in range(min(self.concurrency, count)):
                threading.Thread(target=work, daemon=True).start()
            for _ in range(count):
                reply = done.get()
                if isinstance(reply, Exception):
                    raise reply
                yield reply
        finally:
            wire.cut()

    def _reply(self, request: Request, sampling: Sampling, wire: _Wire) -> Reply:
        prompt = request.prompt
        chat = not isinstance(prompt, str)
        path = "/chat/completions" if chat else "/completions"
        asked: Any = {"prompt": prompt} if isinstance(prompt, str) else {"messages": [dict(one) for one in prompt]}
        body = {
            "model": self.model,
            **asked,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": seed_of(request, sampling),
            "stream": False,
        }
        data = json.dumps(body).encode()
        for attempt in range(1, self.attempts + 1):
            try:
                reply = _read(request.id, wire.post(path, data), chat, self.now())
                return replace(reply, text=wire.hidden(reply.text or "", 16))
            except _Failure as failure:
                error = wire.told(f"POST {path}, attempt {attempt}: {failure}")
                if not failure.passing or attempt == self.attempts or wire.down.is_set():
                    return Reply(request.id, None, *failure.tokens, False, error)
                pause = FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1)
                pause = min(max(pause, failure.retry_after), LONGEST_WAIT_S)
            log.warning("request %s: %s; waiting %.1f s", request.id, error, pause)
            self.wait(wire.down, pause)
        raise AssertionError("the last attempt returns")


def _checked_url(url: str) -> str:
    wrong = "expected a base_url like http://127.0.0.1:8000/v1, without user, password, query or fragment"
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        raise ValueError(f"{wrong}; got an address that cannot be read.") from None
    if not fine or "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(f"{wrong}; got {parts.scheme or 'no scheme'} and host {parts.hostname!r}. Mend the address.")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Failure(Exception):
    """An attempt that gave no text: whether trying again may help, after how many seconds, what was used up."""

    def __init__(
        self,
        message: str,
        passing: bool,
        retry_after: float = 0.0,
        tokens: tuple[int | None, int | None] = (None, None),
    ) -> None:
        super().__init__(message)
        self.passing, self.retry_after, self.tokens = passing, retry_after, tokens


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: Message
    data: bytes


class _Wire:
    """How one call of a `Server` reaches it: the address, the key, and the connections now open, which can be cut."""

    def __init__(self, base_url: str, key: str | None, timeout_s: float) -> None:
        parts = urlsplit(base_url)
        self.host, self.path, self.timeout_s = parts.hostname or "", parts.path, timeout_s
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.key = key
        self.down = threading.Event()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def post(self, path: str, body: bytes) -> _Answer:
        """Send one request on a connection of its own; `_Failure` if no whole answer of a sane size comes in time."""
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
            with self._held(connection.sock, late):
                connection.request("POST", self.path + path, body, headers)
                with connection.getresponse() as response:
                    data = response.read(LARGEST_ANSWER + 1)
        except (OSError, http.client.HTTPException) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                raise _Failure(f"no whole answer within {self.timeout_s:g} s", passing=True) from None
            passing = not isinstance(error, ssl.SSLCertVerificationError)
            raise _Failure(f"{type(error).__name__}: {error}", passing) from None
        finally:
            connection.close()
        if late.is_set():
            raise _Failure(f"no whole answer within {self.timeout_s:g} s", passing=True)
        if len(data) > LARGEST_ANSWER:
            raise _Failure(f"expected an answer of at most {LARGEST_ANSWER} bytes; got more", passing=False)
        if response.length:
            raise _Failure(f"the answer broke off {response.length} bytes before its end", passing=True)
        return _Answer(response.status, response.headers, data)

    @contextlib.contextmanager
    def _held(self, line: socket.socket, late: threading.Event) -> Iterator[None]:
        """The connection can be cut inside the `with`, and is when the time is over.

        A socket's own time-out is for each read; bytes that trickle in would never exceed it.
        """

        def end() -> None:
            late.set()
            _shut(line)

        timer = threading.Timer(self.timeout_s, end)
        timer.daemon = True
        with self._lock:
            if self.down.is_set():
                raise ConnectionAbortedError("interrupted")
            self._open.add(line)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            with self._lock:
                self._open.discard(line)

    def cut(self) -> None:
        """End all that is under way; nothing begins any more."""
        with self._lock:
            self.down.set()
            for line in self._open:
                _shut(line)

    def told(self, message: str) -> str:
        """A message as one short printable line without the key."""
        message = self.hidden(message)[:2000]
        return " ".join("".join(c if c.isprintable() else " " for c in message).split())[:300]

    def hidden(self, text: str, shortest: int = 1) -> str:
        """A text without the key; a key shorter than `shortest`, a dummy, may be a word of the text and stays."""
        return text.replace(self.key, "[key]") if self.key and len(self.key) >= shortest else text


def _shut(line: socket.socket) -> None:
    """Wake whoever reads from the connection: they find its end."""
    with contextlib.suppress(OSError):  # the SSLSocket's own shutdown would take its state away under the reader
        socket.socket.shutdown(line, socket.SHUT_RDWR)


def _read(name: str, answer: _Answer, chat: bool, now: float) -> Reply:
    """The reply in an answer; `_Failure` if there is none."""
    said = answer.data.decode(errors="replace")
    if 300 <= answer.status < 400:
        place = answer.headers.get("Location")
        raise _Failure(f"redirected ({answer.status}) to {place}; give that as base_url if it is right", passing=False)
    if not 200 <= answer.status < 300:
        passing = answer.status in PASSING or answer.status >= 500
        raise _Failure(f"HTTP {answer.status}: {said}", passing, _retry_after(answer.headers, now))
    try:
        value = json.loads(answer.data)
        choice = value["choices"][0]
        text = choice["message"].get("content") if chat else choice["text"]
        reason = choice.get("finish_reason")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise _Failure(f"expected JSON with a choice in it; got {said or 'nothing'}", passing=True) from None
    usage = value.get("usage")
    tokens = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    if text is None and reason == "length":
        text = ""
    if not isinstance(text, str):
        raise _Failure(f"expected a text; got {text!r:.80}, finish_reason {reason!r:.80}", passing=False, tokens=tokens)
    text = text.encode(errors="replace").decode()  # JSON may hold half a surrogate pair, which no file takes
    return Reply(name, text, *tokens, reason == "stop")


def _count(usage: Any, name: str) -> int | None:
    number = usage.get(name) if isinstance(usage, dict) else None
    return number if isinstance(number, int) and not isinstance(number, bool) and number >= 0 else None


def _retry_after(headers: Message, now: float) -> float:
    """Seconds to wait by the `Retry-After` header, a number or a date; 0 without one, or one that cannot be read."""
    value = (headers.get("Retry-After") or "").strip()
    try:
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,9})?", value):
            return float(value)
        date = email.utils.parsedate_to_datetime(value)
        return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now)
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0
