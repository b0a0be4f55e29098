"""Simulated scores under a known truth, and how often the intervals and tests of steerkit are right about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from steerkit.stats.controls import against_controls
from steerkit.stats.mean import mean_interval, seed_interval

KINDS = ("Gaussian", "skewed", "binary")
SKEW = 0.7  # of the exponent of lognormal scores


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
        coverage: share of intervals that hold the true mean; NaN where the claim has no such mean.
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
    width: float
    power: float
    simulations: int


def scores(kind: str, latent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scores of a kind whose mean grows with a latent Gaussian number."""
    if kind == "Gaussian":
        return latent
    if kind == "skewed":
        return np.exp(SKEW * latent)
    return (rng.random(latent.shape) < 1 / (1 + np.exp(-latent))).astype(float)


def of_prompts(kind: str, n: int, simulations: int, seed: int) -> Cell:
    """A gain over coefficient 0: differences of two scores of each prompt, none in truth, or one standard deviation."""
    rng = np.random.default_rng(seed)
    flagged, flipped, covered, widths, power = [], [], [], [], []
    spread = float(np.std(_pair(kind, 100_000, 0.0, rng)))
    for number in range(simulations):
        found = mean_interval(_pair(kind, n, 0.0, rng), n_boot=500, seed=number)
        flagged.append(found.low > 0 or found.high < 0)
        flipped.append(found.p <= 0.05)
        covered.append(found.low <= 0 <= found.high)
        widths.append((found.high - found.low) / spread)
        effect = mean_interval(_pair(kind, n, 1.0, rng), n_boot=500, seed=number)
        power.append(effect.p <= 0.05)
    return Cell(
        "gain over coefficient 0", kind, n, 0, *map(_share, (flagged, flipped, covered, widths, power)), simulations
    )


def _pair(kind: str, n: int, effect: float, rng: np.random.Generator) -> np.ndarray:
    prompt = rng.normal(0, 1, n)
    first, second = (scores(kind, prompt + rng.normal(0, 1, n) + shift, rng) for shift in (effect, 0.0))
    return first - second


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
            if effect:
                power.append(found.low > 0)
                continue
            flagged.append(found.low > 0 or found.high < 0)
            ranked.append(found.p_rank <= 0.05)
            widths.append((found.high - found.low) / table.std())
    return Cell(
        "direction against controls", kind, n, k, _share(flagged), _share(ranked), float("nan"), _share(widths),
        _share(power), simulations,
    )  # fmt: skip


def of_seeds(kind: str, n: int, seeds: int, spread: float, simulations: int, seed: int) -> Cell:
    """A difference between two training methods: seeds differ by `spread` times the questions' spread."""
    rng = np.random.default_rng(seed)
    flagged, covered, widths, power = [], [], [], []
    unit = float(np.std(_pair(kind, 100_000, 0.0, rng)))
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
                continue
            flagged.append(found.low > 0 or found.high < 0)
            covered.append(found.low <= 0 <= found.high)
            widths.append((found.high - found.low) / unit)
    name = f"difference of methods, seed spread {spread:g}"
    return Cell(
        name, kind, n, seeds, _share(flagged), float("nan"), _share(covered), _share(widths), _share(power), simulations
    )


def _share(values: list[bool] | list[float]) -> float:
    return float(np.mean(values))


def jobs(simulations: int) -> Iterator[Callable[[], Cell]]:
    """All cells of the table."""
    seed = 0
    for kind in KINDS:
        for n in (8, 20, 32, 100):
            seed += 1
            yield lambda kind=kind, n=n, seed=seed: of_prompts(kind, n, simulations, seed)  # type: ignore[misc]
            for k in (5, 19, 39):
                seed += 1
                yield lambda kind=kind, n=n, k=k, seed=seed: of_controls(kind, n, k, simulations, seed)  # type: ignore[misc]
            for seeds in (3, 6):
                for spread in (0.0, 0.3, 1.0):
                    seed += 1
                    yield lambda kind=kind, n=n, s=seeds, r=spread, seed=seed: of_seeds(  # type: ignore[misc]
                        kind, n, s, r, simulations, seed
                    )
