"""Runs: forwards of one prompt in a batch, each row with values of another run put in at one place."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from steerkit.generation.batches import exact
from steerkit.models.blocks import find_blocks
from steerkit.models.cache_argument import cache_argument
from steerkit.models.hooks import check_called, observe_points
from steerkit.models.kernels import running
from steerkit.models.model import accepts, device_of, unwrap
from steerkit.models.site_names import Place
from steerkit.models.sites import edit_places, points_at
from steerkit.patching.metrics import Measure

BATCH_ROWS = {"cpu": 32, "cuda": 256}
ARRIVES = 0.02
"""The relative error of a value that is put in from which on a warning names it."""


@dataclass(frozen=True)
class Patch:
    """What one row puts in: the values of `[start, stop)` at a place, of all of its width or of one head.

    Args:
        place: site and layer.
        start: first token.
        stop: token after the last.
        columns: the part of the width, e.g. of one head; None for all.
    """

    place: Place
    start: int
    stop: int
    columns: tuple[int, int] | None = None


class Runs:
    """Forwards of one prompt, each row with one `Patch`.

    A patch changes no position before it, so the keys and values of the tokens before the first patch of a batch are
    computed once for all batches, where the model's cache gives the same logits.

    Args:
        ids: token ids of the prompt.
        measure: the metric; it decides which answer tokens are forwarded after the prompt.
        batch_rows: patches per forward; default by device, halved when memory runs out.
    """

    def __init__(self, model: nn.Module, ids: Sequence[int], measure: Measure, batch_rows: int | None = None) -> None:
        self.model, self.ids, self.measure = model, tuple(ids), measure
        self.blocks, self.device = find_blocks(model), device_of(model)
        self.size = batch_rows or BATCH_ROWS.get(self.device.type, BATCH_ROWS["cpu"])
        self.error = 0.0

    def logits(self) -> list[Float[Tensor, "1 pos vocabulary"]]:
        """The logits of the unpatched run per suffix of the metric, from the last prompt token on."""
        with running(self.model), torch.inference_mode():
            return [self._forward([()], 0, suffix, {}) for suffix in self.measure.suffixes]

    def metric(self) -> float:
        """The metric of the unpatched run."""
        with torch.inference_mode():
            return float(self.measure.of(self.logits())[0])

    def patched(self, patches: Sequence[Patch], values: Mapping[Place, Float[Tensor, "pos width"]]) -> list[float]:
        """The metric with each patch, in their order.

        Args:
            values: place -> what is put in, `[pos, width]` over the positions of the prompt.
        """
        found = [0.0] * len(patches)
        order = sorted(range(len(patches)), key=lambda i: patches[i].start)
        by_start = [list(group) for _, group in groupby(order, key=lambda i: patches[i].start)]
        queue = [group[i : i + self.size] for group in by_start for i in range(0, len(group), self.size)][::-1]
        while queue:
            numbers = queue.pop()
            rows = [patches[i] for i in numbers]
            try:
                with running(self.model), torch.inference_mode():
                    start = min(patch.start for patch in rows) if self._prefix else 0
                    edits = [(patch,) for patch in rows]
                    logits = [self._forward(edits, start, suffix, values) for suffix in self.measure.suffixes]
                    metrics = self.measure.of(logits).tolist()
            except torch.OutOfMemoryError:
                if len(numbers) == 1:
                    raise
                queue += [numbers[len(numbers) // 2 :], numbers[: len(numbers) // 2]]
                continue
            for number, metric in zip(numbers, metrics, strict=True):
                found[number] = metric
        if self.error > ARRIVES:
            warnings.warn(
                f"what is put in at resid_mid arrives with an error of {self.error:.0%} at a position whose stream is "
                f"much larger: {self.model.dtype} does not hold the difference. Load the model in float32, or leave "
                "this position out (often position 0).",
                UserWarning,
                stacklevel=4,
            )
        return found

    def _forward(
        self,
        rows: Sequence[Sequence[Patch]],
        start: int,
        suffix: Sequence[int],
        values: Mapping[Place, Float[Tensor, "pos width"]],
    ) -> Float[Tensor, "batch pos vocabulary"]:
        """Logits from the last prompt token on, of the tokens from `start` with the cache of those before it."""
        ids = torch.tensor([[*self.ids, *suffix][start:]] * len(rows), device=self.device)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": start > 0}
        width = len(self.ids) + len(suffix)
        if start:
            inputs[cache_argument(self.model) or "past_key_values"] = self._cache(start, len(rows))
            inputs["attention_mask"] = torch.ones(len(rows), width, dtype=torch.long, device=self.device)
            if self.blocks.positions:
                inputs["position_ids"] = torch.arange(start, width, device=self.device).expand(len(rows), -1)
        if accepts(self.model, "logits_to_keep"):
            inputs["logits_to_keep"] = len(suffix) + 1
        by_place: dict[Place, list[tuple[int, Patch]]] = defaultdict(list)
        for number, row in enumerate(rows):
            for patch in row:
                by_place[patch.place].append((number, patch))

        def edit(place: Place, value: Tensor) -> Tensor:
            value = value.clone()
            for number, patch in by_place[place]:
                columns = slice(*patch.columns) if patch.columns else slice(None)
                new = values[place][patch.start : patch.stop, columns]
                value[number, patch.start - start : patch.stop - start, columns] = new.to(value.device, value.dtype)
            return value

        def check(place: Place, value: Tensor) -> None:
            for number, patch in by_place[place]:
                new = values[place][patch.start : patch.stop].to(value.device, torch.float32)
                error = (value[number, patch.start - start : patch.stop - start].float() - new).norm(dim=-1)
                self.error = max(self.error, float((error / new.norm(dim=-1).clamp_min(1e-30)).max()))

        sums = points_at(self.model, self.blocks, [place for place in by_place if place[0] == "resid_mid"])
        with edit_places(self.model, self.blocks, by_place, edit) as called, observe_points(sums, check):
            logits: Tensor = self.model(**inputs).logits
        check_called(called, set(by_place))
        return logits[:, -len(suffix) - 1 :]

    @cached_property
    def _prefix(self) -> list[tuple[Tensor, Tensor]] | None:
        """Keys and values of the prompt per layer; None where a cut cache does not give the plain logits."""
        if len(self.ids) < 2 or cache_argument(self.model) != "past_key_values":
            return None
        try:
            if not exact(self.model).chunks:
                return None
        except ValueError:
            return None
        cache = DynamicCache(config=unwrap(self.model).config)
        if not cache.layers or not all(type(layer) is DynamicLayer for layer in cache.layers):
            return None
        inputs: dict[str, Any] = {"input_ids": torch.tensor([self.ids], device=self.device)}
        with running(self.model), torch.inference_mode():
            self.model(**inputs, past_key_values=cache, use_cache=True)
        layers: list[Any] = list(cache.layers)
        return [(layer.keys, layer.values) for layer in layers]

    def _cache(self, length: int, rows: int) -> DynamicCache:
        """The cache of the first `length` tokens, for a number of rows."""
        assert self._prefix is not None
        cache = DynamicCache(config=unwrap(self.model).config)
        for layer, kept in enumerate(self._prefix):
            keys, values = (one[:, :, :length].expand(rows, -1, -1, -1) for one in kept)
            cache.update(keys, values, layer)
        return cache


def values_of(model: nn.Module, ids: Sequence[int], places: Sequence[Place]) -> dict[Place, Float[Tensor, "pos width"]]:
    """The values of a prompt at these places, `[pos, width]` each."""
    blocks = find_blocks(model)
    found: dict[Place, Tensor] = {}
    with (
        running(model),
        torch.inference_mode(),
        observe_points(
            points_at(model, blocks, places), lambda place, value: found.__setitem__(place, value[0].clone())
        ) as called,
    ):
        model(input_ids=torch.tensor([list(ids)], device=device_of(model)), use_cache=False)
    check_called(called, set(places))
    return found


def attributed(
    model: nn.Module,
    ids: Sequence[int],
    measure: Measure,
    patches: Sequence[Patch],
    values: Mapping[Place, Float[Tensor, "pos width"]],
) -> list[float]:
    """The first-order approximation of the change of the metric by each patch, in their order.

    `sum (h_other - h) . dm/dh` over the positions and the width of the patch, from one forward and one backward pass
    per suffix of the metric, at all places together.

    Raises:
        ValueError: the metric has no gradient, or one that is 0 everywhere.
    """
    blocks, device = find_blocks(model), device_of(model)
    places = sorted({patch.place for patch in patches})
    width = len(ids)
    deltas: dict[Place, Tensor] = {}
    read: dict[Place, Tensor] = {}

    def edit(place: Place, value: Tensor) -> Tensor:
        if place not in deltas:
            deltas[place] = torch.zeros_like(value[:, :width], requires_grad=True)
            read[place] = value[0, :width].detach().clone()
        return torch.cat([value[:, :width] + deltas[place], value[:, width:]], 1)

    no_inference = torch.inference_mode(False)  # the caller's, whose tensors have no gradient
    with no_inference, running(model), torch.enable_grad(), edit_places(model, blocks, places, edit) as called:
        logits = []
        for suffix in measure.suffixes:
            row = torch.tensor([[*ids, *suffix]], device=device)
            logits.append(model(input_ids=row, use_cache=False).logits[:, -len(suffix) - 1 :])
        check_called(called, set(places))
        metric = measure.of(logits)[0]
        slopes = torch.autograd.grad(metric, [deltas[place] for place in places]) if metric.requires_grad else []
    if not any(slope.any() for slope in slopes):
        raise ValueError(
            "expected a metric with a slope at the unpatched run for method='attribution'; its gradient is "
            f"{'0' if metric.requires_grad else 'none'}. Pass method='exact', or a differentiable function of the "
            "logits."
        )
    products = {
        place: (values[place].to(read[place].device).float() - read[place].float()) * slope[0].float()
        for place, slope in zip(places, slopes, strict=True)
    }
    return [
        float(products[one.place][one.start : one.stop, slice(*one.columns) if one.columns else slice(None)].sum())
        for one in patches
    ]
