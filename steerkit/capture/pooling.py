"""Pooling: the stream over a span to one vector, at a read position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.text.spans import Passage

Position = str | int
"""`"last"`, `"first"`, `"mean"`, `"letter"`, or an integer index into the span (-1 is the last token)."""
Pool = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`pool(stream [batch, pos, d], rows [span], starts [span], stops [span]) -> [span, d]`."""


def with_letter_found(
    tokenizer: Any, passages: Sequence[Passage], position: Position, indices: dict[int, str] | None = None
) -> Position:
    """Return the index from the end of the spans that `"letter"` means; other positions are returned as they are.

    `"letter"` is the first token of a span with a letter or a digit: of ` (A)` the token `A`, not the bracket.

    Args:
        indices: the index in earlier passages of the same data, with a text; this call adds its own.

    Raises:
        ValueError: a span without such a token, or spans in which it has different distances from the end.
    """
    if not isinstance(position, str) or position != "letter":
        return position
    has_letter: dict[int, bool] = {}
    indices = {} if indices is None else indices
    for passage in passages:
        for start, stop in passage.spans:
            ids = passage.ids[start:stop]
            for token in {*ids} - {*has_letter}:
                has_letter[token] = any(map(str.isalnum, tokenizer.decode([token])))
            found = next((i for i, token in enumerate(ids) if has_letter[token]), 0) - len(ids)
            if not has_letter[ids[found]]:
                raise ValueError(
                    f"expected a letter in every span for position='letter'; {tokenizer.decode(ids)!r:.80} has none. "
                    "Pass an index, such as -2."
                )
            indices.setdefault(found, tokenizer.decode(ids))
    if len(indices) > 1:
        shown = {text: index for index, text in indices.items()}
        raise ValueError(
            f"expected spans that end alike for position='letter', such as ' (A)' and ' (B)'; the letter is at "
            f"{shown!r:.120}. Pass an index, or 'first'."
        )
    return next(iter(indices))


def token_index(position: Position) -> int | None:
    """Return the index into the span that a position reads; None for `"mean"`.

    Raises:
        ValueError: an unknown position.
    """
    if isinstance(position, str) and position == "mean":
        return None
    index = {"last": -1, "first": 0}.get(position) if isinstance(position, str) else position
    if isinstance(index, bool) or not isinstance(index, Integral):
        raise ValueError(
            f"expected position 'last', 'first', 'mean', 'letter' or an integer; got {position!r}. Pass one of these."
        )
    return int(index)


def pool_at(position: Position, passages: Sequence[Passage]) -> Pool:
    """Return the function that pools a batch of spans at this position.

    Raises:
        ValueError: an unknown position, or an index outside the shortest span.
    """
    index = token_index(position)
    if index is None:
        return mean_pool
    shortest = min(stop - start for passage in passages for start, stop in passage.spans)
    if not -shortest <= index < shortest:
        raise ValueError(
            f"expected a position inside every span; {index} is outside the shortest, which has {shortest} tokens. "
            "Pass an index nearer to 0 or -1, or leave that text out."
        )

    def read_one(stream: Tensor, rows: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
        return stream[rows, (starts if index >= 0 else stops) + index]

    return read_one


def mean_pool(
    stream: Float[Tensor, "batch pos d"], rows: Tensor, starts: Tensor, stops: Tensor
) -> Float[Tensor, "span d"]:
    """Return the mean of the stream over each span, in float32."""
    columns = torch.arange(stream.shape[1], device=stream.device)
    inside = (columns >= starts[:, None]) & (columns < stops[:, None])
    weights = inside.to(torch.float32) / (stops - starts)[:, None]
    if len(rows) == len(stream):  # one span per row, in order: no copy of the stream
        return torch.bmm(weights[:, None], stream.float()).squeeze(1)
    means = [
        weight[start:stop] @ stream[row, start:stop].float()
        for row, start, stop, weight in zip(rows, starts, stops, weights, strict=True)
    ]
    return torch.stack(means)
