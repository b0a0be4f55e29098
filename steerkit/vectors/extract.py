"""How steering vectors are extracted from activations: difference in means, PCA, logistic probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.capture.activations import EMBED, ActivationMeans, Activations
from steerkit.vectors.vector import SteeringVector


def difference_in_means(
    activations: Activations | ActivationMeans, positive: str = "positive", negative: str = "negative"
) -> SteeringVector:
    """CAA: `v_l = mean(h_l | positive) - mean(h_l | negative)` per layer (Rimsky et al. 2024, arXiv 2312.06681).

    With as many positives as negatives this is also the mean of the pairs' differences; the labels need not be paired.

    Args:
        activations: what was read, or its running means; sums are in float64.
        positive: label of the items with the property.
        negative: label of the items without it.

    Raises:
        ValueError: a label has no items, or stands on both sides.
    """
    if positive == negative:
        raise ValueError(f"expected two different labels; got {positive!r} on both sides. Name another one.")
    means = activations if isinstance(activations, ActivationMeans) else means_of(activations)
    count = [n for label, n in zip(means.labels, means.counts, strict=True) if label in (positive, negative)]
    difference = means.of(positive) - means.of(negative)
    return _vector(difference, means, "difference_in_means", min(count), positive=positive, negative=negative)


def one_against_others(activations: Activations | ActivationMeans) -> dict[str, SteeringVector]:
    """Per label i: `v_i = m_i - mean of m_j over j != i`, m the label's mean (Yi et al. 2026, arXiv 2604.24881, 4).

    Equal to the paper's mean over groups where every group holds every label equally often.
    """
    means = activations if isinstance(activations, ActivationMeans) else means_of(activations)
    if len(means.labels) < 2:
        raise ValueError(f"expected two labels at least; got {list(means.labels)}. Read texts with another one too.")
    others = (means.mean.sum(0, keepdim=True) - means.mean) / (len(means.labels) - 1)
    return {
        label: _vector(means.mean[i] - others[i], means, "one_against_others", means.counts[i], positive=label)
        for i, label in enumerate(means.labels)
    }


def pca(activations: Activations, positive: str = "positive", negative: str = "negative") -> SteeringVector:
    """The first principal direction of the pairs' differences, about zero, unit length, turned towards `positive`.

    The right singular vector of the largest singular value of the matrix of differences `[pair, d_model]`.

    Raises:
        ValueError: unequal numbers of positives and negatives.
    """
    plus, minus = _sides(activations, positive, negative)
    if len(plus) != len(minus):
        raise ValueError(
            f"expected as many {positive!r} as {negative!r} items; got {len(plus)} and {len(minus)}. Pair them up."
        )
    rows = []
    for column, layer in enumerate(activations.layers):
        difference = (plus[:, column] - minus[:, column]).double()
        direction = torch.linalg.svd(difference, full_matrices=False).Vh[0]
        rows.append(direction * torch.sign(difference.mean(0) @ direction))
        if not rows[-1].norm() > 0.5:
            raise ValueError(
                f"expected differences that point somewhere; they are all zero at layer {layer}. Leave that layer out."
            )
    return _vector(torch.stack(rows), activations, "pca", len(plus), positive=positive, negative=negative)


def logistic(
    activations: Activations, positive: str = "positive", negative: str = "negative", c: float = 1.0
) -> SteeringVector:
    """The unit normal of a logistic probe's boundary, mapped back from standardised features to the raw stream.

    `w_raw = w_std / scale`: the direction left in standardised space points elsewhere (see `steerkit.probes.probe`).
    """
    from steerkit.probes.probe import fit_probe

    labels = activations.items["label"]
    kept = activations.where(labels.isin([positive, negative]))
    blocks = tuple(layer for layer in kept.layers if layer != EMBED)
    kept = replace(kept, resid=kept.resid[:, [kept.layers.index(layer) for layer in blocks]], layers=blocks)
    names = kept.items["label"].tolist()
    rows = [fit_probe(kept.at(layer), names, c=c).direction(positive) for layer in blocks]
    return _vector(torch.stack(rows), kept, "logistic", len(kept) // 2, positive=positive, negative=negative)


def extract_again(vector: SteeringVector, activations: Activations) -> SteeringVector:
    """A vector extracted from other activations in the way that its `meta` says: method, `positive`, `negative`.

    Raises:
        ValueError: `meta` names no method of this module.
    """
    method, positive, negative = (vector.meta.get(key) for key in ("method", "positive", "negative"))
    pairwise = {"difference_in_means": difference_in_means, "pca": pca, "logistic": logistic}
    if method in pairwise and positive is not None and negative is not None:
        return pairwise[method](activations, positive, negative)
    if method == "one_against_others" and positive is not None:
        return one_against_others(activations)[positive]
    raise ValueError(
        f"expected the method {[*pairwise, 'one_against_others']} and the labels in the vector's meta; got {method!r}, "
        f"{positive!r}, {negative!r}. Pass extract=."
    )


def means_of(activations: Activations) -> ActivationMeans:
    """Means per label in float64; labels in alphabetical order."""
    if "label" not in activations.items:
        raise ValueError(f"expected a column 'label' in the items; got {list(activations.items)}. Add one.")
    labels = activations.items["label"].astype(str)
    names = tuple(sorted(labels.unique()))
    rows = [activations.resid[torch.tensor((labels == name).tolist())] for name in names]
    mean = torch.stack([row.double().mean(0) for row in rows])
    return ActivationMeans(mean, tuple(map(len, rows)), names, activations.layers, activations.meta)


def _sides(activations: Activations, positive: str, negative: str) -> tuple[Tensor, Tensor]:
    means = means_of(activations)  # names the labels that are there, if one is missing
    means.of(positive), means.of(negative)
    labels = activations.items["label"]
    return activations.where(labels == positive).resid, activations.where(labels == negative).resid


def _vector(
    rows: Float[Tensor, "layer d_model"], source: Activations | ActivationMeans, method: str, n: int, **meta: Any
) -> SteeringVector:
    blocks: Sequence[tuple[int, Tensor]] = [
        (int(layer), row) for layer, row in zip(source.layers, rows, strict=True) if layer != EMBED
    ]
    return SteeringVector(dict(blocks), {**source.meta, "method": method, "n": n, **meta})
