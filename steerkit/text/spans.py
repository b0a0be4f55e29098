"""Spans: character ranges of a text, and the token ranges that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steerkit.text.prompt import Prompt, PromptLike, messages_of, render
from steerkit.text.tokens import encode, encode_with_offsets

Range = tuple[int, int]


@dataclass(frozen=True)
class Passage:
    """A tokenised text with the token ranges at which activations are read: the input of one row of a batch.

    Args:
        ids: the tokens of the whole text.
        spans: half-open token ranges `(start, stop)` in `ids`, each of at least one token.
        labels: one label per span.
        group: group id; a group stays on one side of a split.

    Raises:
        ValueError: a span without a token, or outside the ids.
    """

    ids: tuple[int, ...]
    spans: tuple[Range, ...]
    labels: tuple[str, ...]
    group: str

    def __post_init__(self) -> None:
        for start, stop in self.spans:
            if not 0 <= start < stop <= len(self.ids):
                raise ValueError(
                    f"expected at least one token in every span, within the {len(self.ids)} tokens of its text; group "
                    f"{self.group} has one at {start}..{stop}. Leave it out."
                )


@dataclass(frozen=True)
class SpannedText:
    """A text and character ranges of it. One forward of the whole text gives the activations of all ranges.

    Args:
        text: a string, used verbatim, or a `Prompt` that `render` made, whose text the spans refer to. A `Prompt` of
            given ids is refused where its text, cut as below, has other ids.
        spans: half-open character ranges `(start, stop)` of the text, in order and not overlapping.
        labels: one label per span; default `"0"`, `"1"`, ...
        group: group id, stored as text; a group stays on one side of a split. None makes each text its own group.
        cut: `"spans"` cuts the text at the ends of its spans, encodes each piece and concatenates the ids, so that no
            token crosses an end: a span decodes to exactly its characters. `"whole"` encodes the text at once, as
            a model is trained on it and writes it; a span then has every token that overlaps it.
        prompt: a prompt that the text continues: a string, chat messages or a `Prompt`. Its tokens are those that
            generation reads.

    Raises:
        ValueError: no spans, spans out of order or outside the text, another number of labels, or an unknown `cut`.

    Example:
        >>> SpannedText("A: yes B: no", ((3, 6), (10, 12)), labels=("A", "B"))
        >>> SpannedText("I am calm.", ((0, 10),), prompt=[{"role": "user", "content": "How are you?"}])
    """

    text: str | Prompt
    spans: tuple[Range, ...]
    labels: tuple[str, ...] = ()
    group: str | None = None
    cut: str = "spans"
    prompt: PromptLike | None = None

    def __post_init__(self) -> None:
        if self.prompt is not None and not isinstance(self.prompt, str | Prompt):
            object.__setattr__(self, "prompt", tuple(messages_of(self.prompt)))
        if self.group is not None:
            object.__setattr__(self, "group", str(self.group))
        length = len(str(self.text))
        end = 0
        for start, stop in self.spans:
            if not (end <= start < stop <= length):
                raise ValueError(
                    f"expected character spans in order, not empty, not overlapping, within 0..{length}; "
                    f"got {self.spans}. Sort them, and merge those that overlap."
                )
            end = stop
        if not self.spans or (self.labels and len(self.labels) != len(self.spans)):
            raise ValueError(
                f"expected spans and one label for each; got {len(self.spans)} and {len(self.labels)} labels. Add what "
                "is missing, or leave the labels out."
            )
        if self.cut not in ("spans", "whole"):
            raise ValueError(f"expected cut to be 'spans' or 'whole'; got {self.cut!r}. Pass one of them.")
        if isinstance(self.text, Prompt) and self.prompt is not None:
            raise ValueError("expected a string that continues the prompt; got a Prompt as text. Pass its text.")


def passage_of(
    tokenizer: Any,
    text: PromptLike | SpannedText,
    group: str,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Passage:
    """Tokenise a text.

    Args:
        tokenizer: a transformers tokenizer.
        text: a spanned text; or a string, messages or a `Prompt`, whose only span is all of it without the tokens that
            the tokenizer added (BOS).
        group: the group id where the text has none.
        chat_template_kwargs: arguments of the chat template.
    """
    if not isinstance(text, SpannedText):
        alone = render(tokenizer, text, chat_template_kwargs)
        return Passage(alone.ids, ((alone.n_added, len(alone.ids)),), ("",), group)
    labels = text.labels or tuple(str(number) for number in range(len(text.spans)))
    group = group if text.group is None else text.group
    prompt = None if text.prompt is None else render(tokenizer, text.prompt, chat_template_kwargs)
    ids, spans = (_encode_whole if text.cut == "whole" else _encode_pieces)(tokenizer, text, prompt)
    return Passage(ids, spans, labels, group)


def _encode_pieces(
    tokenizer: Any, text: SpannedText, prompt: Prompt | None
) -> tuple[tuple[int, ...], tuple[Range, ...]]:
    """The ids of a text that is cut at the ends of its spans, and the token range of each span."""
    ids = list(() if prompt is None else prompt.ids)
    spans: list[Range] = []
    whole, end = str(text.text), 0
    for start, stop in (*text.spans, (len(whole), len(whole))):
        for piece, is_span in ((whole[end:start], False), (whole[start:stop], True)):
            if not piece:
                continue
            first = len(ids)
            if ids or (isinstance(text.text, Prompt) and text.text.source != "text"):
                ids.extend(encode(tokenizer, piece))
            else:
                rendered = render(tokenizer, piece)
                first += rendered.n_added
                ids.extend(rendered.ids)
            if is_span:
                spans.append((first, len(ids)))
        end = stop
    if isinstance(text.text, Prompt) and text.text.source == "ids" and tuple(ids) != text.text.ids:
        raise ValueError(
            f"expected a prompt whose ids are those of its text, cut at the ends of its spans; {whole!r:.80} has "
            "others. Pass cut='whole' if they are those of the whole text, or make the prompt of its text by sk.render."
        )
    return tuple(ids), tuple(spans)


def _encode_whole(
    tokenizer: Any, text: SpannedText, prompt: Prompt | None
) -> tuple[tuple[int, ...], tuple[Range, ...]]:
    """The ids of a text that is encoded at once, and for each span the range of the tokens that overlap it."""
    if prompt is not None:
        own, own_offsets = encode_with_offsets(tokenizer, str(text.text))
        ids, first, offsets = (*prompt.ids, *own), len(prompt.ids), list(own_offsets)
    else:
        rendered = render(tokenizer, text.text)
        ids, first = rendered.ids, rendered.n_added
        offsets = list(_offsets(tokenizer, rendered))
    spans = []
    for start, stop in text.spans:
        inside = [i for i, (low, high) in enumerate(offsets, first) if low < stop and high > start and high > low]
        if not inside:
            raise ValueError(
                f"expected at least one token in characters {start}..{stop} of {str(text.text)!r:.80}; got none. Widen "
                "or drop that span."
            )
        spans.append((inside[0], inside[-1] + 1))
    return ids, tuple(spans)


def _offsets(tokenizer: Any, prompt: Prompt) -> Sequence[Range]:
    """For each of a prompt's own tokens the range of characters of its text that it encodes."""
    if not getattr(tokenizer, "is_fast", False):
        encode_with_offsets(tokenizer, prompt.text)  # raises
    found = tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)
    if tuple(found["input_ids"]) != prompt.ids[prompt.n_added :]:
        raise ValueError(
            f"expected a prompt whose ids are those of its text; {prompt.text!r:.80} has others. Make the prompt of its"
            " text by sk.render."
        )
    return found["offset_mapping"]
