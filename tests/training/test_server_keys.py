"""A server's key: sent in the header to its own address only."""

from __future__ import annotations

import json
import logging
import pickle
from typing import Any

import pytest

from tests.scripted_server import KEY, Call, asked, in_turn
from training.debates.answerers import Sampling
from training.debates.server import Server

pytestmark = pytest.mark.usefixtures("no_key_but_the_tests")


def echo(call: Call) -> None:
    """A server that returns the key it received."""
    if call.question == "short":
        call.raw(400, call.headers["Authorization"].encode())
    else:  # so long that a message cut first and cleaned afterwards would end amid the key
        call.raw(500, f"{' ' * 1940}{call.headers['Authorization']}".encode())


def test_the_key_is_sent_in_the_header_and_stands_nowhere_else(serve, monkeypatch, caplog, capfd) -> None:
    monkeypatch.setenv("SOME_KEY", f"{KEY}\n")
    caplog.set_level(logging.DEBUG)
    scripted, server = serve(in_turn(echo), api_key_env="SOME_KEY", attempts=2, wait=lambda *_: None)
    replies = list(server(asked("short", "long"), Sampling()))
    shown = [*map(repr, replies), repr(server), str(server.about()), repr(vars(server)), caplog.text]
    assert [call.headers["Authorization"] for call in scripted.calls] == [f"Bearer {KEY}"] * 3
    assert not [call for call in scripted.calls if KEY in call.path or KEY in json.dumps(call.body)]
    assert "Bearer [key]" in shown[0] + shown[1] and "HTTP 500: Bearer [key]; waiting" in caplog.text
    pieces = {KEY[i : i + 6] for i in range(len(KEY) - 6)}
    assert not [piece for piece in pieces for text in (*shown, *capfd.readouterr()) if piece in text]
    assert KEY.encode() not in pickle.dumps(Server(scripted.url, "m", "SOME_KEY"))


def test_a_redirect_is_not_followed_and_takes_the_key_nowhere(serve, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    other, _ = serve(in_turn(Call.ok))
    for status in (301, 302, 303, 307, 308):
        target = f"{other.url}/v1/chat/completions".replace("127.0.0.1", "localhost")
        scripted, server = serve(in_turn(lambda call, s=status, t=target: call.raw(s, b"", Location=t)))
        [reply] = server(asked("a"), Sampling())
        assert reply.text is None and f"redirected ({status}) to {target}" in (reply.error or "")
        assert len(scripted.calls) == 1
    assert other.calls == []


@pytest.mark.parametrize("host", ["192.0.2.1", "example.invalid", "127.0.0.1.example.invalid", "localhost.invalid"])
def test_a_key_is_refused_over_plain_http_to_another_machine(monkeypatch, host: str) -> None:
    def connect(*_: Any, **__: Any) -> None:
        raise ConnectionRefusedError("not in a test")

    monkeypatch.setattr("socket.create_connection", connect)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ValueError, match="expected https for a key") as refusal:
        Server(f"http://{host}/v1", "m")(asked("a"), Sampling())
    assert KEY not in str(refusal.value) and "OPENAI_API_KEY" in str(refusal.value)
    for allowed in (
        Server(f"http://{host}/v1", "m", api_key_env=None, attempts=1),
        Server(f"http://{host}/v1", "m", key_over_plain_http=True, attempts=1),
        Server(f"https://{host}/v1", "m", attempts=1),
    ):
        [reply] = allowed(asked("a"), Sampling())
        assert "not in a test" in (reply.error or "")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/v1",
        "localhost:8000",
        "127.0.0.1:8000/v1",
        "http://",
        f"https://user:{KEY}@host/v1",
        f"https://host/v1?key={KEY}",
        "https://host/v1#x",
        "http://host:port/v1",
        "http://host:0/v1",
        "http://[::1/v1",
        "",
    ],
)
def test_an_address_that_cannot_be_meant_is_refused_without_showing_what_may_be_secret(url: str) -> None:
    with pytest.raises(ValueError, match="expected a base_url like") as refusal:
        Server(url, "m")
    assert KEY not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value"), [("concurrency", 0), ("attempts", 0), ("timeout_s", 0), ("timeout_s", float("nan"))]
)
def test_numbers_that_cannot_be_meant_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match="concurrency and attempts from 1"):
        Server("http://localhost", "m", **{name: value})


def test_the_key_itself_in_place_of_its_variables_name_is_refused_and_not_shown() -> None:
    with pytest.raises(ValueError, match="name of an environment variable") as refusal:
        Server("http://localhost", "m", api_key_env=KEY)
    assert KEY not in str(refusal.value)


def test_a_key_of_several_lines_is_refused_and_not_shown(monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\r\nX-Other: {KEY}")
    with pytest.raises(ValueError, match="one line of ASCII in the variable OPENAI_API_KEY") as refusal:
        Server("http://localhost", "m")(asked("a"), Sampling())
    assert KEY not in str(refusal.value)
