"""Figures of what the debate adds and of the paper's protocol: means over training seeds, each seed as a dot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from steerkit.show.plots import GREY, MARKERS, PALETTE, TWO_COLUMNS, new_figure, styled

WHAT_HELPS = (
    "Debate",
    "IMAD",
    "SFT",
    "SFT on shuffled turns",
    "SFT on gold answers",
    "SFT on right answers",
    "GRPO without debate",
    "DebateGPT + GRPO",
    "DebateGPT (answer) + GRPO",
    "IMAD of one self-check",
)
"""Debate, IMAD, and the trainings that show what the debate adds."""


@styled()
def accuracy_by_seed(main: pd.DataFrame, methods: Sequence[str] = WHAT_HELPS, title: str | None = None) -> Any:
    """A panel per family: accuracy of each method, sampled; a dot per training seed, the mean with its interval.

    Args:
        main: the table of `analysis.paper.main_table`.
        methods: rows of the panels, from top to bottom; those that a family lacks are left out.
        title: printed above the panels; default: the most accurate method of each family.
    """
    some = main[(main["decoding"] == "sampled") & main["method"].isin(methods)]
    families = list(dict.fromkeys(some["family"]))
    there = [method for method in methods if method in set(some["method"])]
    title = title or _best_title(some)
    height = 0.9 + 0.2 * len(there) + 0.2 * bool(title)
    figure, [row] = new_figure(TWO_COLUMNS, height, title, 1, len(families), sharey=True)
    for axes, family in zip(row, families, strict=True):
        part = some[some["family"] == family].set_index("method")
        for place, method in enumerate(there):
            if method not in part.index:
                continue
            line = part.loc[method]
            seeds = [100 * float(value) for value in str(line["by_seed"]).split()]
            axes.hlines(place, 100 * line["low"], 100 * line["high"], color=PALETTE[0], lw=1.2)
            axes.plot(seeds, [place] * len(seeds), ".", color=GREY, markersize=3, alpha=0.8)
            axes.plot(100 * line["accuracy"], place, MARKERS[0], color=PALETTE[0], markersize=4)
        axes.set(title=family, xlabel="accuracy, %")
    row[0].set_yticks(range(len(there)), there)
    row[0].invert_yaxis()
    _caption(figure, some)
    return figure


def _best_title(table: pd.DataFrame) -> str:
    """The most accurate method of each family; families where its interval overlaps that of another, apart."""
    best = table.loc[table.groupby("family", sort=False)["accuracy"].idxmax()]
    rest = table.drop(index=best.index)
    is_unclear = [bool((rest[rest["family"] == row.family]["high"] >= row.low).any()) for row in best.itertuples()]
    clear = best[[not one for one in is_unclear]].groupby("method", sort=False)["family"].apply(" and ".join)
    told = [f"{method} does best in {families}" for method, families in clear.items()]
    if any(is_unclear):
        told.append(f"which method does best in {' and '.join(best['family'][is_unclear])} is not shown")
    return "; ".join(told)[:1].upper() + "; ".join(told)[1:]


def _protocol_title(protocols: Mapping[str, pd.DataFrame]) -> str:
    """By how much the mean areas of the agents' own directions differ from those of random ones, and planted ones."""
    every = pd.concat(protocols.values())
    grid = "controls" if (every["grid"] == "controls").any() else "coefficient"
    same = every[(every["score"] == "rouge_l") & (every["grid"] == grid) & (every["measure"] == "area over random")]
    planted = same["stage"].str.contains("planted")
    if same[~planted].empty:
        return ""
    most = same.loc[~planted, "value"].abs().max()
    title = f"The agents' directions do as random ones do (areas differ by at most {most:.3f})"
    if planted.any():
        low, high = same.loc[planted, "value"].min(), same.loc[planted, "value"].max()
        title += f"; planted ones add {low:.2f} to {high:.2f}"
    return title


@styled()
def protocol_areas(protocols: Mapping[str, pd.DataFrame]) -> Any:
    """A panel per family: the area of each kind of directions by checkpoint; a dot per training seed.

    The area is over the coefficients; where controls were run at fewer strengths, over these.

    Args:
        protocols: family -> the table of `analysis.paper.pooling.pool_protocol`.
    """
    figure, [row] = new_figure(TWO_COLUMNS, 2.6, _protocol_title(protocols), 1, len(protocols), sharey=True)
    handles: dict[str, Any] = {}
    parts = []
    for axes, (family, table) in zip(row, protocols.items(), strict=True):
        grid = "controls" if (table["grid"] == "controls").any() else "coefficient"
        kinds = table["measure"].str.extract(r"^area, (\w+)$")[0]
        some = table.assign(kind=kinds)[(table["score"] == "rouge_l") & (table["grid"] == grid) & kinds.notna()]
        parts.append(some)
        places = [tuple(key) for key in some[["stage", "context"]].drop_duplicates().to_numpy()]
        for number, kind in enumerate(dict.fromkeys(some["kind"])):
            mine = some[some["kind"] == kind].set_index(["stage", "context"])
            color, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
            for index, place in enumerate(places):
                if place not in mine.index:
                    continue
                line, x = mine.loc[place], index + 0.14 * (number - 1)
                seeds = [float(value) for value in str(line["by_seed"]).split()]
                axes.vlines(x, line["low"], line["high"], color=color, lw=1.2)
                axes.plot([x] * len(seeds), seeds, ".", color=color, markersize=2.5, alpha=0.5)
                (handles[kind],) = axes.plot(x, line["value"], marker, color=color, markersize=3.5, ls="")
        labels = [f"{stage}\n{context}" for stage, context in places]
        axes.set_xticks(
            range(len(places)), [label.replace(" with planted directions", "\nplanted") for label in labels]
        )
        axes.set_title(family)
    row[0].set_ylabel("area under ROUGE-L")
    _caption(figure, pd.concat(parts), list(handles.items()))
    return figure


def _caption(figure: Any, table: pd.DataFrame, handles: Sequence[tuple[str, Any]] = ()) -> None:
    """The legend with what bars and dots are, and how many there are."""
    seeds, numbers = (sorted({int(number) for number in table[column]}) for column in ("seeds", "n"))
    n = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    several = " or ".join(str(number) for number in seeds if number > 1)
    unit = f"over {several} training seeds, each a dot" if several else "over questions, one training seed"
    if several and seeds[0] == 1:
        unit += " (over questions where there is one)"
    about: Any = {"title": f"Mean and 95 % interval {unit}; n = {n} questions.", "alignment": "left"}
    names = [name for name, _ in handles]
    figure.legend([handle for _, handle in handles], names, loc="outside lower left", ncols=5, **about)
