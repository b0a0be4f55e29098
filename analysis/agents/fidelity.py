"""Teacher-forced fidelity: by how much a model prefers an agent's own text to the others', under steering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import steerkit as sk
from analysis.agents.contexts import Context, first_texts, unnamed
from analysis.stored import stored_scores
from steerkit.scores.fluency import log_probabilities
from steerkit.sweeps.result import SweepResult
from steerkit.text.prompt import Prompt
from steerkit.text.traces import DebateTrace
from steerkit.vectors.controls import roles_of

Cell = tuple[str | None, int | None, float]
"""Vector, layer and coefficient; None, None, 0.0 without steering."""
Case = tuple[Prompt, str, sk.Steering | None]
"""A text after its prompt, and what steers the model."""


def fidelity(
    model: Any,
    tokenizer: Any,
    traces: Sequence[DebateTrace],
    vectors: Mapping[str, sk.SteeringVector],
    layers: Sequence[int],
    coefficients: Sequence[float],
    context: Context = unnamed,
    positions: str = "all",
    out: Path | None = None,
) -> SweepResult:
    """`F_i = L_i - mean over j != i of L_j`, `L` the mean log-probability per token of an agent's text, in nats.

    No text is sampled: the agents' own first texts are scored after the same context, so that the only noise is between
    questions.

    Args:
        model: the checkpoint.
        tokenizer: its tokenizer.
        traces: the debates.
        vectors: by name; the agents' vectors and their controls.
        layers: where they are steered, one at a time.
        coefficients: 0 is always added.
        context: see `analysis.agents.contexts`. With `unnamed`, the same for all agents, each text is scored once.
        positions: where vectors are added, see `steerkit.Steering`.
        out: file of the scores of single texts, of this model, context and these positions, see `analysis.stored`.

    Returns:
        A row per vector, layer, coefficient and (question, agent), in the shape of a sweep's table with the scores
        `fidelity` and `own` (L_i), so that `curve`, `curve_auc` and `gain` apply; `agent` is the author of the text.
    """
    identity = context is not unnamed
    unsteered: Cell = (None, None, 0.0)
    cells: list[Cell] = [unsteered, *((name, at, c) for name in vectors for at in layers for c in coefficients if c)]
    cases = [(trace, agent, first_texts(trace)) for trace in traces for agent in first_texts(trace)]
    content = {name: vector.content() for name, vector in vectors.items()}
    given: list[Case] = []
    keys, names = [], []
    for cell in cells:
        steering = _steering(vectors, cell, positions)
        for number, (trace, agent, own_texts) in enumerate(cases):
            if not identity and agent != min(own_texts):
                continue  # the context is the same for all agents: their texts are scored once
            prompt = context(tokenizer, trace, agent)
            for author, text in own_texts.items():
                given.append((prompt, context.lead(trace, agent) + text, steering))
                keys.append((cell, number if identity else trace.question, author))
                steered_by = None if cell[0] is None else content[cell[0]]
                names.append([steered_by, *cell[1:], trace.question, agent if identity else None, author])

    def means(some: Sequence[Case]) -> list[float]:
        prompts, texts, steerings = zip(*some, strict=True)
        scores = log_probabilities(model, tokenizer, prompts, texts, steerings)
        return [float(score.double().mean()) for score in scores]

    mean = dict(zip(keys, stored_scores(out, names, given, means), strict=True))
    rows = []
    for cell in cells:
        for number, (trace, agent, own_texts) in enumerate(cases):
            key = number if identity else trace.question
            own = mean[cell, key, agent]
            others = float(np.mean([mean[cell, key, author] for author in own_texts if author != agent]))
            rows.append((*cell, f"{trace.question}/{agent}", trace.question, agent, own, own - others))
    columns = ["vector", "layer", "coefficient", "prompt_id", "group", "agent", "own", "fidelity"]
    table = pd.DataFrame(rows, columns=columns)
    zero = table[table["vector"].isna()]
    shared = [zero.assign(vector=name, layer=at) for name in vectors for at in layers]
    table = pd.concat([*shared, table[table["vector"].notna()]], ignore_index=True).astype({"layer": int})
    roles = roles_of(vectors)
    table = table.assign(
        role=[roles[name][0] for name in table["vector"]],
        control_of=[roles[name][1] for name in table["vector"]],
        sample=0,
        text="",
    )
    return SweepResult(table, {"identity": identity})


def _steering(vectors: Mapping[str, sk.SteeringVector], cell: Cell, positions: str) -> sk.Steering | None:
    name, layer, coefficient = cell
    if name is None or layer is None:
        return None
    return sk.Steering(vectors[name], coefficient, positions, foreign=True, layer=layer)
