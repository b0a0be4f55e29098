"""Contexts that precede an agent's first text: the problem alone, the agent's tag, or the agent's own prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from steerkit.text.prompt import Prompt, PromptLike, render
from steerkit.text.tags import agent_tag, round_tag
from steerkit.text.traces import DebateTrace
from training.debates.personas import Cast
from training.problems.problem import Problem


@dataclass(frozen=True)
class Context:
    """What a model reads before an agent's first text, as a function of a debate and an agent.

    Args:
        ask: the prompt, by debate and agent.
        begun: the beginning of the model's text that is given, by agent. It is encoded as in training, where it follows
            the prompt, and ends where a token ends.
        lead: what stands between the context and the agent's text.
    """

    ask: Callable[[DebateTrace, str], PromptLike]
    begun: Callable[[str], str] | None = None
    lead: str = ""

    def __call__(self, tokenizer: Any, trace: DebateTrace, agent: str) -> Prompt:
        """The prompt that precedes an agent's first text."""
        prompt = render(tokenizer, self.ask(trace, agent))
        return prompt if self.begun is None else prompt.followed_by(tokenizer, self.begun(agent))


def first_texts(trace: DebateTrace) -> dict[str, str]:
    """Each agent's text of round 1, which it wrote without reading another agent's."""
    return {str(turn.agent): turn.text for turn in trace.turns if turn.round == 1 and turn.text}


unnamed = Context(lambda trace, _: trace.prompt)
"""The problem alone, without a name of the agent."""

by_tag = Context(lambda trace, _: trace.prompt, lambda agent: f"{round_tag(1)}\n\n{agent_tag(int(agent), 1)}:", " ")
"""The problem and the agent's tag, in the format of the traces that a model was trained on.

The context ends with the colon: in the traces the space after it is part of the token that begins the agent's text.
"""


def by_cast(cast: Cast, kind: str) -> Context:
    """The prompt that the agent had in the debate's first round, for a model that was not trained on tags."""

    def ask(trace: DebateTrace, agent: str) -> PromptLike:
        return cast.ask(Problem(trace.question, trace.question, trace.gold, kind, ""), int(agent), 1, ())

    return Context(ask)
