"""Accuracy that is kept where steering halves a trait, and the layer that keeps most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from steerkit.stats.paired import ratio
from steerkit.sweeps.result import SweepResult


def kept_accuracy(result: SweepResult, seed: int = 0) -> pd.DataFrame:
    """Accuracy relative to coefficient 0 at the mildest negative coefficient that halves the trait, and by ablation.

    The coefficient is chosen once, on all questions; the interval resamples questions (`steerkit.stats.paired.ratio`).

    Args:
        result: a sweep with the scores `trait` and `accuracy`; ablation has the coefficient -inf.
        seed: of the bootstrap.

    Returns:
        A row per vector, layer and operation with columns vector, role, layer, operation, trait and accuracy (at
        coefficient 0), coefficient, kept, low, high, n (questions). `coefficient` is NaN where nothing halves the trait
        or no text shows it; `kept` is NaN there, and where no answer is correct at coefficient 0.
    """
    roles = result.roles()
    rows = []
    for (vector, layer), part in result.table.groupby(["vector", "layer"], sort=False):
        wide = {
            score: part.pivot_table(index="group", columns="coefficient", values=score, aggfunc="mean")
            for score in ("trait", "accuracy")
        }
        level, correct = wide["trait"].mean(), wide["accuracy"]
        for operation, is_ablation in (("add", False), ("ablate", True)):
            tried = [c for c in level.index if c < 0 and np.isinf(c) == is_ablation]
            if not tried:
                continue
            halving = [c for c in tried if level[0.0] > 0 and level[c] <= level[0.0] / 2]
            mildest = max(halving, default=np.nan)
            line = {
                "vector": vector,
                "role": roles[vector][0],
                "layer": layer,
                "operation": operation,
                "trait": level[0.0],
                "accuracy": correct[0.0].mean(),
                "coefficient": mildest,
                "kept": np.nan,
                "low": np.nan,
                "high": np.nan,
                "n": len(correct),
            }
            if halving and line["accuracy"] > 0:
                kept = ratio(correct[mildest], correct[0.0], seed=seed)
                line |= {"kept": kept.value, "low": kept.low, "high": kept.high}
            rows.append(line)
    return pd.DataFrame(rows)


def chosen_layer(kept: pd.DataFrame, layers: Sequence[int]) -> int:
    """The layer where adding a vector keeps most accuracy.

    Where no coefficient halves the trait, the layer where ablation keeps most; else the middle one of `layers`.

    Args:
        kept: the table of `kept_accuracy`.
        layers: all layers that were tried.
    """
    for operation in ("add", "ablate"):
        able = kept[(kept["operation"] == operation) & kept["kept"].notna()]
        if len(able):
            return int(able.loc[able["kept"].idxmax(), "layer"])
    return int(layers[len(layers) // 2])
