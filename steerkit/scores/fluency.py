"""Fluency: scores that need a model: teacher-forced log-probability, perplexity, KL divergence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.generation.engine import Engine, Row, in_batches
from steerkit.io.progress import progress
from steerkit.models.context import check_vocabulary, context_length
from steerkit.steering.steering import Steering
from steerkit.text.prompt import Prompt, encode_prompt
from steerkit.text.tokens import encode

LOGIT_BYTES = 2**28
ROWS = 96


def log_probabilities(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    steerings: Sequence[Steering | None] | None = None,
) -> list[Float[Tensor, " token"]]:
    """`log p(token_t | prompt, tokens before t)` of each text's own tokens, in nats; empty for an empty text.

    The text is tokenised on its own and follows the prompt's ids; prompts that repeat are prefilled once.

    Args:
        steerings: what steers the model in each row; default nothing.
    """

    def read(logits: Tensor, _: Tensor | None, ids: Tensor) -> Tensor:
        return logits.gather(-1, ids[..., None]).squeeze(-1) - logits.logsumexp(-1)

    return _teacher_forced(model, tokenizer, prompts, texts, steerings, read, paired=False)


def perplexity(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], texts: Sequence[str]
) -> Float[np.ndarray, " text"]:
    """`exp(-mean log p)` per token of each text after its prompt, under the unsteered model; NaN for an empty text."""
    scores = log_probabilities(model, tokenizer, prompts, texts)
    return np.array([float(torch.exp(-s.double().mean())) if len(s) else np.nan for s in scores])


def kl(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    steerings: Sequence[Steering | None],
) -> Float[np.ndarray, " text"]:
    """Mean per token of `KL(steered || unsteered)` in nats over the vocabulary, teacher-forced on `texts`.

    Use unsteered texts, so that the push is measured and not the text that it leads to. NaN for an empty text.
    """

    def read(logits: Tensor, plain: Tensor | None, ids: Tensor) -> Tensor:
        assert plain is not None
        steered = logits.log_softmax(-1)
        return (steered.exp() * (steered - plain.log_softmax(-1))).sum(-1)

    scores = _teacher_forced(model, tokenizer, prompts, texts, steerings, read, paired=True)
    return np.array([float(s.double().mean()) if len(s) else np.nan for s in scores])


def _teacher_forced(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    steerings: Sequence[Steering | None] | None,
    read: Any,
    paired: bool,
) -> list[Tensor]:
    """`read(logits, unsteered logits or None, ids)` per token of each text; `[token]` per row."""
    if not len(prompts) == len(texts) == len(steerings if steerings is not None else texts):
        got = [len(texts)] if steerings is None else [len(texts), len(steerings)]
        raise ValueError(f"expected one text (and steering) per prompt, {len(prompts)}; got {got}. Pair them up.")
    ids = [encode(tokenizer, text) for text in texts]
    check_vocabulary(model, ids)
    encoded: dict[str, tuple[int, ...]] = {}
    rows = []
    for number, prompt in enumerate(prompts):
        key = f"{type(prompt).__name__} {prompt!r}"
        encoded.setdefault(key, encode_prompt(tokenizer, prompt))
        steering = steerings[number] if steerings is not None else None
        rows.append(Row(encoded[key], () if steering is None else tuple(steering.per_row(1))))
    out: list[Tensor] = [torch.empty(0)] * len(rows)
    todo = [number for number in range(len(rows)) if ids[number]]
    room = max((len(ids[number]) for number in todo), default=1)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    limit = context_length(model)
    longest = max((len(rows[number].prompt) + len(ids[number]) for number in todo), default=0)
    if limit is not None and longest > limit:
        raise ValueError(
            f"expected prompt and text within the model's context of {limit} tokens; got {longest}. Cut the texts."
        )
    size = max(1, min(ROWS, LOGIT_BYTES // (4 * vocabulary * room * (2 if paired else 1))))

    def work(engine: Engine, numbers: Sequence[int]) -> list[Tensor]:
        mine = [ids[todo[i]] for i in numbers]
        chunk = torch.zeros(len(mine), max(map(len, mine)), dtype=torch.long)
        for row, tokens in enumerate(mine):
            chunk[row, : len(tokens)] = torch.tensor(tokens)
        chunk = chunk.to(engine.device)
        entering = torch.cat([engine.last_tokens(), chunk[:, :-1]], dim=1)
        logits = engine.forward(entering, engine.width - 1).float()
        plain = None
        if paired:
            bare = Engine(model, [Row(row.prompt) for row in engine.rows], room)
            plain = bare.forward(entering, bare.width - 1).float()
        scores = read(logits, plain, chunk).cpu()
        own = [scores[row, : len(tokens)] for row, tokens in enumerate(mine)]
        if any(bool(torch.isnan(part).any()) for part in own):
            raise ValueError(
                "expected finite logits; got NaN. Lower the coefficient, or load the model in bfloat16 or float32."
            )
        return own

    with progress("scoring", len(todo)) as advance:
        for batch in in_batches(model, [rows[i] for i in todo], room, work, size):
            for place, scores in batch:
                out[todo[place]] = scores.clone()  # out of inference mode, so that it is an ordinary tensor
            advance(len(batch))
    return out
