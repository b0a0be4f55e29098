"""Steerings compiled for the rows of a batch: which rows change, by what, in which columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from steerkit.steering.operations import Operation, direction_of, named, operate
from steerkit.steering.positions import steered_columns
from steerkit.vectors.vector import SteeringVector


class RowEdit(Protocol):
    """What is read of a `Steering` here. Its coefficient is one number, not one per row."""

    @property
    def vector(self) -> SteeringVector: ...
    @property
    def coefficient(self) -> float | Tensor: ...
    @property
    def positions(self) -> str: ...
    @property
    def operation(self) -> str | Operation: ...


@dataclass
class RowSteering:
    """The steerings of each row of one batch, compiled to edits of the stream per layer.

    Args:
        rows: for each row its steerings, in the order in which they act.
        prompts: for each row the absolute columns `(start, stop)` of its prompt.
        start: the absolute column of the chunk that is being forwarded; set before each forward.
    """

    rows: Sequence[Sequence[RowEdit]]
    prompts: Sequence[tuple[int, int]]
    start: int = 0
    _edits: dict[int, list[_Edit]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        directions: dict[tuple[int, int, str], Tensor] = {}
        depth = max((len(row) for row in self.rows), default=0)
        for order in range(depth):  # a row's second steering acts after its first: an edit holds each row at most once
            grouped: dict[tuple[int, str], list[tuple[int, RowEdit, Tensor]]] = {}
            for number, row in enumerate(self.rows):
                if order >= len(row) or row[order].coefficient == 0:
                    continue
                steering = row[order]
                for layer, vector in steering.vector.layers.items():
                    operation = named(steering.operation).name
                    key = (id(steering.vector), layer, operation)
                    if key not in directions:
                        directions[key] = direction_of(operation, vector)
                    edited = (number, steering, directions[key])
                    grouped.setdefault((layer, operation), []).append(edited)
            for (layer, operation), edits in grouped.items():
                self._edits.setdefault(layer, []).append(_Edit(operation, edits, self.prompts))

    @property
    def layers(self) -> list[int]:
        """The layers at which any row changes."""
        return sorted(self._edits)

    def edit(self, layer: int, stream: Tensor) -> Tensor | None:
        """The steered stream `[batch, pos, d_model]` of the columns from `start` on; None where nothing changes."""
        edited = None
        for one in self._edits.get(layer, ()):
            if one.low < self.start + stream.shape[1] and self.start < one.high:
                edited = one.apply(stream if edited is None else edited, self.start)
        return edited


class _Edit:
    """One operation at one layer on some rows, each row at most once; its tensors follow the stream's device.

    Args:
        edits: for each edited row its number in the batch, its steering, and what the operation reads of the vector.
        prompts: for each row of the batch the absolute columns of its prompt.
    """

    def __init__(
        self,
        operation: str,
        edits: Sequence[tuple[int, RowEdit, Tensor]],
        prompts: Sequence[tuple[int, int]],
    ) -> None:
        self.operation, self.count = named(operation), len(edits)
        columns = [steered_columns(steering.positions, *prompts[number], operation) for number, steering, _ in edits]
        lows, highs = [low for low, _ in columns], [high for _, high in columns]
        self.low, self.high = min(lows), max(highs)
        self.inside_from, self.inside_to = max(lows), min(highs)  # columns that are steered in every row
        self.rows = torch.tensor([number for number, _, _ in edits])
        self.lows, self.highs = torch.tensor(lows), torch.tensor(highs)
        self.strength = torch.tensor([float(steering.coefficient) for _, steering, _ in edits])[:, None, None]
        self.vectors = torch.stack([vector for _, _, vector in edits])[:, None]
        self.push = self.strength * self.vectors

    def apply(self, stream: Tensor, start: int) -> Tensor:
        if self.push.device != stream.device or self.push.dtype != stream.dtype:
            self._follow(stream)
        every_row = self.count == stream.shape[0]
        old = stream if every_row else stream[self.rows]
        new = operate(self.operation, old, self.vectors, self.strength, self.push)
        if not (self.inside_from <= start and start + stream.shape[1] <= self.inside_to):
            columns = torch.arange(start, start + stream.shape[1], device=stream.device)
            inside = (columns >= self.lows[:, None]) & (columns < self.highs[:, None])
            new = torch.where(inside[..., None], new, old)
        return new if every_row else stream.index_copy(0, self.rows, new)

    def _follow(self, stream: Tensor) -> None:
        self.rows, self.lows, self.highs, self.strength, self.vectors = (
            tensor.to(stream.device) for tensor in (self.rows, self.lows, self.highs, self.strength, self.vectors)
        )
        self.push = self.push.to(stream.device, stream.dtype)
