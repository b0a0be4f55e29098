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
    """The token ids of a text that continues another: without special tokens, and without an added space.

    SentencePiece-like tokenizers put a space before every text that they encode. That space is removed again.

    Raises:
        TypeError: `text` is not a string.
        ValueError: the added space cannot be removed, or UTF-8 cannot hold the text.

    Example: `encode(tokenizer, " was")`
    """
    if not isinstance(text, str):
        raise TypeError(f"expected a text; got {text!r:.80} ({type(text).__name__}). Drop or convert it.")
    utf8(text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids or text[0].isspace() or not str(tokenizer.convert_ids_to_tokens(ids[0])).startswith(SPACE):
        return tuple(ids)
    for prefix in ("^", "|", "\n"):
        prefix_ids = tokenizer(prefix, add_special_tokens=False)["input_ids"]
        joined_ids = tokenizer(prefix + text, add_special_tokens=False)["input_ids"]
        if joined_ids[: len(prefix_ids)] == prefix_ids and len(joined_ids) > len(prefix_ids):
            return tuple(joined_ids[len(prefix_ids) :])
    raise ValueError(
        f"expected ids of {text!r:.80} without a space before it; got ids with one, which the tokenizer adds. Begin "
        "the text with a space."
    )


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
