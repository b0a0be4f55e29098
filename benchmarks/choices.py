"""Choices: steered log-probabilities of given continuations against batched forwards over prompt + choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

import steerkit as sk
from benchmarks import inputs
from benchmarks.decoding import COEFFICIENTS, LAYER
from benchmarks.timing import MIN_PAIRS, Measured, measured, seconds
from steerkit.models.kernels import running
from steerkit.text.prompt import Prompt
from steerkit.text.tokens import encode

CHOICES = (" (A)", " (B)", " (C)", " (D)")
PROMPTS, TOKENS, PART = 32, 100, 8
BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Rows per forward that the plain side chooses from."""


def prompts() -> list[Prompt]:
    """Prompts of equal length, cut from the demo's answers."""
    _, tokenizer = inputs.model()
    texts = inputs.texts(PROMPTS, TOKENS + 20, TOKENS + 20)
    return [Prompt.of_ids(tokenizer, encode(tokenizer, text)[:TOKENS]) for text in texts]


def ours(asked: Sequence[Prompt], vector: sk.SteeringVector) -> np.ndarray:
    """`[coefficient, prompt, choice]`, by `score_choices`."""
    each = [sk.Steering(vector, c) for c in COEFFICIENTS for _ in asked]
    table = sk.score_choices(*inputs.model(), list(asked) * len(COEFFICIENTS), CHOICES, steering=each)
    return table["log_prob"].to_numpy().reshape(len(COEFFICIENTS), len(asked), len(CHOICES))


def plain(asked: Sequence[Prompt], vector: sk.SteeringVector, batch: int) -> np.ndarray:
    """The same by forwards without a cache over prompt + choice, `batch` rows at once, each with its coefficient."""
    model, tokenizer = inputs.model()
    choices = [encode(tokenizer, choice) for choice in CHOICES]
    rows = [(c, prompt.ids, ids) for c in COEFFICIENTS for prompt in asked for ids in choices]
    assert len({len(ids) for ids in choices}) == 1
    found: list[float] = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        ids = torch.tensor([[*prompt, *choice] for _, prompt, choice in part])
        steering = sk.Steering(vector, torch.tensor([c for c, _, _ in part]))
        n = len(choices[0])
        with torch.inference_mode(), running(model), steering.on(model, prompt_length=TOKENS):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=n + 1).logits[:, :-1]
        logs = logits.log_softmax(-1).gather(-1, ids[:, -n:, None])[..., 0]
        found += logs.double().sum(-1).tolist()
    return np.array(found).reshape(len(COEFFICIENTS), len(asked), len(choices))


def choices(pairs: int = MIN_PAIRS + 1, batches: Sequence[int] = BATCHES) -> Iterator[Measured]:
    """4 choices x 9 coefficients x 32 prompts in parts of 8; the plain side at the batch size that is fastest here."""
    vector, asked = inputs.vector().at(LAYER), prompts()
    trial = asked[:2]
    times = {batch: min(seconds(lambda b=batch: plain(trial, vector, b)) for _ in range(2)) for batch in batches}
    best = min(times, key=times.__getitem__)
    parts = [asked[i : i + PART] for i in range(0, PROMPTS, PART)]
    ours(parts[0], vector)  # uncounted
    mine, theirs, worst = list[float](), list[float](), 0.0
    for number in range(pairs):
        part = parts[number % len(parts)]
        results: dict[str, Any] = {}
        sides = [
            (mine, lambda p=part, r=results: r.update(ours=ours(p, vector))),
            (theirs, lambda p=part, r=results: r.update(plain=plain(p, vector, best))),
        ]
        for times_of, work in sides if number % 2 else sides[::-1]:
            times_of.append(seconds(work))
        worst = max(worst, float(np.abs(results["ours"] - results["plain"]).max()))
    assert worst <= 1e-2, worst
    yield measured(
        f"{len(CHOICES)} choices x {len(COEFFICIENTS)} coefficients x {PROMPTS} prompts of {TOKENS} tokens",
        f"batched forwards without a cache, {best} rows at once (the fastest of {', '.join(map(str, batches))})",
        mine,
        theirs,
        ">= 5",
        f"in parts of {PART} prompts; largest difference of a log-probability {worst:.0e}",
    )
