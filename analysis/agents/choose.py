"""The setting in which agents are steered: what is tried on validation debates, and what is frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.agents.contexts import continuations
from analysis.agents.fidelity import unnamed
from analysis.agents.vectors import Source, agent_vectors
from steerkit.capture.activations import Activations
from steerkit.sweeps.result import SweepResult
from steerkit.text.traces import DebateTrace

PLACE = ["source", "position", "layer", "extent"]
ENOUGH = 0.95
"""A milder coefficient is taken if it gains this share of what the best one does."""
Streams = Mapping[tuple[str, str], Activations]


@dataclass(frozen=True)
class Grid:
    """What is tried, and on how much.

    Args:
        sources: what is read, see `analysis.directions.streams_of`.
        positions: read positions, see `analysis.directions`.
        layers: None for all.
        extents: where a vector is added, see `steerkit.Steering`.
        coefficients: of the choice on validation, and of the curves.
        negative: further coefficients of the curves.
        train, validation, test: at most so many debates.
        controls: directions of each kind at the frozen coefficient; the curves take the first `bands` of them.
        max_new_tokens: of the continuations.
    """

    sources: tuple[Source, ...] = ("asked", "trace", "plain")
    positions: tuple[str, ...] = ("last", "mean", "tag")
    layers: tuple[int, ...] | None = None
    extents: tuple[str, ...] = ("all", "from_last_prompt_token:1", "from_last_prompt_token:4")
    coefficients: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    negative: tuple[float, ...] = (-2.0, -1.0)
    train: int = 400
    validation: int = 24
    test: int = 32
    controls: int = 8
    bands: int = 2
    max_new_tokens: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Choice:
    """The setting that is frozen on validation: one for all agents."""

    source: Source
    position: str
    layer: int
    extent: str
    coefficient: float


def choose(
    model: Any, tokenizer: Any, streams: Streams, traces: Sequence[DebateTrace], grid: Grid
) -> tuple[Choice, pd.DataFrame]:
    """The setting that gains most ROUGE-L over coefficient 0, nobody named, mean over agents, and all that was tried.

    The mean and not the worst agent: whom the model plays anyway has nothing left to gain.
    Everything is tried on a quarter of the debates, and the better quarter of the places (source, position, layer,
    extent) on all of them; the choice is among those, at the mildest coefficient that has `ENOUGH` of the gain. In the
    table, `screened` tells the first from the second.
    """

    def trial(held: Sequence[DebateTrace], places: Mapping[tuple[str, str, str], tuple[int, ...]]) -> pd.DataFrame:
        tried = []
        for (source, position, extent), layers in places.items():
            vectors = agent_vectors(streams[source, position])
            pushed = vectors, layers, grid.coefficients, unnamed, extent
            result = continuations(model, tokenizer, held, *pushed, grid.max_new_tokens, grid.seed)
            about = {"source": source, "position": position, "extent": extent}
            tried += [only(result, a, [a]).gain("rouge_l").assign(agent=a, **about) for a in vectors]
        return pd.concat(tried, ignore_index=True).drop(columns="vector")

    every = {
        (*key, extent): grid.layers or tuple(int(layer) for layer in acts.layers)
        for key, acts in streams.items()
        if key[1] in grid.positions
        for extent in grid.extents
    }
    few = trial(traces[: max(4, len(traces) // 4)], every)
    mean = few.groupby([*PLACE, "coefficient"], sort=False)["gain"].mean()
    ranked = mean.groupby(PLACE, sort=False).max().sort_values(ascending=False)
    better: dict[tuple[str, str, str], tuple[int, ...]] = {}
    for source, position, layer, extent in ranked.index[: max(1, len(ranked) // 4)]:
        key = source, position, extent
        better[key] = (*better.get(key, ()), int(layer))
    many = trial(traces, better)
    mean = many.groupby([*PLACE, "coefficient"], sort=False)["gain"].mean()
    *place, strongest = mean.idxmax()
    there = mean.xs(tuple(place), level=PLACE)
    mild = there[there >= ENOUGH * there.max()]
    source, position, layer, extent = place
    coefficient = min(mild.index, default=strongest)
    table = pd.concat([few.assign(screened=True), many.assign(screened=False)], ignore_index=True)
    return Choice(source, position, int(layer), extent, float(coefficient)), table


def only(result: SweepResult, agent: str, vectors: Sequence[str]) -> SweepResult:
    """The rows in which some vectors push towards one agent."""
    table = result.table
    return SweepResult(table[(table["agent"] == agent) & table["vector"].isin(vectors)], result.meta)
