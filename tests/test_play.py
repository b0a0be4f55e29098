"""The playground streams what `generate` would give, and answers its own page only."""

from __future__ import annotations

import json
import re
import threading
from itertools import pairwise

import pytest
import torch

import steerkit as sk
from tests.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("starlette", reason="the extra `play` is not installed")
pytest.importorskip("httpx", reason="the test client needs httpx")
from starlette.testclient import TestClient

from steerkit.play import Wish, app, play, stream

WISH = {
    "prompt": "tell me", "chat": True, "pushes": {"up": [1, 1.0]}, "positions": "from_last_prompt_token",
    "max_new_tokens": 8, "temperature": 0, "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def parts():
    vectors = {"up": sk.SteeringVector({1: torch.linspace(-6, 6, 32), 2: torch.ones(32)})}
    return tiny_model(), tiny_tokenizer(), vectors


@pytest.fixture
def client(parts):
    return TestClient(app(*parts, "127.0.0.1"), base_url="http://127.0.0.1")


def token(client: TestClient) -> dict[str, str]:
    return {"X-Steerkit-Token": re.search('"token": "([^"]+)"', client.get("/").text)[1]}  # type: ignore[index]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_last_texts_are_those_of_generate_and_the_push_changes_one(parts, temperature) -> None:
    model, tokenizer, vectors = parts
    wish = Wish.of({**WISH, "temperature": temperature})
    texts = list(stream(model, tokenizer, vectors, wish, threading.Event()))
    assert len(texts) <= 8 and texts[-1][0] != texts[-1][1]
    assert all(after.startswith(before[:-1]) for (before, _), (after, _) in pairwise(texts))
    if not temperature:
        asked = [[{"role": "user", "content": "tell me"}]] * 2
        steering = sk.Steering(vectors["up"].at(1), 1.0, "from_last_prompt_token")
        whole = sk.generate(model, tokenizer, asked, max_new_tokens=8, steering=[None, steering])
        assert list(texts[-1]) == whole


def test_without_a_push_both_texts_are_the_same(parts) -> None:
    wish = Wish.of({**WISH, "pushes": {"up": [1, 0]}, "temperature": 1.0})
    assert all(a == b for a, b in stream(*parts, wish, threading.Event()))


def test_a_reader_that_leaves_stops_the_model(parts) -> None:
    stopped = threading.Event()
    texts = stream(*parts, Wish.of({**WISH, "max_new_tokens": 200}), stopped)
    next(texts)
    stopped.set()
    assert len(list(texts)) < 198


def test_the_page_streams_lines_to_itself_and_to_nobody_else(client) -> None:
    mine = token(client)
    with client.stream("POST", "/stream", json=WISH, headers=mine) as reply:
        lines = [json.loads(line) for line in reply.iter_lines()]
    assert lines and lines[-1]["unsteered"] != lines[-1]["steered"]
    assert client.post("/stream", json=WISH).status_code == 403
    assert client.post("/stream", json=WISH, headers={"X-Steerkit-Token": "x"}).status_code == 403
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_new_tokens": 0}, "1 to 512 new tokens"),
        ({"prompt": ""}, "expected a prompt"),
        ({"pushes": [1]}, "expected prompt, chat, pushes"),
        ({"temperature": "hot"}, "could not convert"),
    ],
)
def test_bad_wishes_are_refused_by_name(client, change, said) -> None:
    reply = client.post("/stream", json={**WISH, **change}, headers=token(client))
    assert reply.status_code == 400 and said in reply.text


def test_what_only_the_model_can_refuse_comes_as_a_line(client) -> None:
    wish = {**WISH, "pushes": {"down": [1, 1.0]}}
    assert "expected a vector among ['up']" in client.post("/stream", json=wish, headers=token(client)).json()["error"]


def test_the_page_runs_no_script_but_its_own_and_names_no_other_host(client) -> None:
    reply = client.get("/")
    policy = reply.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.findall(r"""(?:src|href)=["']?https?:""", reply.text)
    assert "innerHTML" not in reply.text


def test_a_vector_that_does_not_fit_is_refused_before_the_page_is_served(parts) -> None:
    model, tokenizer, _ = parts
    with pytest.raises(ValueError, match="one vector at least"):
        play(model, tokenizer, {})
    with pytest.raises(ValueError, match="width 32"):
        play(model, tokenizer, {"v": sk.SteeringVector({0: torch.ones(8)})})
