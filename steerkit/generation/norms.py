"""Median norms of the stream where several continuations share a prompt, which is then forwarded once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.capture.activations import Layer
from steerkit.capture.resid import resolve_layers
from steerkit.generation.batches import exact, in_batches
from steerkit.generation.engine import Engine, Row
from steerkit.models.active import suspended
from steerkit.models.blocks import find_blocks
from steerkit.models.site_names import DEFAULT, Place
from steerkit.steering.dose import Texts, median_norms
from steerkit.steering.positions import steered_columns


def shared_median_norms(
    model: nn.Module, texts: Texts, positions: str, operation: str, site: str = DEFAULT
) -> dict[Layer, float]:
    """`median_norms` of texts, of which many have the same prompt, such as choices.

    Where prompts differ, or a steered position is before the last token of a prompt, plain forwards read the norms.

    Args:
        texts, positions, operation, site: as for `median_norms`.
    """
    spans = [steered_columns(positions, 0, len(prompt), operation) for prompt, _ in texts]
    in_prompt = any(low < len(prompt) - 1 for (low, _), (prompt, _) in zip(spans, texts, strict=True))
    with suspended(model):
        if in_prompt or 2 * len({tuple(prompt) for prompt, _ in texts}) > len(texts) or not exact(model).chunks:
            return median_norms(model, texts, None, positions, operation, site)
    layers = resolve_layers(model, find_blocks(model), "all", site, warn=False)
    reader = _Norms([(site, int(layer)) for layer in layers])
    numbered = sorted(range(len(texts)), key=lambda number: len(texts[number][1]))
    found: list[np.ndarray] = []
    for length, some in groupby(numbered, key=lambda number: len(texts[number][1])):
        numbers = list(some)

        def work(
            engine: Engine, batch: Sequence[int], numbers: Sequence[int] = numbers, length: int = length
        ) -> list[np.ndarray]:
            new = torch.tensor([texts[numbers[i]][1] for i in batch], dtype=torch.long, device=engine.device)
            engine.monitor = reader
            engine.forward(torch.cat([engine.last_tokens(), new.view(len(batch), length)], dim=1), engine.width - 1)
            read = reader.take()
            kept = []
            for row, i in zip(read, batch, strict=True):
                (low, high), last = spans[numbers[i]], len(texts[numbers[i]][0]) - 1
                kept.append(row[max(low, 1, last) - last : max(min(high, last + 1 + length) - last, 0)])
            return kept

        rows = [Row(tuple(texts[number][0])) for number in numbers]
        found += [norms for batch in in_batches(model, rows, length, work) for _, norms in batch]
    norms = np.concatenate(found)
    return dict(zip(layers, np.median(norms, axis=0).tolist(), strict=True)) if len(norms) else {}


class _Norms:
    """Reads the norm of the stream at some places in each forward."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places
        self._read: dict[Place, Tensor] = {}

    def read(self, place: Place, before: Tensor, after: Tensor) -> None:
        self._read[place] = before.float().norm(dim=-1)

    def take(self) -> Float[np.ndarray, "batch pos layer"]:
        return torch.stack([self._read.pop(place).cpu() for place in self.places], dim=-1).double().numpy()
