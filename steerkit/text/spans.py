"""Spans: character ranges of a text, and the token ranges that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steerkit.text.prompt import Rendered, encode_with_own
from steerkit.text.tokens import encode

Range = tuple[int, int]


@dataclass(frozen=True)
class Passage:
    """A tokenised text with the token ranges at which activations are read: the input of one row of a batch.

    Args:
        ids: the tokens of the whole text.
        spans: half-open token ranges `(start, stop)` in `ids`.
        labels: one label per span.
        group: group id; a group stays on one side of a split.
    """

    ids: tuple[int, ...]
    spans: tuple[Range, ...]
    labels: tuple[str, ...]
    group: str


@dataclass(frozen=True)
class SpannedText:
    """A text and character ranges of it. One forward of the whole text gives the activations of all ranges.

    Args:
        text: the text, used verbatim.
        spans: half-open character ranges `(start, stop)`, in order and not overlapping.
        labels: one label per span; default `"0"`, `"1"`, ...
        group: group id; a group stays on one side of a split. Default: the text's index in its data set.
        cut: `"spans"` cuts the text at the ends of its spans, encodes each piece and concatenates the ids, so that no
            token crosses an end. `"whole"` encodes the text at once, as the paper's scripts do; a span then has every
            token that overlaps it.

    Raises:
        ValueError: no spans, spans out of order or outside the text, another number of labels, or an unknown `cut`.

    Example: `SpannedText("A: yes B: no", ((3, 6), (10, 12)), labels=("A", "B"))`
    """

    text: str
    spans: tuple[Range, ...]
    labels: tuple[str, ...] = ()
    group: str | None = None
    cut: str = "spans"

    def __post_init__(self) -> None:
        end = 0
        for start, stop in self.spans:
            if not (end <= start < stop <= len(self.text)):
                raise ValueError(
                    f"expected character spans in order, not empty, not overlapping, within 0..{len(self.text)}; "
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


def passage_of(tokenizer: Any, text: str | SpannedText, group: str) -> Passage:
    """Tokenise a text.

    Args:
        tokenizer: a transformers tokenizer.
        text: a string, whose only span is all of it without the tokenizer's first token (BOS), or a spanned text.
        group: the group id where the text has none.
    """
    if isinstance(text, str):
        ids, own = encode_with_own(tokenizer, text)
        return Passage(ids, ((len(ids) - own, len(ids)),), ("",), group)
    labels = text.labels or tuple(str(number) for number in range(len(text.spans)))
    group = group if text.group is None else text.group
    ids, spans = (_encode_whole if text.cut == "whole" else _encode_pieces)(tokenizer, text)
    return Passage(ids, spans, labels, group)


def _encode_pieces(tokenizer: Any, text: SpannedText) -> tuple[tuple[int, ...], tuple[Range, ...]]:
    """The ids of a text that is cut at the ends of its spans, and the token range of each span."""
    ids: list[int] = []
    spans: list[Range] = []
    end = 0
    for start, stop in text.spans:
        for piece, is_span in ((_slice(text.text, end, start), False), (_slice(text.text, start, stop), True)):
            if not piece:
                continue
            if ids:
                piece_ids = encode(tokenizer, piece)
                own = len(piece_ids)
            else:
                piece_ids, own = encode_with_own(tokenizer, piece)
            ids.extend(piece_ids)
            if is_span:
                spans.append((len(ids) - own, len(ids)))
        end = stop
    if end < len(text.text):
        ids.extend(encode(tokenizer, text.text[end:]))
    return tuple(ids), tuple(spans)


def _slice(text: str, start: int, stop: int) -> str:
    """A part of a text; a part of a rendered prompt is `Rendered` too."""
    part = text[start:stop]
    return Rendered(part) if isinstance(text, Rendered) else part


def _encode_whole(tokenizer: Any, text: SpannedText) -> tuple[tuple[int, ...], tuple[Range, ...]]:
    """The ids of a text that is encoded at once, and for each span the range of the tokens that overlap it."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "expected a fast tokenizer for cut='whole', which needs character offsets; got a slow one. "
            "Pass cut='spans'."
        )
    ids, own = encode_with_own(tokenizer, text.text)
    encoded = tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = list(enumerate(encoded["offset_mapping"], len(ids) - own))
    spans = []
    for start, stop in text.spans:
        inside = [i for i, (first, last) in offsets if first < stop and last > start and last > first]
        if not inside:
            raise ValueError(
                f"expected at least one token in characters {start}..{stop} of {text.text!r:.80}; got none. Widen or "
                "drop that span."
            )
        spans.append((inside[0], inside[-1] + 1))
    return ids, tuple(spans)
