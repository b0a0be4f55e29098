from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from transformers.utils.import_utils import is_serve_available

import steerkit as sk
from steerkit.texts import encode_prompt
from tests.reference import greedy
from tests.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer
from training.chat import LocalModel, Reply, Request, Rule, Sampling, seed_of
from training.server import LARGEST_ANSWER, LONGEST_WAIT_S, Server

KEY = "sk-very/secret+0123456789"
LONG_S = 30.0  # what a test waits for at most; it never does unless it fails
PROMPTS = ["Hello", "A rather longer prompt than that", "x = 1", "?", "Hello", "once upon a time", "12 + 3", "abc"]


def say(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def asked(*names: str) -> list[Request]:
    return [Request(name, say(f"question {name}")) for name in names]


# The model in this process


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_eight_requests_in_one_batch_are_answered_as_one_at_a_time(llama, temperature: float) -> None:
    requests = [Request(f"r{i}", say(p) if i % 2 else p) for i, p in enumerate(PROMPTS)]
    sampling = Sampling(temperature, 0.95, 12, seed=3)
    together = {reply.id: reply for reply in LocalModel(*llama)(requests, sampling)}
    alone = {r.id: reply for r in requests for reply in LocalModel(*llama)([r], sampling)}
    assert together == alone and set(together) == {r.id for r in requests}
    assert {r.id: r for r in LocalModel(*llama, batch_rows=3)(requests[::-1], sampling)} == together
    assert len({reply.text for reply in together.values()}) >= 4
    if temperature:
        assert together["r0"].text != together["r4"].text  # one prompt, two ids
        other = {r.id: r for r in LocalModel(*llama)(requests, Sampling(temperature, 0.95, 12, seed=4))}
        assert other != together


def test_tokens_are_counted_to_each_replys_own_end_with_the_token_that_ends_it() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    new = 16
    model.generation_config.eos_token_id = greedy(model, encode_prompt(tokenizer, PROMPTS[0]), new)[3]
    ends = [model.generation_config.eos_token_id, tokenizer.eos_token_id]
    requests = [Request(str(i), p) for i, p in enumerate(PROMPTS)]
    replies = {reply.id: reply for reply in LocalModel(model, tokenizer)(requests, Sampling(0, 1, new))}
    counts = set()
    for request in requests:
        ids = encode_prompt(tokenizer, request.prompt)
        slow = greedy(model, ids, new, ends)
        ended = len(slow) < new
        text = tokenizer.decode(slow, skip_special_tokens=True)
        assert replies[request.id] == Reply(request.id, text, len(ids), len(slow) + ended, ended)
        counts.add((len(slow), ended))
    assert len(counts) > 2 and {ended for _, ended in counts} == {True, False}


def test_a_prompt_beyond_the_context_fails_alone(llama) -> None:
    requests = [Request("good", "abc"), Request("long", "x" * 250), Request("also good", "abcd")]
    replies = {r.id: r for r in LocalModel(*llama)(requests, Sampling(0, 1, 8))}
    assert replies["long"].text is None and "context of 256; got 250 + 8" in (replies["long"].error or "")
    assert (replies["long"].tokens_in, replies["long"].tokens_out) == (250, 0)
    assert all(replies[name].text and not replies[name].error for name in ("good", "also good"))


def test_a_batch_is_handed_over_before_the_next_is_begun() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    begun = []
    model.register_forward_hook(lambda *_: begun.append(1))
    with contextlib.closing(LocalModel(model, tokenizer, batch_rows=1)(asked("a", "b", "c"), Sampling(0, 1, 4))) as got:
        first = next(got)
        after_one = len(begun)
        assert first.text is not None and after_one
        next(got)
        assert len(begun) > after_one


def test_steering_that_is_on_acts_on_the_replies(llama) -> None:
    model, tokenizer = llama
    plain = [r.text for r in LocalModel(model, tokenizer)([Request("a", "Hello")], Sampling(0, 1, 8))]
    with sk.Steering(vector(model, 1), 4.0).on(model):
        steered = [r.text for r in LocalModel(model, tokenizer)([Request("a", "Hello")], Sampling(0, 1, 8))]
        assert steered == sk.generate(model, tokenizer, ["Hello"], max_new_tokens=8)
    assert steered != plain


def test_provenance_is_plain_data_that_names_the_weights(llama) -> None:
    about = LocalModel(*llama).about()
    assert json.loads(json.dumps(about)) == about
    assert about["model_fingerprint"] == sk.models.fingerprint(llama[0])[0] and about["template_sha256"]


# A rule


def test_a_rules_randomness_depends_on_seed_and_id_alone() -> None:
    rule = Rule(lambda request, numbers: f"{request.id} {numbers.random()}")
    first = {r.id: r.text for r in rule(asked("a", "b"), Sampling(seed=1))}
    assert {r.id: r.text for r in rule(asked("c", "b", "a"), Sampling(0, seed=1)) if r.id != "c"} == first
    assert next(rule(asked("a"), Sampling(seed=2))).text != first["a"]
    assert first["a"].split()[1] != first["b"].split()[1]


def test_a_rules_tokens_are_words() -> None:
    rule = Rule(lambda *_: "one two\nthree")
    messages = [{"role": "system", "content": "Be  brief."}, *say("What is rain?")]
    replies = list(rule([Request("a", messages), Request("b", " four words are here ")], Sampling()))
    assert replies == [Reply("a", "one two\nthree", 5, 3, True), Reply("b", "one two\nthree", 4, 3, True)]
    assert "test_a_rules_tokens_are_words" in rule.about()["function"]


@pytest.mark.parametrize("who", ["local", "server", "rule"])
def test_two_requests_with_one_id_are_refused_before_anything_is_asked(llama, who: str) -> None:
    answerers = {"local": LocalModel(*llama), "server": Server("http://127.0.0.1:1", "m"), "rule": Rule(lambda *_: "")}
    with pytest.raises(ValueError, match="different ids; got 'a' more than once"):
        answerers[who](asked("a", "b", "a"), Sampling())


# A server that says what the test tells it to


@dataclass
class Scripted:
    """A loopback server. `script(call, number)` answers the call that came as the `number`-th, counted from 0."""

    script: Callable[[Call, int], None]
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
        """Say nothing until the client is gone, or the time is."""
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


@pytest.fixture(autouse=True)
def no_key_but_the_tests(monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def serve(waits) -> Iterator[Callable[..., tuple[Scripted, Server]]]:
    """Start a scripted server and a client of it whose pauses are written down instead of waited for."""
    with contextlib.ExitStack() as stack:

        def start(script: Callable[[Call, int], None], **options: Any) -> tuple[Scripted, Server]:
            there = stack.enter_context(Scripted(script))
            options = {"timeout_s": LONG_S, "wait": lambda _, seconds: waits.append(seconds), **options}
            return there, Server(there.url, "some-model", **options)

        yield start


def in_turn(*steps: Callable[[Call], None]) -> Callable[[Call, int], None]:
    """Each step answers one call, the last all that follow."""
    return lambda call, number: steps[min(number, len(steps) - 1)](call)


def test_an_answer_is_read_and_the_request_is_as_agreed(serve, waits) -> None:
    there, server = serve(in_turn(Call.ok))
    sampling = Sampling(0.5, 0.8, 99, seed=6)
    request = asked("a")[0]
    assert list(server([request], sampling)) == [Reply("a", "re a", 7, 3, True)]
    assert there.calls[0].path == "/v1/chat/completions" and "Authorization" not in there.calls[0].headers
    assert there.calls[0].body == {
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
    there, server = serve(in_turn(lambda call: call.json({"choices": [{"text": "!", "finish_reason": "length"}]})))
    server = Server(f"{there.url}/some/where/", "m")
    assert list(server([Request("a", "<|user|>\n Hi")], Sampling())) == [Reply("a", "!", None, None, False)]
    assert there.calls[0].path == "/some/where/completions" and there.calls[0].body["prompt"] == "<|user|>\n Hi"


def drop(call: Call) -> None:
    call.handler.close_connection = True


def half(call: Call) -> None:
    data = json.dumps(answer("never whole")).encode()
    call.raw(200, data[: len(data) // 2])


def broken_off(call: Call) -> None:
    data = json.dumps(answer("whole JSON, but less than was announced")).encode()
    call.raw(200, data, Content_Length=str(len(data) + 10))


def refuse(status: int) -> Callable[[Call], None]:
    return lambda call: call.json({"error": {"message": "not now"}}, status)


PASSING = [drop, half, broken_off, *map(refuse, (408, 409, 425, 429, 500, 502, 503, 529))]
PASSING += [lambda call, v=value: call.json(v) for value in ({"choices": []}, {}, [], {"choices": [{"message": None}]})]
PASSING += [lambda call: call.raw(200, b""), lambda call: call.raw(200, b"[" * 100_000)]


@pytest.mark.parametrize("fault", PASSING)
def test_what_may_pass_is_tried_again_with_growing_waits(serve, waits, fault) -> None:
    there, server = serve(in_turn(fault, fault, fault, Call.ok))
    assert list(server(asked("a"), Sampling())) == [Reply("a", "re a", 7, 3, True)]
    assert len(there.calls) == 4
    assert [call.body for call in there.calls] == [there.calls[0].body] * 4
    assert all(0.5 * 2**n <= wait <= 2**n for n, wait in enumerate(waits)) and len(waits) == 3


@pytest.mark.parametrize("fault", PASSING)
def test_after_the_last_attempt_the_reply_says_why_in_one_line(serve, waits, fault) -> None:
    there, server = serve(in_turn(fault), attempts=2)
    [reply] = server(asked("a"), Sampling())
    assert (reply.text, reply.tokens_in, reply.tokens_out, reply.finished) == (None, None, None, False)
    assert re.match(r"POST /chat/completions, attempt 2: .", reply.error or "")
    assert len((reply.error or "").splitlines()) == 1 and len(reply.error or "") <= 300
    assert len(there.calls) == 2 and len(waits) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_refusal_that_will_not_pass_is_not_tried_again(serve, waits, status: int) -> None:
    there, server = serve(in_turn(lambda call: call.raw(status, b"model\x1b[2J\n\n not found")))
    [reply] = server(asked("a"), Sampling())
    assert reply.text is None
    assert reply.error == f"POST /chat/completions, attempt 1: HTTP {status}: model [2J not found"
    assert len(there.calls) == 1 and waits == []


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
    with Scripted(in_turn(Call.ok)) as there:
        url = there.url
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
    there, server = serve(in_turn(hang, Call.ok), timeout_s=0.5)
    assert [reply.text for reply in server(asked("a"), Sampling())] == ["re a"]
    assert len(there.calls) == 2 and len(waits) == 1
    there, server = serve(in_turn(hang), timeout_s=0.1, attempts=1)
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
    ("said", "reply"),
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
def test_odd_answers_are_read_for_what_they_are(serve, waits, said, reply: Reply) -> None:
    there, server = serve(in_turn(lambda call: call.json(said)))
    assert list(server(asked("a"), Sampling())) == [reply]
    assert len(there.calls) == 1


@pytest.mark.parametrize("content", [None, 5, [{"type": "text", "text": "x"}]])
def test_an_answer_that_holds_no_text_is_an_error_which_keeps_its_cost(serve, waits, content) -> None:
    there, server = serve(in_turn(lambda call: call.json(answer(content, "tool_calls"))))
    [reply] = server(asked("a"), Sampling())
    assert (reply.text, reply.tokens_in, reply.tokens_out, reply.finished) == (None, 7, 3, False)
    assert "finish_reason 'tool_calls'" in (reply.error or "") and len(there.calls) == 1


# Many at once


def test_calls_under_way_reach_the_bound_and_never_pass_it(serve) -> None:
    bound, under_way, most = 4, 0, 0
    count = threading.Condition()

    def script(call: Call, number: int) -> None:
        nonlocal under_way, most
        with count:
            under_way += 1
            most = max(most, under_way)
            count.notify_all()
            assert count.wait_for(lambda: most >= bound, LONG_S)
            if number < bound:
                count.wait_for(lambda: most > bound, 0.3)  # time for one too many to show itself
            under_way -= 1
        call.ok()

    names = [str(number) for number in range(12)]
    there, server = serve(script, concurrency=bound)
    assert sorted(reply.id for reply in server(asked(*names), Sampling())) == sorted(names)
    assert most == bound and len(there.calls) == 12


def test_replies_come_as_they_are_finished_each_id_once(serve) -> None:
    quick_is_read = threading.Event()

    def script(call: Call, _: int) -> None:
        if call.question == "slow":
            assert quick_is_read.wait(LONG_S)
        call.ok()

    _, server = serve(script, concurrency=2)
    replies = server(asked("slow", "b", "c", "d"), Sampling())
    first = [next(replies) for _ in range(3)]
    assert [reply.id for reply in first] == ["b", "c", "d"]
    quick_is_read.set()
    assert [(reply.id, reply.text) for reply in replies] == [("slow", "re slow")]


def test_one_request_that_fails_does_not_lose_the_others(serve) -> None:
    faults = {"b": refuse(400), "c": drop, "e": half}
    _, server = serve(lambda call, _: faults.get(call.question, Call.ok)(call), attempts=2)
    replies = list(server(asked(*"abcdef"), Sampling()))
    assert sorted(reply.id for reply in replies) == list("abcdef")
    assert {reply.id for reply in replies if reply.error} == {"b", "c", "e"}
    assert all(reply.text == f"re {reply.id}" for reply in replies if not reply.error)


def threads_end(before: set[threading.Thread]) -> bool:
    """Whether all threads that began since then come to their end."""
    new = set(threading.enumerate()) - before
    for thread in new:
        thread.join(LONG_S)
    return not any(thread.is_alive() for thread in new)


def test_closing_ends_the_calls_under_way_and_begins_no_other(serve, waits, caplog) -> None:
    begun, dropped = threading.Event(), threading.Event()

    def script(call: Call, _: int) -> None:
        if call.question == "a":
            return call.ok()
        begun.set()
        call.until_gone()
        return dropped.set()

    there, server = serve(script, concurrency=1)
    before = set(threading.enumerate())
    replies = server(asked("a", "b", "c", "d"), Sampling())
    assert next(replies).id == "a" and begun.wait(LONG_S)
    replies.close()
    assert dropped.wait(LONG_S) and threads_end(before)
    assert [call.question for call in there.calls] == ["a", "b"]
    assert waits == [] and caplog.text == ""  # nor is one tried again


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where the tests were started in the background by a shell that has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_while_waiting_for_a_reply_cuts_the_calls_and_does_not_hang(serve, interruptible) -> None:
    dropped = threading.Semaphore(0)

    def script(call: Call, number: int) -> None:
        if number == 1:  # two are under way, the main thread waits
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        call.until_gone()
        dropped.release()

    there, server = serve(script, concurrency=2)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        list(server(asked("a", "b", "c"), Sampling()))
    assert dropped.acquire(timeout=LONG_S) and dropped.acquire(timeout=LONG_S) and threads_end(before)
    assert sorted(call.question for call in there.calls) == ["a", "b"]


def test_closing_ends_the_pause_before_the_next_attempt(serve) -> None:
    paused = threading.Event()

    def wait(interrupted: threading.Event, _: float) -> None:
        paused.set()
        assert interrupted.wait(LONG_S)

    there, server = serve(lambda call, _: call.ok() if call.question == "a" else refuse(500)(call), wait=wait)
    before = set(threading.enumerate())
    replies = server(asked("a", "b"), Sampling())
    assert next(replies).id == "a" and paused.wait(LONG_S)
    replies.close()
    assert threads_end(before) and len(there.calls) == 2


def test_a_mistake_in_a_request_is_raised_and_not_waited_for(serve) -> None:
    _, server = serve(in_turn(Call.ok))
    with pytest.raises(TypeError, match="not JSON serializable"):
        list(server([Request("a", [{"role": "user", "content": object()}])], Sampling()))  # type: ignore[dict-item]


def test_no_requests_give_no_replies_and_no_calls(serve) -> None:
    there, server = serve(in_turn(Call.ok))
    assert list(server([], Sampling())) == [] and there.calls == []


# The key


def echo(call: Call) -> None:
    """A server that tells everything it has heard."""
    if call.question == "short":
        call.raw(400, call.headers["Authorization"].encode())
    else:  # so long that a message cut first and cleaned afterwards would end amid the key
        call.raw(500, f"{' ' * 1940}{call.headers['Authorization']}".encode())


def test_the_key_is_sent_in_the_header_and_stands_nowhere_else(serve, monkeypatch, caplog, capfd) -> None:
    monkeypatch.setenv("SOME_KEY", f"{KEY}\n")
    caplog.set_level(logging.DEBUG)
    there, server = serve(in_turn(echo), api_key_env="SOME_KEY", attempts=2, wait=lambda *_: None)
    replies = list(server(asked("short", "long"), Sampling()))
    shown = [*map(repr, replies), repr(server), str(server.about()), repr(vars(server)), caplog.text]
    assert [call.headers["Authorization"] for call in there.calls] == [f"Bearer {KEY}"] * 3
    assert not [call for call in there.calls if KEY in call.path or KEY in json.dumps(call.body)]
    assert "Bearer [key]" in shown[0] + shown[1] and "HTTP 500: Bearer [key]; waiting" in caplog.text
    pieces = {KEY[i : i + 6] for i in range(len(KEY) - 6)}
    assert not [piece for piece in pieces for text in (*shown, *capfd.readouterr()) if piece in text]
    assert KEY.encode() not in pickle.dumps(Server(there.url, "m", "SOME_KEY"))


def test_a_redirect_is_not_followed_and_takes_the_key_nowhere(serve, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    other, _ = serve(in_turn(Call.ok))
    for status in (301, 302, 303, 307, 308):
        target = f"{other.url}/v1/chat/completions".replace("127.0.0.1", "localhost")
        there, server = serve(in_turn(lambda call, s=status, t=target: call.raw(s, b"", Location=t)))
        [reply] = server(asked("a"), Sampling())
        assert reply.text is None and f"redirected ({status}) to {target}" in (reply.error or "")
        assert len(there.calls) == 1
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


# A real server


@pytest.fixture(scope="module")
def real_server(smollm, tmp_path_factory) -> Iterator[Server]:
    """`transformers serve` on the loopback, with the real weights."""
    model, tokenizer = smollm
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    late = threading.Timer(300, process.kill)
    late.start()
    try:
        lines = []
        for line in process.stderr or ():
            lines.append(line)
            if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                yield Server(found[1], str(folder), concurrency=2, attempts=1, timeout_s=300)
                break
        else:
            pytest.fail("transformers serve did not start:\n" + "".join(lines))
    finally:
        late.cancel()
        process.terminate()
        process.communicate()


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
