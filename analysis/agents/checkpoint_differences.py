"""Differences between two checkpoints, question by question: does an agent respond more to its own direction?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from steerkit.stats.areas import curve_auc
from steerkit.stats.paired import paired_difference
from steerkit.sweeps.result import SweepResult

Measure = Callable[[SweepResult, str], pd.Series]
"""The effect of an agent's own direction, one value per question."""


def areas(result: SweepResult, agent: str, score: str) -> pd.Series:
    """The normalised area under an agent's own curve, per question; NaN where a score on the curve is missing."""
    wide = _own(result, agent, score)
    rows = wide.to_numpy()
    values = [curve_auc(wide.columns, row, normalize=True) if np.isfinite(row).all() else np.nan for row in rows]
    return pd.Series(values, index=wide.index)


def gained(result: SweepResult, agent: str, score: str, coefficient: float) -> pd.Series:
    """The gain of a coefficient of an agent's own direction over coefficient 0, per question."""
    wide = _own(result, agent, score)
    return wide[coefficient] - wide[0.0]


def _own(result: SweepResult, agent: str, score: str) -> pd.DataFrame:
    table = result.table
    own = table[(table["agent"] == agent) & (table["vector"] == agent)]
    return own.pivot_table(index="group", columns="coefficient", values=score, aggfunc="mean", dropna=False)


def differences(
    first: SweepResult, second: SweepResult, measure: Measure, agents: Sequence[str], seed: int = 0
) -> pd.DataFrame:
    """A measure at the second checkpoint minus that at the first, paired by question, per agent and over all agents.

    With `areas` it is the paper's comparison of IMAD with its base (arXiv 2604.24881, section 4), with an interval.

    Args:
        first: curves at the first checkpoint, with the column `agent`.
        second: curves at the second.
        measure: `areas` or `gained`, with its further arguments bound.
        agents: the agents' names.
        seed: of the bootstrap.

    Returns:
        Columns agent (`all`: mean over agents), first, second (means), difference, low, high, p, n (questions).
    """
    before = {agent: measure(first, agent) for agent in agents}
    after = {agent: measure(second, agent) for agent in agents}
    for values in (before, after):
        values["all"] = pd.concat(list(values.values()), axis=1).mean(axis=1)
    rows = []
    for agent in (*agents, "all"):
        pair = pd.concat([before[agent], after[agent]], axis=1, keys=["first", "second"]).dropna()
        interval = paired_difference(pair["second"], pair["first"], pair.index.tolist(), seed=seed)
        means = (pair["first"].mean(), pair["second"].mean())
        rows.append((agent, *means, interval.mean, interval.low, interval.high, interval.p, interval.n))
    return pd.DataFrame(rows, columns=["agent", "first", "second", "difference", "low", "high", "p", "n"])
