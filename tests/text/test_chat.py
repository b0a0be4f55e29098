"""The model in this process and a rule as answerers: a reply does not depend on the rest of its batch."""

from __future__ import annotations

import contextlib
import json

import pytest

import steerkit as sk
from steerkit.models.identity import fingerprint
from steerkit.text.prompt import encode_prompt
from tests.reference import greedy
from tests.scripted_server import asked, say
from tests.steering.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer
from training.debates.answerers import LocalModel, Reply, Request, Rule, Sampling
from training.debates.server import Server

PROMPTS = ["Hello", "A rather longer prompt than that", "x = 1", "?", "Hello", "once upon a time", "12 + 3", "abc"]


# The model in this process


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_eight_requests_in_one_batch_are_answered_as_one_at_a_time(llama, temperature: float) -> None:
    requests = [Request(f"r{i}", say(p) if i % 2 else p) for i, p in enumerate(PROMPTS)]
    sampling = Sampling(temperature, 0.95, 12, seed=3)
    together = {reply.id: reply for reply in LocalModel(*llama)(requests, sampling)}
    separate = {r.id: reply for r in requests for reply in LocalModel(*llama)([r], sampling)}
    assert together == separate and set(together) == {r.id for r in requests}
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
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    with contextlib.closing(LocalModel(model, tokenizer, batch_rows=1)(asked("a", "b", "c"), Sampling(0, 1, 4))) as got:
        first = next(got)
        after_one = len(forwards)
        assert first.text is not None and after_one
        next(got)
        assert len(forwards) > after_one


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
    assert about["model_fingerprint"] == fingerprint(llama[0])[0] and about["template_sha256"]


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
