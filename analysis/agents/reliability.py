"""How far a vector can be trusted: halves of the questions, resampled questions, and fewer of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from steerkit.capture.activations import Activations


def reliability(
    acts: Activations, layers: Sequence[int], draws: int = 200, seed: int = 0, sizes: Sequence[int] = ()
) -> pd.DataFrame:
    """Cosines between vectors of one agent made from different questions.

    Kinds: `halves`, of two disjoint halves of the questions; `bootstrap`, of questions drawn with replacement with the
    vector of all; `size n`, of n questions with the vector of all the others. Columns: layer, agent, kind, n, cosine
    (mean over draws), low, high (2.5 and 97.5 % of the draws).
    """
    rng = np.random.default_rng(seed)
    groups, code = np.unique(acts.items["group"].to_numpy(dtype=str), return_inverse=True)
    agents, label = np.unique(acts.items["label"].to_numpy(dtype=str), return_inverse=True)
    total = len(groups)
    if total < 4:
        raise ValueError(f"expected four questions at least; got {total}.")
    smaller = sorted({n for n in (sizes or (5, 10, 20, 40, 80, 160, 320)) if n <= total // 2})
    rows = []
    for layer in layers:
        sums = torch.zeros(len(agents), total, acts.resid.shape[-1], dtype=torch.float64)
        counts = torch.zeros(len(agents), total, dtype=torch.float64)
        sums.index_put_((torch.tensor(label), torch.tensor(code)), acts.at(layer).double(), accumulate=True)
        counts.index_put_((torch.tensor(label), torch.tensor(code)), torch.ones(len(label)).double(), accumulate=True)

        def vectors(weights: np.ndarray, sums: torch.Tensor = sums, counts: torch.Tensor = counts) -> torch.Tensor:
            """`[draw, agent, d_model]` from how often each question counts `[draw, question]`."""
            w = torch.from_numpy(weights).double()
            mean = torch.einsum("dq,aqm->dam", w, sums) / torch.einsum("dq,aq->da", w, counts)[..., None]
            return mean - (mean.sum(1, keepdim=True) - mean) / (len(agents) - 1)

        every = np.ones((1, total))
        half = np.argsort(rng.random((draws, total)), axis=1) < total // 2
        drawn = rng.multinomial(total, [1 / total] * total, size=draws)
        compared = [("halves", total // 2, vectors(half), vectors(~half)), ("bootstrap", total, vectors(drawn), None)]
        for n in smaller:
            few = np.argsort(rng.random((draws, total)), axis=1) < n
            compared.append((f"size {n}", n, vectors(few), vectors(~few)))
        for kind, n, left, right in compared:
            cosine = torch.nn.functional.cosine_similarity(left, vectors(every) if right is None else right, dim=-1)
            for a, agent in enumerate(agents):
                found = cosine[:, a].numpy()
                low, high = np.nanpercentile(found, [2.5, 97.5])
                rows.append((layer, agent, kind, n, float(np.nanmean(found)), low, high))
    return pd.DataFrame(rows, columns=["layer", "agent", "kind", "n", "cosine", "low", "high"])
