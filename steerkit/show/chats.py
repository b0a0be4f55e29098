"""Prompts of a sweep as chats: the messages of each, and a short label. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence

Turn = tuple[str, str]
"""Role and text of a message; the role is empty where it is not known."""
OF_A_TOKEN = re.compile(r"(?<![a-z])(system|user|assistant|model|tool)(?![a-z])", re.IGNORECASE)
OF_A_LINE = re.compile(r"\s*(system|user|assistant|model|tool)[ \t]*(?:\n|$)")
INSTRUCTION = {"[INST]": "user", "[/INST]": "assistant"}


def turns_of(prompt: str, messages: str | None, special_tokens: Collection[str]) -> list[Turn]:
    """The messages of a prompt; empty for a prompt that is no chat.

    Args:
        prompt: the text that the model read.
        messages: what the prompt was rendered from, as JSON; None: not known.
        special_tokens: the special tokens of the tokenizer that occur in the prompt.

    Returns:
        What `split_turns` finds, with a system prompt that the template added, where it ends with these messages; else
        the messages.
    """
    found = split_turns(prompt, special_tokens)
    if messages is None:
        return found
    given = [(message["role"], message["content"]) for message in json.loads(messages)]
    as_texts = [text.strip() for _, text in given]
    return found if [text for _, text in found[-len(given) :]] == as_texts else given


def split_turns(prompt: str, special_tokens: Collection[str]) -> list[Turn]:
    """The messages of a rendered chat, split at special tokens only; empty where no token is followed by a role.

    A special token names the role (`<|user|>`), or the text after it does: as its first line (`<|im_start|>user`), or
    alone before the next special token (Llama 3). All other text is kept.
    """
    if not special_tokens:
        return []
    tokens = re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))))
    found: list[Turn] = []
    role = ""
    for token, text in zip(["", *tokens.findall(prompt)], tokens.split(prompt), strict=True):
        named = OF_A_TOKEN.search(token)
        header = None if named or role or not token else OF_A_LINE.match(text)
        role = INSTRUCTION.get(token) or (named[1].lower() if named else header[1] if header else role)
        content = (text[header.end() :] if header else text).strip()
        if content:
            found.append((role, content))
        if content or not (named or header):
            role = ""
    return found if any(role for role, _ in found) else []


def prompt_labels(prompts: Sequence[str], turns: Sequence[Sequence[Turn]], width: int = 70) -> list[str]:
    """A short label per prompt: its last message, without the lines that all prompts share, cut to a width.

    Where the last messages are not distinct, the label is made from the whole prompt.
    """
    several = [[text for _, text in parts] or [prompt] for prompt, parts in zip(prompts, turns, strict=True)]
    last = [texts[-1] for texts in several]
    is_distinct = len(set(last)) == len(set(prompts))
    lines = [(text if is_distinct else "\n".join(texts)).split("\n") for text, texts in zip(last, several, strict=True)]
    shared = set.intersection(*map(set, lines))
    own = [" ".join(" ".join([line for line in part if line not in shared] or part).split()) for part in lines]
    return [label if len(label) <= width else label[: width - 1] + "\u2026" for label in own]
