"""Fluency: rows belong to their own prompts whatever holds them, and long texts do not slow down short ones."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import steerkit as sk
from steerkit.generation import batches
from steerkit.generation.engine import Row
from steerkit.scores.fluency import kl, log_probabilities, perplexity
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = [f"Prompt {i * 37 % 101}" for i in range(60)]
TEXTS = [f" text {i}" for i in range(60)]
HELD: dict[str, Any] = {
    "a column": pd.Series,
    "a column of another index": lambda x: pd.Series(x, range(7, 67)),
    "an array": np.array,
}
STEERING = sk.Steering(sk.SteeringVector({2: torch.ones(32)}), 0.5)


@pytest.mark.parametrize("kind", HELD)
def test_a_row_is_scored_after_its_own_prompt_whatever_holds_the_prompts(kind: str, llama) -> None:
    held = HELD[kind]
    wanted = perplexity(*llama, PROMPTS, TEXTS)
    np.testing.assert_allclose(perplexity(*llama, held(PROMPTS), held(TEXTS)), wanted, rtol=1e-4)
    wanted = kl(*llama, PROMPTS, TEXTS, [STEERING] * 60)
    np.testing.assert_allclose(kl(*llama, held(PROMPTS), held(TEXTS), pd.Series([STEERING] * 60)), wanted, rtol=1e-3)


def test_a_table_or_a_single_text_is_no_list_of_prompts(llama) -> None:
    with pytest.raises(ValueError, match="expected a list of prompts; got a table with the columns"):
        perplexity(*llama, pd.DataFrame({"prompt": ["a"]}), ["b"])
    with pytest.raises(ValueError, match=r"expected a non-empty list of prompts; got 'ab'"):
        perplexity(*llama, "ab", ["c", "d"])
    assert perplexity(*llama, [], []).shape == (0,)


@pytest.mark.parametrize("paired", [False, True])
def test_a_long_text_does_not_make_the_batches_of_short_ones_small(paired: bool, llama, monkeypatch) -> None:
    model, tokenizer = llama
    prompts, texts = ["Hello"] * 41, [" abc"] * 40 + ["x" * 200]
    monkeypatch.setitem(batches.LOGIT_BYTES, "cpu", 4 * 260 * 200 * (1 + paired))
    rows: list[int] = []
    cut = batches._cut
    monkeypatch.setattr(batches, "_cut", lambda *given: [rows.append(len(one)) or one for one in cut(*given)])
    score = partial(kl, model, tokenizer) if paired else lambda *given: perplexity(model, tokenizer, *given[:2])
    found = score(prompts, texts, [STEERING] * 41)
    assert rows == [1, 40]  # 1 x 200 and 40 x 4 tokens
    np.testing.assert_allclose(found[-1:], score(["Hello"], texts[-1:], [STEERING]), rtol=1e-3)


def test_scores_do_not_depend_on_the_memory_for_logits(llama, monkeypatch) -> None:
    texts = ["y" * (1 + i * 7 % 90) for i in range(12)]
    wanted = log_probabilities(*llama, PROMPTS[:12], texts)
    for positions in (1, 20, 100, 1000):
        monkeypatch.setitem(batches.LOGIT_BYTES, "cpu", 4 * 260 * positions)
        for found, own in zip(log_probabilities(*llama, PROMPTS[:12], texts), wanted, strict=True):
            torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)


def test_a_batch_of_scores_that_does_not_fit_is_halved_and_generation_keeps_its_batches(monkeypatch) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    wanted = perplexity(model, tokenizer, PROMPTS[:12], TEXTS[:12])
    forward, rows = model.forward, list[int]()

    def small(**given: Any) -> Any:
        rows.append(len(given["input_ids"]))
        if rows[-1] > 5:
            raise torch.OutOfMemoryError
        return forward(**given)

    small.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", small)
    np.testing.assert_allclose(perplexity(model, tokenizer, PROMPTS[:12], TEXTS[:12]), wanted, rtol=1e-4)
    assert max(rows) > 5
    rows.clear()
    perplexity(model, tokenizer, PROMPTS[:12], TEXTS[:12])
    assert max(rows) <= 5
    monkeypatch.setattr(model, "forward", forward)
    batched: list[int] = []
    for _ in batches.in_batches(model, [Row((5, 6))] * 12, 9, lambda _, some: batched.append(len(some)) or list(some)):
        pass
    assert batched == [12]
