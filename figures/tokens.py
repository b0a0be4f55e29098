"""Figure of accuracy over tokens, by method."""

from __future__ import annotations

from typing import Any

import pandas as pd

from steerkit.show.plots import GREY, INK, MARKERS, PALETTE, TWO_COLUMNS, new_figure, styled

STRESSED = ("IMAD", "Debate", "Single")


@styled()
def accuracy_tokens(table: pd.DataFrame, title: str | None = None) -> Any:
    """A panel per family and decoding: accuracy with its 95 % interval over tokens in and out, on a logarithmic axis.

    With several training seeds the interval is over the seeds, and each seed is a dot.

    Args:
        table: the table of `analysis.paper.main_table`.
    """
    wanted = ["family", "method", "decoding", "n", "seeds", "accuracy", "low", "high", "tokens"]
    if table.empty or (missing := [column for column in wanted if column not in table]):
        raise ValueError(
            f"expected a main table with rows; got {len(table)} rows, missing: {missing or 'rows'}. Write it with "
            "`python -m analysis main-table`."
        )
    panels = list(table.groupby(["family", "decoding"], sort=False))
    methods = list(dict.fromkeys(table["method"]))
    ranked = [name for name in STRESSED if name in methods] + [name for name in methods if name not in STRESSED]
    looks = {name: (PALETTE[i % 7] if i < 7 else GREY, MARKERS[i % 7]) for i, name in enumerate(ranked)}
    figure, [row] = new_figure(TWO_COLUMNS, 2.6 + 0.11 * len(methods), title, 1, len(panels), sharey=True)
    handles = {}
    for axes, ((family, decoding), part) in zip(row, panels, strict=True):
        for line in part.itertuples():
            color, marker = looks[line.method]
            size = 5 if line.method in STRESSED else 3.5
            axes.vlines(line.tokens, 100 * line.low, 100 * line.high, color=color, lw=1.2)
            each = [float(value) for value in str(getattr(line, "by_seed", "")).split()]
            if len(each) > 1:
                axes.scatter([line.tokens] * len(each), [100 * value for value in each], s=3, color=color, alpha=0.6)
            (handles[line.method],) = axes.plot(
                line.tokens, 100 * line.accuracy, marker, color=color, markersize=size, ls=""
            )
        axes.set_xscale("log", subs=[])
        low, high = part["tokens"].min(), part["tokens"].max()
        ticks = [t for t in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if low / 1.5 <= t <= high * 1.5]
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.set(title=f"{family}, {decoding}", xlabel="tokens in and out per question", xlim=(low / 1.4, high * 1.4))
    row[0].set_ylabel("accuracy, %")
    for axes in row:
        axes.tick_params(colors=INK)
    seeds = int(table["seeds"].max())
    n = table["n"].max()
    unit = f"over {seeds} training seeds (dots)" if seeds > 1 else "over questions, one training seed"
    about: Any = {
        "title": f"Mean and 95 % interval {unit}; n = {n} questions.",
        "alignment": "left",
    }
    order = [name for name in ranked if name in handles]
    figure.legend([handles[m] for m in order], order, loc="outside lower left", ncols=3, **about)
    return figure
