"""Equivalences of steered forwards on the device: cached = uncached, padded = unpadded, batch of 1 = batch of 8."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import steerkit as sk
from benchmarks.gpu.measure import Figure
from benchmarks.gpu.sizes import Sizes, random_llama
from steerkit.generation.batches import exact
from steerkit.generation.engine import Engine, Row

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest relative deviation of a logit vector that passes."""
NEW = 6


def equivalences(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """Relative deviations of steered logits from one prompt at a time without a cache, in float32 and bfloat16.

    Raises:
        AssertionError: after all figures, if a deviation is above its limit, or steering did not change the logits.
    """
    missed = []
    with _full_float32():
        for dtype, limit in LIMITS.items():
            for figure in _of_dtype(random_llama(sizes.exact, device, dtype), device, dtype, limit):
                if not figure["holds"]:
                    missed.append(f"{figure['figure']}: {figure['value']:.1e}")
                yield figure
    assert not missed, f"expected every figure on its side of the limit; got {missed}"


def _of_dtype(model: Any, device: torch.device, dtype: torch.dtype, limit: float) -> Iterator[Figure]:
    generator = torch.Generator().manual_seed(1)
    width, vocabulary = model.config.hidden_size, model.config.vocab_size
    vector = sk.SteeringVector({1: torch.randn(width, generator=generator)})
    prompts = [
        tuple(torch.randint(1, vocabulary, (length,), generator=generator).tolist())
        for length in (3, 17, 9, 24, 5, 12, 30, 8)
    ]
    new = torch.randint(1, vocabulary, (len(prompts), NEW), generator=generator)
    rows = [Row(prompt, (sk.Steering(vector, 0.1 * (i + 1)),)) for i, prompt in enumerate(prompts)]
    exact(model)
    truth = [_uncached(model, row, new[i], device) for i, row in enumerate(rows)]
    unsteered = [_uncached(model, Row(row.prompt), new[i], device) for i, row in enumerate(rows)]
    together = _cached(model, rows, new, device)
    alone = [_cached(model, [row], new[i : i + 1], device)[0] for i, row in enumerate(rows)]
    deviations = {
        "steered, cached and padded batch of 8 against uncached": _largest(together, truth),
        "steered, cached batch of 1 against uncached": _largest(alone, truth),
        "steered, batch of 8 against batch of 1": _largest(together, alone),
    }
    name, unit = str(dtype).removeprefix("torch."), "relative deviation"
    for figure, value in deviations.items():
        yield {"figure": f"{figure} ({name})", "value": value, "unit": unit, "limit": limit, "holds": value <= limit}
    moved = _smallest(truth, unsteered)
    figure = f"steered against unsteered, the smallest of all rows ({name})"
    yield {"figure": figure, "value": moved, "unit": unit, "limit": limit, "holds": moved > limit}


def _uncached(model: Any, row: Row, new: Tensor, device: torch.device) -> Tensor:
    """Logits at the positions that decide the new tokens: one prompt, no cache, the whole text in one forward."""
    ids = torch.tensor([[*row.prompt, *new.tolist()]], device=device)
    with torch.inference_mode():
        if not row.steerings:
            logits = model(input_ids=ids, use_cache=False).logits
        else:
            with row.steerings[0].on(model, prompt_length=len(row.prompt)):
                logits = model(input_ids=ids, use_cache=False).logits
    return logits[0, len(row.prompt) - 1 :].float()


def _cached(model: Any, rows: list[Row], new: Tensor, device: torch.device) -> list[Tensor]:
    """The same logits from the engine, token by token over its cache."""
    with torch.inference_mode():
        engine = Engine(model, rows, NEW + 1)
        ids = torch.cat([engine.last_tokens(), new.to(device)], dim=1)
        steps = [engine.forward(ids[:, i : i + 1], engine.width - 1 + i) for i in range(ids.shape[1])]
        return list(torch.cat(steps, dim=1).float())


def _largest(found: list[Tensor], truth: list[Tensor]) -> float:
    return max(float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max()) for a, b in zip(found, truth, strict=True))


def _smallest(found: list[Tensor], truth: list[Tensor]) -> float:
    return min(float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max()) for a, b in zip(found, truth, strict=True))


class _full_float32:  # noqa: N801  used as a `with`
    """float32 products in full precision inside the `with`: TF32 would hide what is tested."""

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision(self.before)
