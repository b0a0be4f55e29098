"""LEACE: erase a concept from activations, and measure on held-out rows what a probe still finds."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.capture.activations import Activations
from steerkit.capture.layers import Layer, Layers, layer_index, layer_list
from steerkit.io.files import sha256
from steerkit.io.json import canonical_json
from steerkit.models.identity import other_model
from steerkit.models.site_names import DEFAULT
from steerkit.probes import file
from steerkit.probes.folds import deal_folds, permuted_labels, permuted_over
from steerkit.probes.probe import MAX_ITER, TOLERANCE, encoded
from steerkit.probes.solver import solver_for
from steerkit.stats.mean import accuracy_interval

PARTS = ("mean", "right", "left")
FIELDS = ("classes", "layers", "sources")
EQUAL = 1e-6
"""Correlations below it are class means that are equal up to the rounding of float32 activations."""


@dataclass(frozen=True, eq=False)
class Erasure:
    """The map of one layer, `x <- x - (x - mean) right left`, in float64.

    Args:
        mean: `[d_model]`, the mean of the items it was fitted on.
        right: `[d_model, rank]`, what is read of the activation.
        left: `[rank, d_model]`, what is subtracted. `left @ right` is the identity, so the map is a projection.
        source: hash of what it was fitted on: activations, labels and shrinkage; empty if unknown.
    """

    mean: Float[Tensor, " d_model"]
    right: Float[Tensor, "d_model rank"]
    left: Float[Tensor, "rank d_model"]
    source: str = ""

    def __call__(self, x: Float[Tensor, "item d_model"]) -> Float[Tensor, "item d_model"]:
        """Return the erased activations, in float64 on the CPU."""
        wide = x.detach().cpu().double()
        return wide - (wide - self.mean) @ self.right @ self.left

    def content(self) -> str:
        """Return 12 hexadecimal digits that identify the map: its source, or if that is unknown a hash of its values.

        The last bits of a fit depend on the number of threads; what it was fitted on does not.
        """
        if self.source:
            return self.source
        parts = b"".join(part.contiguous().numpy().tobytes() for part in (self.mean, self.right, self.left))
        return sha256(parts)[:12]


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

    def save(self, path: str | Path) -> None:
        """Write a safetensors file atomically: tensors `mean.N`, `right.N`, `left.N`, and a header as JSON.

        Its format is that of vectors, see docs/vector-format.md. A sweep that erases is resumed with the loaded eraser.

        Raises:
            ValueError: classes that are neither strings nor numbers; nothing is written.

        Example:
            >>> eraser.save("agents.safetensors")
            >>> eraser = sk.Eraser.load("agents.safetensors")
        """
        tensors = {
            f"{part}.{layer}": getattr(erasure, part) for layer, erasure in self.layers.items() for part in PARTS
        }
        sources = [erasure.source for erasure in self.layers.values()]
        fields = {"classes": list(self.classes), "layers": list(self.layers), "sources": sources}
        file.save(path, "eraser", tensors, self.meta, self.site, fields)

    @classmethod
    def load(cls, path: str | Path) -> Eraser:
        """Read a file that `save` wrote; its erasures have the same names in a sweep.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: not a file of an eraser, damaged, or of an unknown hook point.
        """
        tensors, meta, site, fields = file.load(path, "eraser", dict.fromkeys(FIELDS, (list,)))
        try:
            layers = dict(zip(map(file.checked_layer, fields["layers"]), fields["sources"], strict=True))
            if {f"{part}.{layer}" for layer in layers for part in PARTS} != set(tensors) or not layers:
                raise ValueError(f"expected {PARTS} of each of the layers {list(layers)}; got {sorted(tensors)}")
            found = {}
            for layer, source in layers.items():
                mean, right, left = (tensors[f"{part}.{layer}"] for part in PARTS)
                file.check_tensor("mean", mean, (mean.numel(),))
                file.check_tensor("right", right, (len(mean), len(left)))
                file.check_tensor("left", left, (len(left), len(mean)))
                found[layer] = Erasure(mean, right, left, str(source))
            return cls(found, file.classes_of(fields["classes"]), meta, site)
        except ValueError as error:
            raise ValueError(f"{path}: {error}. Save the eraser again.") from error

    def at(self, layer: Layer) -> Erasure:
        """Return the erasure of one layer; `ValueError` if there is none."""
        return self.layers[list(self.layers)[layer_index(list(self.layers), layer)]]

    def apply(self, acts: Activations, foreign: bool = False) -> Activations:
        """Return activations with the concept erased, at each of their layers.

        Args:
            foreign: allow activations of other weights than those that it was fitted on, as for `Steering`.

        Raises:
            ValueError: a layer without an erasure, another site, width or model.
        """
        width = next(iter(self.layers.values())).mean.shape[0]
        if acts.site != self.site:
            raise ValueError(f"expected activations of {self.site}; got {acts.site}. Read the same site.")
        if acts.resid.shape[-1] != width:
            raise ValueError(f"expected activations of width {width}; got {acts.resid.shape[-1]}. Read the same model.")
        if (other := other_model(acts.meta, self.meta)) and not foreign:
            raise ValueError(
                f"expected activations of the eraser's model, {self.meta.get('checkpoint', 'unknown')}; got those of "
                f"one with {other}. Read them from that model, or pass foreign=True."
            )
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
    layers = {
        layer: replace(fit_erasure(acts.at(layer), codes, len(classes), shrinkage), source=source)
        for layer, source in _sources(acts, acts.items[label].astype(str).tolist(), float(shrinkage)).items()
    }
    meta = {**acts.meta, "label": label, "n": items, "shrinkage": shrinkage}
    return Eraser(layers, classes, meta, acts.site)


def _sources(acts: Activations, labels: list[str], shrinkage: float) -> dict[Layer, str]:
    """Layer -> hash of what the erasure of that layer is fitted on."""
    about = canonical_json({"method": "leace", "labels": labels, "shrinkage": shrinkage}).encode()
    values = {layer: acts.at(layer).detach().cpu().float().contiguous().numpy().tobytes() for layer in acts.layers}
    return {layer: sha256(about + part)[:12] for layer, part in values.items()}


@dataclass(frozen=True, eq=False)
class Spread:
    """The principal axes of the items of one layer: what the erasures of all labels of these items share.

    Args:
        mean: `[d_model]`, of the items.
        axes: `[axis, d_model]`, orthonormal.
        deviation: `[axis]`, the standard deviation along each, with shrinkage.
        scores: `[item, axis]`, the items along each, centred, in units of `scale`.
        scale: `[axis]`.
    """

    mean: Float[Tensor, " d_model"]
    axes: Float[Tensor, "axis d_model"]
    deviation: Float[Tensor, " axis"]
    scores: Float[Tensor, "item axis"]
    scale: Float[Tensor, " axis"]


def spread_of(x: Float[Tensor, "item d_model"], shrinkage: float = 0.0) -> Spread:
    """Return the principal axes of activations.

    With `x - mean = U S V'` (thin), `Cov(x) = V S^2 V' / n`, so the covariance itself is not formed. It is formed where
    that is faster and shrinkage keeps small variances away from zero, which squaring makes inexact.
    """
    wide = x.detach().cpu().double()
    mean = wide.mean(0)
    centred = wide - mean
    items, width = wide.shape
    if shrinkage and items > width:
        squares, vectors = torch.linalg.eigh(centred.T @ centred)
        squares, vt, u, s = squares.clamp(min=0), vectors.T, centred @ vectors, torch.ones(width, dtype=torch.float64)
    else:
        u, s, vt = torch.linalg.svd(centred, full_matrices=False)
        kept = s > s.max() * max(wide.shape) * torch.finfo(torch.float64).eps
        u, s, vt = u[:, kept], s[kept], vt[kept]
        squares = s**2
    variance = (1 - shrinkage) * squares / items + shrinkage * squares.sum() / (items * width)
    return Spread(mean, vt, variance.sqrt(), u, s)


def fit_erasure(
    x: Float[Tensor, "item d_model"] | Spread, codes: Tensor, n_classes: int, shrinkage: float = 0.0
) -> Erasure:
    """Return the erasure of class indices `[item]` from activations, or from their `spread_of`; see `leace`."""
    spread = x if isinstance(x, Spread) else spread_of(x, shrinkage)
    z = torch.nn.functional.one_hot(codes, n_classes).double()
    cross = spread.scores.T @ (z - z.mean(0))
    whitened = (spread.scale / spread.deviation)[:, None] * cross / len(z)  # W Cov(x, z), in the basis of the axes
    basis, size, _ = torch.linalg.svd(whitened, full_matrices=False)
    basis = basis[:, size > EQUAL]
    right = spread.axes.T @ (basis / spread.deviation[:, None])
    left = (basis * spread.deviation[:, None]).T @ spread.axes
    return Erasure(spread.mean, right, left)


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
        right = {features: np.zeros(len(codes)) for features in kinds}
        for left_out, (fitted, probed) in enumerate(splits):
            kept = torch.from_numpy(fold == left_out)
            spread = spread_of(x[fitted], shrinkage)
            for features, concept in kinds.items():
                seen = x if concept is None else fit_erasure(spread, concept[fitted], len(hidden_classes))(x)
                _, _, p = solver_for(seen, "steerkit")(codes[None], probed[None], len(classes), c, TOLERANCE, MAX_ITER)
                right[features][kept.numpy()] = (p[0].argmax(0) == codes)[kept].double().numpy()
        for features, each in right.items():
            interval = accuracy_interval(each, groups=group_of.tolist())
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


def _labels(acts: Activations, column: str) -> tuple[Tensor, tuple[Hashable, ...]]:
    if column not in acts.items:
        raise ValueError(f"expected a column {column!r} in acts.items; got {list(acts.items)}. Add it or name another.")
    return encoded(acts.items[column])
