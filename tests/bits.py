"""Are a row's logits the same numbers, bit by bit, alone and in any batch?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import steerkit as sk
from steerkit.generation.batches import in_batches
from steerkit.generation.engine import Row
from tests.equivalences import direction

END = 0
"""The token that ends a row here; it is forced, not chosen."""


def population(model: Any, count: int, longest: int, layer: int, shared: int = 0, seed: int = 0) -> list[Row]:
    """Rows of prompts of different lengths, several per prompt, some steered, some from the prompt's start on.

    Args:
        shared: tokens with which most prompts begin.
    """
    rng = random.Random(seed)
    vocabulary = range(1, model.config.vocab_size)
    steering = sk.Steering(direction(model, layer), positions="from_last_prompt_token")
    whole = sk.Steering(direction(model, layer), positions="all")
    beginning = rng.choices(vocabulary, k=shared)
    rows: list[Row] = []
    while len(rows) < count:
        own = rng.choices(vocabulary, k=rng.randint(1, longest))
        prompt = tuple(beginning + own if rng.random() < 0.8 else own)
        for coefficient in (0.0, 0.5, -1.0)[: rng.randint(1, 3)]:
            chosen = whole if rng.random() < 0.05 else steering
            rows.append(Row(prompt, (chosen.scaled(coefficient),)))
    return rows[:count]


def logits(model: Any, rows: Sequence[Row], numbers: Sequence[int], new: int) -> dict[int, list[Tensor]]:
    """The logits of every step of these rows, run in one batch; each row has a length and tokens of its own."""
    seen: dict[int, list[Tensor]] = {number: [] for number in numbers}

    def token(number: int, step: int) -> int:
        rng = random.Random(f"{number} {step}")
        return END if step >= random.Random(number).randint(1, new) else rng.randrange(1, model.config.vocab_size)

    def work(engine: Any, places: Sequence[int]) -> list[None]:
        def choose(found: Tensor, of: Tensor, step: int) -> Tensor:
            rows_now = [numbers[places[i]] for i in of.tolist()]
            for number, row in zip(rows_now, found, strict=True):
                if step <= len(seen[number]) and (step == 0 or token(number, step - 1) != END):
                    seen[number].append(row.clone())
            return torch.tensor([token(number, step) for number in rows_now])

        engine.decode(new, frozenset({END}), choose)
        return [None] * len(places)

    for _ in in_batches(model, [rows[i] for i in numbers], new, work, batch_rows=len(numbers)):
        pass
    return seen


def differences(
    model: Any, rows: Sequence[Row], new: int, sizes: Sequence[int] = (2, 3, 7, 72), alone: int = 12, seed: int = 0
) -> dict[str, int]:
    """How many rows of random batches in random orders have other bits than alone, or than in a batch of all rows."""
    rng = random.Random(seed)
    truth = logits(model, rows, range(len(rows)), new)
    batches = [[number] for number in rng.sample(range(len(rows)), min(alone, len(rows)))]
    for size in sizes:
        batches += [rng.sample(range(len(rows)), min(size, len(rows))) for _ in range(2)]
    compared = different = steps = 0
    for numbers in batches:
        for number, found in logits(model, rows, numbers, new).items():
            assert len(found) == len(truth[number])
            compared, steps = compared + 1, steps + len(found)
            different += any(not torch.equal(a, b) for a, b in zip(found, truth[number], strict=True))
    return {"rows compared": compared, "steps": steps, "rows with other bits": different}
