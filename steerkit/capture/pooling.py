"""Pooling: the stream over a span to one vector, at a read position."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.text.spans import Passage

Position = str | int


Pool = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def pool_at(position: Position, passages: Sequence[Passage]) -> Pool:
    if position == "mean":
        return mean_pool
    index = {"last": -1, "first": 0}.get(position, position) if isinstance(position, str) else position
    if isinstance(index, bool) or not isinstance(index, int):
        raise ValueError(f"expected position 'last', 'first', 'mean' or an integer; got {position!r}. Choose one.")
    shortest = min(stop - start for passage in passages for start, stop in passage.spans)
    if not -shortest <= index < shortest:
        raise ValueError(
            f"expected a position inside every span; {index} is outside the shortest, of {shortest} tokens. Take "
            "one nearer to its end, or leave that text out."
        )

    def at(stream: Tensor, rows: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
        return stream[rows, (starts if index >= 0 else stops) + index]

    return at


def mean_pool(
    stream: Float[Tensor, "batch pos d"], rows: Tensor, starts: Tensor, stops: Tensor
) -> Float[Tensor, "span d"]:
    columns = torch.arange(stream.shape[1], device=stream.device)
    inside = (columns >= starts[:, None]) & (columns < stops[:, None])
    weights = inside.to(torch.float32) / (stops - starts)[:, None]
    if len(rows) == len(stream):  # one span per row, in order: no copy of the stream
        return torch.bmm(weights[:, None], stream.float()).squeeze(1)
    return torch.stack(
        [w[a:b] @ stream[r, a:b].float() for r, a, b, w in zip(rows, starts, stops, weights, strict=True)]
    )
