"""The plan of a sweep: its vectors, prompts, ways of steering, and the rows that these make."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import Any, Literal

from steerkit.capture.activations import Layer
from steerkit.generation.choices import checked_choices
from steerkit.steering.conditions import Condition
from steerkit.steering.operations import Operation
from steerkit.steering.steering import Steering, at_layers
from steerkit.sweeps.columns import RESERVED
from steerkit.sweeps.layers import Label, LayerSet, label_of, layer_sets
from steerkit.text.prompt import PromptLike, listed
from steerkit.vectors.vector import SteeringVector

Place = tuple[str, Label]
"""A vector's name and the label of the layers where it is steered."""


@dataclass(frozen=True)
class Cell:
    """One way of steering in a sweep: a vector at its layers with one coefficient; place None is coefficient 0.

    Args:
        dose: signed, where the sweep is over doses.
    """

    place: Place | None
    steering: Steering | None
    dose: float | None = None

    @property
    def coefficient(self) -> float:
        """The steering's; 0 without one."""
        return 0.0 if self.steering is None else float(self.steering.coefficient)

    @cached_property
    def content(self) -> str | None:
        """The content of the steered vector, at the steered layers; None without one."""
        return None if self.steering is None else self.steering.vector.content()

    @classmethod
    def each(cls, steerings: Mapping[Place, Steering], coefficients: Any, doses: Any = None) -> list[Cell]:
        """Coefficient 0 once, then each steering with each other coefficient or dose (see `resolved`).

        Raises:
            ValueError: see `strengths_of`, and `Steering` for doses of an operation that adds nothing.
        """
        values = strengths_of(coefficients, doses)
        if doses is None:
            steered = [cls(place, one.scaled(c)) for place, one in steerings.items() for c in values if c != 0]
            return [cls(None, None), *steered]
        dosed = [(place, replace(one, dose=c), c) for place, one in steerings.items() for c in values]
        return [cls(None, None, 0.0), *(cls(place, steering, c) for place, steering, c in dosed if c != 0)]


@dataclass(frozen=True)
class Planned:
    """One text of a sweep, or one choice whose probability is computed.

    Args:
        cell: how it is steered.
        prompt: its prompt as a row, see `prompt_rows`.
        sample: index of the sample; of a choice, its index among those of the prompt.
        choice: the continuation that is scored; None where a text is generated.
    """

    cell: Cell
    prompt: Mapping[str, Any]
    sample: int
    choice: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What identifies the row on disk: the content of the steered vector, not its name."""
        part = self.sample if self.choice is None else self.choice
        return self.cell.content, self.cell.coefficient, self.prompt["id"], part

    @classmethod
    def each(cls, cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]], samples: int) -> list[Planned]:
        """The rows of a sweep: all cells of a prompt are neighbours, so that they share its prefill."""
        return [
            cls(cell, row, number, choice)
            for row in rows
            for cell in cells
            for number, choice in enumerate(row["choices"] or [None] * samples)
        ]


def named_vectors(vectors: SteeringVector | Mapping[str, SteeringVector]) -> dict[str, SteeringVector]:
    """Several vectors by name, or one as "vector"; `ValueError` for none, `TypeError` for anything else."""
    named = {"vector": vectors} if isinstance(vectors, SteeringVector) else vectors
    if not isinstance(named, Mapping) or not all(isinstance(vector, SteeringVector) for vector in named.values()):
        raise TypeError(f"expected a SteeringVector, or several by name; got {vectors!r:.80}. Pass {{'name': vector}}.")
    if not named:
        raise ValueError("expected at least one vector; got 0 vectors. Add some.")
    return dict(named)


def prompt_rows(
    prompts: Sequence[PromptLike | Mapping[str, Any]], choices: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Each prompt as a row with `id`, `group`, `reference` and `choices` (None where texts are generated).

    Args:
        choices: those of prompts that have none of their own.

    Raises:
        TypeError: a choice that is no text.
        ValueError: no prompts, one without `prompt`, repeated ids, a column name that the sweep's table uses, a list of
            choices that is empty or has duplicates, or choices for some prompts only.
    """
    rows = []
    for number, prompt in enumerate(listed(prompts)):
        given = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
        row: dict[str, Any] = {key: None if _is_missing(value) else value for key, value in given.items()}
        if "prompt" not in row:
            raise ValueError(f"expected a 'prompt' in row {number}; got keys {sorted(row)}. Add or rename one.")
        row["id"] = str(number if row.get("id") is None else row["id"])
        row["group"] = str(row["id"] if row.get("group") is None else row["group"])
        row.setdefault("reference", None)
        own = row.get("choices")
        asked = choices if own is None else own
        row["choices"] = None if asked is None else checked_choices(asked)
        if taken := RESERVED & set(row):
            raise ValueError(
                f"expected column names that a sweep's table does not use, row {number}; got {sorted(taken)}. "
                "Rename it."
            )
        rows.append(row)
    if 0 < (count := sum(row["choices"] is None for row in rows)) < len(rows):
        first = next(row["id"] for row in rows if row["choices"] is None)
        raise ValueError(
            f"expected choices for every prompt or for none; {count} have none, the first is {first!r}. Add their "
            "choices, or pass choices= for all."
        )
    ids = [row["id"] for row in rows]
    if len(set(ids)) < len(ids):
        twice = sorted({name for name in ids if ids.count(name) > 1})[:5]
        raise ValueError(f"expected prompt ids that differ; got {twice} more than once. Number them.")
    return rows


def _is_missing(value: Any) -> bool:
    """Whether it is NaN, which tables have where a value is missing."""
    return isinstance(value, float) and math.isnan(value)


def steerings_at(
    named: Mapping[str, SteeringVector],
    layers: int | Literal["all"] | Sequence[LayerSet] | None,
    positions: str,
    operation: str | Operation,
    foreign: bool,
    site: str | None = None,
    when: Condition | None = None,
) -> dict[Place, Steering]:
    """A steering with coefficient 1 for each vector and place, all at one site.

    Raises:
        ValueError: a layer that a vector does not hold, or given twice; no `layers` where a vector holds several;
            vectors of several sites and no `site`.
    """
    if len(several := {vector.site for vector in named.values()}) > 1 and site is None:
        raise ValueError(f"expected vectors of one site; got {sorted(several)}. Sweep each by itself, or pass site=.")
    found: dict[Place, Steering] = {}
    places = None if layers is None else layer_sets(layers)
    for name, vector in named.items():
        if places is None:
            at_layers(vector, None)  # raises where the vector holds several layers
        for place in [next(iter(vector.layers))] if places is None else places:
            layer: Any = place
            found[name, label_of(place)] = Steering(
                vector, 1.0, positions, operation, foreign, layer=layer, site=site, when=when
            )
    return found


def strengths_of(coefficients: Any, doses: Any) -> list[float]:
    """The coefficients, or the doses, as a list.

    Raises:
        ValueError: both or neither; no numbers, one given twice, or one that is not finite.
    """
    if (coefficients is None) == (doses is None):
        raise ValueError(
            f"expected coefficients or doses; got {'neither' if doses is None else 'both'}. Pass one of the two."
        )
    name, given = ("coefficient", coefficients) if doses is None else ("dose", doses)
    given = given.tolist() if hasattr(given, "tolist") else given
    listed = [] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    values = [float(c) for c in listed if isinstance(c, Real) and not isinstance(c, bool)]
    if not listed or len(set(values)) < len(listed):
        raise ValueError(f"expected at least one {name}, each a number and given once; got {given!r}. List them.")
    return values


def checked_norms(norms: Mapping[Layer, float] | None) -> dict[Layer, float] | None:
    """The given norms of the stream as numbers; `ValueError` for one that is not a finite number above 0."""
    if norms is None:
        return None
    if other := {layer: norm for layer, norm in norms.items() if not 0 < float(norm) < math.inf}:
        raise ValueError(
            f"expected stream_norms above 0, one per layer; got {other}. Pass e.g. result.meta['stream_norms'] of a "
            "sweep."
        )
    return {int(layer): float(norm) for layer, norm in norms.items()}


def resolved(cells: Sequence[Cell], norms: Mapping[Layer, float]) -> list[Cell]:
    """The cells with the coefficients that their doses mean, see `Steering.resolved`.

    Raises:
        ValueError: `norms` lacks a steered layer.
    """
    steered = {layer for cell in cells if cell.steering is not None for layer in cell.steering.vector.layers}
    if missing := sorted(steered - set(norms)):
        raise ValueError(
            f"expected norms of the stream at the layers {sorted(steered)} for doses; got none for {missing}. Pass "
            "stream_norms=, or prompts and positions that steer a token beyond the first; an engine of vLLM needs sums "
            "to measure them."
        )
    return [cell if cell.steering is None else replace(cell, steering=cell.steering.resolved(norms)) for cell in cells]
