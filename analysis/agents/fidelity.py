"""Teacher-forced fidelity: how much better a model likes an agent's own text than the others', under steering."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

import steerkit as sk
from steerkit.scores.fluency import log_probabilities
from steerkit.sweeps.result import SweepResult
from steerkit.text.prompt import Prompt
from steerkit.text.tags import agent_tag, round_tag
from steerkit.text.traces import DebateTrace
from training.debates.personas import Cast
from training.problems.problem import Problem

Place = tuple[str, int, float]
Named = Callable[[DebateTrace, str], Prompt]
"""What stands before an agent's first text, of a debate and an agent."""


def first_texts(trace: DebateTrace) -> dict[str, str]:
    """What each agent said in round 1, where it had seen no other."""
    return {str(turn.agent): turn.text for turn in trace.turns if turn.round == 1 and turn.text}


def unnamed(trace: DebateTrace, agent: str) -> str:
    """The problem alone: nothing says who is to speak."""
    return trace.prompt


def by_tag(trace: DebateTrace, agent: str) -> str:
    """The problem and the tags that name the agent, as a model trained on traces knows it."""
    return f"{trace.prompt}{round_tag(1)}\n\n{agent_tag(int(agent), 1)}: "


def by_cast(cast: Cast, kind: str) -> Named:
    """The prompt that the agent had in the debate's first round, as the model before any training knows it."""

    def ask(trace: DebateTrace, agent: str) -> Prompt:
        return cast.ask(Problem(trace.question, trace.question, trace.gold, kind, ""), int(agent), 1, ())

    return ask


def fidelity(
    model: Any,
    tokenizer: Any,
    traces: Sequence[DebateTrace],
    vectors: Mapping[str, sk.SteeringVector],
    layers: Sequence[int],
    coefficients: Sequence[float],
    before: Named = unnamed,
    extent: str = "all",
) -> SweepResult:
    """`F_i = L_i - mean over j != i of L_j`, `L` the mean log-probability per token of an agent's text, in nats.

    No text is sampled: the agents' own first texts are scored after the same context, so that the only noise is that of
    the questions. A row per vector, layer, coefficient and (question, agent), shaped as a sweep's with the scores
    `fidelity` and `own` (L_i), so that `curve`, `curve_auc` and `gain` apply; `agent` says whose text it is.

    Args:
        before: the context; with `unnamed`, the same for all agents, each text is scored once.
        extent: where vectors are added, see `steerkit.Steering`.
    """
    identity = before is not unnamed
    places: list[Place] = [(name, at, c) for name in vectors for at in layers for c in coefficients if c != 0]
    steered = [(None, None, 0.0), *places]
    cases = [(trace, agent, first_texts(trace)) for trace in traces for agent in first_texts(trace)]
    prompts, texts, steerings, keys = [], [], [], []
    for place in steered:
        steering = None if place[0] is None else _steering(vectors, place, extent)  # type: ignore[arg-type]
        for number, (trace, agent, said) in enumerate(cases):
            asked = before(trace, agent)
            for other, text in said.items():
                if not identity and agent != min(said):
                    continue  # the context is the same for all agents: their texts are scored once
                prompts.append(asked)
                texts.append(text)
                steerings.append(steering)
                keys.append((place, trace.question if not identity else number, other))
    scores = log_probabilities(model, tokenizer, prompts, texts, steerings)
    mean = {key: float(one.double().mean()) for key, one in zip(keys, scores, strict=True)}
    rows = []
    for place in steered:
        for number, (trace, agent, said) in enumerate(cases):
            key = trace.question if not identity else number
            own = mean[place, key, agent]
            others = float(np.mean([mean[place, key, other] for other in said if other != agent]))
            rows.append((*place, f"{trace.question}/{agent}", trace.question, agent, own, own - others))
    columns = ["vector", "layer", "coefficient", "prompt_id", "group", "agent", "own", "fidelity"]
    table = pd.DataFrame(rows, columns=columns)
    zero = table[table["vector"].isna()]
    everywhere = [zero.assign(vector=name, layer=at) for name in vectors for at in layers]
    table = pd.concat([*everywhere, table[table["vector"].notna()]], ignore_index=True)
    table["layer"] = table["layer"].astype(int).astype(str)
    return SweepResult(table.assign(sample=0, text=""), {"identity": identity})


def _steering(vectors: Mapping[str, sk.SteeringVector], place: Place, extent: str) -> sk.Steering:
    name, layer, coefficient = place
    return sk.Steering(vectors[name].at(layer), coefficient, extent, foreign=True)
