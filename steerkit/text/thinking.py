"""Thoughts: the part of a reasoning model's text in `<think>...</think>`, which is no reply."""

from __future__ import annotations

import re

_TAG = re.compile(r"<(?P<close>/?)(?P<name>think|thinking|thought|reasoning)>", re.IGNORECASE)


def reply_of(text: str) -> str | None:
    """The reply after the last thought of a text; the text itself if it holds no thought.

    The opening tag may stand in the prompt: a text that only holds a closing tag began inside a thought.

    Returns:
        The text after the last closing tag. None where a thought is not closed: there is no reply yet.

    Example:
        >>> reply_of("<think>5? No.</think> 12")
        ' 12'
    """
    tags = list(_TAG.finditer(text))
    if not tags:
        return text
    return text[tags[-1].end() :] if tags[-1]["close"] else None


def opens_thought(text: str) -> bool:
    """Whether a text, e.g. a rendered prompt, ends inside a thought: what follows it is thinking, not a reply.

    Example:
        >>> opens_thought("<|assistant|><think>\\n")
        True
    """
    tags = list(_TAG.finditer(text))
    return bool(tags) and not tags[-1]["close"]
