"""Open questions have no boxes to count: a moderator reads the last answers and says what they agree on, if at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from steerkit.text.prompt import Prompt

TYPES = ("unanimous", "majority", "none")
_VERDICT = re.compile(r"\b(unanimous|majority|none)\b[\s*:.\-]*(.*)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Verdict:
    """What a moderator found.

    Args:
        type: one of `TYPES`.
        explanation: what is agreed on, in the moderator's words; a trace's consensus.
    """

    type: str
    explanation: str


def moderation(question: str, answers: Sequence[str]) -> Prompt:
    """The messages that ask a moderator about the agents' last answers, in their order and without their names."""
    shown = "\n\n".join(f"Answer {number}:\n{text}" for number, text in enumerate(answers, 1))
    wanted = (
        "Do the answers agree in substance? Reply with one word, UNANIMOUS if all do, MAJORITY if more than half do, "
        "or NONE; then a colon, and in one sentence what those that agree say."
    )
    system = "You moderate a discussion. You report what was said and add nothing of your own."
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": f"Question: {question}\n\n{shown}\n\n{wanted}"},
    ]


def read_verdict(text: str) -> Verdict | None:
    """The verdict in a moderator's reply; None where it does not begin with one, or gives an agreement no content."""
    found = _VERDICT.match(text.strip().lstrip("*#> "))
    if found is None:
        return None
    kind, explanation = found[1].lower(), " ".join(found[2].split())
    return Verdict(kind, explanation) if explanation or kind == "none" else None
