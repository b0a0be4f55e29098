"""Batched forwards over tokenised texts, pooled inside the hooks and stopped after the deepest layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.capture.layers import EMBED, Layer
from steerkit.capture.pooling import Pool
from steerkit.capture.resid import hooked_blocks
from steerkit.models.blocks import Blocks, find_blocks
from steerkit.models.hooks import StopForward, check_called, observe_streams
from steerkit.models.kernels import running
from steerkit.models.model import device_of
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


Reader = Callable[[int, Tensor | None, Tensor | None], None]
"""Gets a layer and the streams before and after it, `[batch, pos, d_model]`."""


def read_passages(
    model: nn.Module,
    blocks: Blocks,
    layers: Sequence[Layer],
    passages: Sequence[Passage],
    pool: Pool,
    batch_tokens: int | None,
) -> Iterator[tuple[Tensor, Float[Tensor, "span layer d"]]]:
    """Yield `(span indices, pooled streams)` batch by batch; spans are numbered through all passages in order."""
    device = device_of(model)
    first_span = torch.tensor([0, *(len(passage.spans) for passage in passages)]).cumsum(0)
    deepest = max(hooked_blocks(blocks, layers))
    pooled: dict[Layer, Tensor] = {}

    def reader(batch: Sequence[int]) -> Reader:
        pooled.clear()
        spans = [(row, *span) for row, i in enumerate(batch) for span in passages[i].spans]
        return _pooling_reader(pooled, layers, deepest, pool, torch.tensor(spans, device=device).T)

    for batch in _forward_in_batches(model, blocks, layers, [p.ids for p in passages], reader, batch_tokens):
        numbers = torch.cat([torch.arange(int(first_span[i]), int(first_span[i + 1])) for i in batch])
        yield numbers, torch.stack([pooled[layer].to(device) for layer in layers], dim=1)


def read_tokens(
    model: nn.Module, layers: Sequence[int], rows: Sequence[Sequence[int]], batch_tokens: int | None = None
) -> Iterator[tuple[int, dict[int, Float[Tensor, "pos d_model"]]]]:
    """Yield `(row number, layer -> stream of its tokens)`, in the order in which the rows are forwarded.

    Rows share batches, and a forward ends after the deepest layer.
    """
    blocks = find_blocks(model)
    deepest = max(layers)
    streams: dict[int, Tensor] = {}

    def reader(_: Sequence[int]) -> Reader:
        streams.clear()

        def read(layer: int, entered: Tensor | None, left: Tensor | None) -> None:
            if layer in layers and left is not None:
                streams[layer] = left
            if layer == deepest:
                raise StopForward

        return read

    for batch in _forward_in_batches(model, blocks, layers, rows, reader, batch_tokens):
        for place, number in enumerate(batch):
            yield number, {layer: stream[place, : len(rows[number])] for layer, stream in streams.items()}


def _forward_in_batches(
    model: nn.Module,
    blocks: Blocks,
    layers: Sequence[Layer],
    rows: Sequence[Sequence[int]],
    reader: Callable[[Sequence[int]], Reader],
    batch_tokens: int | None,
) -> Iterator[list[int]]:
    """Forward rows in batches (see `forward_padded`) with the reader of each; yields a batch when it is done."""
    hooked = hooked_blocks(blocks, layers)

    def forward(batch: Sequence[int], inputs: Mapping[str, Any]) -> None:
        read, ran = reader(batch), set[int]()

        def noting(layer: int, entered: Tensor | None, left: Tensor | None) -> None:
            if left is not None:
                ran.add(layer)
            read(layer, entered, left)

        with observe_streams(hooked, noting), contextlib.suppress(StopForward):
            model(**inputs)
        check_called(ran, set(hooked))

    return forward_padded(model, blocks, rows, forward, batch_tokens)


def forward_padded(
    model: nn.Module,
    blocks: Blocks,
    rows: Sequence[Sequence[int]],
    forward: Callable[[Sequence[int], Mapping[str, Any]], None],
    batch_tokens: int | None = None,
) -> Iterator[list[int]]:
    """Call `forward(row numbers, inputs of the model)` for rows of similar length; yields the numbers when it is done.

    A batch is padded on the right, and halved if it does not fit into memory.
    """
    device = device_of(model)
    size = batch_tokens or BATCH_TOKENS.get(device.type, 512)
    queue = token_batches([len(row) for row in rows], size)[::-1]
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


def _pooling_reader(
    pooled: dict[Layer, Tensor], layers: Sequence[Layer], deepest: int, pool: Pool, spans: Tensor
) -> Reader:
    """Return a reader that fills `pooled` with the streams of `layers` and stops the forward after the deepest."""

    def read(layer: int, entered: Tensor | None, left: Tensor | None) -> None:
        for key, stream in ((EMBED, entered if layer == 0 else None), (layer, left)):
            if key in layers and stream is not None:
                rows, starts, stops = spans.to(stream.device)
                pooled[key] = pool(stream, rows, starts, stops)
        if layer == deepest:
            raise StopForward

    return read
