"""Choice of the setting in which agents are steered: what is tried on validation debates, and what is frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.agents.activations import READ, Source
from analysis.agents.contexts import unnamed
from analysis.agents.continuations import continuations
from analysis.agents.curves import only
from analysis.agents.vectors import agent_vectors
from analysis.stored import stored_vectors
from steerkit.capture.activations import Activations
from steerkit.steering.positions import parse_positions
from steerkit.text.traces import DebateTrace
from steerkit.vectors.vector import SteeringVector
from training.settings import check_fields

SETTING = ["source", "position", "layer", "extent"]
"""Columns that name where a vector is read and added; with a coefficient they are a `Choice`."""
ENOUGH = 0.95
"""The mildest coefficient with at least this share of the best one's gain is taken."""
ByPosition = Mapping[tuple[str, str], Activations]
"""Activations by (source, read position)."""


@dataclass(frozen=True)
class Grid:
    """The settings that are tried, and on how many debates.

    Args:
        sources: what is read, see `analysis.agents.activations`.
        positions: read positions, see `analysis.agents.activations`.
        layers: None for all.
        extents: positions where a vector is added, see `steerkit.Steering`.
        coefficients: of the choice on validation, and of the curves.
        negative: further coefficients of the curves.
        train: largest number of debates for vectors.
        validation: largest number of debates for the choice.
        test: largest number of debates for the results.
        controls: number of directions of each kind at the frozen coefficient; a rank of 5 % needs 19.
        bands: number of these directions in the curves.
        few_controls: measure controls only in texts that are sampled and name no agent, on which claims are judged: not
            where an agent is named, and not by teacher-forced fidelity. None is False.
        max_new_tokens: of the continuations; None is one and a half times the longest first text.
        seed: sampling seed, also of the controls.
        rouge_tokenizer: tokenizer of ROUGE-L, see `steerkit.scores.text.tokenize`; None is `rouge_score`.
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
    controls: int = 19
    bands: int = 5
    few_controls: bool | None = None
    max_new_tokens: int | None = 64
    seed: int = 0
    rouge_tokenizer: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        known = {position for positions in READ.values() for position in positions}
        own = {position for source in self.sources for position in READ[source]}
        if set(self.positions) - known or not set(self.positions) & own:
            raise ValueError(
                f"expected positions among {sorted(known)}, one of them a read position of the sources "
                f"{list(self.sources)}; got {list(self.positions)}. Pass some of these."
            )
        if not self.extents:
            raise ValueError('expected extents; got none. Pass e.g. extents=["all"].')
        for extent in self.extents:
            parse_positions(extent)


@dataclass(frozen=True)
class Choice:
    """The setting that is frozen on validation, one for all agents; fields as in `Grid`."""

    source: Source
    position: str
    layer: int
    extent: str
    coefficient: float


def choose(
    model: Any,
    tokenizer: Any,
    activations: ByPosition,
    traces: Sequence[DebateTrace],
    grid: Grid,
    openings: Sequence[str] = (),
    out: Path | None = None,
) -> tuple[Choice, pd.DataFrame]:
    """The setting with the largest gain in ROUGE-L over coefficient 0, agents unnamed, mean over agents.

    The mean is used and not the worst agent, because an agent that the model plays anyway cannot gain.

    Every setting is tried on a quarter of the debates, the better quarter of them on all debates. The choice is among
    the latter, at the mildest coefficient that has `ENOUGH` of the gain.

    Args:
        model: the checkpoint.
        tokenizer: its tokenizer.
        activations: by (source, read position), of training debates.
        traces: validation debates.
        grid: what is tried.
        openings: for each agent what its texts begin with.
        out: folder of the sweeps, which a killed call resumes from.

    Returns:
        The choice, and all gains that were measured. The column `screened` is True for those on a quarter of the
        debates.

    Raises:
        ValueError: ROUGE-L has no value, because its tokenizer does not see the letters of the texts.
    """

    def trial(
        name: str, debates: Sequence[DebateTrace], tried: Mapping[tuple[str, str, str], Sequence[int]]
    ) -> pd.DataFrame:
        """Gains of each agent's vector at the layers that are tried for each (source, position, extent)."""
        parts = []
        for (source, position, extent), layers in tried.items():
            vectors = tried_vectors(activations, source, position, out)
            result = continuations(
                model,
                tokenizer,
                debates,
                vectors,
                layers,
                grid.coefficients,
                unnamed,
                extent,
                grid.max_new_tokens,
                grid.seed,
                out and out / name / f"{source}-{position}-{extent.replace(':', '-')}",
                openings,
                grid.rouge_tokenizer,
            )
            about = {"source": source, "position": position, "extent": extent}
            parts += [only(result, a, [a]).gain("rouge_l").assign(agent=a, **about) for a in vectors]
        return pd.concat(parts, ignore_index=True).drop(columns="vector")

    every = {
        (*key, extent): grid.layers or tuple(int(layer) for layer in acts.layers)
        for key, acts in activations.items()
        if key[1] in grid.positions
        for extent in grid.extents
    }
    screened = trial("screened", traces[: max(4, len(traces) // 4)], every)
    ranked = _mean_gain(screened).groupby(SETTING, sort=False).max().sort_values(ascending=False)
    better: dict[tuple[str, str, str], list[int]] = {}
    for source, position, layer, extent in ranked.index[: max(1, len(ranked) // 4)]:
        better.setdefault((source, position, extent), []).append(int(layer))
    measured = trial("measured", traces, better)
    mean = _mean_gain(measured)
    if mean.isna().all():
        raise ValueError(
            f"expected ROUGE-L of continuations; got none: its tokenizer {grid.rouge_tokenizer or 'rouge_score'!r} "
            "does not see the letters of the texts. Pass --set grid.rouge_tokenizer=unicode."
        )
    *setting, strongest = mean.idxmax()
    by_coefficient = mean.xs(tuple(setting), level=SETTING)
    enough = by_coefficient[by_coefficient >= ENOUGH * by_coefficient.max()]
    source, position, layer, extent = setting
    coefficient = min(enough.index, default=strongest)
    table = pd.concat([screened.assign(screened=True), measured.assign(screened=False)], ignore_index=True)
    return Choice(source, position, int(layer), extent, float(coefficient)), table


def tried_vectors(activations: ByPosition, source: str, position: str, out: Path | None) -> dict[str, SteeringVector]:
    """The agents' vectors of a read position, stored under the folder of the sweeps."""
    folder = out and out / "vectors" / f"{source}-{position}"
    return stored_vectors(folder, lambda: agent_vectors(activations[source, position]))


def _mean_gain(table: pd.DataFrame) -> pd.Series:
    """Mean gain over the agents, by setting and coefficient."""
    return table.groupby([*SETTING, "coefficient"], sort=False)["gain"].mean()
