"""Steerings compiled for the rows of a batch: which rows change, by what, in which columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from steerkit.models.site_names import DEFAULT, Place
from steerkit.steering.conditions import Condition
from steerkit.steering.operations import Operation, direction_of, named, operate
from steerkit.steering.positions import steered_columns
from steerkit.vectors.vector import SteeringVector

Kind = TypeVar("Kind")


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
    @property
    def site(self) -> str | None: ...
    @property
    def when(self) -> Condition | None: ...


@dataclass
class RowSteering:
    """The steerings of each row of one batch, compiled to edits per place, a site and a layer.

    Args:
        rows: for each row its steerings, in the order in which they act.
        prompts: for each row the absolute columns `(start, stop)` of its prompt.
        start: the absolute column of the chunk that is being forwarded; set before each forward.
        decided: `decisions` of these rows in an earlier batch, whose forwards held the ends of their prompts.
    """

    rows: Sequence[Sequence[RowEdit]]
    prompts: Sequence[tuple[int, int]]
    start: int = 0
    decided: Bool[Tensor, "row steering"] | None = None
    _edits: dict[Place, list[_Gate | _Edit]] = field(default_factory=dict)
    _end: int = 0

    def __post_init__(self) -> None:
        directions: dict[tuple[int, int, str], Tensor] = {}
        for order in range(self._depth):  # a row's second steering acts after its first: an edit holds a row once
            grouped: dict[tuple[Place, str, Place | None], list[tuple[int, RowEdit, Tensor]]] = {}
            gated: dict[Place, list[tuple[int, RowEdit]]] = {}
            for number, row in enumerate(self.rows):
                if order >= len(row) or row[order].coefficient == 0:
                    continue
                steering = row[order]
                read_at = None if steering.when is None else steering.when.place
                if read_at is not None:
                    gated.setdefault(read_at, []).append((number, steering))
                for layer, vector in steering.vector.layers.items():
                    operation = named(steering.operation).name
                    key = (id(steering.vector), layer, operation)
                    if key not in directions:
                        directions[key] = direction_of(operation, vector)
                    edited = (number, steering, directions[key])
                    grouped.setdefault(((steering.site or DEFAULT, layer), operation, read_at), []).append(edited)
            gates = {}
            for place, some in gated.items():
                before = None if self.decided is None else self.decided[[number for number, _ in some], order]
                gates[place] = _Gate(order, some, self.prompts, before)
                self._edits.setdefault(place, []).append(gates[place])
            for (place, operation, read_at), edits in grouped.items():
                gate = None if read_at is None else gates[read_at]
                self._edits.setdefault(place, []).append(_Edit(operation, edits, self.prompts, gate))

    @property
    def _depth(self) -> int:
        return max((len(row) for row in self.rows), default=0)

    @property
    def places(self) -> list[Place]:
        """The places, (site, layer), at which any row changes, or is read by a condition."""
        return sorted(self._edits)

    def edit(self, place: Place, stream: Tensor) -> Tensor | None:
        """The steered value `[batch, pos, width]` of the columns from `start` on; None where nothing changes."""
        edited = None
        self._end = self.start + stream.shape[1]
        for one in self._edits.get(place, ()):
            if one.low < self._end and self.start < one.high:
                now = stream if edited is None else edited
                if isinstance(one, _Gate):
                    one.read(now, self.start)
                else:
                    edited = one.apply(now, self.start)
        return edited

    def decisions(self) -> Bool[Tensor, "row steering"]:
        """Whether the conditions that are decided on the prompt hold; False where there is none, or not yet."""
        found = torch.zeros(len(self.rows), self._depth, dtype=torch.bool)
        for gate in self._all(_Gate):
            found[gate.rows.cpu(), gate.order] = gate.decided.cpu()
        return found

    def steered(self) -> list[int] | None:
        """At how many columns of the last forward each row was steered; None if no row has a condition."""
        if not any(True for _ in self._all(_Gate)):
            return None
        columns = torch.arange(self.start, self._end)
        found = torch.zeros(len(self.rows), len(columns), dtype=torch.bool)
        for edit in self._all(_Edit):
            found[edit.rows.cpu()] |= edit.acts_at(columns).cpu()
        return found.sum(1).tolist()

    def _all(self, kind: type[Kind]) -> Iterator[Kind]:
        return (one for some in self._edits.values() for one in some if isinstance(one, kind))


class _Gate:
    """The conditions of one steering of each row, read at one place: at which positions of a forward they hold.

    Args:
        order: which of a row's steerings this is.
        rows: for each row with such a condition its number in the batch, and its steering.
        prompts: for each row of the batch the absolute columns of its prompt.
        decided: `[row of the gate]`, decisions on the prompt that earlier forwards made; None: there were none.
    """

    def __init__(
        self,
        order: int,
        rows: Sequence[tuple[int, RowEdit]],
        prompts: Sequence[tuple[int, int]],
        decided: Tensor | None,
    ) -> None:
        conditions = [steering.when for _, steering in rows if steering.when is not None]
        columns = [_columns_of(steering, prompts[number]) for number, steering in rows]
        ends = [prompts[number][1] - 1 for number, _ in rows]
        self.order, self.place_of = order, {number: place for place, (number, _) in enumerate(rows)}
        self.low, self.high = min(*ends, *(low for low, _ in columns)), max(high for _, high in columns)
        self.first_end, self.last_end = min(ends), max(ends)
        self.every_prompt = all(one.decide == "prompt" for one in conditions)
        self.rows, self.ends = torch.tensor(list(self.place_of)), torch.tensor(ends)
        self.weights = torch.stack([one.weights for one in conditions])
        self.offsets, self.above, self.below = torch.tensor([(one.offset, *one.bounds) for one in conditions]).T
        self.on_prompt = torch.tensor([one.decide == "prompt" for one in conditions])
        self.decided = torch.zeros(len(rows), dtype=torch.bool) if decided is None else decided
        self.holds = self.decided[:, None]

    def read(self, stream: Tensor, start: int) -> None:
        """Find `holds`, `[row of the gate, pos or 1]`, for the columns of a forward."""
        if self.weights.device != stream.device:
            self._follow(stream)
        stop = start + stream.shape[1]
        if start <= self.last_end and self.first_end < stop:
            is_here = (self.ends >= start) & (self.ends < stop)
            at_end = stream[self.rows, (self.ends - start).clamp(0, stop - start - 1)]
            self.decided = torch.where(is_here, self._holds(at_end[:, None])[:, 0], self.decided)
        self.holds = self.decided[:, None]
        if not self.every_prompt:
            self.holds = torch.where(self.on_prompt[:, None], self.holds, self._holds(stream[self.rows]))

    def _holds(self, stream: Tensor) -> Tensor:
        scores = (stream.float() * self.weights[:, None]).sum(-1) + self.offsets[:, None]
        return (scores > self.above[:, None]) & (scores < self.below[:, None])

    def _follow(self, stream: Tensor) -> None:
        for name in ("rows", "ends", "weights", "offsets", "above", "below", "on_prompt", "decided"):
            setattr(self, name, getattr(self, name).to(stream.device))


class _Edit:
    """One operation at one layer on some rows, each row at most once; its tensors follow the stream's device.

    Args:
        edits: for each edited row its number in the batch, its steering, and what the operation reads of the vector.
        prompts: for each row of the batch the absolute columns of its prompt.
        gate: at which positions the conditions of these rows hold; None for rows without conditions.
    """

    def __init__(
        self,
        operation: str,
        edits: Sequence[tuple[int, RowEdit, Tensor]],
        prompts: Sequence[tuple[int, int]],
        gate: _Gate | None = None,
    ) -> None:
        self.operation, self.count, self.gate = named(operation), len(edits), gate
        columns = [_columns_of(steering, prompts[number]) for number, steering, _ in edits]
        lows, highs = [low for low, _ in columns], [high for _, high in columns]
        self.low, self.high = min(lows), max(highs)
        self.inside_from, self.inside_to = max(lows), min(highs)  # columns that are steered in every row
        self.rows = torch.tensor([number for number, _, _ in edits])
        self.lows, self.highs = torch.tensor(lows), torch.tensor(highs)
        self.places = torch.tensor([0 if gate is None else gate.place_of[number] for number, _, _ in edits])
        self.strength = torch.tensor([float(steering.coefficient) for _, steering, _ in edits])[:, None, None]
        self.vectors = torch.stack([vector for _, _, vector in edits])[:, None]
        self.push = self.strength * self.vectors

    def apply(self, stream: Tensor, start: int) -> Tensor:
        if self.push.device != stream.device or self.push.dtype != stream.dtype:
            self._follow(stream)
        every_row = self.count == stream.shape[0]
        old = stream if every_row else stream[self.rows]
        new = operate(self.operation, old, self.vectors, self.strength, self.push)
        acts = None if self.gate is None else self.gate.holds.to(stream.device)[self.places]
        if not (self.inside_from <= start and start + stream.shape[1] <= self.inside_to):
            inside = self._inside(torch.arange(start, start + stream.shape[1], device=stream.device))
            acts = inside if acts is None else acts & inside
        if acts is not None:
            new = torch.where(acts[..., None], new, old)
        return new if every_row else stream.index_copy(0, self.rows, new)

    def acts_at(self, columns: Tensor) -> Bool[Tensor, "row column"]:
        """Whether each row is steered at these columns, those of the last forward."""
        inside = self._inside(columns.to(self.lows.device))
        if self.gate is None or not inside.any():  # a gate reads no forward in which its steering does not act
            return inside
        return inside & self.gate.holds.to(inside.device)[self.places]

    def _inside(self, columns: Tensor) -> Tensor:
        return (columns >= self.lows[:, None]) & (columns < self.highs[:, None])

    def _follow(self, stream: Tensor) -> None:
        for name in ("rows", "lows", "highs", "places", "strength", "vectors"):
            setattr(self, name, getattr(self, name).to(stream.device))
        self.push = self.push.to(stream.device, stream.dtype)


def _columns_of(steering: RowEdit, prompt: tuple[int, int]) -> tuple[int, int]:
    return steered_columns(steering.positions, *prompt, named(steering.operation).name)
