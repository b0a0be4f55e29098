"""Cross-validation folds: groups dealt to folds, and labels permuted with an equal share of each class per fold."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor


def deal_folds(
    groups: pd.Series, labels: np.ndarray, classes: tuple[Hashable, ...], folds: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the group index and the fold of each item; a group stays in one fold.

    The groups are shuffled, ordered by their most frequent class, and dealt to the folds in turn.

    Args:
        groups: the group of each item, compared as text.
        labels: the class index of each item.

    Raises:
        ValueError: a missing group, fewer than 3 folds, fewer groups than folds, or a class in fewer than 3 folds.
    """
    if groups.isna().any():
        raise ValueError(f"expected a group for every item; {groups.isna().sum()} have none. Name their groups.")
    names, group_of = np.unique(groups.astype(str).to_numpy(dtype=str), return_inverse=True)
    if folds < 3 or len(names) < folds:
        raise ValueError(
            f"expected 3 folds at least and as many groups as folds; got {folds} folds and {len(names)} groups. "
            "Read more groups or change folds."
        )
    label_of = pd.crosstab(group_of, labels).to_numpy().argmax(1)
    order = np.lexsort((np.random.default_rng(seed).permutation(len(names)), label_of))
    fold = (order.argsort() % folds)[group_of]
    for index, name in enumerate(classes):
        count = len(set(fold[labels == index]))
        if count < 3:
            raise ValueError(
                f"expected every class in 3 folds at least; class {name!r} is in {count}, so it is missing from a "
                "training fold that leaves two out. Read more groups with it, or drop it."
            )
    return group_of, fold


def permuted_labels(labels: Int[Tensor, " item"], fold: np.ndarray, rng: np.random.Generator) -> Int[Tensor, " item"]:
    """Return the labels permuted over all items.

    Each fold has its share of every class, and every class is in two folds at least.
    """
    while True:
        drawn = pd.Series(rng.random(len(fold))).groupby(fold)
        quantile = (drawn.rank() - rng.random(len(fold))) / drawn.transform("size")
        permuted = labels.sort().values[quantile.to_numpy().argsort().argsort()]
        if all(len(set(fold[permuted == index])) > 1 for index in range(int(labels.max()) + 1)):
            return permuted
