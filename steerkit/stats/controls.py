"""One direction against control directions: is it unlike a further one of their kind?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True)
class AgainstControls:
    """A direction's gain over control directions; see `against_controls`.

    Args:
        gain: its mean score minus the mean over controls.
        low: lower end of the prediction interval of that difference; NaN for fewer than two controls.
        high: upper end.
        p: two-sided p-value of the hypothesis that the direction is one of the controls' kind (Student's t).
        p_rank: one-sided p-value of the same hypothesis by rank, against larger scores.
        n: prompts with a score of the direction.
        k: controls with a score.
    """

    gain: float
    low: float
    high: float
    p: float
    p_rank: float
    n: int
    k: int


def against_controls(values: ArrayLike, controls: ArrayLike, level: float = 0.95) -> AgainstControls:
    """A direction's mean score minus that of k controls, with the prediction interval of a further control.

    With v the direction's mean over prompts, c_1 ... c_k those of the controls, m their mean and s their standard
    deviation,

        gain = v - m,        gain -+ t_{k-1} s sqrt(1 + 1/k),        p_rank = (1 + #{c_j >= v}) / (k + 1).

    Under the null hypothesis the direction is one more draw from the controls' population, swept on the same prompts.
    v then differs from m by the spread of the population, of which the noise of finite prompts is a part, and by the
    error of m. The interval excludes 0 for 1 - `level` of such directions if the means are Gaussian; `p_rank` makes no
    such assumption, and cannot fall below 1 / (k + 1): see `controls_needed`.

    Args:
        values: `[n]`, the direction's score on each prompt. NaN is missing: the prompt is left out for all.
        controls: `[n, k]`, the controls' scores on the same prompts. NaN is missing.
        level: coverage of the interval, in (0, 1).

    Raises:
        ValueError: other shapes; a level outside (0, 1).

    Source: Hahn and Meeker, "Statistical Intervals", 1991, chapter 4; Phipson and Smyth 2010, "Permutation p-values
    should never be zero".

    Example:
        >>> against_controls([3.0, 3.0], [[1.0, 2.0], [1.0, 2.0]]).gain
        1.5
    """
    x, others = np.asarray(values, dtype=float), np.asarray(controls, dtype=float)
    if x.ndim != 1 or others.ndim != 2 or len(x) != len(others):
        raise ValueError(
            f"expected values [n] and controls [n, k]; got shapes {list(x.shape)} and {list(others.shape)}. Pass one "
            "row per prompt in both."
        )
    if not 0 < level < 1:
        raise ValueError(f"expected 0 < level < 1; got {level}. Try 0.95.")
    there = ~np.isnan(x)
    x, others = x[there], others[there]
    others = others[:, ~np.isnan(others).all(axis=0)]
    k, nan = others.shape[1], float("nan")
    if not len(x) or not k:
        return AgainstControls(nan, nan, nan, nan, nan, len(x), k)
    # a control's missing prompts are filled with what the prompt and the control have on average
    means = np.nanmean(others - np.nanmean(others, axis=1, keepdims=True), axis=0) + np.nanmean(others, axis=1).mean()
    value = float(x.mean())
    gain = value - float(means.mean())
    near = 1e-12 * float(np.abs(others).max(initial=0.0, where=~np.isnan(others)))
    rank = (1 + int((means >= value - near).sum())) / (k + 1)
    if k < 2:
        return AgainstControls(gain, nan, nan, nan, rank, len(x), k)
    spread = float(means.std(ddof=1)) * math.sqrt(1 + 1 / k)
    half = float(stats.t.ppf((1 + level) / 2, k - 1)) * spread
    p = 2 * float(stats.t.sf(abs(gain) / spread, k - 1)) if spread else float(abs(gain) <= near)
    return AgainstControls(gain, gain - half, gain + half, p, rank, len(x), k)


def controls_needed(level: float = 0.05) -> int:
    """The fewest controls with which a p-value by rank can reach `level`: the smallest k with 1 / (k + 1) <= level.

    Example:
        >>> controls_needed(0.05)
        19
    """
    if not 0 < level < 1:
        raise ValueError(f"expected 0 < level < 1; got {level}. Try 0.05.")
    return math.ceil(1 / level - 1e-9) - 1
