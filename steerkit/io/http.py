"""HTTP: requests to one server with a limit of time and size, which can be shut down, and a protected key."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import ipaddress
import os
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC
from email.message import Message
from urllib.parse import urlsplit

LARGEST_ANSWER = 16 * 2**20  # bytes
RETRYABLE = frozenset({408, 409, 425, 429})  # client errors that a later attempt may not see; 5xx are retried too


def checked_url(url: str) -> str:
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


def read_key(variable: str | None, url: str, over_plain_http: bool = False) -> str | None:
    """The key in an environment variable for a server; None where there is none.

    Raises:
        ValueError: it is not one line of ASCII, or would be sent unencrypted to another machine.
    """
    key = os.environ.get(variable, "").strip() if variable else ""
    if not key:
        return None
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"expected one line of ASCII in the variable {variable}; got something else. Set it again.")
    parts = urlsplit(url)
    if parts.scheme == "http" and not is_loopback(parts.hostname or "") and not over_plain_http:
        raise ValueError(
            f"expected https for a key that leaves this machine; got {url} and a key in {variable}. Use https, or pass "
            "api_key_env=None (no key) or key_over_plain_http=True."
        )
    return key


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Failure(Exception):
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
class Answer:
    status: int
    headers: Message
    data: bytes


class Connections:
    """Connections to one server: its address, a key, and the open sockets, which `close` shuts down.

    The key is sent only in the header to this address, and is in no error.
    """

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

    def post(self, path: str, body: bytes) -> Answer:
        """Send a body of JSON; see `send`."""
        return self.send("POST", path, body)

    def send(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> Answer:
        """Send one request on a new connection; raise `Failure` without a complete answer of limited size in time."""
        headers = {"Content-Type": kind, "Connection": "close"}
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
                connection.request(method, self.path + path, body, headers)
                with connection.getresponse() as response:
                    data = response.read(LARGEST_ANSWER + 1)
        except (OSError, http.client.HTTPException) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                raise Failure(f"no whole answer within {self.timeout_s:g} s", retryable=True) from None
            retryable = not isinstance(error, ssl.SSLCertVerificationError)
            where = f" ({self.host}:{self.port})" if isinstance(error, ConnectionRefusedError) else ""
            raise Failure(f"{type(error).__name__}: {error}{where}", retryable) from None
        finally:
            connection.close()
        if late.is_set():
            raise Failure(f"no whole answer within {self.timeout_s:g} s", retryable=True)
        if len(data) > LARGEST_ANSWER:
            raise Failure(f"expected an answer of at most {LARGEST_ANSWER} bytes; got more", retryable=False)
        if response.length:
            raise Failure(f"the answer ended {response.length} bytes early", retryable=True)
        return Answer(response.status, response.headers, data)

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


def retry_after(headers: Message, now: float) -> float:
    """Return the seconds in the `Retry-After` header, a number or a date; 0 without a valid one."""
    value = (headers.get("Retry-After") or "").strip()
    try:
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,9})?", value):
            return float(value)
        date = email.utils.parsedate_to_datetime(value)
        return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now)
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0
