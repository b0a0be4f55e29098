"""One checkpoint against another, question by question: is the area under an agent's curve larger after training?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from steerkit import scoring
from steerkit.results import SweepResult


def areas(result: SweepResult, score: str, agent: str) -> pd.Series:
    """The normalised area under an agent's own curve, per question."""
    table = result.table
    own = table[(table["agent"] == agent) & (table["vector"] == agent)]
    wide = own.pivot_table(index="group", columns="coefficient", values=score, aggfunc="mean")
    values = [scoring.curve_auc(wide.columns, row, normalize=True) for row in wide.to_numpy()]
    return pd.Series(values, index=wide.index)


def differences(
    first: SweepResult, second: SweepResult, score: str, agents: Sequence[str], seed: int = 0
) -> pd.DataFrame:
    """Area at the second checkpoint minus area at the first, paired by question, per agent and over all agents.

    The paper's comparison of IMAD with its base (arXiv 2604.24881, section 4), with its interval. Columns: agent
    (`all`: mean over agents), first, second (mean areas), difference, low, high, p, n (questions).
    """
    before = {agent: areas(first, score, agent) for agent in agents}
    after = {agent: areas(second, score, agent) for agent in agents}
    before["all"], after["all"] = (pd.concat(list(side.values()), axis=1).mean(axis=1) for side in (before, after))
    rows = []
    for agent in (*agents, "all"):
        both = pd.concat([before[agent], after[agent]], axis=1, keys=["first", "second"]).dropna()
        gap = (both["second"] - both["first"]).to_numpy()
        interval = scoring.bootstrap_ci(gap, np.array(both.index), seed=seed)
        means = (both["first"].mean(), both["second"].mean())
        rows.append((agent, *means, interval.mean, interval.low, interval.high, interval.p, interval.n))
    return pd.DataFrame(rows, columns=["agent", "first", "second", "difference", "low", "high", "p", "n"])
