"""The limits of what a model can read: its context length and its vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from steerkit.models.model import text_config, unwrap


def check_fits(model: Any, rows: Sequence[Sequence[int]]) -> None:
    """`ValueError` for a row longer than the model's context, or with a token that the model does not have."""
    limit = context_length(model)
    longest = max(map(len, rows), default=0)
    if limit is not None and longest > limit:
        raise ValueError(f"expected texts of at most {limit} tokens, the model's context; got {longest}. Cut it.")
    check_vocabulary(model, rows)


def check_vocabulary(model: Any, rows: Iterable[Sequence[int]]) -> None:
    """`ValueError` if the model has no embedding for a token: the tokenizer is another model's, or was extended."""
    count = getattr(unwrap(model).get_input_embeddings(), "num_embeddings", None)
    highest = max((max(ids, default=-1) for ids in rows), default=-1)
    if isinstance(count, int) and highest >= count:
        raise ValueError(
            f"expected tokens among the {count} that the model has; got token {highest}. Load this model's own "
            "tokenizer, or resize its embeddings."
        )


def context_length(model: Any) -> int | None:
    """The number of positions the model was built for; None if its configuration does not state it."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        length = getattr(text_config(model), name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None
