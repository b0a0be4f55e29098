"""The result of patching: effects by site, layer and position, with intervals over pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from steerkit.capture.activations import facts_html
from steerkit.stats.mean import mean_interval

PLACE = ["site", "layer", "head", "position", "token"]
COLUMNS = [*PLACE, "effect", "effect_low", "effect_high", "n", "n_missing"]


@dataclass(frozen=True, eq=False, repr=False)
class PatchResult:
    """The effects of patching.

    Args:
        table: one row per place that was patched:
            `site`, `layer`, `head` (of `z`, else missing), `position` (token index or name, as given), `token`
            (the token of the unpatched runs there; None where pairs or the tokens of a span differ),
            `effect`: mean over pairs of `(m - m_base) / (m_other - m_base)` with m the metric: 0 is the unpatched run,
            1 the other run,
            `effect_low`, `effect_high`: 95 % interval over pairs (`mean_interval`); NaN for one pair,
            `n`: number of pairs with an effect,
            `n_missing`: number of pairs whose patched run has a metric that is not finite; they are left out.
        pairs: one row per place and pair, with the metrics: `pair`, `base` (unpatched run), `other` (the run that
            activations are taken from), `patched`, and `effect` (NaN where `patched` is not finite).
        meta: provenance: model, mode, metric, method, `answers` (right and wrong text of each pair; None without) and
            `data_sha256`, a hash of the token ids of prompts and answers.
    """

    table: pd.DataFrame
    pairs: pd.DataFrame
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"PatchResult({', '.join(f'{name} {value}' for name, value in self._summary().items())})"

    def _repr_html_(self) -> str:
        """Return the summary and the largest effects as HTML, for notebooks; all texts are escaped."""
        largest = self.table.reindex(self.table["effect"].abs().sort_values(ascending=False).index).head(10)
        shown = largest.to_html(escape=True, index=False, float_format="{:.3f}".format, na_rep="")
        return facts_html("PatchResult", self._summary()) + shown

    def _summary(self) -> dict[str, str]:
        effects = self.table["effect"].abs()
        return {
            "pairs": str(self.pairs["pair"].nunique()),
            "places": str(len(self.table)),
            "mode": str(self.meta.get("mode")),
            "largest effect": "none is finite" if effects.isna().all() else _shown(self.table.loc[effects.idxmax()]),
        }


def _shown(row: pd.Series) -> str:
    """An effect with its place."""
    head = "" if pd.isna(row["head"]) else f" head {row['head']}"
    return f"{row['effect']:.3f} ({row['site']} {row['layer']}{head}, position {row['position']})"


def over_pairs(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return the table of effects per place, from one row per place and pair."""
    rows = []
    for _, group in pairs.groupby(["site", "layer", "head", "position"], sort=False, dropna=False):
        first = group.iloc[0]
        same = group["token"].nunique(dropna=False) == 1
        interval = mean_interval(group["effect"])
        rows.append(
            {
                **{name: first[name] for name in PLACE},
                "token": first["token"] if same else None,
                "effect": interval.mean,
                "effect_low": interval.low,
                "effect_high": interval.high,
                "n": interval.n,
                "n_missing": interval.n_missing,
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS).astype({"head": "Int64"})
