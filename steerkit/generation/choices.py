"""Choices: the probabilities of given continuations, for many differently steered rows over one shared prefill."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import nn

from steerkit.capture.activations import Layer
from steerkit.generation.batches import in_batches
from steerkit.generation.engine import Engine, Row, prompt_edit
from steerkit.generation.norms import shared_median_norms
from steerkit.models.active import suspended
from steerkit.models.context import check_fits
from steerkit.steering.dose import with_coefficients
from steerkit.steering.steering import Steering, steerings_per_row
from steerkit.text.prompt import Prompt, PromptLike, listed, render
from steerkit.text.tokens import encode


class Scored(NamedTuple):
    """The log-probability of a text, and at how many of the positions that decide its tokens the steering acted.

    `steered` is None where no row of the batch has a condition.
    """

    log_prob: float
    steered: int | None = None


LOGIT_BYTES = 2**28  # logits held at once
MAX_ROWS = 96


def score_choices(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[PromptLike],
    choices: Sequence[str] | Sequence[Sequence[str]],
    *,
    steering: Steering | Sequence[Steering | None] | None = None,
    norms: Mapping[Layer, float] | None = None,
    batch_rows: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Return the log-probability of each choice after each prompt, and its probability among the prompt's choices.

    With `c_1 ... c_n` the tokens of a choice and `p` the prompt,

        log_prob    = sum over t of log P(c_t | p, c_1 ... c_{t-1}), in nats,
        probability = exp(log_prob) / sum over the prompt's choices of exp(log_prob).

    The end-of-sequence token is not scored. Longer choices are not corrected for their length: compare choices of one
    form, such as `" (A)"` and `" (B)"`, or divide `log_prob` by `n_tokens`. A prompt is forwarded once for all its
    choices, and for all steerings that leave it as it is.

    Args:
        prompts: strings (verbatim), lists of messages (rendered by the chat template), or `Prompt`s.
        choices: texts that continue every prompt, with their first space; or one list of texts per prompt.
        steering: one for all prompts, or one (or None) per prompt; steerings that `with steering.on(model)` set are
            applied too. The prompt is the prompt, and the tokens of a choice count as new tokens.
        norms: norm of the stream per layer, for steerings with a `dose`; default: the median over the steered positions
            of these prompts and choices, see `steerkit.steering.dose.median_norms`.
        batch_rows: rows forwarded at once; default by the size of the vocabulary.
        chat_template_kwargs: further arguments of the chat template.

    Returns:
        One row per prompt and choice, with the columns prompt (index), choice, log_prob, n_tokens and probability.

    Warns:
        UserWarning: choices whose tokens are others where they are tokenised together with their prompt.

    Raises:
        TypeError: a choice that is no string.
        ValueError: no prompts or choices, an empty choice or one given twice, another number of lists than prompts, a
            prompt and choice too long for the context, a steering that does not fit, or logits that are not finite.

    Example:
        >>> steering = sk.Steering(vector, 1.5, layer=14)
        >>> sk.score_choices(model, tokenizer, ["Is the sea calm?"], [" Yes", " No"], steering=steering)

    Source: the log-likelihoods of lm-evaluation-harness (`HFLM.loglikelihood`); Rimsky et al. 2024, arXiv 2312.06681,
    section 4.1 (probabilities of answer letters under steering).
    """
    prompts = listed(prompts)
    each = choices_per_prompt(choices, len(prompts))
    rendered = [render(tokenizer, prompt, chat_template_kwargs) for prompt in prompts]
    encoded = [prompt.ids for prompt in rendered]
    with suspended(model) as active:
        places = [(number, choice) for number, several in enumerate(each) for choice in several]
        texts = [choice_ids(tokenizer, choice) for _, choice in places]
        warn_of_merged(tokenizer, {(rendered[i], one, ids): 0 for (i, one), ids in zip(places, texts, strict=True)})

        def measured(positions: str, operation: str, site: str) -> Mapping[Layer, float]:
            read = [(encoded[number], ids) for (number, _), ids in zip(places, texts, strict=True)]
            return shared_median_norms(model, read, positions, operation, site) if norms is None else norms

        steered = with_coefficients(steerings_per_row(steering, active, len(prompts)), measured)
        rows = [Row(encoded[number], steered[number]) for number, _ in places]
        check_fits(model, [(*row.prompt, *ids) for row, ids in zip(rows, texts, strict=True)])
        found = {i: value for batch in log_probs_of(model, rows, texts, batch_rows) for i, value in batch}
    log_probs = [found[i].log_prob for i in range(len(rows))]
    if overflowed := sorted({number for (number, _), x in zip(places, log_probs, strict=True) if not np.isfinite(x)}):
        raise ValueError(
            f"expected finite logits; got NaN or infinity for the prompts {overflowed[:8]}. Lower the coefficient, or "
            "load the model in bfloat16 or float32."
        )
    frame = pd.DataFrame(places, columns=["prompt", "choice"])
    frame = frame.assign(log_prob=log_probs, n_tokens=[len(ids) for ids in texts])
    return frame.assign(probability=frame.groupby("prompt")["log_prob"].transform(probabilities))


def choices_per_prompt(choices: Any, count: int) -> list[list[str]]:
    """The choices of each of `count` prompts: the same for all, or those that are given for each.

    Raises:
        TypeError, ValueError: see `score_choices`.
    """
    given = list(choices) if isinstance(choices, Iterable) and not isinstance(choices, str | Mapping) else []
    if not given:
        raise ValueError(
            f"expected a list of texts that continue the prompts; got {choices!r:.80}. Pass e.g. [' Yes', ' No']."
        )
    if all(isinstance(one, str) for one in given):
        return [checked_choices(given)] * count
    if len(given) != count:
        raise ValueError(f"expected one list of choices per prompt, {count}; got {len(given)}. Pair them.")
    return [checked_choices(one) for one in given]


def checked_choices(choices: Any) -> list[str]:
    """The choices of one prompt as a list.

    Raises:
        TypeError: one that is no string.
        ValueError: none, an empty one, or one given twice.
    """
    several = list(choices) if isinstance(choices, Iterable) and not isinstance(choices, str | Mapping) else []
    if stray := [one for one in several if not isinstance(one, str)]:
        raise TypeError(f"expected choices as texts; got {stray[0]!r:.80} ({type(stray[0]).__name__}). Pass texts.")
    if not several or "" in several or len(set(several)) < len(several):
        raise ValueError(
            f"expected a list of choices that differ, none of them empty; got {choices!r:.80}. Pass e.g. "
            "[' Yes', ' No']."
        )
    return several


def choice_ids(tokenizer: Any, choice: str) -> tuple[int, ...]:
    """The token ids of a choice, see `steerkit.text.tokens.encode`; `ValueError` for one that has none."""
    ids = encode(tokenizer, choice)
    if not ids:
        raise ValueError(f"expected choices with at least one token; {choice!r:.80} has none. Pass other texts.")
    return ids


def warn_of_merged(tokenizer: Any, asked: Iterable[tuple[Prompt, str, tuple[int, ...]]]) -> None:
    """Warn of choices whose tokens are others where prompt and choice are tokenised as one text.

    Prompt and choice are tokenised apart. A prompt that ends with a space before `"Yes"`, for example, is read with a
    token for this space, which the model has rarely seen there: put the space at the start of the choice.

    Args:
        asked: prompt, choice, and the choice's token ids.
    """
    merged = {
        (prompt.text[-20:], choice): None
        for prompt, choice, ids in asked
        if prompt.source != "ids"
        and tuple(tokenizer(prompt.text + choice, add_special_tokens=False)["input_ids"])
        != (*prompt.ids[prompt.n_added :], *ids)
    }
    if merged:
        (end, choice), *_ = merged
        warnings.warn(
            f"{len(merged)} choices have other tokens where they are tokenised together with their prompt, e.g. "
            f"{choice!r:.40} after {end!r}. They are scored as tokenised apart: end the prompt without a space, and "
            "begin the choices with it.",
            UserWarning,
            stacklevel=3,
        )


def probabilities(log_probs: Any) -> Float[np.ndarray, " choice"]:
    """`exp(log_prob)` over their sum, for the choices of one prompt; NaN for all if one is NaN."""
    values = np.asarray(log_probs, float)
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def log_probs_of(
    model: nn.Module, rows: Sequence[Row], texts: Sequence[tuple[int, ...]], batch_rows: int | None = None
) -> Iterator[list[tuple[int, Scored]]]:
    """`log P(text | prompt)` under each row's steering; yields each batch's `(row number, score)` when it is done.

    Rows whose texts differ in their last token only are forwarded once, so choices of one token cost one forward of
    one token together. Texts of one length share a batch: nothing is padded on the right, and a row's number does not
    depend on the others. A row whose logits are not finite has NaN.

    Args:
        rows: prompts as ids, with their steerings.
        texts: one per row, as ids, at least one.
    """
    sharing: dict[tuple[Any, ...], list[int]] = {}
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        key = (row.prompt, tuple(prompt_edit(one) for one in row.steerings), text[:-1])
        sharing.setdefault(key, []).append(number)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    by_length = sorted(sharing.values(), key=lambda numbers: len(texts[numbers[0]]))
    for length, some in groupby(by_length, key=lambda numbers: len(texts[numbers[0]])):
        groups = list(some)
        size = batch_rows or max(1, min(MAX_ROWS, LOGIT_BYTES // (4 * vocabulary * length)))
        work = partial(_score, groups, texts)
        for done in in_batches(model, [rows[numbers[0]] for numbers in groups], length - 1, work, size):
            yield [pair for _, pairs in done for pair in pairs]


def _score(
    groups: Sequence[Sequence[int]], texts: Sequence[tuple[int, ...]], engine: Engine, batch: Sequence[int]
) -> list[list[tuple[int, Scored]]]:
    """For each row of a batch the `(number, score)` of the texts that share it, see `log_probs_of`."""
    device = engine.device
    stems = torch.tensor([texts[groups[i][0]][:-1] for i in batch], dtype=torch.long, device=device)
    tokens, start = torch.cat([engine.last_tokens(), stems], dim=1), engine.width - 1
    parts, acted = [], []
    for chunk in tokens.split(tokens.shape[1] if engine.chunks else 1, dim=1):
        parts.append(engine.forward(chunk, start).float())
        acted.append(engine.compiled.steered())
        start += chunk.shape[1]
    logits = torch.cat(parts, dim=1)
    steered = None if None in acted else torch.tensor(acted).sum(0).tolist()
    members = [(place, number) for place, i in enumerate(batch) for number in groups[i]]
    at = torch.tensor([[place] for place, _ in members], device=device)
    ids = torch.tensor([texts[number] for _, number in members], device=device)
    columns = torch.arange(ids.shape[1], device=device)
    scores = (logits[at, columns, ids] - logits.logsumexp(-1)[at, columns]).cpu().double().sum(-1)
    found: list[list[tuple[int, Scored]]] = [[] for _ in batch]
    for (place, number), value in zip(members, torch.where(scores.isfinite(), scores, torch.nan).tolist(), strict=True):
        found[place].append((number, Scored(value, None if steered is None else steered[place])))
    return found
