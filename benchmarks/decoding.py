"""Decoding: a sweep in one batch against HF `generate`, a batch per coefficient, single rows, and without its parts."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

import steerkit as sk
from benchmarks import inputs
from benchmarks.timing import Measured, compare, measured, seconds
from steerkit.generation import cache, engine
from steerkit.generation.batches import engine_of
from steerkit.generation.engine import Row
from steerkit.generation.generate import decode
from steerkit.models.kernels import running
from steerkit.text.prompt import encode_prompt
from steerkit.text.tokens import pad

COEFFICIENTS = (-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
LAYER, NEW, PROMPTS = 14, 64, 8


@contextlib.contextmanager
def endless() -> Iterator[tuple[Any, Any]]:
    """The model and a copy of its tokenizer without an end-of-sequence token: every row gets all its new tokens."""
    model, tokenizer = inputs.model()
    unending = copy.deepcopy(tokenizer)
    unending.eos_token = None
    kept = model.generation_config
    model.generation_config = copy.deepcopy(kept)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    try:
        yield model, unending
    finally:
        model.generation_config = kept


def prompt_ids(count: int = PROMPTS, at_least: int = 0) -> list[tuple[int, ...]]:
    """The demo's chat prompts; with `at_least`, preceded by text that makes them at least that many tokens long."""
    _, tokenizer = inputs.model()
    prompts = []
    for number, question in enumerate(inputs.questions()[:count]):
        messages = question.messages()
        if at_least:
            context = inputs.texts(count, at_least - 40, at_least - 40)[number]
            messages[-1] = {"role": "user", "content": f"{context}\n\n{messages[-1]['content']}"}
        prompts.append(encode_prompt(tokenizer, messages))
    return prompts


def steered_rows(prompts: list[tuple[int, ...]]) -> list[Row]:
    """Every prompt under every coefficient, from the last prompt token on."""
    vector = inputs.vector().at(LAYER)
    steering = sk.Steering(vector, positions="from_last_prompt_token")
    return [Row(prompt, (steering.scaled(c),)) for prompt in prompts for c in COEFFICIENTS]


def run(model: Any, tokenizer: Any, rows: list[Row], new: int = NEW) -> list[tuple[int, ...]]:
    """The new tokens of each row, greedy, by our engine."""
    batches = decode(model, tokenizer, rows, [], max_new_tokens=new)
    done = dict(pair for batch in batches for pair in batch)
    return [done[i].ids for i in range(len(rows))]


def hf(model: Any, rows: list[Row], new: int = NEW, **options: Any) -> list[list[int]]:
    """HF `generate` on the same rows in one left-padded batch."""
    ids, mask, _ = pad([row.prompt for row in rows], "left")
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, **options
        )
    return out[:, ids.shape[1] :].tolist()


def sweep() -> Iterator[Measured]:
    """The sweep in one batch, against the other ways to get the same rows."""
    job = f"sweep of {len(COEFFICIENTS)} coefficients x {PROMPTS} prompts x {NEW} tokens"
    with endless() as (model, tokenizer):
        rows = steered_rows(prompt_ids())
        bare = [Row(row.prompt) for row in rows]
        assert run(model, tokenizer, bare) == [tuple(ids) for ids in hf(model, rows)]
        changed = sum(a != b for a, b in zip(run(model, tokenizer, rows), run(model, tokenizer, bare), strict=True))

        def batch() -> None:
            run(model, tokenizer, rows)

        def per_coefficient() -> None:
            for c in COEFFICIENTS:
                run(model, tokenizer, [row for row in rows if row.steerings[0].coefficient == c])

        yield compare(
            job,
            "HF generate, unsteered, the same 72 rows",
            batch,
            lambda: hf(model, rows),
            5,
            ">= 0.95",
            f"steering changed {changed} of {len(rows)} rows; unsteered, both give the same tokens",
        )
        yield compare(
            job,
            "HF generate, unsteered, static cache",
            batch,
            lambda: hf(model, rows, cache_implementation="static", disable_compile=True),
            3,
            "",
        )
        yield compare(job, "our engine, a batch per coefficient", batch, per_coefficient, 3, ">= 2.5")
        yield from one_by_one(model, rows, job, batch)
    yield with_end(job)


def one_by_one(model: Any, rows: list[Row], job: str, batch: Callable[[], None]) -> Iterator[Measured]:
    """One row at a time through plain `generate` inside `with steering.on(model)`, extrapolated from a few rows."""
    for cached, count, target in ((True, 4, ">= 8"), (False, 2, ">= 25")):
        ours, theirs = [], []
        for start in range(3):
            some = rows[start * 8 : start * 8 + count]

            def serial(some: list[Row] = some, cached: bool = cached) -> None:
                for row in some:
                    with row.steerings[0].on(model):
                        hf(model, [row], use_cache=cached)

            theirs.append(seconds(serial) * len(rows) / count)
            ours.append(seconds(batch))
        how = "with a cache" if cached else "without a cache (the paper's way)"
        yield measured(
            job,
            f"one row at a time, {how}",
            ours,
            theirs,
            target,
            f"extrapolated from {count} of {len(rows)} rows, three times",
        )


def with_end(job: str) -> Measured:
    """Rows that may end early; ended rows are removed from the batch."""
    model, tokenizer = inputs.model()
    rows = steered_rows(prompt_ids())
    return compare(
        job + ", rows may end",
        "HF generate, unsteered, the same 72 rows",
        lambda: run(model, tokenizer, [Row(row.prompt) for row in rows], 128),
        lambda: hf(model, rows, 128),
        3,
        "",
        "both unsteered, up to 128 tokens, equal texts",
    )


def shared_prefill() -> Iterator[Measured]:
    """72 rows of 8 prompts of 300+ tokens against 72 prompts of the same lengths that all differ, 4 new tokens."""
    with endless() as (model, tokenizer):
        prompts = prompt_ids(at_least=300)
        rows = steered_rows(prompts)
        apart = [Row((1000 + i, *row.prompt[1:]), row.steerings) for i, row in enumerate(rows)]
        lengths = sorted(map(len, prompts))
        yield compare(
            f"prompts of {lengths[0]}-{lengths[-1]} tokens, 4 new tokens, {len(rows)} rows",
            "the same engine and lengths, prompts that all differ (nothing to share)",
            lambda: run(model, tokenizer, rows, 4),
            lambda: run(model, tokenizer, apart, 4),
            3,
            ">= 4",
        )
        yield compare(
            f"prompts of {lengths[0]}-{lengths[-1]} tokens, 4 new tokens, {len(rows)} rows",
            "HF generate, unsteered, the same rows",
            lambda: run(model, tokenizer, rows, 4),
            lambda: hf(model, rows, 4),
            3,
            "",
        )


def common_beginning() -> Iterator[Measured]:
    """48 sums, each asked after the same three worked examples, 8 new tokens."""
    with endless() as (model, tokenizer):
        worked = [
            {"role": role, "content": text}
            for a, b in ((23, 45), (38, 26), (52, 17))
            for role, text in (("user", f"What is {a} + {b}?"), ("assistant", f"{a} + {b} = {a + b}"))
        ]
        sums = [{"role": "user", "content": f"What is {a} + {b}?"} for a in range(11, 23, 2) for b in range(31, 63, 4)]
        rows = [Row(encode_prompt(tokenizer, [*worked, asked])) for asked in sums]
        job = f"{len(rows)} questions after three worked examples ({len(rows[0].prompt)} tokens), 8 new tokens"

        def apart() -> list[tuple[int, ...]]:
            with mock.patch.object(cache, "MIN_SAVED_TOKENS", {"cpu": 10**9, "cuda": 10**9}):
                return run(model, tokenizer, rows, 8)

        assert run(model, tokenizer, rows, 8) == apart() == [tuple(ids) for ids in hf(model, rows, 8)]
        yield compare(
            job,
            "the same engine, each prompt prefilled whole",
            lambda: run(model, tokenizer, rows, 8),
            apart,
            5,
            ">= 1.5",
            "equal tokens",
        )
        yield compare(
            job, "HF generate, the same rows", lambda: run(model, tokenizer, rows, 8), lambda: hf(model, rows, 8), 5, ""
        )


def compaction() -> Iterator[Measured]:
    """Rows of 4 to 128 new tokens (half below 24), with ended rows removed from the batch and with them kept."""
    model, tokenizer = inputs.model()
    end = tokenizer.eos_token_id
    rows = [Row(prompt) for prompt in prompt_ids() for _ in range(6)]
    lengths = np.geomspace(4, 128, len(rows)).round().astype(int)
    np.random.default_rng(0).shuffle(lengths)
    stop = torch.tensor(lengths)

    def choose(logits: torch.Tensor, numbers: torch.Tensor, step: int) -> torch.Tensor:
        logits[:, end] = -torch.inf
        return torch.where(stop[numbers] <= step + 1, end, logits.argmax(-1))

    def work() -> list[Any]:
        with running(model), torch.inference_mode():
            return engine_of(model)(rows, 128).decode(128, frozenset([end]), choose)

    def unpacked() -> list[Any]:
        with mock.patch.object(engine, "COMPACT_BELOW", -1.0):
            return work()

    assert [c.ids for c in work()] == [c.ids for c in unpacked()]
    job = f"{len(rows)} rows of 4 to 128 new tokens (median {int(np.median(lengths))})"
    yield compare(
        job,
        "ended rows stay in the batch",
        work,
        unpacked,
        3,
        ">= 1.5",
        "lengths imposed; equal tokens",
    )
