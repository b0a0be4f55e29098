"""Tags: the markers of rounds, agents and consensus in the text of a debate."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

CONSENSUS, END = "<|Consensus|>", "<|endofdebate|>"
TAG = re.compile(
    r"<\|(?:Round (?P<round>[1-9]\d*) - (?:Initial Solutions|Revision)"
    r"|Agent (?P<agent>[1-9]\d*) (?:Solution|Revision)|Consensus|endofdebate)\|>"
)

# Text that may be a misspelt tag: up to 60 characters, with a bar or an angle missing or blanks between them.
_TAG_LIKE = re.compile(r"(?P<left><\s*\|)?(?:(?<=\|)|<|\|)[^<>|]{4,60}(?:(?P<right>\|\s*>)|\||>)")
_NAMES = ("roundinitialsolutions", "roundrevision", "agentsolution", "agentrevision", "consensus", "endofdebate")
_NAMED = re.compile(r"(?:(?:round|agent)[\s_-]*\d|consensus\W*\Z|end[\s_-]*of[\s_-]*debate)", re.IGNORECASE)


def misspelt_tag(text: str) -> re.Match[str] | None:
    """The first part of a text that resembles a tag but is not exactly one.

    Such a part has the words of a tag up to case, blanks and single letters, or begins with the number of an agent or
    round. One bar or angle may be missing, or both bars: `<|agent 1 solution|>`, `<| Consensus |>`,
    `<Agent 2 Solution>`. Other markers (`<|im_end|>`, a table's `| Agent 1 |`) are not misspelt tags.
    """
    exact = {tag.start() for tag in TAG.finditer(text)}
    return next((p for p in _TAG_LIKE.finditer(text) if p.start() not in exact and _is_misspelt(p)), None)


def _is_misspelt(part: re.Match[str]) -> bool:
    found = part.group()
    if not (part["left"] or part["right"] or (found[0] == "<" and found[-1] == ">")):
        return False
    name = found.strip("<|>").strip("<|> \n")
    letters = "".join(filter(str.isalpha, name)).lower()
    near = any(SequenceMatcher(None, letters, known).ratio() > 0.8 for known in _NAMES)
    if part["left"] or part["right"]:
        return near or _NAMED.match(name) is not None
    return near and any(map(str.isdigit, name))


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
