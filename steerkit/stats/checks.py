"""Checks of arguments that several statistics and scores share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import ArrayLike


def check_sequence(name: str, values: object) -> None:
    """`TypeError` for a single str where a sequence is expected."""
    if isinstance(values, str):
        raise TypeError(f"expected {name} to be a sequence; got the single str {values[:40]!r}. Wrap it in a list.")


def check_level(level: float) -> None:
    """`ValueError` for a level outside (0, 1), such as 95."""
    if not 0 < level < 1:
        raise ValueError(f"expected a level in (0, 1); got {level}. Try 0.95 for an interval, 0.05 for a p-value.")


def finite_vector(name: str, values: ArrayLike) -> Float[np.ndarray, " n"]:
    """`values` as a float array `[n]`; `ValueError` for another shape, NaN or infinity."""
    array = np.asarray(values, dtype=float)
    if array.ndim != 1:
        raise ValueError(f"expected {name} of shape [n]; got {list(array.shape)}. Pass one dimension.")
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"expected finite {name}; got {array[at]} at index {at}. Drop missing values first.")
    return array
