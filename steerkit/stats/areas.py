"""Areas: under a curve over coefficients (`curve_auc`) and under the ROC curve (`roc_auc`)."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from steerkit.stats.checks import check_sequence, finite_vector

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def curve_auc(coefficients: ArrayLike, values: ArrayLike, normalize: bool = False) -> float:
    """Area under a curve of values over steering coefficients, by the trapezoid rule.

    `sum_i (c[i+1] - c[i]) (v[i] + v[i+1]) / 2` with the points sorted by `c`; in units of coefficient x value.

    Args:
        coefficients: `[n]`, distinct, in any order.
        values: `[n]`, the value at each coefficient.
        normalize: divide by the width `max(c) - min(c)` of the grid: the mean height of the curve, in units of value.

    Raises:
        ValueError: shapes differ, fewer than two points, a coefficient given twice, NaN or infinity.
    """
    c, v = finite_vector("coefficients", coefficients), finite_vector("values", values)
    if len(c) != len(v):
        raise ValueError(f"expected one value per coefficient; got {len(v)} for {len(c)} coefficients. Pair them up.")
    if len(c) < 2:
        raise ValueError(f"expected at least two coefficients; got {len(c)}. Measure the curve at more points.")
    c, v = np.stack([c, v])[:, np.argsort(c)]
    steps = np.diff(c)
    if not steps.all():
        raise ValueError(f"expected distinct coefficients; got {c[np.argmin(steps)]:g} twice. Average its values.")
    area = steps @ (v[:-1] + v[1:]) / 2
    return float(area / (c[-1] - c[0]) if normalize else area)


def roc_auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, a tie counting one half.

    `(R - n1 (n1 + 1) / 2) / (n1 n0)`, with `R` the sum of the positives' ranks, tied scores sharing their mean rank
    (the Mann-Whitney U over the number of pairs). In [0, 1]; 0.5 is chance.

    Args:
        labels: `[n]`, bool or 0/1; 1 is positive.
        scores: `[n]`, in any unit; only their order counts.

    Raises:
        ValueError: shapes differ, a label other than 0 and 1, a class absent, or a score NaN or infinite.

    Source: Hanley and McNeil, "The Meaning and Use of the Area under a ... (ROC) Curve", 1982.
    """
    y, s = np.asarray(labels), finite_vector("scores", scores)
    if y.shape != s.shape:
        raise ValueError(f"expected a label per score; got shapes {list(y.shape)} and {list(s.shape)}. Pair them up.")
    if y.dtype.kind not in "biuf" or not ((y == 0) | (y == 1)).all():
        got = list(dict.fromkeys(y.tolist()))[:5]
        raise ValueError(f"expected labels of bool or 0/1; got {got}. For more classes use macro_roc_auc.")
    n1, n0 = int((y == 1).sum()), int((y == 0).sum())
    if not (n1 and n0):
        raise ValueError(f"expected both classes; got {n1} positive and {n0} negative. Add items of the other class.")
    _, rung, size = np.unique(s, return_inverse=True, return_counts=True)
    ranks = np.cumsum(size) - (size - 1) / 2
    return float((ranks[rung[y == 1]].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def fold_roc_auc(labels: ArrayLike, scores: ArrayLike, folds: ArrayLike) -> float:
    """`roc_auc` over pairs of items of one fold, whose scores are from one fit: the folds' areas, weighted by n1 n0.

    Scores of different fits differ by a constant: where a fold has more items of a class than the others, its fit saw
    fewer of them and scores all of its items lower. Pooled, the area falls below 0.5 where there is nothing to find.

    Args:
        labels: `[n]`, bool or 0/1; 1 is positive.
        scores: `[n]`, in any unit.
        folds: `[n]`, the fold of each item. Folds without both classes are left out.

    Returns:
        In [0, 1]; NaN if no fold has both classes.

    Raises:
        ValueError: as `roc_auc`, but a class absent.
    """
    y, s, fold = np.asarray(labels, dtype=bool), finite_vector("scores", scores), np.asarray(folds)
    if not y.shape == s.shape == fold.shape:
        raise ValueError(
            f"expected a label and a fold per score; got {y.shape}, {fold.shape}, {s.shape}. Pair them up."
        )
    found, weights = 0.0, 0
    for name in np.unique(fold):
        mine = fold == name
        pairs = int(y[mine].sum()) * int((~y[mine]).sum())
        if pairs:
            found, weights = found + pairs * roc_auc(y[mine], s[mine]), weights + pairs
    return found / weights if weights else float("nan")


def macro_roc_auc(labels: Collection[Hashable], scores: ArrayLike, classes: Sequence[Hashable]) -> float:
    """Mean over the classes of the one-vs-rest `roc_auc` of their column, each class weighing the same.

    Args:
        labels: n labels, each one of `classes`.
        scores: `[n, k]`; column j scores membership in `classes[j]`, in any unit.
        classes: the k distinct classes, in the order of the columns.

    Raises:
        TypeError: a single str in place of `labels` or `classes`.
        ValueError: shapes differ, a class twice or absent from `labels`, a label not among them, a score not finite.
    """
    check_sequence("labels", labels)
    check_sequence("classes", classes)
    table = np.asarray(scores, dtype=float)
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise ValueError(f"expected at least two distinct classes; got {list(classes)}. Name each column once.")
    if table.shape != (len(labels), len(classes)):
        got = f"{len(labels)} labels, {len(classes)} classes and scores {list(table.shape)}"
        raise ValueError(f"expected scores of shape [labels, classes]; got {got}. Give a row per label.")
    if stray := sorted(map(repr, set(labels) ^ set(classes))):
        raise ValueError(f"expected labels and classes to name the same; only one has {', '.join(stray)}. Drop those.")
    return float(np.mean([roc_auc([label == c for label in labels], table[:, j]) for j, c in enumerate(classes)]))
