"""One direction against control directions: is it unlike a further one of their kind?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import special

from steerkit.stats.checks import check_level

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import ArrayLike


@dataclass(frozen=True)
class AgainstControls:
    """A direction's gain over control directions; see `against_controls`.

    Args:
        gain: its mean score minus the mean over controls.
        low: lower end of the prediction interval of that difference; NaN for fewer than two controls, where more than
            half of them have the same mean, and where missing scores leave controls that share no prompt.
        high: upper end.
        p: two-sided p-value of the hypothesis that the direction is one of the controls' kind: by Student's t; where
            more than half of the controls have one mean, by rank, with M their median:
            (1 + #{|c_j - M| >= |v - M|}) / (k + 1).
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
    such assumption, and cannot fall below 1 / (k + 1): see `controls_needed`. Controls that mostly have one mean, as of
    a score that is at its floor, do not say how far a further one could be: then there is no interval. See
    `steerkit.stats.sign.shown_sign`.

    A missing score of a control is filled with the sum of an effect of its prompt and one of the control, by least
    squares over the scores that are there.

    Args:
        values: `[n]`, the direction's score on each prompt. NaN is missing: the prompt is left out for all, as is one
            without a score of any control.
        controls: `[n, k]`, the controls' scores on the same prompts. NaN is missing.
        level: coverage of the interval, in (0, 1).

    Raises:
        ValueError: other shapes; an infinite score; a level outside (0, 1).

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
    check_level(level)
    _check_finite(x, others)
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
    half = _half_width(means, level)
    if not math.isnan(half):
        spread = float(means.std(ddof=1)) * math.sqrt(1 + 1 / k)
        p = 2 * float(special.stdtr(k - 1, -abs(gain) / spread))
    else:
        middle = float(np.median(means))
        p = (1 + int((np.abs(means - middle) >= abs(value - middle) - near).sum())) / (k + 1)
    return AgainstControls(gain, gain - half, gain + half, p, rank, len(x), k)


@dataclass(frozen=True)
class ControlBand:
    """A control band: where the mean score of a further control is expected; see `control_band`.

    Args:
        mean: the mean over controls.
        low: lower end of the prediction interval; NaN where `against_controls` has none.
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
    `m -+ t_{k-1} s sqrt(1 + 1/k)`. A direction whose mean over the same prompts lies outside is unlike these controls.

    Args:
        controls: `[n, k]`, the controls' scores by prompt. NaN is missing.
        level: coverage of the interval, in (0, 1).

    Raises:
        ValueError: another shape; an infinite score; a level outside (0, 1).

    Source: as `against_controls`.

    Example:
        >>> control_band([[1.0, 2.0], [1.0, 2.0]]).mean
        1.5
    """
    table = np.asarray(controls, dtype=float)
    if table.ndim != 2:
        raise ValueError(f"expected controls [n, k]; got shape {list(table.shape)}. Pass one row per prompt.")
    check_level(level)
    _check_finite(table)
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
    check_level(level)
    return math.ceil(1 / level - 1e-9) - 1


def _means(controls: Float[np.ndarray, "prompt control"]) -> Float[np.ndarray, " control"]:
    """Each control's mean over prompts, missing scores filled with the additive fit of prompts and controls.

    With M_ij = 1 where score y_ij is there, n_i = sum_j M_ij and r_i the mean of a prompt's scores, the effects b of
    the controls solve `(diag(sum_i M_ij) - sum_i M_i' M_i / n_i) b = sum_i M_ij (y_ij - r_i)`.
    """
    there = ~np.isnan(controls)
    by_prompt = np.nanmean(controls, axis=1)
    if there.all():
        return controls.mean(axis=0)
    weights = there / there.sum(axis=1, keepdims=True)
    equations = np.diag(there.sum(axis=0).astype(float)) - there.T @ weights
    effects, _, rank, _ = np.linalg.lstsq(equations, np.nansum(controls - by_prompt[:, None], axis=0), rcond=1e-9)
    means = effects + float((by_prompt - weights @ effects).mean())
    return means if rank == len(effects) - 1 else np.full(len(effects), np.nan)


def _half_width(means: Float[np.ndarray, " control"], level: float) -> float:
    """Half of the prediction interval of a further mean; NaN for a single one, or if more than half are equal."""
    k = len(means)
    near = 1e-12 * float(np.abs(means).max(initial=0.0))
    if k < 2 or np.isnan(means).any() or 2 * int((np.abs(means - np.median(means)) <= near).sum()) > k:
        return math.nan
    return float(special.stdtrit(k - 1, (1 + level) / 2)) * float(means.std(ddof=1)) * math.sqrt(1 + 1 / k)


def _check_finite(*tables: np.ndarray) -> None:
    if infinite := sum(int(np.isinf(table).sum()) for table in tables):
        raise ValueError(f"expected finite scores, or NaN; got {infinite} infinite. Use NaN for missing.")
