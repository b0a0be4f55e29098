"""Batched forwards over tokenised texts, pooled inside the hooks and stopped after the deepest layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.capture.layers import EMBED, Layer
from steerkit.capture.pooling import Pool
from steerkit.capture.resid import hooked_blocks
from steerkit.models.blocks import Blocks
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
    hooked = hooked_blocks(blocks, layers)
    deepest = max(hooked)
    size = batch_tokens or BATCH_TOKENS.get(device.type, 512)
    queue = token_batches([len(passage.ids) for passage in passages], size)[::-1]
    while queue:
        batch = queue.pop()
        ids, mask, positions = pad([passages[i].ids for i in batch], "right", device)
        spans = [(row, *span) for row, i in enumerate(batch) for span in passages[i].spans]
        numbers = torch.cat([torch.arange(int(first_span[i]), int(first_span[i + 1])) for i in batch])
        pooled: dict[Layer, Tensor] = {}
        read = _pooling_reader(pooled, layers, deepest, pool, torch.tensor(spans, device=device).T)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if blocks.positions:
            inputs["position_ids"] = positions
        try:
            with (  # not while the caller works on a batch
                running(model),
                torch.inference_mode(),
                observe_streams(hooked, read),
                contextlib.suppress(StopForward),
            ):
                model(**inputs)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            half = len(batch) // 2
            queue += [batch[half:], batch[:half]]
            continue
        check_called({0 if key == EMBED else int(key) for key in pooled}, set(hooked))
        yield numbers, torch.stack([pooled[layer].to(device) for layer in layers], dim=1)


def _pooling_reader(
    pooled: dict[Layer, Tensor], layers: Sequence[Layer], deepest: int, pool: Pool, spans: Tensor
) -> Callable[[int, Tensor | None, Tensor | None], None]:
    """Return a reader that fills `pooled` with the streams of `layers` and stops the forward after the deepest."""

    def read(layer: int, entered: Tensor | None, left: Tensor | None) -> None:
        for key, stream in ((EMBED, entered if layer == 0 else None), (layer, left)):
            if key in layers and stream is not None:
                rows, starts, stops = spans.to(stream.device)
                pooled[key] = pool(stream, rows, starts, stops)
        if layer == deepest:
            raise StopForward

    return read
