"""Replies of a server: parsed, retried where another attempt may succeed, and an error otherwise."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator

import pytest
from transformers.utils.import_utils import is_serve_available

from steerkit.io.chat import LONGEST_WAIT_S
from steerkit.io.http import LARGEST_ANSWER
from tests.scripted_server import Call, Scripted, answer, asked, drop, half, in_turn, refuse, say
from tests.transformers_server import serving
from training.debates.answerers import LocalModel, Reply, Request, Sampling, seed_of
from training.debates.server import Server

pytestmark = pytest.mark.usefixtures("no_key_but_the_tests")


def test_an_answer_is_read_and_the_request_is_as_agreed(serve, waits) -> None:
    scripted, server = serve(in_turn(Call.ok))
    sampling = Sampling(0.5, 0.8, 99, seed=6)
    request = asked("a")[0]
    assert list(server([request], sampling)) == [Reply("a", "re a", 7, 3, True)]
    assert scripted.calls[0].path == "/v1/chat/completions" and "Authorization" not in scripted.calls[0].headers
    assert scripted.calls[0].body == {
        "model": "some-model",
        "messages": say("question a"),
        "temperature": 0.5,
        "top_p": 0.8,
        "max_tokens": 99,
        "seed": seed_of(request, sampling),
        "stream": False,
    }
    assert waits == []
    seeds = {seed_of(Request(name, ""), Sampling(seed=seed)) for name in "abc" for seed in range(3)}
    assert len(seeds) == 9 and all(0 <= seed < 2**31 for seed in seeds)


def test_a_string_goes_verbatim_to_completions_below_the_path_of_the_address(serve) -> None:
    scripted, server = serve(in_turn(lambda call: call.json({"choices": [{"text": "!", "finish_reason": "length"}]})))
    server = Server(f"{scripted.url}/some/where/", "m")
    assert list(server([Request("a", "<|user|>\n Hi")], Sampling())) == [Reply("a", "!", None, None, False)]
    assert scripted.calls[0].path == "/some/where/completions" and scripted.calls[0].body["prompt"] == "<|user|>\n Hi"


def broken_off(call: Call) -> None:
    data = json.dumps(answer("whole JSON, but less than was announced")).encode()
    call.raw(200, data, Content_Length=str(len(data) + 10))


PASSING = [drop, half, broken_off, *map(refuse, (408, 409, 425, 429, 500, 502, 503, 529))]
PASSING += [lambda call, v=value: call.json(v) for value in ({"choices": []}, {}, [], {"choices": [{"message": None}]})]
PASSING += [lambda call: call.raw(200, b""), lambda call: call.raw(200, b"[" * 100_000)]


@pytest.mark.parametrize("fault", PASSING)
def test_what_may_pass_is_tried_again_with_growing_waits(serve, waits, fault) -> None:
    scripted, server = serve(in_turn(fault, fault, fault, Call.ok))
    assert list(server(asked("a"), Sampling())) == [Reply("a", "re a", 7, 3, True)]
    assert len(scripted.calls) == 4
    assert [call.body for call in scripted.calls] == [scripted.calls[0].body] * 4
    assert all(0.5 * 2**n <= wait <= 2**n for n, wait in enumerate(waits)) and len(waits) == 3


@pytest.mark.parametrize("fault", PASSING)
def test_after_the_last_attempt_the_reply_says_why_in_one_line(serve, waits, fault) -> None:
    scripted, server = serve(in_turn(fault), attempts=2)
    [reply] = server(asked("a"), Sampling())
    assert (reply.text, reply.tokens_in, reply.tokens_out, reply.finished) == (None, None, None, False)
    assert re.match(r"POST /chat/completions, attempt 2: .", reply.error or "")
    assert len((reply.error or "").splitlines()) == 1 and len(reply.error or "") <= 300
    assert len(scripted.calls) == 2 and len(waits) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_refusal_that_will_not_pass_is_not_tried_again(serve, waits, status: int) -> None:
    scripted, server = serve(in_turn(lambda call: call.raw(status, b"model\x1b[2J\n\n not found")))
    [reply] = server(asked("a"), Sampling())
    assert reply.text is None
    assert reply.error == f"POST /chat/completions, attempt 1: HTTP {status}: model [2J not found"
    assert len(scripted.calls) == 1 and waits == []


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("header", "wait"),
    [
        ("7", 7.0),
        ("9.5", 9.5),
        ("Thu, 01 Jan 1970 00:16:55 GMT", 15.0),
        ("Thu, 01 Jan 1970 00:16:55 -0000", 15.0),
        ("86400", LONGEST_WAIT_S),
        ("999999999999", None),
        ("Fri, 31 Dec 9999 23:59:59 GMT", LONGEST_WAIT_S),
        ("Thu, 01 Jan 1970 00:00:00 GMT", None),
        ("0", None),
        ("-5", None),
        ("nan", None),
        ("soon", None),
        ("", None),
    ],
)
def test_retry_after_is_heeded_as_seconds_and_as_a_date_up_to_a_bound(serve, waits, status, header, wait) -> None:
    def later(call: Call) -> None:
        call.json({}, status, Retry_After=header)

    _, server = serve(in_turn(later, Call.ok), now=lambda: 1000.0)
    assert [reply.text for reply in server(asked("a"), Sampling())] == ["re a"]
    assert waits == [wait] if wait else 0.5 <= waits[0] <= 1 and len(waits) == 1


def test_without_anything_listening_the_reply_is_an_error(waits) -> None:
    with Scripted(in_turn(Call.ok)) as scripted:
        url = scripted.url
    server = Server(url, "m", attempts=3, wait=lambda _, seconds: waits.append(seconds))
    [reply] = server(asked("a"), Sampling())
    assert reply.text is None and "ConnectionRefusedError" in (reply.error or "") and len(waits) == 2


def trickle(call: Call) -> None:
    """Never end, but never be silent for long either: each single read is fast."""
    call.raw(200, b"")
    while not call.gone_within(0.02):
        call.handler.wfile.write(b" ")


def trickle_headers(call: Call) -> None:
    call.handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while not call.gone_within(0.02):
        call.handler.wfile.write(b"x")


@pytest.mark.parametrize("hang", [Call.until_gone, trickle, trickle_headers])
def test_an_answer_that_does_not_come_whole_in_time_is_given_up_and_tried_again(serve, waits, hang) -> None:
    scripted, server = serve(in_turn(hang, Call.ok), timeout_s=0.5)
    assert [reply.text for reply in server(asked("a"), Sampling())] == ["re a"]
    assert len(scripted.calls) == 2 and len(waits) == 1
    scripted, server = serve(in_turn(hang), timeout_s=0.1, attempts=1)
    [reply] = server(asked("a"), Sampling())
    assert (reply.error or "").endswith("attempt 1: no whole answer within 0.1 s")


def test_an_answer_without_end_is_not_read_into_memory(serve, waits) -> None:
    sent = []

    def endless(call: Call) -> None:
        call.raw(200, b"")
        with contextlib.suppress(ConnectionError):
            while len(sent) < 4 * LARGEST_ANSWER // 2**16:
                call.handler.wfile.write(b" " * 2**16)
                sent.append(1)

    _, server = serve(in_turn(endless))
    [reply] = server(asked("a"), Sampling())
    assert f"at most {LARGEST_ANSWER} bytes" in (reply.error or "") and waits == []
    assert len(sent) * 2**16 < 2 * LARGEST_ANSWER


@pytest.mark.parametrize(
    ("body", "reply"),
    [
        (answer("cut sho", "length"), Reply("a", "cut sho", 7, 3, False)),
        (answer("", "stop"), Reply("a", "", 7, 3, True)),
        (answer(None, "length"), Reply("a", "", 7, 3, False)),
        (answer("x", "content_filter"), Reply("a", "x", 7, 3, False)),
        (answer("x", None), Reply("a", "x", 7, 3, False)),
        (answer("x", usage={}), Reply("a", "x", None, None, True)),
        (answer("x", usage=[]), Reply("a", "x", None, None, True)),
        (answer("x", usage={"prompt_tokens": 5, "completion_tokens": None}), Reply("a", "x", 5, None, True)),
        (answer("x", usage={"prompt_tokens": True, "completion_tokens": -1}), Reply("a", "x", None, None, True)),
        (answer("half \ud83d a pair"), Reply("a", "half ? a pair", 7, 3, True)),
    ],
)
def test_odd_answers_are_read_for_what_they_are(serve, waits, body, reply: Reply) -> None:
    scripted, server = serve(in_turn(lambda call: call.json(body)))
    assert list(server(asked("a"), Sampling())) == [reply]
    assert len(scripted.calls) == 1


@pytest.mark.parametrize("content", [None, 5, [{"type": "text", "text": "x"}]])
def test_an_answer_that_holds_no_text_is_an_error_which_keeps_its_cost(serve, waits, content) -> None:
    scripted, server = serve(in_turn(lambda call: call.json(answer(content, "tool_calls"))))
    [reply] = server(asked("a"), Sampling())
    assert (reply.text, reply.tokens_in, reply.tokens_out, reply.finished) == (None, 7, 3, False)
    assert "finish_reason 'tool_calls'" in (reply.error or "") and len(scripted.calls) == 1


# A real server


@pytest.fixture(scope="module")
def real_server(smollm, tmp_path_factory) -> Iterator[Server]:
    """`transformers serve` on the loopback, with the real weights."""
    model, tokenizer = smollm
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with serving(folder) as url:
        yield Server(url, str(folder), concurrency=2, attempts=1, timeout_s=300)


@pytest.mark.skipif(
    not is_serve_available(), reason="the extra transformers[serving] (fastapi, uvicorn, openai) is not installed"
)
def test_transformers_serve_and_the_local_model_give_the_same_greedy_replies(smollm, real_server: Server) -> None:
    questions = ("What is rain?", "Name two colours of the rainbow.", "What is the capital of France?")
    requests = [Request(f"chat {i}", say(question)) for i, question in enumerate(questions)]
    requests.append(Request("verbatim", "The capital of France is"))
    sampling = Sampling(0, 1, 24)
    theirs = {reply.id: reply for reply in real_server(requests, sampling)}
    ours = {reply.id: reply for reply in LocalModel(*smollm)(requests, sampling)}
    assert theirs == ours
    assert {reply.finished for reply in ours.values()} == {True, False}
