"""Token ids of continuations, and batches of them padded to one width."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from steerkit.io.files import utf8

Ids = Sequence[int]
ANCHORS = ("^", "|", "\n", "a")
"""Texts after which a continuation is encoded, where a tokenizer adds a space to each text that it encodes."""


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The token ids of a text that continues another: without special tokens, and without an added space.

    All boundaries between prompt and continuation are made here: training, reading, generation and scores concatenate
    the ids of the prompt and these ids. Tokenizers that put a space before each text that they encode (SentencePiece,
    and byte-level ones with `add_prefix_space`) encode the text after another one, whose ids are then cut off.

    Raises:
        TypeError: `text` is not a string.
        ValueError: the added space cannot be removed, or UTF-8 cannot hold the text.

    Example: `encode(tokenizer, " was")`
    """
    return _encoded(tokenizer, text, offsets=False)[0]


def encode_with_offsets(tokenizer: Any, text: str) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """`encode`, and for each token the half-open range of characters of `text` that it encodes.

    Raises:
        ValueError: a slow tokenizer, which has no offsets; see also `encode`.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "expected a fast tokenizer for cut='whole', which needs character offsets; got a slow one. "
            "Pass cut='spans'."
        )
    return _encoded(tokenizer, text, offsets=True)


def _encoded(tokenizer: Any, text: str, offsets: bool) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """The ids of a continuation, and their offsets where they are asked for."""
    if not isinstance(text, str):
        raise TypeError(f"expected a text; got {text!r:.80} ({type(text).__name__}). Drop or convert it.")
    utf8(text)
    if not text or not adds_space(tokenizer):
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=offsets)
        return tuple(found["input_ids"]), tuple(found["offset_mapping"]) if offsets else ()
    found = _after_anchor(tokenizer, text, offsets, exact=True) or _after_anchor(tokenizer, text, offsets, exact=False)
    if found is not None:
        return found
    raise ValueError(
        f"expected ids of {text!r:.80} without a space before it; got ids with one, which the tokenizer adds. Begin "
        "the text with a space."
    )


def _after_anchor(tokenizer: Any, text: str, offsets: bool, exact: bool) -> Any:
    """The ids (and offsets) of a text after the first anchor whose own ids stay; None if there is no such anchor.

    Args:
        exact: the ids must decode to the text. Texts with unknown or normalised characters do not.
    """
    for anchor in ANCHORS:
        before = tokenizer(anchor, add_special_tokens=False)["input_ids"]
        found = tokenizer(anchor + text, add_special_tokens=False, return_offsets_mapping=offsets)
        ids = found["input_ids"][len(before) :]
        if found["input_ids"][: len(before)] != before or not ids:
            continue
        if not exact or decode(tokenizer, ids, skip_special=False) == text:
            shifted = found["offset_mapping"][len(before) :] if offsets else ()
            return tuple(ids), tuple((start - len(anchor), stop - len(anchor)) for start, stop in shifted)
    return None


def tokenizer_rules(tokenizer: Any) -> tuple[Any, ...]:
    """What may be changed of a tokenizer besides its vocabulary: number of tokens, special tokens, and its rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [getattr(backend, name, None) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]
    switches = tuple(getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "add_prefix_space"))
    states = tuple(bytes(part.__getstate__()) if part is not None else None for part in parts)
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    return size, str(getattr(tokenizer, "special_tokens_map", None)), switches, states


_adds_space: weakref.WeakKeyDictionary[Any, tuple[Any, bool]] = weakref.WeakKeyDictionary()


def adds_space(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a space before each text that it encodes; found once per tokenizer and rules."""
    known, now = _adds_space.get(tokenizer), tokenizer_rules(tokenizer)
    if known is None or known[0] != now:
        known = now, any(_is_changed(tokenizer, text) for text in ("a", " a"))
        _adds_space[tokenizer] = known
    return known[1]


def _is_changed(tokenizer: Any, text: str) -> bool:
    """Whether the tokens of a text begin with a space that the text does not have."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spelled = "".join(map(str, tokenizer.convert_ids_to_tokens(ids))).replace("\u2581", " ").replace("\u0120", " ")
    return spelled.startswith(" ") and spelled != text


def decode(tokenizer: Any, ids: Ids, skip_special: bool = True) -> str:
    """The text of token ids that continue another text.

    Some decoders drop a space at the start of what they decode. The ids are decoded after another text, so that the
    space is kept.

    Args:
        skip_special: leave out special tokens; added ordinary tokens (tags) stay.

    Example: `decode(tokenizer, encode(tokenizer, " was"))` is `" was"`.
    """
    options = {"skip_special_tokens": skip_special, "clean_up_tokenization_spaces": False}
    lead = tokenizer("a", add_special_tokens=False)["input_ids"]
    before, both = tokenizer.decode(lead, **options), tokenizer.decode([*lead, *ids], **options)
    return str(both[len(before) :] if both.startswith(before) else tokenizer.decode(list(ids), **options))


def special_tokens(tokenizer: Any, texts: Iterable[Ids]) -> dict[str, int]:
    """The special tokens among the ids of texts, each with its id."""
    known = getattr(tokenizer, "added_tokens_decoder", {})
    used = {token for ids in texts for token in ids}
    return {str(token): number for number, token in known.items() if token.special and number in used}


def continuation_ids(tokenizer: Any, text: str | Ids) -> tuple[int, ...]:
    """The ids of a continuation: of a text by `encode`; ids are returned as they are."""
    if isinstance(text, str):
        return encode(tokenizer, text)
    if not isinstance(text, Iterable):
        raise TypeError(f"expected a text or token ids; got {text!r:.80} ({type(text).__name__}). Drop or convert it.")
    return tuple(map(int, text))


def pad(
    rows: Sequence[Sequence[int]], side: str, device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Rows of ids as one batch, padded with id 0.

    Args:
        rows: the token ids of each row, at least one row.
        side: "left" or "right": where the padding goes.
        device: the device of the returned tensors.

    Returns:
        `(input_ids, attention_mask, position_ids)`, each int64 `[batch, pos]`. Position ids count the tokens of a row
        from 0, so they do not depend on the padding; padding has position 0.
    """
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        columns = slice(0, len(tokens)) if side == "right" else slice(width - len(tokens), width)
        ids[row, columns] = torch.as_tensor(tokens, dtype=torch.long)
        mask[row, columns] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0) * mask
    return ids.to(device), mask.to(device), positions.to(device)
