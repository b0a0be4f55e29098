"""LEACE: erase a concept from activations, and measure on held-out rows what a probe still finds."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.capture.activations import Activations
from steerkit.capture.layers import Layer, Layers, layer_index, layer_list
from steerkit.models.site_names import DEFAULT
from steerkit.probes.folds import deal_folds, permuted_labels, permuted_over
from steerkit.probes.probe import MAX_ITER, TOLERANCE, encoded
from steerkit.probes.solver import solver_for
from steerkit.stats.mean import accuracy_interval

EQUAL = 1e-6
"""Correlations below it are class means that are equal up to the rounding of float32 activations."""


@dataclass(frozen=True, eq=False)
class Erasure:
    """The map of one layer, `x <- x - (x - mean) right left`, in float64.

    Args:
        mean: `[d_model]`, the mean of the items it was fitted on.
        right: `[d_model, rank]`, what is read of the activation.
        left: `[rank, d_model]`, what is subtracted. `left @ right` is the identity, so the map is a projection.
    """

    mean: Float[Tensor, " d_model"]
    right: Float[Tensor, "d_model rank"]
    left: Float[Tensor, "rank d_model"]

    def __call__(self, x: Float[Tensor, "item d_model"]) -> Float[Tensor, "item d_model"]:
        """Return the erased activations, in float64 on the CPU."""
        wide = x.detach().cpu().double()
        return wide - (wide - self.mean) @ self.right @ self.left

    def content(self) -> str:
        """Return 12 hexadecimal digits that depend on the map alone."""
        parts = b"".join(part.contiguous().numpy().tobytes() for part in (self.mean, self.right, self.left))
        return hashlib.sha256(parts).hexdigest()[:12]


@dataclass(frozen=True, eq=False, repr=False)
class Eraser:
    """Erasures of one concept by layer: the result of `leace`. `==` and `hash` compare identity.

    Args:
        layers: layer -> `Erasure`.
        classes: the labels that are erased, sorted.
        meta: provenance of the activations, the label column, number of items, shrinkage.
        site: what was read of each block.

    Example:
        >>> eraser = sk.leace(acts, label="agent")
        >>> erased = eraser.apply(acts)
    """

    layers: Mapping[Layer, Erasure]
    classes: tuple[Hashable, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    site: str = DEFAULT

    def __repr__(self) -> str:
        rank = max(erasure.left.shape[0] for erasure in self.layers.values())
        return f"Eraser({len(self.layers)} layers, {len(self.classes)} classes, rank {rank})"

    def at(self, layer: Layer) -> Erasure:
        """Return the erasure of one layer; `ValueError` if there is none."""
        return self.layers[list(self.layers)[layer_index(list(self.layers), layer)]]

    def apply(self, acts: Activations) -> Activations:
        """Return activations with the concept erased, at each of their layers.

        Raises:
            ValueError: a layer without an erasure, another site or width.
        """
        width = next(iter(self.layers.values())).mean.shape[0]
        if acts.site != self.site:
            raise ValueError(f"expected activations of {self.site}; got {acts.site}. Read the same site.")
        if acts.resid.shape[-1] != width:
            raise ValueError(f"expected activations of width {width}; got {acts.resid.shape[-1]}. Read the same model.")
        erased = [self.at(layer)(acts.at(layer)).float() for layer in acts.layers]
        meta = {**acts.meta, "erased": str(self.meta.get("label"))}
        return replace(acts, resid=torch.stack(erased, 1), meta=meta)


def leace(acts: Activations, label: str = "label", shrinkage: float = 0.0) -> Eraser:
    """Fit the erasure of a concept (LEACE): no linear probe on the erased items beats a constant.

    Formula, with x `[d_model]` an activation, z `[class]` the one-hot label, W the inverse square root of the
    covariance of x (pseudoinverse):

        x <- x - W^+ P W (x - mean x),    P the orthogonal projection onto the columns of W Cov(x, z).

    Of all affine maps that leave `Cov(x, z) = 0` (all classes have the same mean), it changes the items least, in mean
    square. The rank is the number of classes minus 1.

    The guarantee holds for the items it was fitted on. With few items W is noise, and held-out items are still
    separable: read several times more items than `d_model`, or pass `shrinkage`. Score held-out rows with
    `probe_erased`.

    Args:
        acts: the activations.
        label: the column of `acts.items` with the classes, two at least.
        shrinkage: s in [0, 1]: the covariance becomes `(1 - s) Cov(x) + s trace(Cov(x)) / d_model * identity`. The
            guarantee is the same for every s; the change is the smallest for 0. 1 projects out the differences between
            the class means, orthogonally.

    Returns:
        An `Eraser`, for each layer of `acts`.

    Raises:
        ValueError: no such column, a missing label, one class only, or `shrinkage` outside [0, 1].

    Warns:
        UserWarning: not more items than `d_model`, with `shrinkage` 0.

    Example:
        >>> eraser = sk.leace(acts, label="agent")
        >>> sk.fit_probe(eraser.apply(acts).at(14), acts.items["agent"])
        >>> sk.generate(model, tokenizer, prompts, max_new_tokens=40, steering=sk.erase(eraser, layer=14))

    Source: Belrose et al. 2023, "LEACE: Perfect linear concept erasure in closed form", arXiv 2306.03819, theorem 4.3.
    """
    codes, classes = _labels(acts, label)
    if isinstance(shrinkage, bool) or not isinstance(shrinkage, int | float) or not 0 <= shrinkage <= 1:
        raise ValueError(f"expected shrinkage between 0 and 1; got {shrinkage!r}. Pass a number such as 0.1.")
    items, width = len(acts), acts.resid.shape[-1]
    if items <= width and shrinkage == 0:
        warnings.warn(
            f"{items} items of width {width}: the erasure holds for these items, and held-out items stay separable. "
            "Read more items than d_model, or pass shrinkage=.",
            UserWarning,
            stacklevel=2,
        )
    layers = {layer: fit_erasure(acts.at(layer), codes, len(classes), shrinkage) for layer in acts.layers}
    meta = {**acts.meta, "label": label, "n": items, "shrinkage": shrinkage}
    return Eraser(layers, classes, meta, acts.site)


def fit_erasure(x: Float[Tensor, "item d_model"], codes: Tensor, n_classes: int, shrinkage: float = 0.0) -> Erasure:
    """Return the erasure of class indices `[item]` from activations; see `leace`.

    With `x - mean = U S V'` (thin), `Cov(x) = V S^2 V' / n`, so the covariance itself is not formed.
    """
    wide = x.detach().cpu().double()
    mean = wide.mean(0)
    z = torch.nn.functional.one_hot(codes, n_classes).double()
    u, s, vt = torch.linalg.svd(wide - mean, full_matrices=False)
    kept = s > s.max() * max(wide.shape) * torch.finfo(torch.float64).eps
    u, s, vt = u[:, kept], s[kept], vt[kept]
    variance = (1 - shrinkage) * s**2 / len(wide) + shrinkage * (s**2).sum() / (len(wide) * wide.shape[1])
    whitened = (s / variance.sqrt())[:, None] * (u.T @ (z - z.mean(0))) / len(wide)  # W Cov(x, z), in the basis V
    basis, size, _ = torch.linalg.svd(whitened, full_matrices=False)
    basis = basis[:, size > EQUAL]
    right = vt.T @ (basis / variance.sqrt()[:, None])
    left = (basis * variance.sqrt()[:, None]).T @ vt
    return Erasure(mean, right, left)


def probe_erased(
    acts: Activations,
    label: str = "label",
    erase: str | None = None,
    group: str = "group",
    layers: Layers = "all",
    folds: int = 5,
    c: float = 1.0,
    shrinkage: float = 0.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure the accuracy of a linear probe before and after erasure, on rows that neither of them was fitted on.

    For each fold, half of the other folds fit the erasure, the other half (erased) the probe, and the fold is scored. A
    probe fitted on the items of the erasure would find nothing, by construction. The rows of the table, per layer:

    - `features == "resid"`: the same probe on the same items, nothing erased.
    - `features == "erased"`: the classes of column `erase` are erased.
    - `features == "erased_shuffled"`: control; the erasure of permuted labels, which has the same rank. Where every
      group has one class, whole groups exchange it.

    Args:
        acts: the activations.
        label: the column of `acts.items` that the probe predicts.
        erase: the column that is erased; default `label`.
        group: the column with the group ids; a group stays in one fold.
        layers: `"all"` layers that were read, one layer, or several.
        folds: number of folds, 3 at least.
        c: inverse strength of the penalty, as in `fit_probe`.
        shrinkage: as in `leace`.
        seed: seed of the folds and of the permutation.

    Returns:
        Columns `layer`, `features`, `accuracy`, `accuracy_low`, `accuracy_high` (95 % over groups), `majority` (share
        of the largest class), `n`, `n_groups`, `folds`.

    Raises:
        ValueError: a column, layer, label or group is missing, fewer than 3 folds, fewer groups than folds, or a class
            that is missing from one of the halves.

    Example:
        >>> sk.probe_erased(acts, label="agent").pivot(index="layer", columns="features", values="accuracy")

    Source: Belrose et al. 2023, arXiv 2306.03819.
    """
    erased = label if erase is None else erase
    if group not in acts.items:
        raise ValueError(f"expected a column {group!r} in acts.items; got {list(acts.items)}. Add it or name another.")
    codes, classes = _labels(acts, label)
    hidden, hidden_classes = _labels(acts, erased)
    chosen = list(acts.layers) if isinstance(layers, str) and layers == "all" else layer_list(layers)
    if not chosen:
        raise ValueError("expected one layer at least; got none. Pass layers='all' for all that were read.")
    group_of, fold = deal_folds(acts.items[group], codes.numpy(), classes, folds, seed)
    shuffled = _shuffled(hidden, group_of, fold, np.random.default_rng([seed, 2]))
    kinds = {"resid": None, "erased": hidden, "erased_shuffled": shuffled}
    splits = [_halves(fold, left_out, folds) for left_out in range(folds)]
    for fitted, probed in splits:
        if len(codes[probed].unique()) < len(classes) or len(hidden[fitted].unique()) < len(hidden_classes):
            raise ValueError(
                "expected every class in both halves of each training fold; got one without. Read more groups, or drop "
                "the rare class."
            )
    rows = []
    for layer in chosen:
        x = acts.at(layer)
        for features, concept in kinds.items():
            right = np.zeros(len(codes))
            for left_out, (fitted, probed) in enumerate(splits):
                kept = torch.from_numpy(fold == left_out)
                seen = x if concept is None else _erased(x, concept, fitted, len(hidden_classes), shrinkage)
                fit = solver_for(seen, "steerkit")
                _, _, p = fit(codes[None], probed[None], len(classes), c, TOLERANCE, MAX_ITER)
                right[kept.numpy()] = (p[0].argmax(0) == codes)[kept].double().numpy()
            interval = accuracy_interval(right, groups=group_of.tolist())
            rows.append((layer, features, interval.mean, interval.low, interval.high))
    table = pd.DataFrame(rows, columns=["layer", "features", "accuracy", "accuracy_low", "accuracy_high"])
    majority = float(np.bincount(codes.numpy()).max() / len(codes))
    return table.assign(majority=majority, n=len(codes), n_groups=len(set(group_of.tolist())), folds=folds)


def _shuffled(labels: Tensor, group_of: np.ndarray, fold: np.ndarray, rng: np.random.Generator) -> Tensor:
    """The labels permuted over items, or over whole groups of several items, where each has one class."""
    several = group_of.max() + 1 < len(group_of)
    if several and permuted_over(labels, group_of) == "whole groups":
        return permuted_labels(labels, group_of, fold, rng)
    return labels[torch.from_numpy(rng.permutation(len(labels)))]


def _halves(fold: np.ndarray, left_out: int, folds: int) -> tuple[Tensor, Tensor]:
    """The items of the erasure and those of the probe, as masks, where one fold is left out."""
    others = [(left_out + step) % folds for step in range(1, folds)]
    half = len(others) // 2
    return tuple(torch.from_numpy(np.isin(fold, part)) for part in (others[:half], others[half:]))  # type: ignore[return-value]


def _erased(x: Tensor, concept: Tensor, fitted: Tensor, n_classes: int, shrinkage: float) -> Tensor:
    return fit_erasure(x[fitted], concept[fitted], n_classes, shrinkage)(x)


def _labels(acts: Activations, column: str) -> tuple[Tensor, tuple[Hashable, ...]]:
    if column not in acts.items:
        raise ValueError(f"expected a column {column!r} in acts.items; got {list(acts.items)}. Add it or name another.")
    return encoded(acts.items[column])
