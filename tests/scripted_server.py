"""A loopback server that answers by a script of the test and records the requests."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from training.debates.answerers import Request

KEY = "sk-very/secret+0123456789"
LONG_S = 30.0  # longest wait of a test; only a failing test waits so long


def say(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def asked(*names: str) -> list[Request]:
    return [Request(name, say(f"question {name}")) for name in names]


@dataclass
class Scripted:
    """A loopback server. `script(call, number)` answers the call that came as the `number`-th, counted from 0.

    `models` is the list that it reports to `GET /models`; None has no such list.
    """

    script: Callable[[Call, int], None]
    models: list[dict[str, Any]] | None = None
    calls: list[Call] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def __enter__(self) -> Scripted:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.calls)
                    outer.calls.append(Call(self, self.path, dict(self.headers), body))
                with contextlib.suppress(ConnectionError):  # the client may have gone, as it should in some tests
                    outer.script(outer.calls[number], number)

            def do_GET(self) -> None:
                listed = outer.models is not None and self.path.endswith("/models")
                Call(self, self.path, {}, {}).json({"data": outer.models}, 200 if listed else 404)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@dataclass
class Call:
    handler: BaseHTTPRequestHandler
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def question(self) -> str:
        return self.body["messages"][-1]["content"].removeprefix("question ")

    def raw(self, status: int, data: bytes, **headers: str) -> None:
        self.handler.send_response(status)
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.end_headers()
        self.handler.wfile.write(data)

    def json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.raw(status, json.dumps(value).encode(), **headers)

    def ok(self) -> None:
        self.json(answer(f"re {self.question}"))

    def gone_within(self, seconds: float) -> bool:
        """Return whether the client disconnects within the time; nothing is sent meanwhile."""
        self.handler.connection.settimeout(seconds)
        try:
            return self.handler.connection.recv(1) == b""
        except TimeoutError:
            return False

    def until_gone(self) -> None:
        assert self.gone_within(LONG_S)


def answer(content: Any, finish: Any = "stop", usage: Any = None) -> dict[str, Any]:
    usage = {"prompt_tokens": 7, "completion_tokens": 3} if usage is None else usage
    message = {"role": "assistant", "content": content}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}


def in_turn(*steps: Callable[[Call], None]) -> Callable[[Call, int], None]:
    """Each step answers one call, the last all that follow."""
    return lambda call, number: steps[min(number, len(steps) - 1)](call)


def drop(call: Call) -> None:
    call.handler.close_connection = True


def half(call: Call) -> None:
    data = json.dumps(answer("never whole")).encode()
    call.raw(200, data[: len(data) // 2])


def refuse(status: int) -> Callable[[Call], None]:
    return lambda call: call.json({"error": {"message": "not now"}}, status)
