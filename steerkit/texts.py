"""Texts as token ids: prompts rendered, spans exact, rows padded, the caller's tokenizer never changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from steerkit import artifacts

Message = Mapping[str, str]
Prompt = str | Sequence[Message]


SPACE = "\u2581"  # how SentencePiece writes a space


class Rendered(str):
    """A prompt that a chat template has rendered: used as it is, no first token added."""

    __slots__ = ()


@dataclass(frozen=True)
class Passage:
    """Token ids of one text, and the spans of it that are to be read.

    Args:
        ids: the tokens of the whole text.
        spans: half-open token ranges `(start, stop)` in `ids`.
        labels: one label per span.
        group: what must not straddle a split.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    labels: tuple[str, ...]
    group: str


@dataclass(frozen=True)
class SpannedText:
    """A text and character ranges of it, each to be read in the one forward of the whole.

    Args:
        text: the text, used verbatim.
        spans: half-open character ranges `(start, stop)`, in order and not overlapping.
        labels: one label per span; default `"0"`, `"1"`, ...
        group: what must not straddle a split; default the text's index in its data set.
        cut: `"spans"` tokenises the text piece by piece, cut at the spans' ends, and concatenates the ids, so that no
            token straddles an end. `"whole"` tokenises it in one go, as the paper's scripts do, and takes every token
            that overlaps the span.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    labels: tuple[str, ...] = ()
    group: str | None = None
    cut: str = "spans"

    def __post_init__(self) -> None:
        end = 0
        for start, stop in self.spans:
            if not (end <= start < stop <= len(self.text)):
                raise ValueError(
                    f"expected character spans in order, not empty, not overlapping, within 0..{len(self.text)}; "
                    f"got {self.spans}."
                )
            end = stop
        if not self.spans or (self.labels and len(self.labels) != len(self.spans)):
            raise ValueError(
                f"expected spans and one label for each; got {len(self.spans)} and {len(self.labels)} labels."
            )
        if self.cut not in ("spans", "whole"):
            raise ValueError(f"expected cut to be 'spans' or 'whole'; got {self.cut!r}.")


def render(tokenizer: Any, prompt: Prompt) -> str:
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
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # the template is a program that the checkpoint brings: it may raise anything
            raise ValueError(
                f"expected messages that the chat template takes; it refuses them: {error}. Change their roles, or "
                "pass a string."
            ) from error
    if not text:
        raise ValueError("expected a prompt of at least one character; got an empty one. Write one, or leave it out.")
    artifacts.utf8(text)
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


def encode_prompt(tokenizer: Any, prompt: Prompt) -> tuple[int, ...]:
    """The ids of a prompt. A string gets the tokenizer's own first token (BOS) unless it begins with it; a rendered
    chat never does, since its template writes it; nothing is ever appended.

    Raises:
        ValueError: no token is left.
    """
    return _encoded(tokenizer, prompt)[0]


def _encoded(tokenizer: Any, prompt: Prompt) -> tuple[tuple[int, ...], int]:
    """The ids of a prompt, and how many of them are the text's own."""
    text = render(tokenizer, prompt)
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


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The ids of a text that continues another: no special tokens added, and no space that the text has not.

    Tokenizers of the SentencePiece kind put a space before any text that they are given; here it is cut off again.

    Raises:
        TypeError: it is no text.
        ValueError: it cannot be cut off, or UTF-8 cannot hold the text.
    """
    if not isinstance(text, str):
        raise TypeError(f"expected a text; got {text!r:.80} ({type(text).__name__}). Drop or convert it.")
    artifacts.utf8(text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids or text[0].isspace() or not str(tokenizer.convert_ids_to_tokens(ids[0])).startswith(SPACE):
        return tuple(ids)
    for lead in ("^", "|", "\n"):
        before = tokenizer(lead, add_special_tokens=False)["input_ids"]
        both = tokenizer(lead + text, add_special_tokens=False)["input_ids"]
        if both[: len(before)] == before and len(both) > len(before):
            return tuple(both[len(before) :])
    raise ValueError(f"expected ids of {text!r:.80} without a space before it; the tokenizer puts one. Begin with one.")


def passage_of(tokenizer: Any, text: str | SpannedText, group: str) -> Passage:
    """A text with one span (all of it but the tokenizer's own first token) or a spanned text, tokenised."""
    if isinstance(text, str):
        ids, own = _encoded(tokenizer, text)
        return Passage(ids, ((len(ids) - own, len(ids)),), ("",), group)
    labels = text.labels or tuple(str(i) for i in range(len(text.spans)))
    group = group if text.group is None else text.group
    if text.cut == "whole":
        return Passage(*_whole(tokenizer, text), labels, group)
    tokens: list[int] = []
    spans: list[tuple[int, int]] = []
    at = 0
    for start, stop in text.spans:
        for piece_start, piece_stop, read in ((at, start, False), (start, stop, True)):
            piece = type(text.text)(text.text[piece_start:piece_stop])
            new = () if not piece else encode_prompt(tokenizer, piece) if not tokens else encode(tokenizer, piece)
            lead = len(new) - len(encode(tokenizer, piece)) if read and not tokens else 0
            if read:
                spans.append((len(tokens) + lead, len(tokens) + len(new)))
            tokens.extend(new)
        at = stop
    if at < len(text.text):
        tokens.extend(encode(tokenizer, text.text[at:]))
    return Passage(tuple(tokens), tuple(spans), labels, group)


def _whole(tokenizer: Any, text: SpannedText) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("expected a fast tokenizer for cut='whole' (it gives character offsets). Use cut='spans'.")
    encoded = tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encode_prompt(tokenizer, text.text)
    lead = len(ids) - len(encoded["input_ids"])
    spans = []
    for start, stop in text.spans:
        inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"], lead) if a < stop and b > start and b > a]
        if not inside:
            raise ValueError(
                f"expected at least one token in characters {start}..{stop} of {text.text!r:.80}; found none."
            )
        spans.append((inside[0], inside[-1] + 1))
    return ids, tuple(spans)


def pad(
    rows: Sequence[Sequence[int]], side: str, device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Rows of ids as one batch: `(input_ids, attention_mask, position_ids)`, padded on one side with id 0.

    Position ids count a row's own tokens from 0, so that padding moves nothing; pads carry position 0.
    """
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        where = slice(0, len(tokens)) if side == "right" else slice(width - len(tokens), width)
        ids[row, where] = torch.as_tensor(tokens, dtype=torch.long)
        mask[row, where] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0) * mask
    return ids.to(device), mask.to(device), positions.to(device)


def check_fits(model: Any, rows: Sequence[Sequence[int]]) -> None:
    """`ValueError` for a text longer than the model's context, or with a token that the model does not have."""
    limit, longest = context_length(model), max(map(len, rows), default=0)
    if limit is not None and longest > limit:
        raise ValueError(f"expected texts of at most {limit} tokens, the model's context; got {longest}. Cut it.")
    check_vocabulary(model, rows)


def check_vocabulary(model: Any, rows: Iterable[Sequence[int]]) -> None:
    """`ValueError` if the model has no embedding of a token: the tokenizer is another model's, or has grown."""
    from steerkit.blocks import unwrap

    count = getattr(unwrap(model).get_input_embeddings(), "num_embeddings", None)
    highest = max((max(ids, default=-1) for ids in rows), default=-1)
    if isinstance(count, int) and highest >= count:
        raise ValueError(
            f"expected tokens among the {count} that the model has; got token {highest}. Load this model's own "
            "tokenizer, or resize its embeddings."
        )


def context_length(model: Any) -> int | None:
    """How many positions the model was built for; None where its configuration does not say."""
    from steerkit.blocks import text_config

    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        length = getattr(text_config(model), name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None
