"""Prompts: strings or chat messages, rendered and turned into the token ids that a model reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from steerkit.io.files import utf8

Message = Mapping[str, str]
Prompt = str | Sequence[Message]


class Rendered(str):
    """A prompt that a chat template has rendered: it is used verbatim, and no first token is added."""

    __slots__ = ()


def render(tokenizer: Any, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None) -> str:
    """The text that the model reads for a prompt: a string verbatim, messages through the chat template.

    Some templates add a system prompt if the messages have none (SmolLM2's does). Pass a system message to replace it.

    Args:
        tokenizer: a transformers tokenizer; messages need its `chat_template`.
        prompt: a string, or a list of `{"role", "content"}` messages.
        chat_template_kwargs: arguments of `tokenizer.apply_chat_template`, e.g. `{"enable_thinking": False}`,
            `{"tools": [...]}`, or `{"continue_final_message": True}` to continue the last message. By default the text
            ends with the assistant's header (`add_generation_prompt=True`, except with `continue_final_message`).

    Returns:
        The string itself, or the rendered messages as `Rendered`, a string to which no first token is added later.

    Raises:
        ValueError: messages for a tokenizer without a chat template, or that the template refuses; an empty prompt, or
            one that UTF-8 cannot hold.

    Example:
        >>> sk.render(tokenizer, [{"role": "user", "content": "Hi"}], {"enable_thinking": False})
    """
    if isinstance(prompt, str):
        text = prompt
    else:
        text = Rendered(_apply_template(tokenizer, messages_of(prompt), chat_template_kwargs))
    if not text:
        raise ValueError("expected a prompt of at least one character; got an empty one. Write one, or leave it out.")
    utf8(text)
    return text


def _apply_template(
    tokenizer: Any, messages: list[dict[str, str]], chat_template_kwargs: Mapping[str, Any] | None
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "expected a tokenizer with a chat template for a list of messages; this one has none. Pass a string."
        )
    options = dict(chat_template_kwargs or {})
    options.setdefault("add_generation_prompt", not options.get("continue_final_message", False))
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # the template is a program in the checkpoint: it may raise anything
        raise ValueError(
            f"expected messages that the chat template takes; it refuses them: {error}. Change their roles or "
            "the template's arguments, or pass a string."
        ) from error


def messages_of(prompt: object) -> list[dict[str, str]]:
    """A chat as a list of messages, each with a role and a content; `ValueError` for anything else."""
    messages = list(prompt) if isinstance(prompt, Iterable) else []
    if not messages or not all(_is_message(message) for message in messages):
        raise ValueError(
            f"expected a prompt string or a list of {{'role', 'content'}} messages, both texts; got {prompt!r:.200}. "
            "Put a single message, or a conversation among several prompts, in a list of its own."
        )
    return [dict(message) for message in messages]


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def encode_prompt(
    tokenizer: Any, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """The token ids of a prompt.

    The tokenizer's first token (BOS) is added to a string that does not begin with it. It is never added to rendered
    messages, whose template writes it. No token is added at the end.

    Raises:
        ValueError: the prompt has no token, or see `render`.
    """
    return encode_with_own(tokenizer, prompt, chat_template_kwargs)[0]


def encode_with_own(
    tokenizer: Any, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None
) -> tuple[tuple[int, ...], int]:
    """`(ids, own)`: the token ids of a prompt, and how many of the last of them encode its text (all but BOS)."""
    text = render(tokenizer, prompt, chat_template_kwargs)
    text_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = text_ids
    bos = getattr(tokenizer, "bos_token", None)
    if not isinstance(text, Rendered) and not (bos and text.startswith(bos)):
        special_ids = tokenizer(text)["input_ids"]
        for start in range(len(special_ids) - len(text_ids) + 1):
            if special_ids[start : start + len(text_ids)] == text_ids:
                ids = special_ids[: start + len(text_ids)]
                break
    if not ids:
        raise ValueError(f"expected a prompt of at least one token; {text!r:.80} has none. Write one, or leave it out.")
    return tuple(ids), len(text_ids)
