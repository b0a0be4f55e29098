"""Probabilities of given continuations, against plain steered forwards over prompt + choice, one at a time."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

import steerkit as sk
from steerkit.generation import choices as module
from steerkit.text.prompt import encode_prompt
from steerkit.text.tokens import encode
from tests.reference import steered_logits
from tests.steering.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["Hello", "A longer prompt", [{"role": "user", "content": "hi"}]]
CHOICES = [" (A)", " (B)", " yes", "n", "m"]
FIRST = {"from_last_prompt_token": -1, "generated": 0}


def slow(model: Any, prompt: tuple[int, ...], choice: tuple[int, ...], steering: sk.Steering | None) -> float:
    """The log-probability of a choice by one plain forward over prompt and choice."""
    ids = (*prompt, *choice)
    layers, coefficient, columns = {}, 0.0, range(0)
    if steering is not None:
        first = 0 if steering.positions == "all" else len(prompt) + FIRST[steering.positions]
        layers, coefficient, columns = steering.vector.layers, steering.coefficient, range(first, len(ids))
    logs = steered_logits(model, ids, layers, coefficient, columns).double().log_softmax(-1)
    return float(sum(logs[len(prompt) - 1 + i, token] for i, token in enumerate(choice)))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("positions", ["from_last_prompt_token", "generated", "all"])
def test_steered_choices_equal_a_steered_plain_forward_over_prompt_and_choice(kind: str, positions: str) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    steering = sk.Steering(vector(model, 1, 2), 0.4, positions, layer="all")
    each = [steering, None, steering]
    frame = sk.score_choices(model, tokenizer, PROMPTS, CHOICES, steering=each)
    assert list(frame) == ["prompt", "choice", "log_prob", "n_tokens", "probability"]
    assert frame["choice"].tolist() == CHOICES * 3 and frame["prompt"].tolist() == sorted([0, 1, 2] * 5)
    for row in frame.itertuples():
        choice = encode(tokenizer, row.choice)
        wanted = slow(model, encode_prompt(tokenizer, PROMPTS[row.prompt]), choice, each[row.prompt])
        assert row.log_prob == pytest.approx(wanted, abs=1e-4)
        assert row.n_tokens == len(choice)
    sums = frame.groupby("prompt")["log_prob"].transform(lambda x: np.log(np.exp(x).sum()))
    np.testing.assert_allclose(frame["probability"], np.exp(frame["log_prob"] - sums), rtol=1e-12)
    plain = sk.score_choices(model, tokenizer, PROMPTS, CHOICES)
    apart = (frame["log_prob"] - plain["log_prob"]).abs().groupby(frame["prompt"]).max()
    assert apart[1] == 0 and apart[[0, 2]].min() > 1e-3


def test_choices_may_differ_per_prompt_and_score_as_alone() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    each = [[" a", " bc"], [" (A)"], [" x", " y", " longer"]]
    frame = sk.score_choices(model, tokenizer, PROMPTS, each)
    assert frame.groupby("prompt")["choice"].agg(list).tolist() == each
    for number, (prompt, several) in enumerate(zip(PROMPTS, each, strict=True)):
        alone = sk.score_choices(model, tokenizer, [prompt], several)
        part = frame[frame["prompt"] == number]
        np.testing.assert_allclose(part["log_prob"], alone["log_prob"], atol=1e-5)
        np.testing.assert_allclose(part["probability"], alone["probability"], atol=1e-5)


def test_with_packed_kernels_the_numbers_of_a_row_have_the_same_bits_in_every_batch() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    steering = sk.Steering(vector(model, 1), 0.4)
    with sk.use_kernels(model, "onednn"):
        one, several = (
            sk.score_choices(model, tokenizer, PROMPTS, CHOICES, steering=steering, batch_rows=rows) for rows in (1, 50)
        )
    assert one.equals(several)


def test_choices_that_differ_in_their_last_token_share_a_row_and_prompts_their_prefill(monkeypatch) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    forwarded = []
    score = module._score
    monkeypatch.setattr(module, "_score", lambda g, t, e, batch: forwarded.append(len(batch)) or score(g, t, e, batch))
    sk.score_choices(model, tokenizer, ["Hello", "there"], ["a", "b", "c", "d"])
    assert forwarded == [2]
    forwarded.clear()
    sk.score_choices(model, tokenizer, ["Hello", "there"], ["ab", "ac", "db"])
    assert forwarded == [4]


def test_steering_that_is_on_is_applied_before_the_rows_own() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    first, second = sk.Steering(vector(model, 1), 0.4), sk.Steering(vector(model, 2), 0.3)
    with first.on(model):
        both = sk.score_choices(model, tokenizer, ["Hello"], CHOICES, steering=second)
    together = sk.SteeringVector({1: 0.4 * first.vector.layers[1], 2: 0.3 * second.vector.layers[2]})
    wanted = sk.score_choices(model, tokenizer, ["Hello"], CHOICES, steering=sk.Steering(together, layer="all"))
    np.testing.assert_allclose(both["log_prob"], wanted["log_prob"], atol=1e-5)


def test_choices_of_generated_texts_have_the_log_probabilities_of_generation() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    steering = sk.Steering(vector(model, 1), 0.4)
    options = {"max_new_tokens": 3, "steering": steering, "return_details": True, "temperature": 1.0}
    written = sk.generate(model, tokenizer, ["Hello"] * 60, **options)
    whole = [one for one in written if encode(tokenizer, one.text) == one.ids]  # bytes that are characters
    assert whole
    for one in whole:
        found = sk.score_choices(model, tokenizer, ["Hello"], [one.text], steering=steering)
        assert found["log_prob"].item() == pytest.approx(sum(one.log_probs), abs=1e-4)
        assert found["probability"].item() == 1.0


def test_logits_that_overflow_are_refused_by_prompt() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    beyond = sk.Steering(sk.SteeringVector({1: 10 * torch.ones(32)}), 3e38)  # infinite in float32
    with pytest.raises(ValueError, match=r"NaN or infinity for the prompts \[1\]"):
        sk.score_choices(model, tokenizer, PROMPTS[:2], ["a"], steering=[None, beyond])


def test_choices_that_merge_with_the_end_of_a_prompt_are_named_and_scored_as_tokenised_apart() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.add_tokens(["ab"])
    with pytest.warns(UserWarning, match="1 choices have other tokens .* e.g. 'b' after 'xa'"):
        found = sk.score_choices(model, tokenizer, ["xa"], ["b", "c"])
    assert found["n_tokens"].tolist() == [1, 1]
    ids = tokenizer("xa", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    wanted = [float(logs[tokenizer(one, add_special_tokens=False)["input_ids"][0]]) for one in ("b", "c")]
    assert found["log_prob"].tolist() == pytest.approx(wanted, abs=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.score_choices(model, tokenizer, ["xc"], ["b", "c"])
