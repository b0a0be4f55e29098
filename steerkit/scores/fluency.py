"""Fluency: scores that need a model: teacher-forced log-probability, perplexity, KL divergence."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.generation.batches import SCORED_ROWS, engine_of, held_logits, in_batches
from steerkit.generation.engine import Engine, Row
from steerkit.io.progress import progress
from steerkit.models.context import check_vocabulary, context_length
from steerkit.steering.steering import Steering
from steerkit.text.prompt import PromptLike, encode_prompt, listed
from steerkit.text.tokens import Ids, continuation_ids


def log_probabilities(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[PromptLike],
    texts: Sequence[str | Ids],
    steerings: Sequence[Steering | None] | None = None,
) -> list[Float[Tensor, " token"]]:
    """Log-probability `log p(token_t | prompt, tokens before t)` of each token of each text, in nats.

    Equal prompts are prefilled once. An empty text has no tokens.

    Args:
        prompts: strings, chats or `Prompt`s.
        texts: continuations. Pass the token ids of a text that this model generated (`Generation.ids`): its text may
            encode to other ids. A string is encoded as continuation of its prompt (`steerkit.text.tokens.encode`).
        steerings: what steers the model in each row; default nothing. Pass one with a dose as
            `steering.resolved(norms)`.

    Warns:
        UserWarning: rows whose logits are NaN or infinite; their log-probabilities are NaN.
    """

    def score(logits: Tensor, _: Tensor | None, ids: Tensor) -> Tensor:
        return logits.gather(-1, ids[..., None]).squeeze(-1) - logits.logsumexp(-1)

    return _teacher_forced(model, tokenizer, prompts, texts, steerings, score, paired=False)


def perplexity(
    model: nn.Module, tokenizer: Any, prompts: Sequence[PromptLike], texts: Sequence[str | Ids]
) -> Float[np.ndarray, " text"]:
    """`exp(-mean log p)` per token of each text after its prompt, under the unsteered model; NaN for an empty text.

    Texts as in `log_probabilities`: strings or token ids. The end-of-sequence token counts where the ids hold it.
    """
    scores = log_probabilities(model, tokenizer, prompts, texts)
    return np.array([float(torch.exp(-s.double().mean())) if len(s) else np.nan for s in scores])


def kl(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[PromptLike],
    texts: Sequence[str | Ids],
    steerings: Sequence[Steering | None],
) -> Float[np.ndarray, " text"]:
    """Mean per token of `KL(steered || unsteered)` in nats over the vocabulary, teacher-forced on `texts`.

    Use unsteered texts, so that the push is measured and not the text that it leads to. NaN for an empty text. Texts as
    in `log_probabilities`: strings or token ids.

    A steering with a dose raises ValueError, since no text is generated over which its norm could be measured: pass
    `steering.resolved(norms)`, with `result.meta["stream_norms"]` of a sweep or `steerkit.steering.dose.median_norms`.
    """

    def score(logits: Tensor, plain: Tensor | None, ids: Tensor) -> Tensor:
        assert plain is not None
        steered = logits.log_softmax(-1)
        return (steered.exp() * (steered - plain.log_softmax(-1))).sum(-1)

    scores = _teacher_forced(model, tokenizer, prompts, texts, steerings, score, paired=True)
    return np.array([float(s.double().mean()) if len(s) else np.nan for s in scores])


def _teacher_forced(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[PromptLike],
    texts: Sequence[str | Ids],
    steerings: Sequence[Steering | None] | None,
    score: Callable[[Tensor, Tensor | None, Tensor], Tensor],
    paired: bool,
) -> list[Tensor]:
    """`score(logits, unsteered logits or None, ids)` of each token of each text; `[token]` per row.

    Args:
        paired: also forward the unsteered model.
    """
    prompts = listed(prompts) if len(prompts) else []  # a column of a table makes a new object at each reading
    texts = listed(texts, "texts") if len(texts) else []
    if not len(prompts) == len(texts) == len(steerings if steerings is not None else texts):
        got = [len(texts)] if steerings is None else [len(texts), len(steerings)]
        raise ValueError(f"expected one text (and steering) per prompt, {len(prompts)}; got {got}. Pair them.")
    ids = [continuation_ids(tokenizer, text) for text in texts]
    check_vocabulary(model, ids)
    encoded = {id(prompt): encode_prompt(tokenizer, prompt) for prompt in {id(one): one for one in prompts}.values()}
    steered = [None] * len(prompts) if steerings is None else list(steerings)
    rows = [
        Row(encoded[id(prompt)], () if steering is None else tuple(steering.per_row(1)))
        for prompt, steering in zip(prompts, steered, strict=True)
    ]
    out: list[Tensor] = [torch.empty(0)] * len(rows)
    todo = [number for number in range(len(rows)) if ids[number]]
    limit = context_length(model)
    longest = max((len(rows[number].prompt) + len(ids[number]) for number in todo), default=0)
    if limit is not None and longest > limit:
        raise ValueError(
            f"expected prompt and text within the model's context of {limit} tokens; got {longest}. Cut the texts."
        )

    def work(engine: Engine, numbers: Sequence[int]) -> list[Tensor]:
        batch_ids = [ids[todo[i]] for i in numbers]
        chunk = torch.zeros(len(batch_ids), max(map(len, batch_ids)), dtype=torch.long)
        for row, tokens in enumerate(batch_ids):
            chunk[row, : len(tokens)] = torch.tensor(tokens)
        chunk = chunk.to(engine.device)
        entering = torch.cat([engine.last_tokens(), chunk[:, :-1]], dim=1)
        logits = engine.forward(entering, engine.width - 1).float()
        plain = None
        if paired:
            unsteered = engine_of(model)([Row(row.prompt) for row in engine.rows], engine.room)
            plain = unsteered.forward(entering, unsteered.width - 1).float()
        scores = score(logits, plain, chunk).cpu()
        return [scores[row, : len(tokens)] for row, tokens in enumerate(batch_ids)]

    with progress("scoring", len(todo)) as advance:
        some, rooms, held = [rows[i] for i in todo], [len(ids[i]) - 1 for i in todo], held_logits(model, 1 + paired)
        for batch in in_batches(model, some, rooms, work, SCORED_ROWS, held):
            for number, scores in batch:
                out[todo[number]] = scores.clone()  # outside inference mode, so that it is an ordinary tensor
            advance(len(batch))
    if overflowed := [number for number, one in enumerate(out) if not torch.isfinite(one).all()]:
        warnings.warn(
            f"expected finite logits; got NaN or infinity in {len(overflowed)} of {len(rows)} rows, whose scores are "
            f"NaN: {overflowed[:8]}. Lower the coefficient, or load the model in bfloat16 or float32.",
            UserWarning,
            stacklevel=3,
        )
        for number in overflowed:
            out[number] = torch.full_like(out[number], torch.nan)
    return out
