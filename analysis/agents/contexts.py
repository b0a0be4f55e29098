"""Contexts that precede an agent's first text: the problem alone, the agent's tag, or the agent's own prompt."""

from __future__ import annotations

from collections.abc import Callable

from steerkit.text.prompt import Prompt
from steerkit.text.tags import agent_tag, round_tag
from steerkit.text.traces import DebateTrace
from training.debates.personas import Cast
from training.problems.problem import Problem

Context = Callable[[DebateTrace, str], Prompt]
"""The prompt that precedes an agent's first text, as a function of a debate and an agent."""


def first_texts(trace: DebateTrace) -> dict[str, str]:
    """Each agent's text of round 1, which it wrote without reading another agent's."""
    return {str(turn.agent): turn.text for turn in trace.turns if turn.round == 1 and turn.text}


def unnamed(trace: DebateTrace, agent: str) -> str:
    """The problem alone, without a name of the agent."""
    return trace.prompt


def by_tag(trace: DebateTrace, agent: str) -> str:
    """The problem and the agent's tag, in the format of the traces that a model was trained on."""
    return f"{trace.prompt}{round_tag(1)}\n\n{agent_tag(int(agent), 1)}: "


def by_cast(cast: Cast, kind: str) -> Context:
    """The prompt that the agent had in the debate's first round, for a model that was not trained on tags."""

    def ask(trace: DebateTrace, agent: str) -> Prompt:
        return cast.ask(Problem(trace.question, trace.question, trace.gold, kind, ""), int(agent), 1, ())

    return ask
