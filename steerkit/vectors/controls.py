"""Control directions: random, covariance-matched and shuffled-label vectors of equal norm, each with its role.

A control answers "would another direction of this norm do as much?". Each kind has one definition here; the role is
stored in the vector's `meta` and becomes the column `role` of a sweep's table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.capture.activations import Activations
from steerkit.vectors.extract import extract_again
from steerkit.vectors.vector import SteeringVector

ROLES = ("vector", "random", "matched", "shuffled", "other")
Vectors = SteeringVector | Mapping[str, SteeringVector]


def random(vectors: Vectors, n: int = 19, seed: int = 0) -> dict[str, SteeringVector]:
    """`n` isotropic random directions for each vector, of its norm at every layer (see `random_like`).

    Args:
        vectors: one (named "vector") or several by name.
        n: how many; with 19, the smallest one-sided rank p-value is 0.05.

    Returns:
        `NAME/random-0`, `NAME/random-1`, ...

    Example:
        >>> sk.sweep(model, tokenizer, {"calm": v, **sk.controls.random({"calm": v})}, prompts, coefficients=[1])
    """
    return _controls("random", vectors, n, lambda vector, number: random_like(vector, seed + number))


def matched(vectors: Vectors, activations: Activations, n: int = 19, seed: int = 0) -> dict[str, SteeringVector]:
    """`n` random directions for each vector with the covariance of the stream: `u ~ N(0, cov(h))`, rescaled.

    An isotropic direction mostly points where the stream does not vary; this one points where it varies.

    Args:
        activations: what the covariance is of; they hold every layer of the vectors.

    Returns:
        `NAME/matched-0`, ..., each with the norm of its vector at every layer.
    """

    def draw(vector: SteeringVector, number: int) -> SteeringVector:
        generator = torch.Generator().manual_seed(seed + number)
        drawn = {}
        for layer in vector.layers:
            rows = activations.at(layer).double()
            drawn[layer] = (rows - rows.mean(0)).T @ torch.randn(len(rows), generator=generator, dtype=torch.float64)
        return SteeringVector(drawn, {**vector.meta, "seed": seed + number}).scaled_to(vector)

    return _controls("matched", vectors, n, draw)


def shuffled(
    vectors: Vectors,
    activations: Activations,
    n: int = 19,
    seed: int = 0,
    extract: Callable[[Activations], SteeringVector] | None = None,
) -> dict[str, SteeringVector]:
    """`n` vectors for each vector, extracted in the same way after the labels were permuted (`shuffle_labels`).

    Args:
        activations: what the vectors were extracted from.
        extract: how; default: the method and labels in the vector's `meta`.

    Returns:
        `NAME/shuffled-0`, ..., each with the norm of its vector at every layer.

    Raises:
        ValueError: no `extract`, and `meta` does not say how the vector was extracted.
    """

    def draw(vector: SteeringVector, number: int) -> SteeringVector:
        permuted = shuffle_labels(activations, seed + number)
        again = extract(permuted) if extract is not None else extract_again(vector, permuted)
        return replace(again.at(*vector.layers), meta={**vector.meta, "seed": seed + number}).scaled_to(vector)

    return _controls("shuffled", vectors, n, draw)


def shuffle_labels(activations: Activations, seed: int = 0) -> Activations:
    """The same activations with their labels permuted within each group.

    Where no group holds two different labels, the labels are permuted over all items.
    """
    rng = np.random.default_rng(seed)
    labels = activations.items["label"].copy()
    within = (activations.items.groupby("group")["label"].nunique() > 1).any()
    parts: Sequence[Any] = (
        [rows.index for _, rows in activations.items.groupby("group", sort=False)] if within else [labels.index]
    )
    for index in parts:
        labels.loc[index] = rng.permutation(labels.loc[index].to_numpy())
    return replace(activations, items=activations.items.assign(label=labels))


def random_like(vector: SteeringVector, seed: int) -> SteeringVector:
    """`vector` under a random rotation: `V Q`, V its layers as rows, Q a random rotation of the stream.

    Each layer is an isotropic random direction of the same norm, and two layers have the cosine that they have in
    `vector`: steered at several layers at once, the pushes add up as those of `vector` do.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randn(vector.d_model, generator=generator) for _ in vector.layers])
    axes, _ = _frame(drawn.double())
    _, mixed = _frame(torch.stack([row.double() for row in vector.layers.values()]))
    noise = dict(zip(vector.layers, (axes @ mixed).T, strict=True))
    rotated = SteeringVector(noise, {**vector.meta, "seed": seed}).scaled_to(vector)
    return with_role(rotated, "random")


def with_role(vector: SteeringVector, role: str, of: str | None = None) -> SteeringVector:
    """The same vector marked as a control.

    Args:
        role: one of `ROLES`; `"other"` for, e.g., another agent's vector.
        of: name of the vector that it is a control of; None for all vectors of a sweep.
    """
    if role not in ROLES:
        raise ValueError(f"expected a role among {ROLES}; got {role!r}.")
    method = {} if role in ("vector", "other") else {"method": role}
    return replace(vector, meta={**vector.meta, **method, "role": role, "control_of": of})


def roles_of(named: Mapping[str, SteeringVector]) -> dict[str, tuple[str, str | None]]:
    """For each vector by name: its role, and the name of the vector that it is a control of.

    None as second entry: it is no control, or a control of every vector among `named`.
    """
    found = {}
    for name, vector in named.items():
        of = vector.meta.get("control_of")
        found[name] = (str(vector.meta.get("role", "vector")), of if of in named and of != name else None)
    return found


def _controls(
    role: str, vectors: Vectors, n: int, draw: Callable[[SteeringVector, int], SteeringVector]
) -> dict[str, SteeringVector]:
    named = {"vector": vectors} if isinstance(vectors, SteeringVector) else vectors
    return {
        f"{name}/{role}-{number}": with_role(draw(vector, number), role, of=name)
        for name, vector in named.items()
        for number in range(n)
    }


def _frame(rows: Float[Tensor, "layer d_model"]) -> tuple[Float[Tensor, "d_model axis"], Float[Tensor, "axis layer"]]:
    """Orthonormal axes, and the rows in them: `rows.T = axes @ mixed`, the first row along the first axis."""
    axes, mixed = torch.linalg.qr(rows.T)
    sign = torch.where(mixed.diagonal() < 0, -1.0, 1.0)
    return axes * sign, mixed * sign[:, None]
