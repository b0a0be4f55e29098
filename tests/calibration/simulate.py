"""Simulated scores under a known truth, and how often the intervals and tests of steerkit are right about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np

from steerkit.stats.controls import against_controls
from steerkit.stats.mean import accuracy_interval
from steerkit.stats.paired import paired_difference, ratio
from steerkit.stats.seeds import seed_interval
from steerkit.stats.sign import shown_sign

KINDS = ("Gaussian", "skewed", "binary")
SIZES = (8, 20, 32, 100)
SKEW = {"skewed": 0.35, "very skewed": 0.7}
"""Factor in the exponent of lognormal scores. With the first, a score has a skewness of 1.7 if x has the variance 2."""

RARE = -4.0
"""Log-odds of rare binary scores at a latent score of 0: most texts have 0."""


@dataclass(frozen=True)
class Cell:
    """A row of the table.

    Args:
        claim: what is tested.
        kind: of the scores.
        n: prompts, or questions per seed.
        k: controls, or seeds; 0 where there are none.
        false_positives: share of simulations without an effect that are flagged at 5 %.
        by_rank: the same by the second test: by rank, or by sign flips.
        coverage: share of intervals that hold the true mean where there is no effect; NaN where the claim has no such
            mean.
        effect_coverage: the same where there is the effect of `power`.
        width: mean width of the intervals, in standard deviations of the scores.
        power: share of simulations with an effect of one standard deviation of the scores that are flagged.
        simulations: of each figure.
    """

    claim: str
    kind: str
    n: int
    k: int
    false_positives: float
    by_rank: float
    coverage: float
    effect_coverage: float
    width: float
    power: float
    simulations: int


def scores(kind: str, latent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scores of a kind whose mean grows with a latent Gaussian number."""
    if kind == "Gaussian":
        return latent
    if kind in SKEW:
        return np.exp(SKEW[kind] * latent)
    odds = latent + (RARE if kind == "rare" else 0.0)
    return (rng.random(latent.shape) < 1 / (1 + np.exp(-odds))).astype(float)


def of_prompts(kind: str, n: int, simulations: int, seed: int) -> Cell:
    """A gain over coefficient 0: differences of two scores of each prompt, none in truth, or one standard deviation."""
    rng = np.random.default_rng(seed)
    flagged, flipped, covered, holds, widths, power = [], [], [], [], [], []
    spread, truth = float(np.std(np.subtract(*_pair(kind, 100_000, 0.0, rng)))), _true_gain(kind, 2.0, 1.0)
    for number in range(simulations):
        found = paired_difference(*_pair(kind, n, 0.0, rng), n_boot=500, seed=number)
        flagged.append(found.low > 0 or found.high < 0)
        flipped.append(found.p <= 0.05)
        covered.append(found.low <= 0 <= found.high)
        widths.append((found.high - found.low) / spread)
        effect = paired_difference(*_pair(kind, n, 1.0, rng), n_boot=500, seed=number)
        power.append(effect.p <= 0.05)
        holds.append(effect.low <= truth <= effect.high)
    shares = map(_share, (flagged, flipped, covered, holds, widths, power))
    return Cell("gain over coefficient 0", kind, n, 0, *shares, simulations)


def _pair(kind: str, n: int, effect: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    prompt = rng.normal(0, 1, n)
    first, second = (scores(kind, prompt + rng.normal(0, 1, n) + shift, rng) for shift in (effect, 0.0))
    return first, second


def _true_gain(kind: str, variance: float, effect: float) -> float:
    """The mean gain of scores whose latent scores have a variance, by Gauss-Hermite quadrature."""
    points, weights = np.polynomial.hermite_e.hermegauss(80)
    latent, weights = points * np.sqrt(variance), weights / weights.sum()

    def mean(shift: float) -> float:
        if kind == "binary":
            return float(weights @ (1 / (1 + np.exp(-latent - shift))))
        return float(weights @ (np.exp(SKEW[kind] * (latent + shift)) if kind in SKEW else latent + shift))

    return mean(effect) - mean(0.0)


def of_controls(kind: str, n: int, k: int, simulations: int, seed: int) -> Cell:
    """A direction against k controls of its kind, or one that pushes by three standard deviations of a direction."""
    rng = np.random.default_rng(seed)
    flagged, ranked, widths, power = [], [], [], []
    for _ in range(simulations):
        for effect in (0.0, 3.0):
            direction = rng.normal(0, 1, (1, k + 1))
            direction[0, 0] = effect if effect else direction[0, 0]
            latent = rng.normal(0, 1, (n, 1)) + direction + rng.normal(0, 1, (n, k + 1))
            table = scores(kind, latent, rng)
            found = against_controls(table[:, 0], table[:, 1:])
            sign = shown_sign(found.gain, found.low, found.high, found.p)
            if effect:
                power.append(sign > 0)
                continue
            flagged.append(sign != 0)
            ranked.append(found.p_rank <= 0.05)
            if not np.isnan(found.low):
                widths.append((found.high - found.low) / table.std())
    width = _share(widths) if len(widths) == simulations else float("nan")
    return Cell(
        "direction against controls", kind, n, k, _share(flagged), _share(ranked), float("nan"), float("nan"),
        width, _share(power), simulations,
    )  # fmt: skip


def of_seeds(kind: str, n: int, seeds: int, spread: float, simulations: int, seed: int) -> Cell:
    """A difference between two training methods: seeds differ by `spread` times the questions' spread."""
    rng = np.random.default_rng(seed)
    flagged, covered, holds, widths, power = [], [], [], [], []
    unit, truth = float(np.std(np.subtract(*_pair(kind, 100_000, 0.0, rng)))), _true_gain(kind, 2.0 + spread**2, 1.0)
    for _ in range(simulations):
        for effect in (0.0, 1.0):
            latent = [rng.normal(0, 1, n) for _ in range(seeds)]
            values = []
            for one in latent:
                sides = []
                for shift in (effect, 0.0):
                    pushed = one + rng.normal(0, spread) + rng.normal(0, 1, n) + shift
                    sides.append(scores(kind, pushed, rng))
                values.append(float((sides[0] - sides[1]).mean()))
            found = seed_interval(values)
            if effect:
                power.append(found.low > 0)
                holds.append(found.low <= truth <= found.high)
                continue
            flagged.append(found.low > 0 or found.high < 0)
            covered.append(found.low <= 0 <= found.high)
            widths.append((found.high - found.low) / unit)
    name = f"difference of methods, seed spread {spread:g}"
    shares = map(_share, (covered, holds, widths, power))
    return Cell(name, kind, n, seeds, _share(flagged), float("nan"), *shares, simulations)


def of_accuracy(share: float, n: int, simulations: int, seed: int) -> Cell:
    """A share of right answers."""
    rng, nan = np.random.default_rng(seed), float("nan")
    found = [accuracy_interval((rng.random(n) < share).astype(float)) for _ in range(simulations)]
    covered, widths = [i.low <= share <= i.high for i in found], [(i.high - i.low) for i in found]
    name = f"accuracy of {share:.0%}"
    return Cell(name, "binary", n, 0, nan, nan, nan, _share(covered), _share(widths), nan, simulations)


def of_ratio(kind: str, n: int, seeds: int, simulations: int, seed: int, mean: float = 10.0) -> Cell:
    """The tokens of one method over those of another, one half in truth: means over n questions of each seed.

    Args:
        mean: of the denominators, in units of the latent scores. An interval without ends holds every ratio.
    """
    rng, nan = np.random.default_rng(seed), float("nan")
    scale = float(scores(kind, rng.normal(0, 1, 100_000), rng).std())
    covered, widths = [], []
    for _ in range(simulations):
        level = rng.normal(0, 0.3, (seeds, 1)) * scale
        mine, theirs = (scores(kind, rng.normal(0, 1, (seeds, n)), rng) for _ in range(2))
        centre = float(np.exp(SKEW[kind] ** 2 / 2)) if kind in SKEW else 0.0
        first, second = (value + (one - centre + level).mean(1) for value, one in ((mean / 2, mine), (mean, theirs)))
        found = ratio(first, second)
        covered.append(found.low <= 0.5 <= found.high)
        widths.append(found.high - found.low)
    name = "ratio of tokens over seeds" if mean == 10 else f"ratio over seeds, denominators of mean {mean:g}"
    width = _share(widths) if np.isfinite(widths).all() else nan
    return Cell(name, kind, n, seeds, nan, nan, nan, _share(covered), width, nan, simulations)


def _share(values: list[bool] | list[float]) -> float:
    return float(np.mean(values))


def jobs(simulations: int) -> list[Callable[[], Cell]]:
    """All cells of the table; the number of a cell is the seed of its simulations."""
    cells: list[Callable[..., Cell]] = []
    for kind, n in product(KINDS, SIZES):
        cells.append(partial(of_prompts, kind, n))
        cells += [partial(of_controls, kind, n, k) for k in (5, 19, 39)]
        cells += [partial(of_seeds, kind, n, seeds, spread) for seeds in (3, 6) for spread in (0.0, 0.3, 1.0)]
    for n in SIZES:
        cells += [partial(of_accuracy, share, n) for share in (0.5, 0.9)]
        cells += [partial(of_ratio, "skewed", n, seeds) for seeds in (3, 6)]
    for kind, seeds, mean in product(("Gaussian", "skewed"), (3, 6), (0.2, 1.0)):
        cells.append(partial(of_ratio, kind, 20, seeds, mean=mean))
    cells += [partial(of_controls, "very skewed", n, k) for n, k in ((8, 5), (32, 5), (8, 19), (32, 19))]
    cells += [partial(of_controls, "rare", n, k) for n, k in ((8, 5), (32, 5), (8, 19), (32, 19))]
    return [partial(cell, simulations=simulations, seed=seed) for seed, cell in enumerate(cells, start=1)]
