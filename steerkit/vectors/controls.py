"""Control directions: random, covariance-matched and shuffled-label vectors of equal norm, each with its role.

A control tests whether another direction of the same norm has the same effect. The role is stored in the vector's
`meta` and becomes the column `role` of a sweep's table.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.capture.activations import Activations
from steerkit.models.identity import other_model
from steerkit.probes.folds import of_one_class
from steerkit.vectors.extract import extract_again
from steerkit.vectors.vector import SteeringVector

ROLES = ("vector", "random", "matched", "shuffled", "other")
Vectors = SteeringVector | Mapping[str, SteeringVector]


def random(vectors: Vectors, n: int = 19, seed: int = 0) -> dict[str, SteeringVector]:
    """Return `n` isotropic random directions for each vector, of its norm at every layer (see `random_like`).

    Args:
        vectors: one vector (named "vector") or several by name.
        n: number of controls per vector; with 19, the smallest one-sided rank p-value is 0.05.
        seed: control k is drawn with `seed + k`; for a disjoint set, pass a seed that differs by at least `n`.
            Control k of one vector is parallel to control k of another one. Pool the controls of several vectors only
            if they were drawn with disjoint seeds.

    Returns:
        `NAME/random-0`, `NAME/random-1`, ... with `role` "random" and `control_of` NAME in `meta`.

    Raises:
        ValueError: `n` is negative, or a vector is zero at a layer.

    Example:
        >>> sk.sweep(model, tokenizer, {"calm": v, **sk.controls.random({"calm": v})}, prompts, coefficients=[1])
    """
    return _controls("random", vectors, n, lambda vector, number: random_like(vector, seed + number))


def matched(vectors: Vectors, activations: Activations, n: int = 19, seed: int = 0) -> dict[str, SteeringVector]:
    """Return `n` random directions for each vector with the covariance of the stream, `u ~ N(0, cov(h))`, rescaled.

    An isotropic direction mostly points where the stream does not vary; this one points where it varies. The layers are
    drawn independently, so at several layers at once the pushes do not add up as those of the vector do.

    Args:
        vectors: as in `random`.
        activations: the items whose covariance is matched; they hold every layer of the vectors. The covariance of
            items with several labels includes the difference between the labels; pass the items of one label,
            `acts.where(acts.items["label"] == "negative")`, to exclude it.
        n: number of controls per vector.
        seed: as in `random`.

    Returns:
        `NAME/matched-0`, ..., each with the norm of its vector at every layer.

    Raises:
        ValueError: a layer of the vector was not read, or the items are equal there; the activations are of another
            site, model or adapter than the vector.

    Warns:
        UserWarning: the activations were read at another position than the vector.

    Example:
        >>> sk.controls.matched({"calm": v}, acts)
    """

    def draw(vector: SteeringVector, number: int) -> SteeringVector:
        generator = torch.Generator().manual_seed(int(seed) + number)
        drawn = {}
        for layer in vector.layers:
            rows = activations.at(layer).double()
            weights = torch.randn(len(rows), generator=generator, dtype=torch.float64)
            drawn[layer] = (rows - rows.mean(0)).T @ weights
        return replace(vector, layers=drawn, meta={**vector.meta, "seed": int(seed) + number}).scaled_to(vector)

    _check_read_alike(vectors, activations)
    return _controls("matched", vectors, n, draw)


def shuffled(
    vectors: Vectors,
    activations: Activations,
    n: int = 19,
    seed: int = 0,
    extract: Callable[[Activations], SteeringVector] | None = None,
) -> dict[str, SteeringVector]:
    """Return `n` vectors for each vector, extracted in the same way after the labels were shuffled, rescaled.

    The shuffle is balanced, so that the true difference cancels: under a plain permutation a share of it remains by
    chance, and rescaling to the norm of the vector makes that share large. It is within the groups that have both
    labels, such as contrast pairs; groups with one label exchange it as whole groups (see `shuffle_labels`).

    Args:
        vectors: as in `random`.
        activations: the items that the vectors were extracted from. For a vector with a `positive` and a `negative`
            label, only the items with these labels are shuffled.
        n: number of controls per vector.
        seed: as in `random`.
        extract: function from all activations, relabelled, to a vector; default: the method and labels in the vector's
            `meta` (`extract_again`).

    Returns:
        `NAME/shuffled-0`, ..., each with the norm of its vector at every layer.

    Raises:
        ValueError: no `extract`, and `meta` does not hold the method and the labels; the activations are of another
            site, model or adapter than the vector.

    Warns:
        UserWarning: the activations were read at another position than the vector.

    Example:
        >>> v = sk.difference_in_means(acts)
        >>> sk.controls.shuffled({"calm": v}, acts)
    """

    def draw(vector: SteeringVector, number: int) -> SteeringVector:
        if extract is not None:
            again = extract(shuffle_labels(activations, seed + number, balanced=True))
        else:
            again = extract_again(vector, shuffle_labels(_used_by(vector, activations), seed + number, balanced=True))
        drawn = replace(again.at(*vector.layers), meta={**vector.meta, "seed": int(seed) + number})
        return drawn.scaled_to(vector)

    _check_read_alike(vectors, activations)
    return _controls("shuffled", vectors, n, draw)


def shuffle_labels(
    activations: Activations, seed: int = 0, balanced: bool = False, label: str = "label"
) -> Activations:
    """Return the same activations with their labels shuffled as those of a label without an effect could be.

    In a group with several labels, such as a contrast pair, they are shuffled within the group. Groups with one label,
    such as topics or documents that are labelled as a whole, exchange it as whole groups: the shuffled labels then
    differ by what groups differ by, as the true ones do. Items without a group of their own count as such groups.

    Args:
        balanced: False: a random permutation. True: a random assignment that gives the items (or whole groups) of each
            true label every label in proportion to its frequency, e.g. in exactly half of the contrast pairs the two
            labels are swapped. The means of the shuffled labels then differ by noise, not by a chance share of the true
            difference.
        label: the column of `activations.items` that is shuffled.

    Raises:
        ValueError: no such column, or an item without a label or group.

    Warns:
        UserWarning: whole groups exchange their labels, and fewer than 20 assignments differ: p by rank cannot be 0.05.

    Example:
        >>> shuffle_labels(acts, seed=1, balanced=True).items["label"]
    """
    names, group_of = (_as_text(activations, column) for column in (label, "group"))
    rng = np.random.default_rng(seed)
    own = activations.items[label].to_numpy()
    codes = pd.factorize(group_of)[0]
    parts = np.split(np.argsort(codes, kind="stable"), np.bincount(codes).cumsum()[:-1])
    is_whole = of_one_class(names, codes)
    mixed = [part for part, whole in zip(parts, is_whole, strict=True) if not whole]
    wholes = [part for part, whole in zip(parts, is_whole, strict=True) if whole]
    new = own.copy()
    ranks, start = (rng.permutation(len(mixed)), rng.random()) if balanced and mixed else (None, 0.0)
    for number, part in enumerate(mixed):
        if ranks is None:
            new[part] = rng.permutation(own[part])
        else:
            order = part[np.lexsort((rng.random(len(part)), names[part]))]
            new[order] = np.roll(own[order], int(len(part) * (ranks[number] + start) / len(mixed)))
    if wholes:
        first = np.array([part[0] for part in wholes])
        _warn_of_few(names[first], bool(mixed))
        drawn = _balanced(own[first], names[first], rng) if balanced else rng.permutation(own[first])
        new[np.concatenate(wholes)] = np.repeat(drawn, [len(part) for part in wholes])
    labels = pd.Series(new, activations.items.index, activations.items[label].dtype)
    return replace(activations, items=activations.items.assign(**{label: labels}))


def _as_text(activations: Activations, column: str) -> np.ndarray:
    """A column of the items as text."""
    if column not in activations.items:
        raise ValueError(f"expected a column {column!r} in the items; got {list(activations.items)}. Add it.")
    missing = activations.items[column].isna()
    if missing.any():
        raise ValueError(f"expected a {column} for every item; {missing.sum()} have none. Add them, or drop the items.")
    return activations.items[column].astype(str).to_numpy(dtype=str)


def _balanced(own: np.ndarray, names: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels drawn such that those with one true label get every label in proportion to its frequency."""
    drawn = pd.Series(rng.random(len(names))).groupby(names)
    quantile = (drawn.rank() - rng.random(len(names))) / drawn.transform("size")
    new = own.copy()
    new[quantile.to_numpy().argsort()] = own[names.argsort()]
    return new


def _warn_of_few(names: np.ndarray, are_others: bool) -> None:
    counts = np.unique(names, return_counts=True)[1].tolist()
    if not are_others and len(names) < 20:  # of two labels, 20 groups have 20 assignments at least
        different = math.factorial(len(names)) // math.prod(map(math.factorial, counts))
        if different < 20:
            warnings.warn(
                f"the labels of {len(names)} whole groups are exchanged, which gives {different} different assignments,"
                " the true one among them: p by rank cannot be 0.05. Read more groups.",
                UserWarning,
                stacklevel=3,
            )


def _check_read_alike(vectors: Vectors, activations: Activations) -> None:
    """Refuse activations of another site or model than a vector's; warn of another read position."""
    for name, vector in _named(vectors).items():
        if activations.site != vector.site:
            raise ValueError(f"expected activations at {vector.site}; got {activations.site}. Pass site= to collect.")
        if other := other_model(activations.meta, vector.meta):
            raise ValueError(
                f"expected activations of the model that {name!r} was read from, "
                f"{vector.meta.get('checkpoint', 'unknown')}; got those of one with {other}. Read them from that model."
            )
        positions = vector.meta.get("read_position"), activations.meta.get("read_position")
        if None not in positions and positions[0] != positions[1]:
            warnings.warn(
                f"expected activations at the read position of {name!r}, {positions[0]!r}; got {positions[1]!r}, where "
                "the stream has another covariance and other means. Pass position= to collect.",
                UserWarning,
                stacklevel=3,
            )


def _named(vectors: Vectors) -> Mapping[str, SteeringVector]:
    return {"vector": vectors} if isinstance(vectors, SteeringVector) else vectors


def _used_by(vector: SteeringVector, activations: Activations) -> Activations:
    """Return the items with the vector's `positive` and `negative` labels; all items where it has no `negative`."""
    sides = [vector.meta.get("positive"), vector.meta.get("negative")]
    if None in sides:
        return activations
    return activations.where(activations.items["label"].astype(str).isin([str(side) for side in sides]))


def random_like(vector: SteeringVector, seed: int) -> SteeringVector:
    """Return the vector under a random rotation: `V Q`, with the layers as rows of V and Q a rotation of the stream.

    Each layer is an isotropic random direction of the same norm, and two layers have the same cosine as in `vector`:
    steered at several layers at once, the pushes add up as those of `vector` do.

    Example:
        >>> sk.random_like(vector, seed=0).norms() == vector.norms()  # up to rounding
    """
    return random_like_all([vector], seed)[0]


def random_like_all(vectors: Sequence[SteeringVector], seed: int) -> list[SteeringVector]:
    """Return several vectors of one width under one random rotation, so that they keep their cosines.

    Steered together, they push as far as the given vectors do together; opposite vectors stay opposite.

    Example:
        >>> random_like_all([calm, -1 * calm], seed=0)  # two opposite vectors
    """
    if not vectors:
        return []
    generator = torch.Generator().manual_seed(int(seed))
    rows = torch.stack([row.double() for vector in vectors for row in vector.layers.values()])
    drawn = torch.stack([torch.randn(rows.shape[1], generator=generator) for _ in rows])
    axes, _ = _frame(drawn.double())
    _, mixed = _frame(rows)
    rotated = iter((axes @ mixed).T)
    found = []
    for vector in vectors:
        layers = {layer: next(rotated) for layer in vector.layers}
        noise = replace(vector, layers=layers, meta={**vector.meta, "seed": int(seed)}).scaled_to(vector)
        found.append(with_role(noise, "random"))
    return found


def with_role(vector: SteeringVector, role: str, of: str | None = None) -> SteeringVector:
    """Return the same vector with a role in its `meta`.

    Args:
        role: one of `ROLES`; `"other"` for, e.g., another agent's vector.
        of: name of the vector that it is a control of; None for all vectors of a sweep.

    Raises:
        ValueError: an unknown role.
    """
    if role not in ROLES:
        raise ValueError(f"expected a role among {ROLES}; got {role!r}. Pass one of them.")
    method = {} if role in ("vector", "other") else {"method": role}
    return replace(vector, meta={**vector.meta, **method, "role": role, "control_of": of})


def roles_of(named: Mapping[str, SteeringVector]) -> dict[str, tuple[str, str | None]]:
    """Return for each vector by name its role, and the name of the vector that it is a control of.

    The second entry is None for a vector that is no control, or that is a control of every vector in `named`.
    """
    roles = {}
    for name, vector in named.items():
        of = vector.meta.get("control_of")
        roles[name] = (str(vector.meta.get("role", "vector")), of if of in named and of != name else None)
    return roles


def _controls(
    role: str, vectors: Vectors, n: int, draw: Callable[[SteeringVector, int], SteeringVector]
) -> dict[str, SteeringVector]:
    if isinstance(n, bool) or not isinstance(n, Integral) or n < 0:
        raise ValueError(f"expected the number of controls per vector, an integer from 0; got {n!r}. Pass e.g. 19.")
    return {
        f"{name}/{role}-{number}": with_role(draw(vector, number), role, of=name)
        for name, vector in _named(vectors).items()
        for number in range(n)
    }


def _frame(rows: Float[Tensor, "layer d_model"]) -> tuple[Float[Tensor, "d_model axis"], Float[Tensor, "axis layer"]]:
    """Return orthonormal axes and the rows in them: `rows.T = axes @ mixed`, the first row along the first axis."""
    axes, mixed = torch.linalg.qr(rows.T)
    sign = torch.where(mixed.diagonal() < 0, -1.0, 1.0)
    return axes * sign, mixed * sign[:, None]
