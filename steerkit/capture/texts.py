"""What `collect` reads: strings, chats, spanned texts and contrast pairs, with labels and groups, as token ids."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from torch import nn

from steerkit.io.files import sha256
from steerkit.models.context import check_fits
from steerkit.text.pairs import ContrastPair
from steerkit.text.prompt import Prompt, PromptLike, listed
from steerkit.text.spans import Passage, SpannedText, passage_of

Text = PromptLike | SpannedText | ContrastPair
Texts = Sequence[Text] | Mapping[str, Sequence[Text]]


@dataclass(frozen=True)
class LabelledText:
    """A text, and the label and group that the caller gave it; None keeps the text's own."""

    text: Text
    label: str | None = None
    group: str | None = None


def labelled_texts(
    texts: Texts, labels: Iterable[object] | None = None, groups: Iterable[object] | None = None
) -> list[LabelledText]:
    """Return the texts in order, each with the label and group given for it.

    Args:
        texts: a list of texts, or a mapping from label to a list of texts.
        labels: one per text; stored as `str(label)`.
        groups: one per text; stored as `str(group)`.

    Raises:
        ValueError: no texts; another number of labels or groups than of texts; a missing label or group; labels given
            twice (a mapping and `labels=`, or `labels=` for a `SpannedText` or `ContrastPair`, which hold their own).
    """
    if isinstance(texts, Mapping):
        if labels is not None:
            raise ValueError(
                "expected labels once; got labels= and a mapping, whose keys are the labels. Drop labels=, or pass a "
                "list of texts."
            )
        if not texts or any(_is_empty_or_text(several) for several in texts.values()):
            raise ValueError(
                f"expected a non-empty list of texts under each label; got {dict(texts)!r:.80}. Put them in a list."
            )
        labels = [label for label, several in texts.items() for _ in several]
        texts = [text for several in texts.values() for text in several]
    elif not isinstance(texts, list) or not texts:
        texts = listed(texts, "texts")
    names = _one_per_text("label", labels, len(texts))
    group_ids = _one_per_text("group", groups, len(texts))
    for number, (text, label, group) in enumerate(zip(texts, names, group_ids, strict=True)):
        if isinstance(text, SpannedText | ContrastPair) and (label is not None or group is not None):
            kind = type(text).__name__
            given = "labels" if label is not None else "groups"
            raise ValueError(
                f"expected strings or chats with {given} given; got a {kind} as text {number}, which holds its own "
                f"labels and group. Drop the {given}, or set the group of the {kind}."
            )
    return [LabelledText(*row) for row in zip(texts, names, group_ids, strict=True)]


def _is_empty_or_text(texts: Any) -> bool:
    return isinstance(texts, str | Mapping) or not isinstance(texts, Iterable) or not len(texts)  # type: ignore[arg-type]


def _one_per_text(name: str, values: Iterable[object] | None, count: int) -> list[str | None]:
    """Return one label or group per text, as strings; None for each where none are given."""
    if values is None:
        return [None] * count
    if isinstance(values, str | Mapping):
        raise ValueError(f"expected {name}s as a list, one per text; got {values!r:.80}. Put them in a list.")
    listed = list(values)
    if len(listed) != count:
        raise ValueError(f"expected one {name} per text, {count}; got {len(listed)}. Pass one for each text.")
    missing = [number for number, value in enumerate(listed) if value is None or pd.isna(value) is True]
    if missing:
        raise ValueError(f"expected a {name} for every text; text {missing[0]} has none. Pass one, or drop that text.")
    return [str(value) for value in listed]


def tokenise(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[LabelledText],
    chat_template_kwargs: Mapping[str, Any] | None = None,
    first: int = 0,
) -> list[Passage]:
    """Return the texts as token ids with the spans to read; a contrast pair becomes two passages.

    Args:
        first: index of the first text in its data set; a text without a group has its index as group id, with a mark
            if that is the group of another text.

    Raises:
        TypeError: a text of another type.
        ValueError: an empty text or span, or a text longer than the model's context.
    """
    passages = passages_of(tokenizer, texts, chat_template_kwargs, first)
    check_fits(model, [passage.ids for passage in passages])
    return passages


def passages_of(
    tokenizer: Any,
    texts: Sequence[LabelledText],
    chat_template_kwargs: Mapping[str, Any] | None = None,
    first: int = 0,
) -> list[Passage]:
    """What `tokenise` returns, whatever the model's limits are."""
    passages: list[Passage] = []
    own_groups = {one.text.group for one in texts if isinstance(one.text, ContrastPair | SpannedText)}
    for number, given in enumerate(texts, first):
        own_group = _new_group(number, own_groups) if given.group is None else given.group
        text = given.text
        if isinstance(text, ContrastPair):
            passages += text.passages(tokenizer, own_group, chat_template_kwargs)
            continue
        if not isinstance(text, str | SpannedText | Prompt | Sequence | Mapping):
            raise TypeError(
                f"expected a string, a list of chat messages, Prompt, SpannedText or ContrastPair as text {number}; "
                f"got {type(text).__name__}. Convert it."
            )
        passage = passage_of(tokenizer, text, own_group, chat_template_kwargs)
        passages.append(passage if given.label is None else replace(passage, labels=(given.label,)))
    return passages


def _new_group(number: int, given: Container[str | None]) -> str:
    """The index of a text as its group id, with a mark where another text was given this group."""
    group = str(number)
    while group in given:
        group += "'"
    return group


def texts_sha256(texts: Sequence[LabelledText], chat_template_kwargs: Mapping[str, Any] | None = None) -> str:
    """Return a hash of the texts with their given labels, groups and template arguments, for provenance."""
    lines = []
    for one in texts:
        given = one.label is not None or one.group is not None
        lines.append(repr((one.text, one.label, one.group) if given else one.text))
    if chat_template_kwargs:
        lines.append(repr(dict(chat_template_kwargs)))
    return sha256("\n".join(lines))
