"""Effect per item: how the score of each prompt moves with the strength of the steering."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike


def slopes(strengths: ArrayLike, scores: ArrayLike) -> Float[np.ndarray, " item"]:
    """The least-squares slope of each item's score over the strengths, `sum (x - m)(y - n) / sum (x - m)^2`.

    m and n are the means of the item's strengths and scores. A slope below 0 is a score that falls as the steering
    grows: the item moves the wrong way, if the steering is meant to raise the score.

    Args:
        strengths: `[strength]`, coefficients or doses.
        scores: `[item, strength]`. NaN is missing: the slope is that of the other strengths.

    Returns:
        `[item]`; NaN for an item with scores at fewer than two strengths, exactly 0 where all its scores are equal.

    Raises:
        ValueError: other shapes, or an infinite score.

    Source: Tan et al. 2024, "Analyzing the Generalization and Reliability of Steering Vectors", arXiv 2407.12404,
    section 3, where the slope is called steerability.

    Example:
        >>> slopes([-1, 0, 1], [[0.2, 0.3, 0.4], [0.5, 0.5, 0.2]]).round(2)
        array([ 0.1 , -0.15])
    """
    x, y = np.asarray(strengths, dtype=float), np.asarray(scores, dtype=float)
    if x.ndim != 1 or y.ndim != 2 or y.shape[1] != len(x):
        raise ValueError(
            f"expected strengths [m] and scores [n, m]; got shapes {list(x.shape)} and {list(y.shape)}. Pass one row "
            "per item."
        )
    if np.isinf(y).any():
        raise ValueError(f"expected finite scores, or NaN; got {np.isinf(y).sum()} infinite. Use NaN for missing.")
    out = np.full(len(y), np.nan)
    for item, row in enumerate(y):
        there = np.isfinite(row)
        if len(set(x[there].tolist())) > 1:
            at = x[there] - x[there].mean()
            is_flat = np.ptp(row[there]) <= 1e-12 * np.abs(row[there]).max()
            out[item] = 0.0 if is_flat else float(at @ (row[there] - row[there].mean()) / (at @ at))
    return out
