"""Cross-validation folds: groups dealt to folds, and labels permuted as they could be without an effect."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor


def deal_folds(
    groups: pd.Series, labels: np.ndarray, classes: tuple[Hashable, ...], folds: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the group index and the fold of each item; a group stays in one fold.

    The groups are shuffled and ordered by their most frequent class and by size, the largest first. Each is dealt to
    the fold with the fewest items of groups of this class, of these to the one with the fewest items.

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
    size = np.bincount(group_of)
    dealt, filled = np.zeros(len(names), dtype=int), np.zeros((len(classes), folds), dtype=int)
    for group in np.lexsort((np.random.default_rng(seed).permutation(len(names)), -size, label_of)):
        dealt[group] = np.lexsort((filled.sum(0), filled[label_of[group]]))[0]
        filled[label_of[group], dealt[group]] += size[group]
    fold = dealt[group_of]
    for index, name in enumerate(classes):
        count = len(set(fold[labels == index]))
        if count < 3:
            raise ValueError(
                f"expected every class in 3 folds at least; class {name!r} is in {count}, so it is missing from a "
                "training fold that leaves two out. Read more groups with it, or drop it."
            )
    return group_of, fold


Permuted = Literal["within groups", "whole groups", "items"]


def of_one_class(labels: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    """Return for each group, in the order of its index, whether all its items have one class.

    The items of such a group are alike whatever their class is, so labels are exchanged between whole groups: items
    that are permuted one by one would lose the variance between groups, which the true labels hold.

    Example:
        >>> of_one_class(np.array([0, 1, 1, 1]), np.array([0, 0, 1, 1]))
        array([False,  True])
    """
    return np.asarray((pd.crosstab(group_of, labels).to_numpy() > 0).sum(1) == 1)


def permuted_over(labels: Int[Tensor, " item"], group_of: np.ndarray) -> Permuted:
    """Return over what labels are exchangeable where the class has nothing to do with the item.

    Within groups if every group has each class equally often, as pairs do; whole groups if every group has one class;
    else items.
    """
    counts = pd.crosstab(group_of, labels.numpy()).to_numpy()
    if (counts == counts[0]).all():
        return "within groups"
    return "whole groups" if of_one_class(labels.numpy(), group_of).all() else "items"


def permuted_labels(
    labels: Int[Tensor, " item"], group_of: np.ndarray, fold: np.ndarray, rng: np.random.Generator
) -> Int[Tensor, " item"]:
    """Return the labels permuted over what `permuted_over` says.

    Where items or whole groups are permuted, each fold has its share of every class, and every class is in two folds at
    least.
    """
    over = permuted_over(labels, group_of)
    if over == "within groups":
        by_group = np.lexsort((np.arange(len(group_of)), group_of))
        permuted = torch.empty_like(labels)
        permuted[by_group] = labels[np.lexsort((rng.random(len(group_of)), group_of))]
        return permuted
    if over == "whole groups":
        first = np.unique(group_of, return_index=True)[1]
        return _over_items(labels[first], fold[first], rng)[group_of]
    return _over_items(labels, fold, rng)


def _over_items(labels: Int[Tensor, " item"], fold: np.ndarray, rng: np.random.Generator) -> Int[Tensor, " item"]:
    while True:
        drawn = pd.Series(rng.random(len(fold))).groupby(fold)
        quantile = (drawn.rank() - rng.random(len(fold))) / drawn.transform("size")
        permuted = labels.sort().values[quantile.to_numpy().argsort().argsort()]
        if all(len(set(fold[permuted == index])) > 1 for index in range(int(labels.max()) + 1)):
            return permuted
