"""Spans: character ranges of a text and the token ranges that they become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steerkit.text.prompt import encode_prompt, encode_with_own
from steerkit.text.tokens import encode


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


def passage_of(tokenizer: Any, text: str | SpannedText, group: str) -> Passage:
    """A text with one span (all of it but the tokenizer's own first token) or a spanned text, tokenised."""
    if isinstance(text, str):
        ids, own = encode_with_own(tokenizer, text)
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
