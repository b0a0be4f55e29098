"""One checkpoint against another, question by question: does an agent answer more to its own direction?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

import steerkit as sk
from analysis.agents.material import Material
from analysis.agents.vectors import agent_vectors, turn_streams
from steerkit.stats.areas import curve_auc
from steerkit.stats.bootstrap import bootstrap_ci
from steerkit.sweeps.result import SweepResult

Measure = Callable[[SweepResult, str], pd.Series]
"""What an agent's own direction does, a value per question."""


def areas(result: SweepResult, agent: str, score: str) -> pd.Series:
    """The normalised area under an agent's own curve, per question."""
    wide = _own(result, agent, score)
    values = [curve_auc(wide.columns, row, normalize=True) for row in wide.to_numpy()]
    return pd.Series(values, index=wide.index)


def gained(result: SweepResult, agent: str, score: str, coefficient: float) -> pd.Series:
    """What a coefficient of its own direction gains over coefficient 0, per question."""
    wide = _own(result, agent, score)
    return wide[coefficient] - wide[0.0]


def _own(result: SweepResult, agent: str, score: str) -> pd.DataFrame:
    table = result.table
    own = table[(table["agent"] == agent) & (table["vector"] == agent)]
    return own.pivot_table(index="group", columns="coefficient", values=score, aggfunc="mean")


def differences(
    first: SweepResult, second: SweepResult, measure: Measure, agents: Sequence[str], seed: int = 0
) -> pd.DataFrame:
    """A measure at the second checkpoint minus that at the first, paired by question, per agent and over all agents.

    Of `areas`, the paper's comparison of IMAD with its base (arXiv 2604.24881, section 4), with its interval. Columns:
    agent (`all`: mean over agents), first, second (means), difference, low, high, p, n (questions).
    """
    before = {agent: measure(first, agent) for agent in agents}
    after = {agent: measure(second, agent) for agent in agents}
    before["all"], after["all"] = (pd.concat(list(side.values()), axis=1).mean(axis=1) for side in (before, after))
    rows = []
    for agent in (*agents, "all"):
        both = pd.concat([before[agent], after[agent]], axis=1, keys=["first", "second"]).dropna()
        gap = (both["second"] - both["first"]).to_numpy()
        interval = bootstrap_ci(gap, np.array(both.index), seed=seed)
        means = (both["first"].mean(), both["second"].mean())
        rows.append((agent, *means, interval.mean, interval.low, interval.high, interval.p, interval.n))
    return pd.DataFrame(rows, columns=["agent", "first", "second", "difference", "low", "high", "p", "n"])


def published_vectors(material: Material, stage: str, n: int, out: Path) -> dict[str, sk.SteeringVector]:
    """The agents' vectors as the paper has them, from each response's last token in `n` debates; kept in a folder.

    At each layer the agent's mean less the others'; of unit length, as the paper's, only where it is asked for.
    Source: Yi, Mueller and Lee 2026, arXiv 2604.24881, section 4.
    """
    files = sorted(out.glob("published-*.safetensors"))
    if not files:
        for agent, vector in agent_vectors(turn_streams(*material.load(stage), material.train[:n])["last"]).items():
            vector.save(out / f"published-{agent}.safetensors")
        files = sorted(out.glob("published-*.safetensors"))
    return {path.stem.removeprefix("published-"): sk.SteeringVector.load(path) for path in files}


def checkpoint_cosines(vectors: Mapping[str, Mapping[str, sk.SteeringVector]]) -> pd.DataFrame:
    """Cosine of an agent's vector at one checkpoint with the same agent's at another: agent, layer, stage, other."""
    rows = [
        (agent, layer, stage, other, cosine)
        for stage, other in product(vectors, repeat=2)
        for agent in vectors[stage]
        for layer, cosine in vectors[stage][agent].cosine(vectors[other][agent]).items()
    ]
    return pd.DataFrame(rows, columns=["agent", "layer", "stage", "other", "cosine"])
