"""Concurrent calls of a server: their number is bounded, each gets its reply, and closing cancels all."""

from __future__ import annotations

import signal
import threading

import pytest

from tests.scripted_server import LONG_S, Call, asked, drop, half, in_turn, refuse
from training.debates.answerers import Request, Sampling

pytestmark = pytest.mark.usefixtures("no_key_but_the_tests")


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
    scripted, server = serve(script, concurrency=bound)
    assert sorted(reply.id for reply in server(asked(*names), Sampling())) == sorted(names)
    assert most == bound and len(scripted.calls) == 12


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
    started, dropped = threading.Event(), threading.Event()

    def script(call: Call, _: int) -> None:
        if call.question == "a":
            return call.ok()
        started.set()
        call.until_gone()
        return dropped.set()

    scripted, server = serve(script, concurrency=1)
    before = set(threading.enumerate())
    replies = server(asked("a", "b", "c", "d"), Sampling())
    assert next(replies).id == "a" and started.wait(LONG_S)
    replies.close()
    assert dropped.wait(LONG_S) and threads_end(before)
    assert [call.question for call in scripted.calls] == ["a", "b"]
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

    scripted, server = serve(script, concurrency=2)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        list(server(asked("a", "b", "c"), Sampling()))
    assert dropped.acquire(timeout=LONG_S) and dropped.acquire(timeout=LONG_S) and threads_end(before)
    assert sorted(call.question for call in scripted.calls) == ["a", "b"]


def test_closing_ends_the_pause_before_the_next_attempt(serve) -> None:
    paused = threading.Event()

    def wait(interrupted: threading.Event, _: float) -> None:
        paused.set()
        assert interrupted.wait(LONG_S)

    scripted, server = serve(lambda call, _: call.ok() if call.question == "a" else refuse(500)(call), wait=wait)
    before = set(threading.enumerate())
    replies = server(asked("a", "b"), Sampling())
    assert next(replies).id == "a" and paused.wait(LONG_S)
    replies.close()
    assert threads_end(before) and len(scripted.calls) == 2


def test_a_mistake_in_a_request_is_raised_and_not_waited_for(serve) -> None:
    _, server = serve(in_turn(Call.ok))
    with pytest.raises(ValueError, match="messages, both texts"):
        list(server([Request("a", [{"role": "user", "content": object()}])], Sampling()))  # type: ignore[dict-item]


def test_no_requests_give_no_replies_and_no_calls(serve) -> None:
    scripted, server = serve(in_turn(Call.ok))
    assert list(server([], Sampling())) == [] and scripted.calls == []
