"""Extract steering vectors from activations: difference in means, one against others, PCA, logistic probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.capture.activations import ActivationMeans, Activations
from steerkit.capture.layers import EMBED
from steerkit.vectors.vector import SteeringVector

CANCELLED = 1e-6
"""A mean below this share of the mean size is zero up to the rounding of float32 activations."""


def difference_in_means(
    activations: Activations | ActivationMeans, positive: str = "positive", negative: str = "negative"
) -> SteeringVector:
    """Return the difference in means per layer (CAA), `v_l = mean(h_l | positive) - mean(h_l | negative)`.

    With as many positives as negatives this is also the mean of the pairs' differences; the labels need not be paired.

    Args:
        activations: activations or their means per label; sums are in float64.
        positive: label of the items with the property. Labels are compared as text: 1 is "1".
        negative: label of the items without it.

    Returns:
        One vector `[d_model]` per block that was read, in units of the stream, at the site that was read.

    Raises:
        ValueError: a label has no items, both labels are equal, or an item has no label.

    Example:
        >>> vector = sk.difference_in_means(acts, "harmful", "harmless")

    Source: Rimsky et al. 2024, "Steering Llama 2 via Contrastive Activation Addition", arXiv 2312.06681.
    """
    positive, negative = _two_labels(positive, negative)
    means = activations if isinstance(activations, ActivationMeans) else means_of(activations)
    count = [n for label, n in zip(means.labels, means.counts, strict=True) if label in (positive, negative)]
    difference = means.of(positive) - means.of(negative)
    return _vector(difference, means, "difference_in_means", min(count), positive=positive, negative=negative)


def one_against_others(activations: Activations | ActivationMeans) -> dict[str, SteeringVector]:
    """Return for each label i `v_i = m_i - mean of m_j over j != i`, with m_i the mean of the label's items.

    This equals the paper's mean over groups if every group holds every label equally often.

    Args:
        activations: activations or their means per label.

    Returns:
        Label -> vector.

    Raises:
        ValueError: fewer than two labels, or an item without a label.

    Example:
        >>> agents = sk.one_against_others(acts)
        >>> agents["1"].norms()

    Source: Yi et al. 2026, arXiv 2604.24881, section 4.
    """
    means = activations if isinstance(activations, ActivationMeans) else means_of(activations)
    if len(means.labels) < 2:
        raise ValueError(f"expected two labels at least; got {list(means.labels)}. Collect another label too.")
    others = (means.mean.sum(0, keepdim=True) - means.mean) / (len(means.labels) - 1)
    return {
        label: _vector(means.mean[i] - others[i], means, "one_against_others", means.counts[i], positive=label)
        for i, label in enumerate(means.labels)
    }


def pca(activations: Activations, positive: str = "positive", negative: str = "negative") -> SteeringVector:
    """Return the first principal direction of the pairs' differences, uncentred, unit norm, pointing to `positive`.

    It is the right singular vector of the largest singular value of the matrix of differences `[pair, d_model]`. The
    k-th positive item is paired with the k-th negative item.

    Args:
        activations: as many items with the label `positive` as with `negative`.
        positive: label of the items with the property.
        negative: label of the items without it.

    Returns:
        One unit vector `[d_model]` per block that was read.

    Raises:
        ValueError: a label has no items, unequal numbers of items, an item without a label, only zeros as differences
            at a layer, or differences that cancel along the direction, so that its sign is undefined.

    Example:
        >>> vector = sk.pca(sk.collect(model, tokenizer, pairs))

    Source: Zou et al. 2023, "Representation Engineering", arXiv 2310.01405.
    """
    positive, negative = _two_labels(positive, negative)
    blocks, labels = _both_sides(activations, positive, negative)
    plus, minus = (blocks.where(labels == side).resid for side in (positive, negative))
    if len(plus) != len(minus):
        raise ValueError(
            f"expected as many {positive!r} as {negative!r} items; got {len(plus)} and {len(minus)}. Pass pairs."
        )
    directions = []
    for column, layer in enumerate(blocks.layers):
        difference = (plus[:, column] - minus[:, column]).double()
        if not difference.any():
            raise ValueError(
                f"expected differences other than zero; got only zeros at layer {layer}. Leave that layer out."
            )
        direction = torch.linalg.svd(difference, full_matrices=False).Vh[0]
        along = difference @ direction
        if along.mean().abs() <= CANCELLED * along.abs().mean():
            raise ValueError(
                f"expected differences with a mean along their first direction; at layer {layer} they cancel, so its "
                "sign is undefined, as where half of the pairs have their sides exchanged. Pass pairs of one direction."
            )
        directions.append(direction * along.mean().sign())
    return _vector(torch.stack(directions), blocks, "pca", len(plus), positive=positive, negative=negative)


def logistic(
    activations: Activations, positive: str = "positive", negative: str = "negative", c: float = 1.0
) -> SteeringVector:
    """Return the unit normal of a logistic probe's boundary, mapped back from standardised features to the raw stream.

    `v = w_raw / |w_raw|` with `w_raw = w_std / scale`. In standardised space the direction would be a different one.

    Args:
        activations: items with both labels; others are ignored.
        positive: label of the items with the property.
        negative: label of the items without it.
        c: inverse strength of the L2 penalty, as in `fit_probe`.

    Returns:
        One unit vector `[d_model]` per block that was read.

    Raises:
        ValueError: a label has no items, an item has no label, or all items are equal at a layer.

    Example:
        >>> vector = sk.logistic(acts, "harmful", "harmless")
    """
    from steerkit.probes.probe import fit_probe

    positive, negative = _two_labels(positive, negative)
    blocks, labels = _both_sides(activations, positive, negative)
    rows = [fit_probe(blocks.at(layer), labels, c=c).direction(positive) for layer in blocks.layers]
    meta = {"positive": positive, "negative": negative, "c": float(c)}
    return _vector(torch.stack(rows), blocks, "logistic", int(labels.value_counts().min()), **meta)


def extract_again(vector: SteeringVector, activations: Activations) -> SteeringVector:
    """Return a vector extracted from other activations by the method, its labels and its `c` in `vector.meta`.

    Raises:
        ValueError: `meta` does not hold a method of this module and its labels.
    """
    method, positive, negative = (vector.meta.get(key) for key in ("method", "positive", "negative"))
    with_c = partial(logistic, c=vector.meta.get("c", 1.0))
    pairwise: dict[str, Callable[[Activations, str, str], SteeringVector]]
    pairwise = {"difference_in_means": difference_in_means, "pca": pca, "logistic": with_c}
    if method in pairwise and positive is not None and negative is not None:
        return pairwise[method](activations, positive, negative)
    if method == "one_against_others" and positive is not None:
        return one_against_others(activations)[positive]
    raise ValueError(
        f"expected a method among {[*pairwise, 'one_against_others']} and its labels in the vector's meta; got "
        f"{method!r}, {positive!r}, {negative!r}. Pass extract=, a function from activations to a vector."
    )


def means_of(activations: Activations) -> ActivationMeans:
    """Return the means per label in float64; labels in alphabetical order."""
    labels = labels_of(activations)
    names = tuple(sorted(labels.unique()))
    rows = [activations.resid[torch.tensor((labels == name).tolist())] for name in names]
    mean = torch.stack([row.double().mean(0) for row in rows])
    return ActivationMeans(mean, tuple(map(len, rows)), names, activations.layers, activations.meta, activations.site)


def labels_of(activations: Activations) -> pd.Series:
    """Return the label of each item as text.

    Raises:
        ValueError: no column `label`, or an item without a label.
    """
    if "label" not in activations.items:
        raise ValueError(f"expected a column 'label' in the items; got {list(activations.items)}. Add one.")
    labels = activations.items["label"]
    if labels.isna().any():
        raise ValueError(
            f"expected a label for every item; {labels.isna().sum()} of {len(labels)} have none. Label them, or drop "
            "them: acts.where(acts.items['label'].notna())."
        )
    return labels.astype(str)


def _two_labels(positive: object, negative: object) -> tuple[str, str]:
    if str(positive) == str(negative):
        raise ValueError(f"expected two different labels; got {positive!r} on both sides. Pass another label.")
    return str(positive), str(negative)


def _both_sides(activations: Activations, positive: str, negative: str) -> tuple[Activations, pd.Series]:
    """Return the items with one of two labels, without the layer `"embed"`, to which nothing is added; and the labels.

    Raises:
        ValueError: one of the labels has no items, an item has no label, or `"embed"` is the only layer.
    """
    labels = labels_of(activations)
    if missing := [label for label in (positive, negative) if label not in set(labels)]:
        raise ValueError(f"expected one of the labels {sorted(set(labels))}; got {missing[0]!r}. Name one of those.")
    layers = tuple(layer for layer in activations.layers if layer != EMBED)
    if not layers:
        raise ValueError("expected activations of a block; got 'embed' alone. Read a layer from 0.")
    columns = [activations.layers.index(layer) for layer in layers]
    kept = labels.isin([positive, negative])
    blocks = replace(activations, resid=activations.resid[:, columns], layers=layers)
    return blocks.where(kept), labels[kept].reset_index(drop=True)


def _vector(
    rows: Float[Tensor, "layer d_model"], source: Activations | ActivationMeans, method: str, n: int, **meta: Any
) -> SteeringVector:
    blocks: Sequence[tuple[int, Tensor]] = [
        (int(layer), row) for layer, row in zip(source.layers, rows, strict=True) if layer != EMBED
    ]
    return SteeringVector(dict(blocks), {**source.meta, "method": method, "n": n, **meta}, source.site)
