"""Numbers as text: an estimate with its interval, and how many decimals to print."""

from __future__ import annotations

import math
from typing import Any

DASH = "\u2013"
MINUS = "\u2212"


def number_text(value: float, digits: int = 2, *, typographic: bool = False, signed: bool = False) -> str:
    """A number with `digits` decimals and without negative zero.

    Args:
        value: NaN is printed as `nan`.
        typographic: for pages and figures: U+2212 as minus sign, and an en dash for NaN.
        signed: print a plus sign too.

    Example:
        >>> number_text(-0.5, 2)
        '-0.50'
    """
    text = f"{value:{'+' if signed else ''}z.{digits}f}"
    if typographic:
        return DASH if math.isnan(value) else text.replace("-", MINUS)
    return text


def interval_text(
    mean: float,
    low: float | None = None,
    high: float | None = None,
    digits: int = 2,
    *,
    typographic: bool = False,
    signed: bool = False,
) -> str:
    """An estimate with its interval, `0.42 [0.31, 0.53]`; the estimate alone where one of them is missing or NaN.

    An interval that holds every number, as that of a ratio can, is `(unbounded)`.

    Args:
        mean: the estimate.
        low: the lower end of its interval.
        high: the upper end of its interval.
        digits: decimals of all three.
        typographic: see `number_text`.
        signed: see `number_text`.

    Example:
        >>> interval_text(0.42, 0.31, 0.53, 2)
        '0.42 [0.31, 0.53]'
    """
    shown = number_text(mean, digits, typographic=typographic, signed=signed)
    if low is None or high is None or any(map(math.isnan, (mean, low, high))):
        return shown
    if math.isinf(low) and math.isinf(high):
        return f"{shown} (unbounded)"
    ends = [number_text(end, digits, typographic=typographic, signed=signed) for end in (low, high)]
    return f"{shown} [{ends[0]}, {ends[1]}]"


def p_text(p: float) -> str:
    """A p-value with three decimals; below 0.001 only that it is.

    Example:
        >>> p_text(0.00005)
        '< 0.001'
    """
    return "< 0.001" if p < 0.001 else number_text(p, 3)


def digits_for(values: Any) -> int:
    """Decimals that give the median magnitude of some numbers two or three significant figures, from 0 to 4.

    Zeros, infinities and NaN are ignored.
    """
    import numpy as np  # here, so that the command line's help need not import it

    sizes = np.abs(np.atleast_1d(np.asarray(values, dtype=float)))
    power = math.floor(math.log10(np.median(sizes[(sizes > 0) & (sizes < np.inf)].tolist() or [1])))
    return min(4, max(0, 2 - power if power >= 0 else 1 - power))
