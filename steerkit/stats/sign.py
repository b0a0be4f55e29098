"""The sign of an effect that is shown: by its interval, or by p where it has none."""

from __future__ import annotations

import math


def shown_sign(mean: float, low: float, high: float, p: float, level: float = 0.05) -> int:
    """The sign of an effect that is shown, else 0: by its interval, or by p where it has no interval.

    Args:
        mean: the effect: a gain over coefficient 0 or over controls.
        low: lower end of its interval; NaN where there is none.
        high: upper end.
        p: its two-sided p-value.
        level: the largest p that shows an effect.

    Example:
        >>> shown_sign(0.3, 0.1, 0.5, 0.01), shown_sign(0.3, float("nan"), float("nan"), 0.05)
        (1, 1)
    """
    if math.isnan(low) or math.isnan(high):
        return (mean > 0) - (mean < 0) if p <= level + 1e-9 else 0
    return 1 if low > 0 else -1 if high < 0 else 0
