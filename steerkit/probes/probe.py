"""Probes: what a linear classifier reads out of the residual stream, next to the controls that give it a meaning."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerkit.capture.activations import EMBED, Activations, Layer
from steerkit.probes.solver import fit_batch, standardised
from steerkit.stats.areas import macro_roc_auc
from steerkit.stats.bootstrap import bootstrap_ci

PERMUTATIONS = 5
LENGTH_POSITION = ["n_tokens", "start"]


@dataclass(frozen=True, repr=False)
class Probe:
    """A linear classifier on raw activations: `p(k | x) = softmax_k(x @ weights.T + bias)`.

    Args:
        classes: the labels, sorted, in the order of the rows.
        weights: `[class, d_model]` in float64, in logits per unit of activation.
        bias: `[class]` in float64, in logits.

    The fit is on standardised features, but `weights` is mapped back: `w_raw = w_std / scale`. A direction left in
    standardised space would be wrong for steering: each feature would be pushed `scale` times too hard.
    """

    classes: tuple[Hashable, ...]
    weights: Float[Tensor, "class d_model"]
    bias: Float[Tensor, " class"]

    def direction(self, cls: Hashable) -> Float[Tensor, " d_model"]:
        """Where to push for class k: `w_k - mean_{j != k} w_j` over its L2 norm. `ValueError` if there is none."""
        if cls not in self.classes:
            raise ValueError(f"expected one of the classes {list(self.classes)}; got {cls!r}. Name one of those.")
        if not self.weights.any():
            raise ValueError("expected weights other than 0; all are 0, as where all items are equal. Drop this layer.")
        return _directions(self.weights)[self.classes.index(cls)]

    def scores(self, x: Float[Tensor, "item d_model"]) -> Float[Tensor, "item class"]:
        """Probability of each class, in float64. `ValueError` for another width than that of the weights."""
        if x.ndim != 2 or x.shape[1] != self.weights.shape[1]:
            raise ValueError(f"expected x of shape [item, {self.weights.shape[1]}]; got {list(x.shape)}. Reshape it.")
        return torch.softmax(x.double() @ self.weights.T + self.bias, dim=1)

    def predict(self, x: Float[Tensor, "item d_model"]) -> list[Hashable]:
        """The most probable class of each item; the first of them on a tie."""
        return [self.classes[k] for k in self.scores(x).argmax(dim=1).tolist()]


@dataclass(frozen=True, repr=False)
class ProbeResult:
    """What `probe_layers` found.

    Args:
        table: two rows per layer (`true`, `shuffled` labels), one for the nested choice, one for length and position.
            Columns: `layer` (a layer, `"nested"`, or None without one), `features` (`resid`, `length_position`),
            `labels`, `accuracy` (share), `accuracy_low`, `accuracy_high` (95 % bootstrap interval over groups),
            `roc_auc` (mean over classes, one against the rest), `n` items, `n_groups`, `n_classes`, `folds`.
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


def fit_probe(
    x: Float[Tensor, "item d_model"],
    labels: Sequence[Hashable] | np.ndarray | pd.Series,
    c: float = 1.0,
    tol: float = 1e-6,
    max_iter: int = 1000,
) -> Probe:
    """Logistic regression with an L2 penalty on standardised features, given back in the raw space.

    The minimum over W, b of `sum_i -log softmax(z_i W' + b)[y_i] + |W|^2 / (2c)` with `z = (x - mean) / std`; the
    intercept has no penalty. Two classes share one vector, `p = sigmoid(z w + b)` with `|w|^2 / (2c)`, given as rows
    `-w/2` and `w/2`. This is what scikit-learn's `make_pipeline(StandardScaler(), LogisticRegression(C=c))` minimises.
    A feature that does not vary gets scale 1.

    Args:
        x: `[item, d_model]`, finite.
        labels: one per item, two different ones at least.
        c: inverse strength of the penalty.
        tol: how far the loss may be above its minimum, relative to it. The penalty's curvature bounds that excess by
            `c |gradient|^2 / 2` (`c / 4` with two classes), checked in float64; the intercept counts with its own.
        max_iter: steps after which the fit gives up, with a RuntimeWarning that names the gradient's norm.

    Raises:
        ValueError: shapes disagree, one class only, a missing label, NaN or infinity in x, or `c` not above 0.

    Source: Hastie, Tibshirani and Friedman, "The Elements of Statistical Learning", 2009, section 4.4.
    """
    y, classes = _encode(labels)
    if x.ndim != 2 or len(x) != len(y):
        raise ValueError(f"expected x of shape [{len(y)} labels, d_model]; got {list(x.shape)}. Give a row per label.")
    if not torch.isfinite(x).all():
        raise ValueError("expected finite x; got NaN or infinity. Drop those items.")
    weights, bias, _ = fit_batch(
        standardised(x), y[None], torch.ones_like(y[None]).bool(), len(classes), c, tol, max_iter
    )
    return Probe(classes, weights[0], bias[0])


def probe_layers(
    acts: Activations,
    label: str = "label",
    group: str = "group",
    layers: Sequence[Layer] | None = None,
    folds: int = 5,
    c: float = 1.0,
    seed: int = 0,
) -> ProbeResult:
    """Held-out accuracy of a linear probe at every layer, with its controls.

    Each fold is predicted by `fit_probe` (with `tol=1e-5`) on the others. Groups are dealt to the folds at random,
    evenly among those with the same most frequent label. The controls:

    - `labels == "shuffled"`, per layer: the labels permuted over all items, every fold getting its share of each class
      (else held-out figures fall below chance); mean of five permutations: what fitting noise reaches.
    - `features == "length_position"`: the same probe on the span's `n_tokens` and `start` alone.
    - `layer == "nested"`: the layer is chosen anew within each training fold, by its accuracy there (predicting each of
      the other folds in turn; the earliest on a tie), and judged on the fold left out, so that the figure for the best
      layer is from items that did not choose it.
    - The layer `"embed"`, if it was read, is what the tokens alone tell; if not, `meta["embed_read"]` is False.

    Args:
        acts: the activations.
        label: the column of `acts.items` with the classes.
        group: the column with what must not straddle a fold; compared as text.
        layers: the layers to probe; None for all that were read.
        folds: number of folds, 3 at least (the inner choice needs two in each training fold).
        c: as in `fit_probe`.
        seed: of the folds, the permutations and the bootstrap.

    Raises:
        ValueError: a column, layer, label or group is missing, fewer than 3 folds or than `folds` groups, or a class
            that is missing from a training fold.

    Source: Hewitt and Liang 2019, arXiv 1909.03368 (control labels); Varma and Simon 2006, BMC Bioinformatics 7:91.
    """
    if missing := [name for name in (label, group, *LENGTH_POSITION) if name not in acts.items]:
        raise ValueError(f"expected columns {missing} in acts.items; got {list(acts.items)}. Add them or name others.")
    if not (chosen := tuple(acts.layers if layers is None else layers)):
        raise ValueError("expected one layer at least; got none. Pass layers=None for all that were read.")
    read = [acts.at(layer) for layer in chosen]
    y, classes = _encode(acts.items[label])
    group_of, fold = _deal(acts.items[group], y.numpy(), classes, folds, seed)
    n, k, items, truth = len(y), len(classes), np.arange(len(y)), y.numpy()[None]
    a, b = np.triu_indices(folds)  # the fits leave out each fold (a == b), each pair of folds, and last nothing
    fit_of = np.zeros((folds, folds), dtype=int)
    fit_of[a, b] = fit_of[b, a] = np.arange(len(a))
    train = torch.tensor(np.vstack([(fold != a[:, None]) & (fold != b[:, None]), np.ones((1, n), dtype=bool)]))
    outer = train[fit_of.diagonal().tolist()]
    rng = np.random.default_rng([seed, 1])
    shuffled = torch.stack([_permuted(y, fold, rng) for _ in range(PERMUTATIONS)])

    def row(layer: Layer | None, features: str, labels: str, truth: np.ndarray, p: np.ndarray) -> dict[str, Any]:
        """One row of the table, from labels `[repeat, item]` and held-out probabilities `[repeat, item, class]`."""
        ci = bootstrap_ci((p.argmax(-1) == truth).mean(0), groups=group_of.tolist(), seed=seed)
        auc = float(np.mean([macro_roc_auc(t.tolist(), s, range(k)) for t, s in zip(truth, p, strict=True)]))
        found = {"accuracy": ci.mean, "accuracy_low": ci.low, "accuracy_high": ci.high, "roc_auc": auc}
        size = {"n": n, "n_groups": len(set(group_of)), "n_classes": k, "folds": folds}
        return {"layer": layer, "features": features, "labels": labels, **found, **size}

    rows, held_out, inner = [], [], []
    confusion: dict[Layer, np.ndarray] = {layer: np.zeros((k, k), dtype=int) for layer in chosen}
    directions: dict[Layer, Tensor] = {}
    for layer, raw in zip(chosen, read, strict=True):
        features = standardised(raw)
        weights, _, p = fit_batch(features, y.expand(len(train), n), train, k, c)
        directions[layer] = _directions(weights[-1])
        held_out.append(p[fit_of[fold, fold], :, items].numpy())
        np.add.at(confusion[layer], (truth[0], held_out[-1].argmax(-1)), 1)
        right = (p.argmax(1) == y).numpy()
        inner.append([right[fit_of[i, fold], items][fold != i].mean() for i in range(folds)])
        _, _, p = fit_batch(features, shuffled.repeat_interleave(folds, 0), outer.repeat(PERMUTATIONS, 1), k, c)
        noise = p.view(PERMUTATIONS, folds, k, n)[:, fold, :, items].transpose(0, 1).numpy()
        rows.append(row(layer, "resid", "true", truth, held_out[-1][None]))
        rows.append(row(layer, "resid", "shuffled", shuffled.numpy(), noise))
    best = np.array(inner).argmax(0)
    rows.append(row("nested", "resid", "true", truth, np.stack(held_out)[best[fold], items][None]))
    lengths = standardised(torch.tensor(acts.items[LENGTH_POSITION].to_numpy(dtype=float)))
    _, _, p = fit_batch(lengths, y.expand(folds, n), outer, k, c)
    rows.append(row(None, "length_position", "true", truth, p[fold, :, items].numpy()[None]))
    meta = {"label": label, "group": group, "folds": folds, "c": c, "seed": seed, "embed_read": EMBED in chosen}
    meta |= {"nested_layers": [chosen[i] for i in best], "majority_accuracy": float(np.bincount(y.numpy()).max() / n)}
    return ProbeResult(pd.DataFrame(rows), confusion, directions, classes, {**acts.meta, **meta})


def _encode(labels: Sequence[Hashable] | np.ndarray | pd.Series) -> tuple[Int[Tensor, " item"], tuple[Hashable, ...]]:
    """The index of each label in the sorted classes, and the classes."""
    codes, classes = pd.factorize(pd.Series(labels).reset_index(drop=True), sort=True)
    if (codes < 0).any():
        raise ValueError(f"expected a label for every item; item {int((codes < 0).argmax())} has none. Drop that item.")
    if len(classes) < 2:
        raise ValueError(f"expected two classes at least; got {list(classes)}. Label items of another class too.")
    return torch.from_numpy(codes.astype(np.int64)), tuple(classes.tolist())


def _deal(groups: pd.Series, y: np.ndarray, classes: tuple[Hashable, ...], folds: int, seed: int) -> list[np.ndarray]:
    """Group and fold of each item: the groups, shuffled and ordered by most frequent class, dealt out one by one."""
    if groups.isna().any():
        raise ValueError(f"expected a group for every item; {groups.isna().sum()} have none. Name their groups.")
    names, group_of = np.unique(groups.astype(str).to_numpy(dtype=str), return_inverse=True)
    if folds < 3 or len(names) < folds:
        got = f"got {folds} folds and {len(names)} groups. Read more groups or change folds."
        raise ValueError(f"expected 3 folds at least and as many groups as folds; {got}")
    label_of = pd.crosstab(group_of, y).to_numpy().argmax(1)
    order = np.lexsort((np.random.default_rng(seed).permutation(len(names)), label_of))
    fold = (order.argsort() % folds)[group_of]
    for k, name in enumerate(classes):
        if (there := len(set(fold[y == k]))) < 3:
            why = "so it is missing from a training fold that leaves two out. Read more groups with it, or drop it."
            raise ValueError(f"expected every class in 3 folds at least; class {name!r} is in {there}, {why}")
    return [group_of, fold]


def _permuted(y: Int[Tensor, " item"], fold: np.ndarray, rng: np.random.Generator) -> Int[Tensor, " item"]:
    """The labels permuted over all items, each fold with its share of every class, and every class in two at least."""
    while True:
        drawn = pd.Series(rng.random(len(fold))).groupby(fold)
        place = (drawn.rank() - rng.random(len(fold))) / drawn.transform("size")
        shuffled = y.sort().values[place.to_numpy().argsort().argsort()]
        if all(len(set(fold[shuffled == k])) > 1 for k in range(int(y.max()) + 1)):
            return shuffled


def _directions(weights: Float[Tensor, "class d_model"]) -> Float[Tensor, "class d_model"]:
    """Each row minus the mean of the other rows, over its L2 norm; zero where that is zero."""
    others = (weights.sum(0) - weights) / (len(weights) - 1)
    return torch.nn.functional.normalize(weights - others, dim=1, eps=1e-300)
