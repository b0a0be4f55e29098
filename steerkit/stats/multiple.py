"""Corrections for multiple comparisons."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from steerkit.stats.checks import finite_vector

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import ArrayLike


def holm(p_values: ArrayLike) -> Float[np.ndarray, " n"]:
    """Holm's step-down adjusted p-values, which control the family-wise error rate under any dependence.

    With the p-values sorted, the i-th smallest (i from 0) becomes `min(1, max_{j <= i} (n - j) p[j])`; the order
    given is kept. Reject where the result is at most the error rate wanted.

    Args:
        p_values: `[n]`, in [0, 1]; the whole family of tests.

    Raises:
        ValueError: not one dimension, or an entry NaN or outside [0, 1].

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.
    """
    p = finite_vector("p_values", p_values)
    if ((p < 0) | (p > 1)).any():
        raise ValueError(f"expected p_values in [0, 1]; got {p.min():g} to {p.max():g}. Pass probabilities.")
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted
