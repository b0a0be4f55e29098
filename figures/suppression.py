"""Figure of the suppression of a trait: trait, accuracy and perplexity over the coefficient, by checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from figures.agents import over_seeds
from steerkit.show.plots import curve_grid

SCORES = {"trait": "share with the trait", "accuracy": "accuracy", "perplexity": "perplexity"}


def suppression_curves(curves: pd.DataFrame, context: str) -> Any:
    """A column per checkpoint, a row per score; in grey the mean of random directions and where a further one would be.

    Args:
        curves: the table `suppression_curves` of `analysis.suppression.suppress`.
        context: `plain` prompts, or the malicious agent `forced` by its tag.
    """
    some = curves[(curves["context"] == context) & np.isfinite(curves["coefficient"])]
    panels = {
        label: {stage: part[(part["stage"] == stage) & (part["score"] == score)] for stage in _ordered(part["stage"])}
        for score, label in SCORES.items()
        if len(part := some[some["score"] == score])
    }
    controls = _ordered(some.loc[some["role"] != "vector", "vector"])
    where = "with the malicious agent's tag" if context == "forced" else "on plain prompts"
    log = [SCORES["perplexity"]] if SCORES["perplexity"] in panels else []
    sample = over_seeds(some)
    return curve_grid(panels, "coefficient", "vector", controls, f"Suppression {where}", log=log, sample=sample)


def _ordered(names: pd.Series) -> list[str]:
    return [str(name) for name in dict.fromkeys(names)]
