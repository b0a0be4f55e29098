"""Decoding: a sweep in one batch against HF `generate`, a batch per coefficient, single rows, and without its parts."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
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
SWEEP = f"sweep of {len(COEFFICIENTS)} coefficients x {PROMPTS} prompts x {NEW} tokens"


@contextlib.contextmanager
def endless() -> Iterator[tuple[Any, Any]]:
    """The model and a copy of its tokenizer, both without an end token: every row gets all its new tokens."""
    model, tokenizer = inputs.model()
    unending = copy.deepcopy(tokenizer)
    unending.eos_token = unending.chat_template = None
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
    """The sweep in one batch against HF `generate` as it comes."""
    with endless() as (model, tokenizer):
        rows = steered_rows(prompt_ids())
        bare = [Row(row.prompt) for row in rows]
        assert run(model, tokenizer, bare) == [tuple(ids) for ids in hf(model, rows)]
        changed = sum(a != b for a, b in zip(run(model, tokenizer, rows), run(model, tokenizer, bare), strict=True))

        def batch() -> None:
            run(model, tokenizer, rows)

        note = f"steering changed {changed} of {len(rows)} rows; unsteered, both give the same tokens"
        yield compare(
            SWEEP, "HF generate, unsteered, the same 72 rows", batch, lambda: hf(model, rows), 11, ">= 3.5", note
        )
        against = "HF generate, unsteered, static cache"
        static = {"cache_implementation": "static", "disable_compile": True}
        yield compare(SWEEP, against, batch, lambda: hf(model, rows, **static), 3)
    yield with_end(SWEEP)


def kernels() -> Iterator[Measured]:
    """The sweep against HF `generate` inside our kernels, a batch per coefficient, bfloat16 and torch's own kernels."""
    with endless() as (model, tokenizer):
        rows = steered_rows(prompt_ids())

        def batch() -> None:
            run(model, tokenizer, rows)

        def inside() -> None:
            with sk.use_kernels(model):
                hf(model, rows)

        def on_torch() -> None:
            with sk.use_kernels(model, "torch"):
                run(model, tokenizer, rows)

        def per_coefficient() -> None:
            for c in COEFFICIENTS:
                run(model, tokenizer, [row for row in rows if row.steerings[0].coefficient == c])

        yield compare(SWEEP, "HF generate, unsteered, inside our kernels", batch, inside, 11, ">= 2")
        yield compare(SWEEP, "our engine, a batch per coefficient", batch, per_coefficient, 11, ">= 2.5")
        yield compare(SWEEP, "our engine with torch's kernels", batch, on_torch, 11)
        coarse = copy.deepcopy(model).to(torch.bfloat16)
        same = sum(a == b for a, b in zip(run(model, tokenizer, rows), run(coarse, tokenizer, rows), strict=True))
        yield compare(
            SWEEP + ", in bfloat16",
            "the same in float32",
            lambda: run(coarse, tokenizer, rows),
            batch,
            11,
            ">= 1.15",
            f"{same} of {len(rows)} texts equal those in float32",
        )


def one_by_one() -> Iterator[Measured]:
    """One row at a time through plain `generate` inside `with steering.on(model)`, extrapolated from a few rows."""
    with endless() as (model, tokenizer):
        rows = steered_rows(prompt_ids())
        for cached, count, target in ((True, 4, ">= 8"), (False, 2, ">= 25")):
            ours, theirs = [], []
            run(model, tokenizer, rows)
            for start in range(11):
                some = [rows[(start * 7 + i * 13) % len(rows)] for i in range(count)]

                def serial(some: list[Row] = some, cached: bool = cached) -> None:
                    for row in some:
                        with sk.use_kernels(model, "torch"), row.steerings[0].on(model):
                            hf(model, [row], use_cache=cached)

                theirs.append(seconds(serial) * len(rows) / count)
                ours.append(seconds(lambda: run(model, tokenizer, rows)))
            how = "with a cache" if cached else "without a cache (the paper's way)"
            note = f"extrapolated from {count} of {len(rows)} rows; their side with torch's kernels"
            yield measured(SWEEP, f"one row at a time, {how}", ours, theirs, target, note)


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
            11,
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
        _, templated = inputs.model()
        rows = [Row(encode_prompt(templated, [*worked, asked])) for asked in sums]
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
            11,
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
        11,
        ">= 1.5",
        "lengths imposed; equal tokens",
    )
