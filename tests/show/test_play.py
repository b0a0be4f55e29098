"""The playground streams what `generate` would give, and answers its own page only."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

import steerkit as sk
from tests.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("starlette", reason="the extra `play` is not installed")
pytest.importorskip("httpx", reason="the test client needs httpx")
pytest.importorskip("uvicorn", reason="the extra `play` is not installed")
import uvicorn
from starlette.testclient import TestClient

from steerkit.generation import batches
from steerkit.generation.batches import exact
from steerkit.generation.engine import Engine
from steerkit.show.play import CONTROL_SEED, GenerationRequest, _Written, app, play, stream
from steerkit.steering.dose import median_norms
from steerkit.sweeps.projections import _token_ends
from steerkit.vectors.controls import random_like_all
from tests.browser import Tab

REQUEST = {
    "prompt": "tell me", "chat": True, "strengths": {"up": [1, 1.0]}, "positions": "from_last_prompt_token",
    "operation": "add", "max_new_tokens": 8, "temperature": 0, "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def parts():
    vectors = {"up": sk.SteeringVector({1: torch.linspace(-6, 6, 32), 2: torch.ones(32)})}
    return tiny_model(), tiny_tokenizer(), vectors


@pytest.fixture
def client(parts):
    return TestClient(app(*parts, "127.0.0.1"), base_url="http://127.0.0.1")


def token(client: TestClient) -> dict[str, str]:
    return {"X-Steerkit-Token": re.search('"token":"([^"]+)"', client.get("/").text)[1]}  # type: ignore[index]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_last_texts_are_those_of_generate_and_the_steering_changes_one(parts, temperature) -> None:
    model, tokenizer, vectors = parts
    request = GenerationRequest.from_json({**REQUEST, "temperature": temperature})
    texts = list(stream(model, tokenizer, vectors, request, threading.Event()))
    assert len(texts) <= 8 and texts[-1][0] != texts[-1][1]
    assert all(after.unsteered.startswith(before.unsteered[:-1]) for before, after in pairwise(texts))
    asked = [[{"role": "user", "content": "tell me"}]]
    steering = sk.Steering(vectors["up"].at(1), 1.0, "from_last_prompt_token")
    whole = [
        sk.generate(model, tokenizer, asked, max_new_tokens=8, steering=one, temperature=temperature)[0]
        for one in (None, steering)
    ]
    assert list(texts[-1][:2]) == whole


def test_a_strength_in_doses_is_of_the_median_norm_over_the_prompt(parts) -> None:
    model, tokenizer, vectors = parts
    request = GenerationRequest.from_json({**REQUEST, "strengths": {"up": [1, 4.0]}, "unit": "dose"})
    texts = list(stream(model, tokenizer, vectors, request, threading.Event()))
    asked = [{"role": "user", "content": "tell me"}]
    norms = median_norms(model, [(sk.render(tokenizer, asked).ids, ())], None, "prompt")
    steering = sk.Steering(vectors["up"], dose=4.0, layer=1)
    control = sk.Steering(sk.random_like(vectors["up"].at(1), seed=CONTROL_SEED), dose=4.0)
    rows = [None, steering, control]
    wanted = sk.generate(model, tokenizer, [asked] * 3, max_new_tokens=8, steering=rows, norms=norms)
    assert list(texts[-1][:3]) == wanted and len(set(wanted)) == 3


def test_controls_of_two_vectors_push_as_far_together_as_the_vectors_do(parts) -> None:
    model, tokenizer, _ = parts
    up = sk.SteeringVector({1: torch.linspace(-6, 6, 32)})
    request = GenerationRequest.from_json({**REQUEST, "strengths": {"up": [1, 3.0], "down": [1, 3.0]}})
    opposite = list(stream(model, tokenizer, {"up": up, "down": -1 * up}, request, threading.Event()))[-1]
    assert opposite.steered == opposite.unsteered == opposite.control
    other = sk.SteeringVector({1: torch.ones(32)})
    drawn = random_like_all([up, other], 3)
    assert drawn[0].cosine(drawn[1])[1] == pytest.approx(up.cosine(other)[1], abs=1e-6)
    assert [one.norms()[1] for one in drawn] == pytest.approx([up.norms()[1], other.norms()[1]])
    layers = sk.random_like(sk.SteeringVector({1: up.layers[1], 2: other.layers[1]}), 3).layers.values()
    assert all(torch.equal(row, one.layers[1]) for row, one in zip(layers, drawn, strict=True))


def test_a_dose_is_of_the_norm_at_the_site_of_the_vector(parts) -> None:
    model, tokenizer, vectors = parts
    other = {"up": sk.SteeringVector(vectors["up"].layers, site="mlp_out")}
    request = GenerationRequest.from_json({**REQUEST, "strengths": {"up": [1, -2.0]}, "unit": "dose"})
    texts = list(stream(model, tokenizer, other, request, threading.Event()))
    asked = [{"role": "user", "content": "tell me"}]
    read = [(sk.render(tokenizer, asked).ids, ())]
    at_site, at_block = (median_norms(model, read, None, "prompt", site=site) for site in ("mlp_out", "resid_post"))
    steering = sk.Steering(other["up"], dose=-2.0, layer=1)
    wanted, wrong = (
        sk.generate(model, tokenizer, [asked], max_new_tokens=8, steering=steering, norms=norms)[0]
        for norms in (at_site, at_block)
    )
    assert texts[-1].steered == wanted != wrong


@pytest.mark.parametrize("positions", ["from_last_prompt_token", "prompt", "all"])
def test_a_dose_after_a_prompt_of_one_token_is_of_the_norm_at_new_tokens(parts, positions: str) -> None:
    model, tokenizer, vectors = parts
    given = {"prompt": "H", "chat": False, "strengths": {"up": [1, 4.0]}, "unit": "dose", "positions": positions}
    (texts,) = list(stream(*parts, GenerationRequest.from_json({**REQUEST, **given}), threading.Event()))[-1:]
    (written,) = sk.generate(model, tokenizer, ["H"], max_new_tokens=8, return_details=True)
    ids = sk.render(tokenizer, "H").ids
    assert len(ids) == 1
    norms = median_norms(model, [(ids, written.ids)])
    steering = sk.Steering(vectors["up"], dose=4.0, layer=1, positions=positions)
    assert texts.unsteered == written.text
    assert texts.steered == sk.generate(model, tokenizer, ["H"], max_new_tokens=8, steering=steering, norms=norms)[0]


def test_without_steering_both_texts_are_the_same(parts) -> None:
    request = GenerationRequest.from_json({**REQUEST, "strengths": {"up": [1, 0]}, "temperature": 1.0})
    assert all(one.unsteered == one.steered == one.control for one in stream(*parts, request, threading.Event()))


def test_tokens_are_shaded_live_by_the_projections_of_generate(parts) -> None:
    model, tokenizer, vectors = parts
    request = GenerationRequest.from_json({**REQUEST, "watch": ["up", 2]})
    texts = list(stream(model, tokenizer, vectors, request, threading.Event()))
    asked = [[{"role": "user", "content": "tell me"}]] * 2
    steering = [None, sk.Steering(vectors["up"].at(1), 1.0)]
    watch = {"up": vectors["up"].at(2)}
    wanted = sk.generate(model, tokenizer, asked, max_new_tokens=8, steering=steering, watch=watch)
    for text, tokens, one in zip(texts[-1][:2], texts[-1].tokens[:2], wanted, strict=True):
        ends = [end for end, _ in tokens]
        assert text == one.text and ends == sorted(ends) and ends[-1] == len(text)
        values = one.projections["up"]["after"].tolist()
        assert [value for _, value in tokens] == pytest.approx(values[: len(tokens)]) and len(tokens) >= len(values) - 1
    counts = [len(one.tokens[0]) for one in texts]
    assert counts == [*range(len(counts))]  # a token is read one step after its choice
    without = stream(model, tokenizer, vectors, GenerationRequest.from_json(REQUEST), threading.Event())
    assert [one[:3] for one in without] == [one[:3] for one in texts[:-1]]


@pytest.fixture
def too_large(monkeypatch, parts):
    """Call it with numbers of rows: a batch of so many runs out of memory after its third token."""
    exact(parts[0])
    forward = Engine.forward

    def set_to(*rows: int) -> None:
        def failing(self: Engine, ids: Any, start: int) -> Any:
            if len(self.rows) in rows and start > self.width + 1:
                raise torch.OutOfMemoryError("the device is full.")
            return forward(self, ids, start)

        monkeypatch.setattr(Engine, "forward", failing)

    yield set_to
    batches._fitting.clear()


def test_after_a_batch_that_did_not_fit_into_memory_each_text_and_its_shades_are_its_own(parts, too_large) -> None:
    request = GenerationRequest.from_json({**REQUEST, "watch": ["up", 2]})
    wanted = list(stream(*parts, request, threading.Event()))[-1]
    assert len(set(wanted[:3])) == 3
    too_large(3)
    for _ in range(2):  # the second time, the batches are small from the start
        found = list(stream(*parts, request, threading.Event()))[-1]
        assert found[:3] == wanted[:3]
        for tokens, expected in zip(found.tokens, wanted.tokens, strict=True):
            assert [end for end, _ in tokens] == [end for end, _ in expected]
            assert [value for _, value in tokens] == pytest.approx([value for _, value in expected], abs=1e-4)


def test_a_text_that_alone_does_not_fit_into_memory_comes_as_a_line(client, too_large) -> None:
    too_large(1, 2, 3)
    reply = client.post("/stream", json=REQUEST, headers=token(client))
    error = json.loads(reply.text.splitlines()[-1])["error"]
    assert error.startswith("out of memory: the device is full. Shorten the prompt")


@pytest.mark.parametrize("watch", [["down", 1], ["up", 3]])
def test_a_watched_vector_or_layer_that_is_not_there_comes_as_a_line(client, watch) -> None:
    reply = client.post("/stream", json={**REQUEST, "watch": watch}, headers=token(client))
    assert "expected" in reply.json()["error"]


@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.parametrize("text", ["Hi", "caf\u00e9!", "a \U0001f602!", "\U0001f602"])
def test_tokens_of_a_text_that_grows_end_where_those_of_the_whole_text_do(text: str, cut: int) -> None:
    tokenizer = tiny_tokenizer()  # each byte is a token
    ids = tokenizer(text)["input_ids"][: -cut or None]
    written = _Written(tokenizer)
    for count in range(1, len(ids) + 1):
        written.extend(ids[:count])
    assert written.ends == (_token_ends(tokenizer, ids) if ids else [])


def test_a_client_that_disconnects_stops_the_model(parts) -> None:
    stopped = threading.Event()
    texts = stream(*parts, GenerationRequest.from_json({**REQUEST, "max_new_tokens": 200}), stopped)
    next(texts)
    stopped.set()
    assert len(list(texts)) < 198


def test_the_page_streams_lines_to_itself_and_to_no_other_page(client) -> None:
    mine = token(client)
    with client.stream("POST", "/stream", json=REQUEST, headers=mine) as reply:
        lines = [json.loads(line) for line in reply.iter_lines()]
    assert lines and lines[-1]["unsteered"] != lines[-1]["steered"]
    assert client.post("/stream", json=REQUEST).status_code == 403
    assert client.post("/stream", json=REQUEST, headers={"X-Steerkit-Token": "x"}).status_code == 403
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "1 to 512 new tokens"),
        ({"prompt": ""}, "expected a prompt"),
        ({"strengths": [1]}, "expected prompt, chat, strengths"),
        ({"temperature": "hot"}, "could not convert"),
        ({"unit": "volts"}, "expected a unit among"),
    ],
)
def test_bad_requests_are_refused_by_name(client, change, message) -> None:
    reply = client.post("/stream", json={**REQUEST, **change}, headers=token(client))
    assert reply.status_code == 400 and message in reply.text


def test_a_vector_can_be_ablated(parts) -> None:
    model, tokenizer, vectors = parts
    request = GenerationRequest.from_json({**REQUEST, "operation": "ablate"})
    steered = list(stream(model, tokenizer, vectors, request, threading.Event()))[-1].steered
    steering = sk.Steering(vectors["up"], 1.0, operation="ablate", layer=1)
    asked = [[{"role": "user", "content": "tell me"}]]
    assert [steered] == sk.generate(model, tokenizer, asked, max_new_tokens=8, steering=steering)


def test_a_vector_of_other_weights_is_refused_unless_foreign_is_passed(parts, monkeypatch) -> None:
    model, tokenizer, _ = parts
    served: list[object] = []
    monkeypatch.setattr(uvicorn, "run", lambda *arguments, **_: served.append(arguments))
    other = {"v": sk.SteeringVector({1: torch.ones(32)}, {"model_fingerprint": "of another model"})}
    with pytest.raises(ValueError, match="expected a vector read from this model"):
        play(model, tokenizer, other)
    assert not served
    play(model, tokenizer, other, foreign=True)
    assert len(served) == 1


def test_what_only_the_model_can_refuse_comes_as_a_line(client) -> None:
    request = {**REQUEST, "strengths": {"down": [1, 1.0]}}
    reply = client.post("/stream", json=request, headers=token(client))
    assert "expected a vector among ['up']" in reply.json()["error"]


def test_the_page_runs_no_script_but_its_own_and_names_no_other_host(client) -> None:
    reply = client.get("/")
    policy = reply.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.findall(r"""(?:src|href)=["']?https?:""", reply.text)
    assert "innerHTML" not in reply.text


def test_a_vector_that_does_not_fit_is_refused_before_the_page_is_served(parts) -> None:
    model, tokenizer, _ = parts
    with pytest.raises(ValueError, match="at least one vector"):
        play(model, tokenizer, {})
    with pytest.raises(ValueError, match="width 32"):
        play(model, tokenizer, {"v": sk.SteeringVector({0: torch.ones(8)})})


# The page in a browser, on the real model


@pytest.fixture(scope="module")
def warm(smollm: Any) -> dict[str, sk.SteeringVector]:
    pairs = [
        sk.ContrastPair(f"My {who} is", " wonderful, and I am so happy and glad.", " awful, and I am so sad and angry.")
        for who in ("day", "friend", "work", "garden")
    ]
    return {"warm": sk.difference_in_means(sk.collect(*smollm, pairs, layers=[12, 14], position="mean"))}


@pytest.fixture(scope="module")
def address(smollm: Any, warm: dict[str, sk.SteeringVector]) -> Iterator[str]:
    """Where the playground of the real model listens: a free port of this machine."""
    settings = uvicorn.Config(
        app(*smollm, warm, "127.0.0.1"), host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(settings)
    bound = settings.bind_socket()
    serving = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    serving.start()
    yield f"http://127.0.0.1:{bound.getsockname()[1]}/"
    server.should_exit = True
    serving.join()


def test_in_a_browser_the_slider_steers_the_real_model_once_and_three_texts_stream(
    tab: Tab, address: str, smollm: Any, warm: dict[str, sk.SteeringVector]
) -> None:
    tab.open(address)
    tab.js("at('max_new_tokens').value = 12")
    tab.js("at('prompt').value = 'How is your day?'")
    tab.js(
        "window.seen = []; new MutationObserver(() => seen.push(at('steered').textContent))"
        ".observe(at('steered'), { childList: true, subtree: true })"
    )
    tab.js("window.sent = []; window.send = fetch")
    tab.js("fetch = (path, options) => (sent.push(options.body), send(path, options))")
    tab.js("at('first').value = '6'")
    tab.js("document.querySelector('input[type=range]').focus()")
    for _ in range(12):
        tab.press("ArrowRight")
    assert tab.js("document.querySelector('output').textContent") == "0.60"
    tab.until("at('status').textContent === 'done'")
    assert len(tab.js("sent")) == 1, "a generation per key"
    assert json.loads(tab.js("sent[0]"))["positions"] == "from_last_prompt_token:6"
    assert tab.js("document.querySelectorAll('input[type=range]').length") == len(warm)
    layer = int(tab.js("document.querySelector('#strengths select').value"))
    asked = [{"role": "user", "content": "How is your day?"}]
    norms = median_norms(smollm[0], [(sk.render(smollm[1], asked).ids, ())], None, "prompt")
    vector = warm["warm"].at(layer)
    both = (vector, sk.random_like(vector, seed=CONTROL_SEED))
    rows = [None, *(sk.Steering(one, dose=0.6, positions="from_last_prompt_token:6") for one in both)]
    expected = sk.generate(*smollm, [asked] * 3, max_new_tokens=12, steering=rows, norms=norms)
    assert [tab.js(f"at('{name}').textContent") for name in ("unsteered", "steered", "control")] == expected
    assert len(set(expected)) == 3
    assert len(tab.js("seen")) > 3, "the text came at once, not token by token"
    assert tab.js("document.querySelector('#steered mark').textContent") != ""
    assert tab.js("document.querySelectorAll('#steered .token, #unsteered .token').length") >= 12
    assert "Projection on warm" in tab.js("at('scale').textContent")


@pytest.mark.parametrize("operation", ["ablate", "clamp", "rotate"])
def test_in_a_browser_an_operation_without_a_dose_is_steered_by_a_coefficient(
    tab: Tab, address: str, operation: str
) -> None:
    tab.open(address)
    tab.js("at('max_new_tokens').value = 3; window.sent = []; window.send = fetch")
    tab.js("fetch = (path, options) => (sent.push(options.body), send(path, options))")
    title = "document.querySelector('section[aria-label=\"random direction\"] h2').textContent"
    assert (tab.js("at('unit').value"), tab.js(title)) == ("dose", "Random direction, same dose")
    tab.js(f"at('operation').value = {operation!r}; at('operation').dispatchEvent(new Event('change'))")
    assert (tab.js("at('unit').value"), tab.js(title)) == ("coefficient", "Random direction, same coefficient")
    assert tab.js("at('unit').disabled")
    tab.js("document.querySelector('input[type=range]').focus()")
    tab.press("ArrowRight")
    tab.until("!['', 'generating'].includes(at('status').textContent)")
    assert tab.js("at('status').textContent") == "done"
    assert json.loads(tab.js("sent[0]"))["unit"] == "coefficient"
    tab.js("at('operation').value = 'add'; at('operation').dispatchEvent(new Event('change'))")
    assert not tab.js("at('unit').disabled")


def test_in_a_browser_hostile_names_and_texts_are_only_text(tab: Tab, parts: Any) -> None:
    model, tokenizer, vectors = parts
    name = "</script><img src=x onerror=alert(1)>"
    settings = uvicorn.Config(
        app(model, tokenizer, {name: vectors["up"]}, "127.0.0.1"),
        host="127.0.0.1",
        port=0,
        log_level="warning",
        timeout_graceful_shutdown=2,
    )
    server, bound = uvicorn.Server(settings), settings.bind_socket()
    serving = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    serving.start()
    try:
        tab.open(f"http://127.0.0.1:{bound.getsockname()[1]}/")
        assert tab.until("document.querySelector('#strengths span')?.textContent") == name
        tab.js("show(['<b>plain', '<b>plain</b><script>window.hit = 1</script>', '<b>'])")
        assert tab.js("at('steered').textContent") == "<b>plain</b><script>window.hit = 1</script>"
        assert tab.js("[window.hit, document.images.length, document.querySelectorAll('b').length]") == [None, 0, 0]
    finally:
        server.should_exit = True
        serving.join()
