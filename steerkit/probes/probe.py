"""Probes: linear classifiers on the residual stream, with controls."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerkit.capture.activations import Activations, facts_html, shown_layers
from steerkit.capture.layers import EMBED, Layer, Layers, layer_list, plain_layer
from steerkit.models.site_names import DEFAULT, check_name
from steerkit.probes import file
from steerkit.probes.folds import deal_folds, permuted_labels, permuted_over
from steerkit.probes.solver import Fit, solver_for
from steerkit.stats.areas import fold_roc_auc
from steerkit.stats.controls import ControlBand, control_band
from steerkit.stats.mean import Interval, accuracy_interval

PERMUTATIONS = 5
LENGTH_POSITION = ["n_tokens", "start"]
TOLERANCE = 1e-5
MAX_ITER = 1000
Solver = Literal["steerkit", "scikit-learn"]


@dataclass(frozen=True, eq=False, repr=False)
class Probe:
    """A linear classifier on raw activations: `p(k | x) = softmax_k(x @ weights.T + bias)`.

    The fit is on standardised features, but `weights` is mapped back: `w_raw = w_std / scale`. A direction left in
    standardised space would be wrong for steering: each feature would be pushed `scale` times too far.
    `==` and `hash` compare identity.

    Args:
        classes: the labels, sorted, in the order of the rows.
        weights: `[class, d_model]` in float64, in logits per unit of activation.
        bias: `[class]` in float64, in logits.
        layer: where it was fitted; None if unknown.
        site: what was read of the block there.
        meta: provenance of the activations.

    Example:
        >>> probe = sk.fit_probe(acts, "label", layer=14)
        >>> probe.predict(acts.at(14))
    """

    classes: tuple[Hashable, ...]
    weights: Float[Tensor, "class d_model"]
    bias: Float[Tensor, " class"]
    layer: Layer | None = None
    site: str = DEFAULT
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        where = "" if self.layer is None else f", {self.site} of layer {self.layer}"
        return f"Probe(classes {_shown_classes(self.classes)}, d_model {self.weights.shape[1]}{where})"

    def save(self, path: str | Path) -> None:
        """Write a safetensors file atomically: tensors `weights` and `bias`, and a header as JSON.

        Its format is that of vectors, see docs/vector-format.md.

        Raises:
            ValueError: classes that are neither strings nor numbers; nothing is written.

        Example:
            >>> probe.save("probe.safetensors")
            >>> probe = sk.Probe.load("probe.safetensors")
        """
        fields = {"classes": list(self.classes), "layer": self.layer}
        file.save(path, "probe", {"weights": self.weights, "bias": self.bias}, self.meta, self.site, fields)

    @classmethod
    def load(cls, path: str | Path) -> Probe:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: not a file of a probe, damaged, or of an unknown hook point.
        """
        tensors, meta, site, fields = file.load(path, "probe", {"classes": (list,), "layer": (int, str, NoneType)})
        try:
            if set(tensors) != {"weights", "bias"}:
                raise ValueError(f"expected the tensors weights and bias; got {sorted(tensors)}")
            classes = file.classes_of(fields["classes"])
            weights, bias = tensors["weights"], tensors["bias"]
            file.check_tensor("weights", weights, (len(classes), weights.shape[-1]))
            file.check_tensor("bias", bias, (len(classes),))
            layer = None if fields["layer"] is None else file.checked_layer(fields["layer"])
            return cls(classes, weights, bias, layer, site, meta)
        except ValueError as error:
            raise ValueError(f"{path}: {error}. Save the probe again.") from error

    def direction(self, cls: Hashable) -> Float[Tensor, " d_model"]:
        """Return the unit direction that raises class k: `w_k - mean_{j != k} w_j` over its L2 norm.

        Raises:
            ValueError: an unknown class, or all weights are 0.
        """
        if cls not in self.classes:
            raise ValueError(f"expected one of the classes {list(self.classes)}; got {cls!r}. Name one of those.")
        if not self.weights.any():
            raise ValueError("expected weights other than 0; all are 0, as where all items are equal. Drop this layer.")
        return _directions(self.weights)[self.classes.index(cls)]

    def scores(self, x: Float[Tensor, "item d_model"]) -> Float[Tensor, "item class"]:
        """Return the probability of each class, `[item, class]` in float64 on the CPU.

        Raises:
            ValueError: x has another width than the weights.
        """
        if x.ndim != 2 or x.shape[1] != self.weights.shape[1]:
            raise ValueError(f"expected x of shape [item, {self.weights.shape[1]}]; got {list(x.shape)}. Reshape it.")
        return torch.softmax(x.cpu().double() @ self.weights.T + self.bias, dim=1)

    def predict(self, x: Float[Tensor, "item d_model"]) -> list[Hashable]:
        """Return the most probable class of each item; the first of them on a tie."""
        return [self.classes[k] for k in self.scores(x).argmax(dim=1).tolist()]


@dataclass(frozen=True, eq=False, repr=False)
class ProbeResult:
    """Held-out accuracy of probes at every layer, with controls: the result of `probe_layers`.

    `==` and `hash` compare identity.

    Args:
        table: two rows per layer (`true`, `shuffled` labels), one for the nested choice of the layer, one for length
            and position. Columns:
            `layer`: a layer, `"nested"`, or None for length and position.
            `features`: `resid` or `length_position`.
            `labels`: `true` or `shuffled`.
            `accuracy`: share of held-out items.
            `accuracy_low`, `accuracy_high`: 95 % interval over groups (`accuracy_interval`); for shuffled labels the
            95 % prediction interval of a further permutation, NaN where most of the five have one accuracy.
            `roc_auc`: mean over classes, each against the rest, of the share of pairs of items of one fold in which the
            item of the class has the higher probability; ties count one half.
            `n` items, `n_groups`, `n_classes`, `folds`.
        confusion: layer -> counts of held-out items `[class, class]`; rows are true, columns predicted.
        directions: layer -> `Probe.direction` of each class `[class, d_model]`, from all items; zero if all are equal.
        classes: the labels, sorted, in the order of the rows.
        meta: provenance of the activations, the arguments, `majority_accuracy` (share of the largest class),
            `embed_read`, and `nested_layers`: the layer chosen within each training fold.
    """

    table: pd.DataFrame
    confusion: Mapping[Layer, Int[np.ndarray, "class class"]]
    directions: Mapping[Layer, Float[Tensor, "class d_model"]]
    classes: tuple[Hashable, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"ProbeResult({', '.join(f'{name} {value}' for name, value in self._summary().items())})"

    def _repr_html_(self) -> str:
        """Return the summary and the table as HTML, for notebooks; all texts are escaped."""
        table = self.table.to_html(escape=True, index=False, float_format="{:.3f}".format, na_rep="")
        return facts_html("ProbeResult", self._summary()) + table

    def _summary(self) -> dict[str, str]:
        summary = {"layers": shown_layers(list(self.directions)), "classes": _shown_classes(self.classes)}
        nested = self.table[self.table["layer"] == "nested"]
        if len(nested):
            row = nested.iloc[0]
            interval = f"[{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]"
            summary["nested accuracy"] = f"{row['accuracy']:.3f} {interval}"
            summary["n"] = str(row["n"])
        if "majority_accuracy" in self.meta:
            summary["majority accuracy"] = f"{self.meta['majority_accuracy']:.3f}"
        return summary


def fit_probe(
    x: Float[Tensor, "item d_model"] | Activations,
    labels: str | Sequence[Hashable] | np.ndarray | pd.Series,
    c: float = 1.0,
    tol: float = 1e-6,
    max_iter: int = MAX_ITER,
    solver: Solver = "steerkit",
    *,
    layer: Layer | None = None,
    site: str | None = None,
) -> Probe:
    """Fit a logistic regression with an L2 penalty on standardised features, mapped back to the raw space.

    The minimum over W, b of `sum_i -log softmax(z_i W' + b)[y_i] + |W|^2 / (2c)` with `z = (x - mean) / std`; the
    intercept has no penalty. Two classes share one vector, `p = sigmoid(z w + b)` with `|w|^2 / (2c)`, stored as rows
    `-w/2` and `w/2`. A constant feature gets scale 1.

    Args:
        x: activations, or a tensor `[item, d_model]`, finite.
        labels: one per item, two different ones at least; for activations also the name of their column.
        c: inverse strength of the penalty.
        tol: the largest excess of the loss over its minimum, relative to the loss. The curvature of the penalty bounds
            that excess by `c |gradient|^2 / 2` (`c / 4` with two classes), checked in float64; the intercept counts
            with its own curvature. `"scikit-learn"` ignores it and bounds the gradient by 1e-8.
        max_iter: number of steps after which the fit stops with a warning.
        solver: `"steerkit"`, or the slower reference `"scikit-learn"`,
            `make_pipeline(StandardScaler(), LogisticRegression(C=c))`. Both minimise the same loss.
        layer: of activations, the layer that is fitted; default: the one that they hold. Of a tensor, where it was
            read, for conditions.
        site: of a tensor, what was read of the block; default `"resid_post"`. Activations have their own.

    Returns:
        A `Probe` in the raw space. It carries layer and site, and the provenance of activations.

    Raises:
        ValueError: shapes disagree, one class only, a missing label or column, NaN or infinity in x, `c` not above 0,
            an unknown solver or site, no layer for activations of several, or another site than that of activations.

    Warns:
        RuntimeWarning: no convergence; names the norm of the gradient.

    Example:
        >>> probe = sk.fit_probe(acts, "label", layer=14)
        >>> direction = probe.direction("positive")

    Source: Hastie, Tibshirani and Friedman, "The Elements of Statistical Learning", 2009, section 4.4.
    """
    if isinstance(x, Activations):
        tensor, labels, site, meta = _of_activations(x, labels, layer, site)
        own = x.layers[0] if layer is None else layer
        return replace(fit_probe(tensor, labels, c, tol, max_iter, solver, layer=own, site=site), meta=meta)
    y, classes = encoded(labels)
    if x.ndim != 2 or len(x) != len(y):
        raise ValueError(f"expected x of shape [{len(y)} labels, d_model]; got {list(x.shape)}. Pass a row per label.")
    if not torch.isfinite(x).all():
        raise ValueError("expected finite x; got NaN or infinity. Drop those items.")
    fit = solver_for(x, solver)
    weights, bias, _ = fit(y[None], torch.ones_like(y[None]).bool(), len(classes), c, tol, max_iter)
    return Probe(classes, weights[0], bias[0], plain_layer(layer), check_name(DEFAULT if site is None else site))


def _of_activations(
    acts: Activations, labels: Any, layer: Layer | None, site: str | None
) -> tuple[Tensor, Any, str, Mapping[str, Any]]:
    """Of activations: the tensor and labels of a fit, the site and their provenance."""
    if layer is None and len(acts.layers) > 1:
        raise ValueError(f"expected a layer; the activations hold {list(acts.layers)}. Pass layer=.")
    if site not in (None, acts.site):
        raise ValueError(f"expected the site of the activations, {acts.site}; got {site!r}. Leave site= out.")
    if isinstance(labels, str):
        if labels not in acts.items:
            raise ValueError(f"expected a column {labels!r} in acts.items; got {list(acts.items)}. Name another.")
        labels = acts.items[labels]
    return acts.at(acts.layers[0] if layer is None else layer), labels, acts.site, acts.meta


def probe_layers(
    acts: Activations,
    label: str = "label",
    group: str = "group",
    layers: Layers = "all",
    folds: int = 5,
    c: float = 1.0,
    seed: int = 0,
    solver: Solver = "steerkit",
) -> ProbeResult:
    """Measure the held-out accuracy of a linear probe at every layer, with its controls.

    Each fold is predicted by `fit_probe` (with `tol=1e-5`) on the others. Groups are dealt to the folds at random,
    evenly among those with the same most frequent label. The controls:

    - `labels == "shuffled"`, per layer: the labels are permuted as a class without an effect could be: within groups if
      every group has each class equally often; over whole groups if each has one class; else over items
      (`meta["permuted"]`). In the last two cases every fold gets its share of each class, otherwise held-out accuracy
      falls below chance; it also does for true labels without an effect if groups have one class and differ in size.
      The accuracy is the mean of five permutations, its interval the prediction interval of a further one. It is
      missing (NaN) where more than half of the five have one accuracy, which is frequent with a dozen groups or fewer.
    - `features == "length_position"`: the same probe on the span's `n_tokens` and `start` alone.
    - `layer == "nested"`: the layer is chosen within each training fold, by its accuracy there (each of the other folds
      is predicted in turn; the earliest layer on a tie), and evaluated on the fold left out. So the accuracy of the
      best layer comes from items that did not choose it.
    - The layer `"embed"`, if it was read, measures what the tokens alone predict; `meta["embed_read"]` records it.

    Args:
        acts: the activations.
        label: the column of `acts.items` with the classes.
        group: the column with the group ids, compared as text; a group stays in one fold.
        layers: `"all"` layers that were read, one layer, or several.
        folds: number of folds, 3 at least (the nested choice needs two in each training fold).
        c: inverse strength of the penalty, as in `fit_probe`.
        seed: seed of the folds and the permutations.
        solver: `"steerkit"`, or the slower reference `"scikit-learn"`.

    Returns:
        A `ProbeResult`.

    Raises:
        ValueError: a column, layer, label or group is missing, fewer than 3 folds, fewer groups than `folds`, a class
            that is missing from a training fold, or an unknown solver.

    Example:
        >>> result = sk.probe_layers(sk.collect(model, tokenizer, pairs, layers=["embed", 8, 14]))
        >>> result.table

    Source: Hewitt and Liang 2019, arXiv 1909.03368 (control labels); Varma and Simon 2006, BMC Bioinformatics 7:91.
    """
    if missing := [name for name in (label, group, *LENGTH_POSITION) if name not in acts.items]:
        raise ValueError(f"expected columns {missing} in acts.items; got {list(acts.items)}. Add them or name others.")
    chosen = tuple(acts.layers) if isinstance(layers, str) and layers == "all" else tuple(layer_list(layers))
    if not chosen:
        raise ValueError("expected one layer at least; got none. Pass layers='all' for all that were read.")
    raw = [acts.at(layer) for layer in chosen]
    design = _design(acts, label, group, folds, seed)
    rows: list[dict[str, Any]] = []
    confusion: dict[Layer, np.ndarray] = {}
    directions: dict[Layer, Tensor] = {}
    held_out: list[np.ndarray] = []
    training_accuracy: list[list[float]] = []
    for layer, values in zip(chosen, raw, strict=True):
        fit = solver_for(values, solver)
        weights, p = _fit_true(fit, design, c)
        directions[layer] = _directions(weights)
        held_out.append(p[design.fit_without[design.fold, design.fold], :, design.items])
        training_accuracy.append(design.training_accuracy(p))
        confusion[layer] = design.confusion(held_out[-1])
        rows.append(design.row(layer, "resid", "true", design.labels.numpy()[None], held_out[-1][None]))
        rows.append(design.row(layer, "resid", "shuffled", design.shuffled.numpy(), _fit_shuffled(fit, design, c)))
    best = np.array(training_accuracy).argmax(0)
    nested = np.stack(held_out)[best[design.fold], design.items]
    rows.append(design.row("nested", "resid", "true", design.labels.numpy()[None], nested[None]))
    lengths = torch.tensor(acts.items[LENGTH_POSITION].to_numpy(dtype=float))
    by_length = _fit_outer(solver_for(lengths, solver), design, c)
    rows.append(design.row(None, "length_position", "true", design.labels.numpy()[None], by_length[None]))
    meta = {
        **acts.meta,
        "site": acts.site,
        "label": label,
        "group": group,
        "folds": folds,
        "c": c,
        "seed": seed,
        "solver": solver,
        "embed_read": EMBED in chosen,
        "nested_layers": [chosen[index] for index in best],
        "permuted": permuted_over(design.labels, design.group_of),
        "majority_accuracy": float(np.bincount(design.labels.numpy()).max() / len(design.labels)),
    }
    return ProbeResult(pd.DataFrame(rows), confusion, directions, design.classes, meta)


@dataclass(frozen=True, eq=False)
class _Design:
    """The fits of `probe_layers`: labels, folds, and the training items of each fit.

    Args:
        labels: class index `[item]`.
        classes: the labels by index.
        group_of: group index `[item]`.
        fold: fold `[item]`.
        n_folds: number of folds.
        train: training items `[fit, item]`; the fits leave out each fold, each pair of folds, and (the last) nothing.
        fit_without: `[fold, fold]`, index of the fit that leaves out both.
        shuffled: permuted labels `[permutation, item]`.
    """

    labels: Tensor
    classes: tuple[Hashable, ...]
    group_of: np.ndarray
    fold: np.ndarray
    n_folds: int
    train: Tensor
    fit_without: np.ndarray
    shuffled: Tensor

    @property
    def items(self) -> np.ndarray:
        return np.arange(len(self.labels))

    @property
    def outer(self) -> Tensor:
        """`[fold, item]`: the training items of the fits that leave out one fold."""
        return self.train[self.fit_without.diagonal().tolist()]

    def training_accuracy(self, p: np.ndarray) -> list[float]:
        """Per fold left out: the accuracy on the other folds, each predicted by a fit that leaves out both."""
        right = p.argmax(1) == self.labels.numpy()
        return [
            right[self.fit_without[out, self.fold], self.items][self.fold != out].mean() for out in range(self.n_folds)
        ]

    def _roc_auc(self, truth: np.ndarray, p: np.ndarray) -> float:
        """Macro ROC AUC over pairs of items of one fold: other folds' fits have other intercepts."""
        parts = [fold_roc_auc(truth == index, p[:, index], self.fold) for index in range(len(self.classes))]
        return float(np.mean(parts))

    def confusion(self, held_out: np.ndarray) -> np.ndarray:
        counts = np.zeros((len(self.classes), len(self.classes)), dtype=int)
        np.add.at(counts, (self.labels.numpy(), held_out.argmax(-1)), 1)
        return counts

    def row(self, layer: Layer | None, features: str, labels: str, truth: np.ndarray, p: np.ndarray) -> dict[str, Any]:
        """One row of the table, from labels `[repeat, item]` and held-out probabilities `[repeat, item, class]`."""
        right = p.argmax(-1) == truth
        interval: Interval | ControlBand = accuracy_interval(right.mean(0), groups=self.group_of.tolist())
        if len(truth) > 1:
            interval = control_band(right.T)
        areas = [self._roc_auc(t, s) for t, s in zip(truth, p, strict=True)]
        return {
            "layer": layer,
            "features": features,
            "labels": labels,
            "accuracy": interval.mean,
            "accuracy_low": float(np.clip(interval.low, 0, 1)),  # keeps NaN
            "accuracy_high": float(np.clip(interval.high, 0, 1)),
            "roc_auc": float(np.mean(areas)),
            "n": len(self.labels),
            "n_groups": len(set(self.group_of)),
            "n_classes": len(self.classes),
            "folds": self.n_folds,
        }


def _design(acts: Activations, label: str, group: str, folds: int, seed: int) -> _Design:
    labels, classes = encoded(acts.items[label])
    group_of, fold = deal_folds(acts.items[group], labels.numpy(), classes, folds, seed)
    first, second = np.triu_indices(folds)  # equal for a fit that leaves out one fold
    fit_without = np.zeros((folds, folds), dtype=int)
    fit_without[first, second] = fit_without[second, first] = np.arange(len(first))
    left_out = (fold != first[:, None]) & (fold != second[:, None])
    train = torch.tensor(np.vstack([left_out, np.ones((1, len(labels)), dtype=bool)]))
    rng = np.random.default_rng([seed, 1])
    shuffled = torch.stack([permuted_labels(labels, group_of, fold, rng) for _ in range(PERMUTATIONS)])
    return _Design(labels, classes, group_of, fold, folds, train, fit_without, shuffled)


def _fit_true(fit: Fit, design: _Design, c: float) -> tuple[Tensor, np.ndarray]:
    """Return the weights of the fit on all items, and all fits' probabilities `[fit, class, item]`."""
    labels = design.labels.expand(len(design.train), -1)
    weights, _, p = fit(labels, design.train, len(design.classes), c, TOLERANCE, MAX_ITER)
    return weights[-1], p.numpy()


def _fit_shuffled(fit: Fit, design: _Design, c: float) -> np.ndarray:
    """Return the held-out probabilities `[permutation, item, class]` of fits on permuted labels."""
    labels = design.shuffled.repeat_interleave(design.n_folds, 0)
    train = design.outer.repeat(PERMUTATIONS, 1)
    _, _, p = fit(labels, train, len(design.classes), c, TOLERANCE, MAX_ITER)
    by_fold = p.view(PERMUTATIONS, design.n_folds, len(design.classes), -1)
    return by_fold[:, design.fold, :, design.items].transpose(0, 1).numpy()


def _fit_outer(fit: Fit, design: _Design, c: float) -> np.ndarray:
    """Return the held-out probabilities `[item, class]` of one fit per fold."""
    labels = design.labels.expand(design.n_folds, -1)
    _, _, p = fit(labels, design.outer, len(design.classes), c, TOLERANCE, MAX_ITER)
    return p[design.fold, :, design.items].numpy()


def encoded(labels: Sequence[Hashable] | np.ndarray | pd.Series) -> tuple[Int[Tensor, " item"], tuple[Hashable, ...]]:
    """Return the index of each label in the sorted classes, and the classes."""
    codes, classes = pd.factorize(pd.Series(labels).reset_index(drop=True), sort=True)
    if (codes < 0).any():
        raise ValueError(f"expected a label for every item; item {int((codes < 0).argmax())} has none. Drop that item.")
    if len(classes) < 2:
        raise ValueError(f"expected two classes at least; got {list(classes)}. Label items of another class too.")
    return torch.from_numpy(codes.astype(np.int64)), tuple(classes.tolist())


def _directions(weights: Float[Tensor, "class d_model"]) -> Float[Tensor, "class d_model"]:
    """Return each row minus the mean of the other rows, over its L2 norm; zero where that is zero."""
    others = (weights.sum(0) - weights) / (len(weights) - 1)
    return torch.nn.functional.normalize(weights - others, dim=1, eps=1e-300)


def _shown_classes(classes: Sequence[Hashable]) -> str:
    shown = ", ".join(f"{name!s:.40}" for name in classes[:6])
    return shown if len(classes) <= 6 else f"{shown}, ... ({len(classes)} classes)"
