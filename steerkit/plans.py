"""Plans: what a sweep is asked for, checked and laid out before anything runs or is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from steerkit.activations import Layer
from steerkit.steering import Steering
from steerkit.texts import Prompt
from steerkit.vectors import SteeringVector

LayerSet = int | tuple[int, ...]
RESERVED = {
    "vector", "layer", "coefficient", "prompt_id", "sample", "chat", "text", "n_tokens", "finished", "relative_dose",
    "positions", "operation", "samples", "temperature", "top_p", "max_new_tokens", "seed", "weights",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One way of steering in a sweep: a vector at its layers with one coefficient; vector None is coefficient 0."""

    vector: str | None
    layer: str | None
    coefficient: float


def named_vectors(vectors: SteeringVector | Mapping[str, SteeringVector]) -> dict[str, SteeringVector]:
    """Several vectors by name, or one as "vector"; `TypeError` for anything else."""
    named = {"vector": vectors} if isinstance(vectors, SteeringVector) else vectors
    if not isinstance(named, Mapping) or not all(isinstance(vector, SteeringVector) for vector in named.values()):
        raise TypeError(
            f"expected a SteeringVector, or several by name; got {vectors!r:.80}. Say {{'name': vector}} for each."
        )
    return dict(named)


def prompt_rows(prompts: Sequence[Prompt | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each prompt as a row with `id`, `group` and `reference`.

    Raises:
        ValueError: no prompts, one without `prompt`, repeated ids, or a column that a sweep has of its own.
    """
    if isinstance(prompts, str | Mapping) or not len(prompts):
        raise ValueError(f"expected a non-empty list of prompts; got {prompts!r:.80}. Put them in a list.")
    rows = []
    for number, prompt in enumerate(prompts):
        row: dict[str, Any] = dict(prompt) if isinstance(prompt, Mapping) else {"prompt": prompt}
        if "prompt" not in row:
            raise ValueError(f"expected a 'prompt' in row {number}; got keys {sorted(row)}. Add or rename one.")
        row["id"] = str(row.get("id", number))
        row["group"] = str(row["id"] if row.get("group") is None else row["group"])
        row.setdefault("reference", None)
        if taken := RESERVED & set(row):
            raise ValueError(f"expected other names than a sweep's own, row {number}; got {sorted(taken)}. Rename it.")
        rows.append(row)
    ids = [row["id"] for row in rows]
    if len(set(ids)) < len(ids):
        twice = sorted({name for name in ids if ids.count(name) > 1})[:5]
        raise ValueError(f"expected prompt ids that differ; got {twice} more than once. Number them.")
    return rows


def steerings_at(
    named: Mapping[str, SteeringVector],
    layers: Sequence[LayerSet] | None,
    positions: str,
    operation: Any,
    foreign: bool,
) -> dict[tuple[str, str | None], Steering]:
    """The steerings, with coefficient 1, by vector and place; at all of a vector's layers together for `layers` None.

    Raises:
        ValueError: no list of layers, one that a vector has not, or one twice.
    """
    found: dict[tuple[str, str | None], Steering] = {}
    places = None if layers is None else _places(layers)
    for name, vector in named.items():
        for where in [tuple(vector.layers)] if places is None else places:
            label = "+".join(map(str, where))
            found[name, label] = Steering(vector.at(*where), positions=positions, operation=operation, foreign=foreign)
    return found


def _places(layers: Sequence[LayerSet]) -> list[tuple[int, ...]]:
    """Each place as a tuple of the layers that are steered together there."""
    given = [] if isinstance(layers, str) or not isinstance(layers, Iterable) else list(layers)
    places = [tuple(place) if isinstance(place, tuple | list) else (place,) for place in given]
    if not places or len(set(places)) < len(places):
        raise ValueError(
            f"expected a list of layers that differ, each a number or a tuple of numbers; got {layers!r}. List them."
        )
    return places


def cells_of(steerings: Mapping[tuple[str, str | None], Steering], coefficients: Sequence[float]) -> list[Cell]:
    """Coefficient 0 once, then each steering with each other coefficient.

    Raises:
        ValueError: no list of numbers, one twice, or one that is not finite.
    """
    given = [] if isinstance(coefficients, str) or not isinstance(coefficients, Iterable) else list(coefficients)
    values = [float(c) for c in given if isinstance(c, Real) and not isinstance(c, bool)]
    if not given or len(set(values)) < len(given):
        raise ValueError(f"expected coefficients that differ, one number at least; got {coefficients!r}. List them.")
    for value in values:
        replace(next(iter(steerings.values())), coefficient=value)  # refuses one that is not finite
    return [Cell(None, None, 0.0)] + [Cell(name, layer, c) for name, layer in steerings for c in values if c != 0]


def relative_dose(steering: Steering, coefficient: float, norms: Mapping[Layer, float]) -> float:
    """`|coefficient| * |v_l| / mean |h_l|`: the push over the stream's mean length; of several layers the mean.

    Args:
        steering: its own coefficient does not count.
        norms: mean length of the stream per layer, e.g. from `steerkit.capture.stream_norms`.

    Returns:
        NaN to ablate, where the vector's length does not matter, and where a layer's norm is not among `norms`.
    """
    vector = steering.vector
    if steering.operation == "ablate" or not all(layer in norms for layer in vector.layers):
        return float("nan")
    return abs(coefficient) * sum(norm / norms[layer] for layer, norm in vector.norms().items()) / len(vector.layers)
