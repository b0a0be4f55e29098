"""Prompts: strings or chat messages, rendered and turned into the token ids that a model reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from steerkit.io.files import utf8

Message = Mapping[str, str]
Prompt = str | Sequence[Message]


class Rendered(str):
    """A prompt that a chat template has rendered: used as it is, no first token added."""

    __slots__ = ()


def render(tokenizer: Any, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None) -> str:
    """A prompt as the text that the model reads: a string verbatim, a list of messages through the chat template.

    A template may add a system prompt of its own where the messages state none (SmolLM2's does): state one to be sure.

    Raises:
        ValueError: messages for a tokenizer without a chat template, or which the template refuses; an empty prompt, or
            one that UTF-8 cannot hold.
    """
    if isinstance(prompt, str):
        text: Any = prompt
    else:
        messages = messages_of(prompt)
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "expected a tokenizer with a chat template for a list of messages; this one has none. Pass a string."
            )
        options = {"add_generation_prompt": True, **(chat_template_kwargs or {})}
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # the template is a program that the checkpoint brings: it may raise anything
            raise ValueError(
                f"expected messages that the chat template takes; it refuses them: {error}. Change their roles, or "
                "pass a string."
            ) from error
    if not text:
        raise ValueError("expected a prompt of at least one character; got an empty one. Write one, or leave it out.")
    utf8(text)
    return str(text)


def messages_of(prompt: object) -> list[dict[str, str]]:
    """A chat as a list of messages, each a text with a role; `ValueError` for anything else."""
    messages = list(prompt) if isinstance(prompt, Iterable) else []
    fields = ("role", "content")
    if not messages or not all(
        isinstance(one, Mapping) and all(isinstance(one.get(name), str) for name in fields) for one in messages
    ):
        raise ValueError(
            f"expected a prompt string or a list of {{'role', 'content'}} messages, both texts; got {prompt!r:.200}. "
            "Put a single message, or a conversation among several prompts, in a list of its own."
        )
    return [dict(one) for one in messages]


def encode_prompt(
    tokenizer: Any, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """The ids of a prompt. A string gets the tokenizer's own first token (BOS) unless it begins with it; a rendered
    chat never does, since its template writes it; nothing is ever appended.

    Raises:
        ValueError: no token is left.
    """
    return encode_with_own(tokenizer, prompt, chat_template_kwargs)[0]


def encode_with_own(
    tokenizer: Any, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None
) -> tuple[tuple[int, ...], int]:
    """The ids of a prompt, and how many of them are the text's own."""
    text = render(tokenizer, prompt, chat_template_kwargs)
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    own = len(plain)
    bos = getattr(tokenizer, "bos_token", None)
    if isinstance(prompt, str) and not isinstance(prompt, Rendered) and not (bos and text.startswith(bos)):
        marked = tokenizer(text)["input_ids"]
        for lead in range(len(marked) - len(plain) + 1):
            if marked[lead : lead + len(plain)] == plain:
                plain = marked[: lead + len(plain)]
                break
    if not plain:
        raise ValueError(f"expected a prompt of at least one token; {text!r:.80} has none. Write one, or leave it out.")
    return tuple(plain), own
