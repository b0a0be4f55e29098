"""Figures about the agents' vectors: steering curves, cosines, probe accuracy, and the plane that they span."""

from __future__ import annotations

from typing import Any

import pandas as pd

from steerkit.show.plots import MARKERS, PALETTE, TWO_COLUMNS, curve_grid, heat_map, layer_profile, new_figure, styled

SOURCES = {"trace": "whole traces", "untagged": "traces without tags", "plain": "turns alone, no tags"}
SCORES = {
    "rouge_l": "ROUGE-L to own text",
    "speaks": "speaks first, share",
    "fidelity": "fidelity, nats/token",
}


def steering_curves(curves: pd.DataFrame, stage: str, identity: bool) -> Any:
    """A column per agent, a row per score: its own direction and the controls over the coefficient.

    Args:
        curves: the table of `analysis.agents.curves.curves`.
        stage: name of the checkpoint.
        identity: True: with the agent's tag in the context; False: without.
    """
    some = curves[(curves["stage"] == stage) & (curves["identity"] == identity)]
    if "k" in some:  # of a vector alone there is no number of controls
        some = some.assign(k=some["k"].where(some["role"] != "vector"))
    panels = {
        label: {
            f"agent {agent}": part[part["agent"].astype(str) == agent]
            for agent in sorted(some["agent"].astype(str).unique())
        }
        for score, label in SCORES.items()
        if len(part := some[some["score"] == score])
    }
    own = some[(some["kind"] == "own") & (some["score"] == "rouge_l")]
    means = own.pivot(index="agent", columns="coefficient", values="mean") if len(own) else pd.DataFrame()
    title = f"{stage}, {'the tag of the agent in the context' if identity else 'no identity in the context'}"
    if len(means) and 0 in means and means.columns.max() > 0:
        gains = means[means.columns.max()] - means[0]
        title += f": the own direction changes ROUGE-L by {gains.min():+.2f} to {gains.max():+.2f} (coefficient "
        title += f"{means.columns.max():g})"
    controls = some.loc[some["role"] != "vector", "kind"].drop_duplicates()
    return curve_grid(panels, "coefficient", "kind", controls.tolist(), title, sample=over_seeds(some))


def over_seeds(table: pd.DataFrame) -> str | None:
    """What the intervals of a table over several training seeds are over; None for the table of one seed."""
    if "seeds" not in table or table["seeds"].max() < 2:
        return None
    return f"over {table['seeds'].max():.0f} training seeds, n = {table['n'].max():.0f} questions of each"


def cosine_map(cosines: pd.DataFrame, stage: str, layer: int) -> Any:
    """Cosines between the agents' vectors of one checkpoint at one layer."""
    some = cosines[(cosines["stage"] == stage) & (cosines["layer"] == layer)]
    frame = some.pivot(index="agent", columns="other", values="cosine")
    return heat_map(frame, "cosine", centre=0.0, title=f"{stage}, layer {layer}")


def checkpoint_map(cosines: pd.DataFrame) -> Any:
    """Cosines of the same agent's vectors at two checkpoints, mean over agents, at the middle layer."""
    layers = sorted(cosines["layer"].unique())
    layer = layers[len(layers) // 2]
    stages = list(dict.fromkeys(cosines["stage"]))
    mean = cosines[cosines["layer"] == layer].groupby(["stage", "other"])["cosine"].mean().unstack()
    title = f"the same agent at two checkpoints, layer {layer}"
    return heat_map(mean.loc[stages, stages], "cosine", centre=0.0, title=title)


def probe_profile(table: pd.DataFrame, stage: str, debates: str, source: str, position: str) -> Any:
    """Held-out accuracy of probes of the agents' names by layer, with its controls."""
    keys = {"stage": stage, "debates": debates, "source": source, "position": position}
    some = table
    for key, value in keys.items():
        some = some[some[key] == value]
    title = f"{stage}, {debates}: {SOURCES[source]}, {position}"
    return layer_profile(some, title, majority=float(some["majority"].iloc[0]))


def separability(table: pd.DataFrame) -> Any:
    """Held-out accuracy at the last token, layer chosen in training folds: a row per text, a column per checkpoint."""
    some = table[(table["layer"].astype(str) == "nested") & (table["labels"] == "true") & (table["position"] == "last")]
    some = some.assign(text=some["debates"] + ": " + some["source"].map(SOURCES))
    order = [list(dict.fromkeys(some[name])) for name in ("text", "stage")]
    frames = {
        name: some.pivot(index="text", columns="stage", values=name).reindex(index=order[0], columns=order[1])
        for name in ("accuracy", "accuracy_low", "accuracy_high")
    }
    mean, low, high = frames.values()
    title = f"Who speaks, from the last token; largest class {some['majority'].iloc[0]:.2f}"
    return heat_map(mean, "held-out accuracy", low=low, high=high, n=some["n_groups"], title=title)


@styled()
def plane(points: pd.DataFrame) -> Any:
    """A panel per checkpoint: test turns in the plane that the agents' vectors span, the vectors as arrows.

    Args:
        points: the table of `analysis.agents.geometry.plane`: stage, kind (`turn` or `vector`), agent, x, y, n
            (questions).
    """
    stages = list(dict.fromkeys(points["stage"]))
    figure, [row] = new_figure(TWO_COLUMNS, 2.5, None, 1, len(stages))
    handles = {}
    for axes, stage in zip(row, stages, strict=True):
        some = points[points["stage"] == stage]
        for number, agent in enumerate(sorted(some["agent"].astype(str).unique())):
            mine = some[some["agent"].astype(str) == agent]
            turns, vector = mine[mine["kind"] == "turn"], mine[mine["kind"] == "vector"].iloc[0]
            color = PALETTE[number % len(PALETTE)]
            handles[f"agent {agent}"] = axes.scatter(
                turns["x"], turns["y"], s=5, color=color, marker=MARKERS[number % len(MARKERS)], alpha=0.5, lw=0
            )
            arrow = {"arrowstyle": "-|>", "color": color, "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (vector["x"], vector["y"]), (0, 0), arrowprops=arrow, annotation_clip=False)
            axes.update_datalim([(0, 0), (vector["x"], vector["y"])])
        axes.autoscale_view()
        axes.set_aspect("equal", adjustable="datalim")
        axes.set(title=stage, xlabel="first direction", xticks=[], yticks=[])
    row[0].set_ylabel("second direction")
    n = int(points["n"].max())
    about: Any = {"title": f"Turns of n = {n} test questions; arrows: the agents' vectors.", "alignment": "left"}
    figure.legend(list(handles.values()), list(handles), loc="outside lower left", ncols=3, **about)
    return figure
