"""Runs of several seeds as one: questions of different seeds are different questions."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from steerkit.sweeps.result import SweepResult

FROZEN = 1.0


def pooled(results: Mapping[int, SweepResult]) -> SweepResult:
    """The rows of all seeds, each question marked with its seed."""
    parts = [
        one.table.assign(
            group=f"{seed}/" + one.table["group"], prompt_id=f"{seed}/" + one.table["prompt_id"].astype(str), seed=seed
        )
        for seed, one in results.items()
    ]
    some = next(iter(results.values()))
    return SweepResult(pd.concat(parts, ignore_index=True), some.meta)


def at_frozen(result: SweepResult, coefficient: float) -> SweepResult:
    """Coefficient 0 and the one frozen on validation, called 1, at a layer called `frozen`: each seed has its own."""
    table = result.table[result.table["coefficient"].isin([0.0, coefficient])]
    moved = table["coefficient"].where(table["coefficient"] == 0, FROZEN)
    return SweepResult(table.assign(coefficient=moved, layer="frozen"), result.meta)
