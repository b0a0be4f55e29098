"""Moderator of open questions: without boxes to count, a model reports whether the last answers agree."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from steerkit.text.prompt import PromptLike
from steerkit.text.thinking import reply_of

TYPES = ("unanimous", "majority", "none")
_VERDICT = re.compile(
    r"\b(unanimous|majority|none)\b(?!\W*(?:or\W+)?(?:unanimous|majority|none)\b)[\s*:.\-]*(.*)",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Verdict:
    """A moderator's report on the last answers of a debate.

    Args:
        type: one of `TYPES`.
        explanation: what the agreeing answers have in common, in the moderator's words; a trace's consensus.
    """

    type: str
    explanation: str


def moderation(question: str, answers: Sequence[str]) -> PromptLike:
    """Return the chat messages that ask a moderator about the agents' last answers, in order and without names."""
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


def read_verdict(text: str, opened: bool = False) -> Verdict | None:
    """Parse the verdict in a moderator's reply.

    Args:
        text: the reply.
        opened: whether the prompt opened a thought, see `steerkit.text.thinking.reply_of`.

    Returns:
        The verdict. None if the reply, after a thought, does not begin with exactly one of `TYPES`, or reports an
        agreement without content.

    Example:
        >>> read_verdict("MAJORITY: two do not know.")
        Verdict(type='majority', explanation='two do not know.')
    """
    match = _VERDICT.match((reply_of(text, opened) or "").strip().lstrip("*#> "))
    if match is None:
        return None
    kind, explanation = match[1].lower(), " ".join(match[2].split())
    return Verdict(kind, explanation) if explanation or kind == "none" else None
