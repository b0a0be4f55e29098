"""Tags: the markers of rounds, agents and consensus in the text of a debate."""

from __future__ import annotations

import re

CONSENSUS, END = "<|Consensus|>", "<|endofdebate|>"
TAG = re.compile(
    r"<\|(?:Round (?P<round>[1-9]\d*) - (?:Initial Solutions|Revision)"
    r"|Agent (?P<agent>[1-9]\d*) (?:Solution|Revision)|Consensus|endofdebate)\|>"
)


LIKE_A_TAG = re.compile(r"<\s*\|?\s*(?:Round|Agent|Consensus|End\s?of\s?Debate)\b[^<>\n]{0,60}?\|?\s*>", re.IGNORECASE)
"""What a reader takes for a tag, well spelt or not."""


def misspelt_tag(text: str) -> re.Match[str] | None:
    """The first piece of a text that looks like a tag and is none: another case, blanks inside, a missing bar.

    Example: `misspelt_tag("<| Agent 1 solution|>: 4")[0]` is `"<| Agent 1 solution|>"`.
    """
    return next((found for found in LIKE_A_TAG.finditer(text) if not TAG.fullmatch(found[0])), None)


def round_tag(number: int) -> str:
    """The tag at the start of a round, counted from 1."""
    return f"<|Round {number} - {'Initial Solutions' if number == 1 else 'Revision'}|>"


def agent_tag(agent: int, number: int) -> str:
    """The tag at the start of an agent's turn in a round, both counted from 1."""
    return f"<|Agent {agent} {'Solution' if number == 1 else 'Revision'}|>"


def tags(agents: int = 3, rounds: int = 2) -> tuple[str, ...]:
    """All distinct tags of a debate, ordered by first occurrence; by default the ten of the paper."""
    body = [
        tag
        for number in range(1, rounds + 1)
        for tag in (round_tag(number), *(agent_tag(agent, number) for agent in range(1, agents + 1)))
    ]
    return tuple(dict.fromkeys((*body, CONSENSUS, END)))


def without_tags(text: str) -> str:
    """A tagged text, well-formed or not, without its tags and the colons after them."""
    return re.sub(rf"(?:{TAG.pattern}):?\s*", "", text).strip()


def agents_in(text: str) -> set[int]:
    """The numbers of the agents whose tags occur in a text, well-formed or not."""
    return {int(tag["agent"]) for tag in TAG.finditer(text) if tag["agent"]}
