"""One direction against control directions: is it unlike a further one of their kind?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import special

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import ArrayLike


@dataclass(frozen=True)
class AgainstControls:
    """A direction's gain over control directions; see `against_controls`.

    Args:
        gain: its mean score minus the mean over controls.
        low: lower end of the prediction interval of that difference; NaN for fewer than two controls.
        high: upper end.
        p: two-sided p-value of the hypothesis that the direction is one of the controls' kind (Student's t; where all
            controls have the same mean and the direction another, 1 / (k + 1)).
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
        values: `[n]`, the direction's score on each prompt. NaN is missing: the prompt is left out for all, as is one
            without a score of any control.
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
    _check_level(level)
    there = ~np.isnan(x) & ~np.isnan(others).all(axis=1)
    x, others = x[there], others[there]
    others = others[:, ~np.isnan(others).all(axis=0)]
    k, nan = others.shape[1], float("nan")
    if not len(x) or not k:
        return AgainstControls(nan, nan, nan, nan, nan, len(x), k)
    means = _means(others)
    value = float(x.mean())
    gain = value - float(means.mean())
    near = 1e-12 * float(np.abs(others).max(initial=0.0, where=~np.isnan(others)))
    gain = 0.0 if abs(gain) <= near else gain
    rank = (1 + int((means >= value - near).sum())) / (k + 1)
    if k < 2:
        return AgainstControls(gain, nan, nan, nan, rank, len(x), k)
    spread = float(means.std(ddof=1)) * math.sqrt(1 + 1 / k)
    half = _half_width(means, level)
    if spread > near:
        p = 2 * float(special.stdtr(k - 1, -abs(gain) / spread))
    else:
        p = 1.0 if abs(gain) <= near else 1 / (k + 1)
    return AgainstControls(gain, gain - half, gain + half, p, rank, len(x), k)


@dataclass(frozen=True)
class ControlBand:
    """A control band: where the mean score of a further control is expected; see `control_band`.

    Args:
        mean: the mean over controls.
        low: lower end of the prediction interval; NaN for fewer than two controls.
        high: upper end.
        n: prompts with a score of some control.
        k: controls with a score.
    """

    mean: float
    low: float
    high: float
    n: int
    k: int


def control_band(controls: ArrayLike, level: float = 0.95) -> ControlBand:
    """The mean score of k controls, and the prediction interval of a further control on the same prompts.

    With c_1 ... c_k the controls' means over prompts, m their mean and s their standard deviation, the interval is
    `m -+ t_{k-1} s sqrt(1 + 1/k)`. A direction whose mean lies outside is unlike these controls.

    Args:
        controls: `[n, k]`, the controls' scores by prompt. NaN is missing.
        level: coverage of the interval, in (0, 1).

    Raises:
        ValueError: another shape; a level outside (0, 1).

    Source: as `against_controls`.

    Example:
        >>> control_band([[1.0, 2.0], [1.0, 2.0]]).mean
        1.5
    """
    table = np.asarray(controls, dtype=float)
    if table.ndim != 2:
        raise ValueError(f"expected controls [n, k]; got shape {list(table.shape)}. Pass one row per prompt.")
    _check_level(level)
    there = ~np.isnan(table)
    table = table[there.any(axis=1)][:, there.any(axis=0)]
    n, k = table.shape
    if not k:
        return ControlBand(math.nan, math.nan, math.nan, 0, 0)
    means = _means(table)
    mean, half = float(means.mean()), _half_width(means, level)
    return ControlBand(mean, mean - half, mean + half, n, k)


def controls_needed(level: float = 0.05) -> int:
    """The fewest controls with which a p-value by rank can reach `level`: the smallest k with 1 / (k + 1) <= level.

    Example:
        >>> controls_needed(0.05)
        19
    """
    _check_level(level)
    return math.ceil(1 / level - 1e-9) - 1


def _means(controls: Float[np.ndarray, "prompt control"]) -> Float[np.ndarray, " control"]:
    """Each control's mean over prompts; a missing score is filled with what its prompt and its control have else."""
    by_prompt = np.nanmean(controls, axis=1)
    return np.nanmean(controls - by_prompt[:, None], axis=0) + by_prompt.mean()


def _half_width(means: Float[np.ndarray, " control"], level: float) -> float:
    """Half of the prediction interval of a further mean; NaN for a single one."""
    k = len(means)
    if k < 2:
        return math.nan
    return float(special.stdtrit(k - 1, (1 + level) / 2)) * float(means.std(ddof=1)) * math.sqrt(1 + 1 / k)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"expected a level in (0, 1); got {level}. Try 0.95 for an interval, 0.05 for a p-value.")
