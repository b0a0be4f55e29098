"""The first turn of a continuation: its text, and which agent speaks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from steerkit.text.tags import TAG


@dataclass(frozen=True)
class FirstTurn:
    """The first turn of a continuation.

    Args:
        text: the text up to the next tag, without the tags before it.
        agent: the agent whose tag precedes it; else the one whose format it has; None where neither is known.
    """

    text: str
    agent: int | None


def first_turn(continuation: str, openings: Sequence[str] = ()) -> FirstTurn:
    """The first turn of a continuation, tagged or not.

    Tags of a round and of an agent at the beginning are skipped; the turn ends at the next tag. A continuation of a
    context that ends with an agent's tag begins with that agent's text.

    Args:
        continuation: what the model wrote, tags included.
        openings: for each agent a regular expression that matches the beginning of its texts.

    Example:
        >>> first_turn("<|Round 1 - Initial Solutions|>\\n\\n<|Agent 2 Solution|>: 4 <|Consensus|>")
        FirstTurn(text='4', agent=2)
    """
    rest, agent = continuation.lstrip(), None
    while (tag := TAG.match(rest)) and agent is None:
        if not (tag["round"] or tag["agent"]):
            break
        agent = int(tag["agent"]) if tag["agent"] else None
        rest = rest[tag.end() :].lstrip()
    if agent is not None:
        rest = rest.removeprefix(":").lstrip()
    following = TAG.search(rest)
    text = (rest[: following.start()] if following else rest).strip()
    if agent is None:
        agent = by_format(text, openings)
    return FirstTurn(text, agent)


def by_format(text: str, openings: Sequence[str]) -> int | None:
    """The agent, counted from 1, whose opening a text has; None without one, or with several agents'."""
    fitting = [number for number, opening in enumerate(openings, 1) if re.match(opening, text)]
    return fitting[0] if len(fitting) == 1 else None
