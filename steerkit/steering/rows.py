"""Steerings compiled for the rows of a batch: which rows change, by what, in which columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from steerkit.steering.operations import direction_of, operate
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
    def operation(self) -> str: ...


@dataclass(frozen=True)
class _Member:
    """One row of an `_Edit`: its number in the batch, its steered columns `low..high`, its strength and vector."""

    number: int
    low: int
    high: int
    strength: float
    vector: Tensor


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
            grouped: dict[tuple[int, str], list[_Member]] = {}
            for number, row in enumerate(self.rows):
                if order >= len(row) or row[order].coefficient == 0:
                    continue
                steering = row[order]
                low, high = steered_columns(steering.positions, *self.prompts[number])
                for layer, vector in steering.vector.layers.items():
                    key = (id(steering.vector), layer, steering.operation)
                    if key not in directions:
                        directions[key] = direction_of(steering.operation, vector)
                    member = _Member(number, low, high, float(steering.coefficient), directions[key])
                    grouped.setdefault((layer, steering.operation), []).append(member)
            for (layer, operation), members in grouped.items():
                self._edits.setdefault(layer, []).append(_Edit(operation, members))

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
    """One operation at one layer on some rows, each row at most once; its tensors follow the stream's device."""

    def __init__(self, operation: str, members: Sequence[_Member]) -> None:
        self.operation, self.count = operation, len(members)
        lows, highs = [member.low for member in members], [member.high for member in members]
        self.low, self.high = min(lows), max(highs)
        self.inside_from, self.inside_to = max(lows), min(highs)  # columns that are steered in every row
        self.rows = torch.tensor([member.number for member in members])
        self.lows, self.highs = torch.tensor(lows), torch.tensor(highs)
        self.strength = torch.tensor([member.strength for member in members])[:, None, None]
        self.vectors = torch.stack([member.vector for member in members])[:, None]
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
