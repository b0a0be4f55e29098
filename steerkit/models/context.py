"""The limits of what a model can read: its context length and its vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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


def rope_switch(model: Any) -> int | None:
    """The number of positions up to which a model with LongRoPE takes its short factors; None for other models.

    transformers chooses the factors for all rows of a forward, by the largest position in it.
    """
    config = text_config(model)
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [given, *(part for part in given.values() if isinstance(part, Mapping))] if given else []
    for part in parts:
        if part.get("rope_type", part.get("type")) == "longrope":
            limit = part.get("original_max_position_embeddings")
            limit = limit or getattr(config, "original_max_position_embeddings", None)
            return int(limit or getattr(config, "max_position_embeddings", None) or 0) or None
    return None


def check_switch(model: Any, lengths: Iterable[int]) -> None:
    """`ValueError` for a text, prompt and new tokens together, beyond the positions where LongRoPE changes its factors.

    Keys that are cached before have the short factors, queries after it the long ones.
    """
    limit = rope_switch(model)
    longest = max(lengths, default=0)
    if limit is not None and longest > limit:
        raise ValueError(
            f"expected prompts and new tokens of at most {limit} tokens together, where this model changes the factors "
            f"of its rotary embedding (LongRoPE); got {longest}. Shorten them, or steer the model's own `generate` "
            "with `steering.on(model)`."
        )


def context_length(model: Any) -> int | None:
    """The number of positions the model was built for; None if its configuration does not state it."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        length = getattr(text_config(model), name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None
