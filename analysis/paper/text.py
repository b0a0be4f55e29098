"""An estimate and its interval as text."""

from __future__ import annotations


def interval_text(mean: float, low: float, high: float, form: str = ".2f") -> str:
    """`0.42 [0.31, 0.53]`.

    Args:
        mean: the estimate.
        low: lower end of its interval.
        high: upper end of its interval.
        form: format of all three, e.g. `+.3f` or `.1f`.

    Example:
        >>> interval_text(0.42, 0.31, 0.53)
        '0.42 [0.31, 0.53]'
    """
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"
