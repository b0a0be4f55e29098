"""Token ids of continuations, and batches of them padded to one width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from steerkit.io.files import utf8

SPACE = "\u2581"  # how SentencePiece writes a space


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The ids of a text that continues another: no special tokens added, and no space that the text has not.

    Tokenizers of the SentencePiece kind put a space before any text that they are given; here it is cut off again.

    Raises:
        TypeError: it is no text.
        ValueError: it cannot be cut off, or UTF-8 cannot hold the text.
    """
    if not isinstance(text, str):
        raise TypeError(f"expected a text; got {text!r:.80} ({type(text).__name__}). Drop or convert it.")
    utf8(text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids or text[0].isspace() or not str(tokenizer.convert_ids_to_tokens(ids[0])).startswith(SPACE):
        return tuple(ids)
    for lead in ("^", "|", "\n"):
        before = tokenizer(lead, add_special_tokens=False)["input_ids"]
        both = tokenizer(lead + text, add_special_tokens=False)["input_ids"]
        if both[: len(before)] == before and len(both) > len(before):
            return tuple(both[len(before) :])
    raise ValueError(f"expected ids of {text!r:.80} without a space before it; the tokenizer puts one. Begin with one.")


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
