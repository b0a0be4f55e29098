r"""Thinking: the part of a reply that a reasoning model writes before its answer, and templates that open or drop text.

Three notations are known: `<think>...</think>` (also `<thinking>`, `<thought>`, `<reasoning>`, and `[THINK]`), and the
channels of harmony, where `<|channel|>final<|message|>` begins the reply and any other channel is a thought.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_TAG = re.compile(
    r"<(?P<close>/?)(?i:think(?:ing)?|thought|reasoning)>|\[(?P<close_capital>/?)THINK\]"
    r"|<\|channel\|>(?P<final>final)?[^<]{0,100}<\|message\|>"
)


def reply_of(text: str, opened: bool = False) -> str | None:
    r"""Return the text after the thought of a reasoning model.

    The text before `</think>` is a thought, with or without `<think>`: some chat templates write the opening tag into
    the prompt. After several thoughts, the reply is the text after the last one.

    Args:
        text: the generated text.
        opened: whether the prompt opened the thought (`opens_thinking`). A text without any tag is then a thought that
            was cut off.

    Returns:
        The reply without white space at its ends; a text without a thought is returned unchanged. None if the thought
        is unfinished.

    Example:
        >>> reply_of("<think>maybe 5</think>\n\n12")
        '12'
        >>> reply_of("<think>maybe 5") is None
        True
    """
    last = _last_tag(text)
    if last is None:
        return None if opened else text
    return None if _opens(last) else text[last.end() :].strip()


def opens_thinking(prompt: str) -> bool:
    r"""Return whether a prompt ends inside a thought: its last thinking tag is an opening one.

    Example:
        >>> opens_thinking("<|user|>2+2<|assistant|><think>\n"), opens_thinking("<think></think>")
        (True, False)
    """
    last = _last_tag(prompt)
    return last is not None and _opens(last)


def drops_system(tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None) -> bool:
    """Return whether a chat template leaves the system message out without an error.

    A template that refuses system messages is not one that drops them: its error names the fault.

    Args:
        tokenizer: a transformers tokenizer; without a chat template the result is False.
        chat_template_kwargs: arguments of `tokenizer.apply_chat_template`.
    """
    rendered = _rendered(tokenizer, chat_template_kwargs)
    return rendered is not None and _MARKER not in rendered


def template_opens_thinking(tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None) -> bool:
    """Return whether a chat template ends a prompt with an open thought; the arguments are those of `drops_system`."""
    rendered = _rendered(tokenizer, chat_template_kwargs)
    return rendered is not None and opens_thinking(rendered)


_MARKER = "System message 7319."


def _rendered(tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None) -> str | None:
    """A chat with `_MARKER` as system message, rendered; None if the template is missing or refuses it."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "system", "content": _MARKER}, {"role": "user", "content": "Hello."}]
    options = {"add_generation_prompt": True, **(chat_template_kwargs or {})}
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception:  # the template is a program in the checkpoint: it may raise anything
        return None


def _last_tag(text: str) -> re.Match[str] | None:
    last = None
    for last in _TAG.finditer(text):  # noqa: B007
        pass
    return last


def _opens(tag: re.Match[str]) -> bool:
    return not (tag["close"] or tag["close_capital"] or tag["final"])
