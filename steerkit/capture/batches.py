"""Batched forwards over tokenised texts, pooled inside the hooks and stopped after the deepest layer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.capture.layers import Layer
from steerkit.capture.pooling import Pool
from steerkit.capture.resid import block_numbers, deepest, reading
from steerkit.models.blocks import Blocks, find_blocks
from steerkit.models.context import rope_switch
from steerkit.models.hooks import StopForward, check_called
from steerkit.models.kernels import running
from steerkit.models.model import device_of
from steerkit.models.site_names import DEFAULT
from steerkit.text.spans import Passage
from steerkit.text.tokens import pad

BATCH_TOKENS = {"cpu": 512, "cuda": 16384}


def token_batches(lengths: Sequence[int], batch_tokens: int, max_rows: int | None = None) -> list[list[int]]:
    """Return row indices in batches of similar length, longest first, each of at most `batch_tokens` padded tokens."""
    batches: list[list[int]] = []
    width = 0
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = batches and ((len(batches[-1]) + 1) * width > batch_tokens or len(batches[-1]) == max_rows)
        if not batches or full:
            batches.append([])
            width = lengths[row]
        batches[-1].append(row)
    return batches


Reader = Callable[[Layer, Tensor], None]
"""Gets a layer and the value of a site there, `[batch, pos, width]`."""


def read_passages(
    model: nn.Module,
    blocks: Blocks,
    layers: Sequence[Layer],
    passages: Sequence[Passage],
    pool: Pool,
    batch_tokens: int | None,
    site: str = DEFAULT,
) -> Iterator[tuple[Tensor, Float[Tensor, "span layer d"]]]:
    """Yield `(span indices, pooled streams)` batch by batch; spans are numbered through all passages in order."""
    device = device_of(model)
    first_span = torch.tensor([0, *(len(passage.spans) for passage in passages)]).cumsum(0)
    pooled: dict[Layer, Tensor] = {}

    def reader(batch: Sequence[int]) -> Reader:
        pooled.clear()
        spans = [(row, *span) for row, i in enumerate(batch) for span in passages[i].spans]
        return _pooling_reader(pooled, deepest(layers), pool, torch.tensor(spans, device=device).T)

    rows = [passage.ids for passage in passages]
    for batch in _forward_in_batches(model, blocks, layers, rows, reader, batch_tokens, site):
        numbers = torch.cat([torch.arange(int(first_span[i]), int(first_span[i + 1])) for i in batch])
        yield numbers, torch.stack([pooled[layer].to(device) for layer in layers], dim=1)


def read_tokens(
    model: nn.Module, layers: Sequence[int], rows: Sequence[Sequence[int]], batch_tokens: int | None = None
) -> Iterator[tuple[int, dict[int, Float[Tensor, "pos d_model"]]]]:
    """Yield `(row number, layer -> stream of its tokens)`, in the order in which the rows are forwarded.

    Rows share batches, and a forward ends after the deepest layer.
    """
    blocks = find_blocks(model)
    streams: dict[int, Tensor] = {}

    def reader(_: Sequence[int]) -> Reader:
        streams.clear()

        def read(layer: Layer, value: Tensor) -> None:
            streams[int(layer)] = blocks.kept(value)
            if layer == max(layers):
                raise StopForward

        return read

    for batch in _forward_in_batches(model, blocks, layers, rows, reader, batch_tokens, DEFAULT):
        for place, number in enumerate(batch):
            yield number, {layer: stream[place, : len(rows[number])] for layer, stream in streams.items()}


def _forward_in_batches(
    model: nn.Module,
    blocks: Blocks,
    layers: Sequence[Layer],
    rows: Sequence[Sequence[int]],
    reader: Callable[[Sequence[int]], Reader],
    batch_tokens: int | None,
    site: str,
) -> Iterator[list[int]]:
    """Forward rows in batches (see `forward_padded`) with the reader of each; yields a batch when it is done."""

    def forward(batch: Sequence[int], inputs: Mapping[str, Any]) -> None:
        with reading(model, blocks, site, layers, reader(batch)) as ran, contextlib.suppress(StopForward):
            model(**inputs)
        check_called(ran, block_numbers(layers))

    return forward_padded(model, blocks, rows, forward, batch_tokens)


def forward_padded(
    model: nn.Module,
    blocks: Blocks,
    rows: Sequence[Sequence[int]],
    forward: Callable[[Sequence[int], Mapping[str, Any]], None],
    batch_tokens: int | None = None,
) -> Iterator[list[int]]:
    """Call `forward(row numbers, inputs of the model)` for rows of similar length; yields the numbers when it is done.

    A batch is padded on the right, and halved if it does not fit into memory. Rows on both sides of `rope_switch` share
    no batch.
    """
    device = device_of(model)
    size = batch_tokens or BATCH_TOKENS.get(device.type, 512)
    switch = rope_switch(model) or math.inf
    queue: list[list[int]] = []
    for side in (
        [i for i, row in enumerate(rows) if len(row) <= switch],
        [i for i, row in enumerate(rows) if len(row) > switch],
    ):
        batches = token_batches([len(rows[i]) for i in side], size)
        queue += [[side[i] for i in batch] for batch in reversed(batches)]
    while queue:
        batch = queue.pop()
        ids, mask, positions = pad([rows[i] for i in batch], "right", device)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if blocks.positions:
            inputs["position_ids"] = positions
        try:
            with running(model), torch.inference_mode():  # not while the caller works on a batch
                forward(batch, inputs)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            half = len(batch) // 2
            queue += [batch[half:], batch[:half]]
            continue
        yield batch


def _pooling_reader(pooled: dict[Layer, Tensor], last: Layer, pool: Pool, spans: Tensor) -> Reader:
    """Return a reader that fills `pooled`, and stops the forward after the layer `last`."""

    def read(layer: Layer, value: Tensor) -> None:
        rows, starts, stops = spans.to(value.device)
        pooled[layer] = pool(value, rows, starts, stops)
        if layer == last:
            raise StopForward

    return read
