"""Reliability of the agents' vectors: cosines between vectors from halves, resamples and subsets of the questions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from steerkit.capture.activations import Activations

SIZES = (5, 10, 20, 40, 80, 160, 320)


def reliability(
    acts: Activations, layers: Sequence[int], draws: int = 200, seed: int = 0, sizes: Sequence[int] = ()
) -> pd.DataFrame:
    """Cosines between vectors of one agent from different questions.

    Kinds: `halves`, two disjoint halves of the questions; `bootstrap`, questions drawn with replacement against all;
    `size n`, n questions against all the others.

    Args:
        acts: labels are the agents, groups the questions.
        layers: where vectors are compared.
        draws: number of draws of each kind.
        seed: of the draws.
        sizes: the n of `size n`; default `SIZES`. Sizes above half of the questions are left out.

    Returns:
        Columns layer, agent, kind, n, cosine (mean over draws), low, high (2.5 and 97.5 % of the draws).

    Raises:
        ValueError: fewer than four questions.
    """
    rng = np.random.default_rng(seed)
    groups, code = np.unique(acts.items["group"].to_numpy(dtype=str), return_inverse=True)
    agents, label = np.unique(acts.items["label"].to_numpy(dtype=str), return_inverse=True)
    total = len(groups)
    if total < 4:
        raise ValueError(f"expected four questions at least; got {total}. Pass activations of more debates.")
    smaller = sorted({n for n in (sizes or SIZES) if n <= total // 2})
    at = (torch.tensor(label), torch.tensor(code))
    rows = []
    for layer in layers:
        sums = torch.zeros(len(agents), total, acts.resid.shape[-1], dtype=torch.float64)
        counts = torch.zeros(len(agents), total, dtype=torch.float64)
        sums.index_put_(at, acts.at(layer).double(), accumulate=True)
        counts.index_put_(at, torch.ones(len(label), dtype=torch.float64), accumulate=True)
        every = _vectors(np.ones((1, total)), sums, counts)
        half = np.argsort(rng.random((draws, total)), axis=1) < total // 2
        drawn = rng.multinomial(total, [1 / total] * total, size=draws)
        compared = [
            ("halves", total // 2, _vectors(half, sums, counts), _vectors(~half, sums, counts)),
            ("bootstrap", total, _vectors(drawn, sums, counts), every),
        ]
        for n in smaller:
            subset = np.argsort(rng.random((draws, total)), axis=1) < n
            compared.append((f"size {n}", n, _vectors(subset, sums, counts), _vectors(~subset, sums, counts)))
        for kind, n, left, right in compared:
            cosines = torch.nn.functional.cosine_similarity(left, right, dim=-1)
            for column, agent in enumerate(agents):
                values = cosines[:, column].numpy()
                low, high = np.nanpercentile(values, [2.5, 97.5])
                rows.append((layer, agent, kind, n, float(np.nanmean(values)), low, high))
    return pd.DataFrame(rows, columns=["layer", "agent", "kind", "n", "cosine", "low", "high"])


def _vectors(weights: np.ndarray, sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The agents' vectors `[draw, agent, d_model]` from the weight of each question `[draw, question]`.

    Args:
        weights: how often each question counts in each draw.
        sums: `[agent, question, d_model]`, streams summed over the turns of an agent in a question.
        counts: `[agent, question]`, number of these turns.
    """
    w = torch.from_numpy(weights).double()
    mean = torch.einsum("dq,aqm->dam", w, sums) / torch.einsum("dq,aq->da", w, counts)[..., None]
    return mean - (mean.sum(1, keepdim=True) - mean) / (mean.shape[1] - 1)
