"""Where the seconds of the sweep go: linear layers, attention, the rest; and GFLOP/s against the measured peak.

The shares are those of torch's profiler, which slows small operations down; the seconds are measured without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

import steerkit as sk
from benchmarks import decoding
from benchmarks.timing import seconds
from steerkit.generation import batches
from steerkit.generation.batches import Exact
from steerkit.models.kernels import _pack, multiply

LINEAR = ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm", "aten::linear")
ATTENTION = ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::scaled_dot_product_attention")
PEAK_SIZE = 2048


def peak() -> float:
    """GFLOP/s of a large product with packed weights, the best of ten."""
    x, weight = torch.randn(2, PEAK_SIZE, PEAK_SIZE)
    packed = _pack(weight)
    best = min(seconds(lambda: multiply(x, packed, None)) for _ in range(10))
    return 2 * PEAK_SIZE**3 / best / 1e9


def shares() -> Iterator[dict[str, Any]]:
    """A row per way to run the sweep of 72 rows."""
    with decoding.endless() as (model, tokenizer):
        rows = decoding.steered_rows(decoding.prompt_ids())
        numbers = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
        prompts = sum(len(prompt) - 1 for prompt in {row.prompt for row in rows})
        head = model.get_output_embeddings().weight.numel()
        flop = 2 * (len(rows) * decoding.NEW * numbers + prompts * (numbers - head))
        highest = peak()

        def batch() -> None:
            decoding.run(model, tokenizer, rows)

        copied = Exact(padded=True, chunks=True, shared=False)
        for name, kernels, ways in (
            ("torch's kernels, a cache copied to the rows", "torch", copied),
            ("oneDNN's kernels, a cache copied to the rows", "onednn", copied),
            ("oneDNN's kernels, cascade attention", "onednn", None),
        ):
            replaced: Any = mock.patch.object(batches, "exact", lambda _, ways=ways: ways) if ways else mock.MagicMock()
            with sk.use_kernels(model, kernels), replaced:  # type: ignore[arg-type]
                yield {"way": name, **_shares(batch, flop, highest)}


def _shares(work: Callable[[], None], flop: float, highest: float) -> dict[str, Any]:
    work()
    took = min(seconds(work) for _ in range(3))
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        work()
    events = recorded.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    linear = sum(event.self_cpu_time_total for event in events if event.key in LINEAR) / total
    attention = sum(event.self_cpu_time_total for event in events if event.key in ATTENTION) / total
    return {
        "seconds": took,
        "linear layers": linear,
        "attention": attention,
        "rest": 1 - linear - attention,
        "GFLOP/s in linear layers": flop / (took * linear) / 1e9,
        "measured peak": highest,
    }
