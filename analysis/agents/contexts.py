"""Contexts that precede an agent's first text: the problem alone, the trace up to its tag, or its own prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from steerkit.text.prompt import Prompt, PromptLike, render
from steerkit.text.tags import agent_tag, round_tag
from steerkit.text.tokens import encode
from steerkit.text.traces import DebateTrace
from training.debates.personas import Cast
from training.problems.problem import Problem

SOME_ANSWER = {"number": "0", "option": "A", "word": "yes", "pair": "0 1", "open": None}
"""An answer of each kind: a prompt depends on the question and on the kind of its answer, not on the answer."""


@dataclass(frozen=True)
class Context:
    """What a model reads before an agent's first text, as a function of a debate and an agent.

    Args:
        ask: the prompt, by debate and agent.
        before: the model's text between the prompt and the agent's text, by debate and agent; None for none.
    """

    ask: Callable[[DebateTrace, str], PromptLike]
    before: Callable[[DebateTrace, str], str] | None = None

    def __call__(self, tokenizer: Any, trace: DebateTrace, agent: str) -> Prompt:
        """The prompt that precedes an agent's first text, with the model's text before it up to its last white space.

        The latter is encoded as in training, where it follows the prompt. In the traces the white space before an
        agent's text is part of the token that begins it.
        """
        prompt = render(tokenizer, self.ask(trace, agent))
        return prompt if self.before is None else prompt.followed_by(tokenizer, self.begun(trace, agent))

    def begun(self, trace: DebateTrace, agent: str) -> str:
        """The beginning of the model's text that is given; empty where only a prompt is."""
        return "" if self.before is None else self.before(trace, agent).rstrip()

    def lead(self, trace: DebateTrace, agent: str) -> str:
        """The white space between the context and the agent's text."""
        before = "" if self.before is None else self.before(trace, agent)
        return before[len(before.rstrip()) :]


def first_texts(trace: DebateTrace) -> dict[str, str]:
    """Each agent's text of round 1, which it wrote without reading another agent's."""
    return {str(turn.agent): turn.text for turn in trace.turns if turn.round == 1 and turn.text}


def up_to_text(trace: DebateTrace, agent: str) -> str:
    """The trace up to an agent's text of round 1: the turns of earlier agents, and the agent's tag with its colon."""
    turns = zip(trace.turns, trace.turn_ranges, strict=True)
    stop = next(start for turn, (start, _) in turns if (turn.round, str(turn.agent)) == (1, agent))
    return trace.text[trace.text.index(round_tag(1)) : stop]


def up_to_text_alone(trace: DebateTrace, agent: str) -> str:
    """The tag of round 1 and an agent's tag with its colon, without any agent's turn."""
    before = up_to_text(trace, agent)
    opened = trace.body[: trace.body.index(agent_tag(trace.turns[0].agent, 1))]
    return opened + before[before.rindex(agent_tag(int(agent), 1)) :]


def other_ids(tokenizer: Any, traces: Sequence[DebateTrace]) -> int:
    """The number of first texts whose context and text, each encoded, are other tokens than those of the whole trace.

    The last token of a text is not compared: what follows may be part of it.
    """
    count = 0
    for trace in traces:
        whole = encode(tokenizer, trace.body)
        for agent, text in first_texts(trace).items():
            context = encode(tokenizer, up_to_text(trace, agent).rstrip())
            ids = (*context, *encode(tokenizer, by_tag.lead(trace, agent) + text)[:-1])
            count += ids != whole[: len(ids)]
    return count


unnamed = Context(lambda trace, _: trace.prompt)
"""The problem alone, without a name of the agent."""

by_tag = Context(lambda trace, _: trace.prompt, up_to_text)
"""The problem and the trace up to the agent's tag: the text that precedes the agent's turn in training."""

tag_alone = Context(lambda trace, _: trace.prompt, up_to_text_alone)
"""The problem and the agent's tag: no turn of another agent tells whose turn it is."""


def by_cast(cast: Cast, kind: str) -> Context:
    """The prompt that the agent had in the debate's first round, for a model that was not trained on tags."""

    def ask(trace: DebateTrace, agent: str) -> PromptLike:
        return cast.ask(Problem(trace.question, trace.question, SOME_ANSWER[kind], kind, ""), int(agent), 1, ())

    return Context(ask)
