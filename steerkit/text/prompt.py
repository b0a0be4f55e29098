"""Prompts: strings or chat messages, rendered once into the token ids that a model reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any, Literal

from steerkit.io.files import utf8
from steerkit.text.tokens import encode

Message = Mapping[str, str]


@dataclass(frozen=True)
class Prompt:
    """The token ids that a model reads, and how they were made. Made by `render`, or from ids by `Prompt.of_ids`.

    Whatever takes a string or messages also takes a `Prompt`, and then uses its ids as they are.

    Args:
        ids: token ids, at least one.
        text: the text that the ids encode, with the tokens that a chat template wrote and without `n_added` first ones.
        source: `"text"` for a string, `"chat"` for messages, `"ids"` for ids.
        n_added: number of first ids that the tokenizer added to a string (BOS).

    Raises:
        ValueError: no ids, one that is not an integer from 0, or `n_added` beyond them.
    """

    ids: tuple[int, ...]
    text: str
    source: Literal["text", "chat", "ids"] = "ids"
    n_added: int = 0

    def __post_init__(self) -> None:
        ids = self.ids.tolist() if hasattr(self.ids, "tolist") else list(self.ids)
        if not ids or not all(isinstance(token, Integral) and int(token) >= 0 for token in ids):
            raise ValueError(
                f"expected at least one token id, each an integer from 0; got {ids[:8]}. Pass the ids of one text."
            )
        if not 0 <= self.n_added <= len(ids):
            raise ValueError(f"expected n_added from 0 to {len(ids)}; got {self.n_added}. Count the added tokens.")
        object.__setattr__(self, "ids", tuple(map(int, ids)))

    @classmethod
    def of_ids(cls, tokenizer: Any, ids: Sequence[int]) -> Prompt:
        """A prompt of given token ids; its text is decoded from them, special tokens included."""
        listed = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        return cls(tuple(listed), str(tokenizer.decode(listed, clean_up_tokenization_spaces=False)))

    def followed_by(self, tokenizer: Any, text: str) -> Prompt:
        """This prompt with the beginning of its continuation, e.g. an agent's tag; its own ids stay as they are."""
        return Prompt((*self.ids, *encode(tokenizer, text)), self.text + text, self.source, self.n_added)

    def __str__(self) -> str:
        return self.text


PromptLike = str | Sequence[Message] | Prompt
"""What functions take as a prompt: a string, chat messages, or a `Prompt`."""


def render(tokenizer: Any, prompt: PromptLike, chat_template_kwargs: Mapping[str, Any] | None = None) -> Prompt:
    """What the model reads for a prompt: a string verbatim, messages through the chat template, a `Prompt` unchanged.

    The tokens that the tokenizer puts first (BOS) are added to a string that does not begin with the BOS token. They
    are never added to messages, whose template writes them. No token is added at the end.

    Some templates add a system prompt if the messages have none (SmolLM2's does). Pass a system message to replace it.
    Some write today's date (Llama 3's does): the same messages are then another prompt on another day. Keep the
    `Prompt` to use it again.

    Args:
        tokenizer: a transformers tokenizer; messages need its `chat_template`.
        prompt: a string, a list of `{"role", "content"}` messages, or a `Prompt`.
        chat_template_kwargs: arguments of `tokenizer.apply_chat_template`, e.g. `{"enable_thinking": False}`,
            `{"tools": [...]}`, or `{"continue_final_message": True}` to continue the last message. By default the text
            ends with the assistant's header (`add_generation_prompt=True`, except with `continue_final_message`).

    Returns:
        A `Prompt`: token ids, their text, and how they were made.

    Raises:
        ValueError: messages for a tokenizer without a chat template, or that the template refuses; a prompt without a
            character or a token, or one that UTF-8 cannot hold.

    Example:
        >>> sk.render(tokenizer, [{"role": "user", "content": "Hi"}], {"enable_thinking": False}).text
    """
    if isinstance(prompt, Prompt):
        return prompt
    is_chat = not isinstance(prompt, str)
    text = _apply_template(tokenizer, messages_of(prompt), chat_template_kwargs) if is_chat else str(prompt)
    if not text:
        raise ValueError("expected a prompt of at least one character; got an empty one. Write one, or leave it out.")
    utf8(text)
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = [] if is_chat else _first_tokens(tokenizer, text, own)
    if not (first or own):
        raise ValueError(f"expected a prompt of at least one token; {text!r:.80} has none. Write one, or leave it out.")
    return Prompt((*first, *own), text, "chat" if is_chat else "text", len(first))


def _first_tokens(tokenizer: Any, text: str, own: list[int]) -> list[int]:
    """The tokens that the tokenizer puts before a string; none if it begins with them, or with the BOS token."""
    bos = getattr(tokenizer, "bos_token", None)
    if bos and text.startswith(bos):
        return []
    whole = tokenizer(text)["input_ids"]
    for start in range(len(whole) - len(own) + 1):
        if whole[start : start + len(own)] == own:
            first = list(whole[:start])
            return [] if first and own[: len(first)] == first else first
    raise ValueError(
        f"expected a tokenizer that adds special tokens around the ids of a text; for {text!r:.80} it gives "
        f"{whole[:8]} with and {own[:8]} without them. Pass a Prompt with the ids that the model should read."
    )


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


def listed(given: Any, what: str = "prompts") -> list[Any]:
    """Several prompts or texts as a list.

    Raises:
        ValueError: none, a single text, a mapping, or a table, whose iteration gives the names of its columns.

    Example:
        >>> listed(["The sea is"])
        ['The sea is']
    """
    if hasattr(given, "columns"):
        raise ValueError(
            f"expected a list of {what}; got a table with the columns {list(given.columns)[:8]}. Pass one column, "
            "such as table['prompt'].tolist(), or for a sweep its rows: table.to_dict('records')."
        )
    several = list(given) if isinstance(given, Iterable) and not isinstance(given, str | Mapping) else []
    if not several:
        raise ValueError(f"expected a non-empty list of {what}; got {given!r:.80}. Put them in a list.")
    return several


def encode_prompt(
    tokenizer: Any, prompt: PromptLike, chat_template_kwargs: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """The token ids of a prompt, see `render`."""
    return render(tokenizer, prompt, chat_template_kwargs).ids


def prompt_source(prompt: PromptLike) -> Any:
    """A prompt as plain data, for hashes and files: a string, a list of messages, or a `Prompt`'s fields."""
    if isinstance(prompt, Prompt):
        return {**asdict(prompt), "ids": list(prompt.ids)}
    return prompt if isinstance(prompt, str) else messages_of(prompt)
