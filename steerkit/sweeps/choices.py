"""Probabilities of given continuations in one call, by a model in this process or by an engine that serves one."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from steerkit.capture.activations import Layer
from steerkit.generation.choices import choice_ids, choices_per_prompt, probabilities, warn_of_merged
from steerkit.generation.engine import Row
from steerkit.generation.generator import Settings
from steerkit.models.active import suspended
from steerkit.models.context import check_fits
from steerkit.steering.dose import with_coefficients
from steerkit.steering.steering import Steering, steerings_per_row
from steerkit.sweeps.sweep import generator_of
from steerkit.text.prompt import PromptLike, listed, render


def score_choices(
    model: nn.Module | None,
    tokenizer: Any,
    prompts: Sequence[PromptLike],
    choices: Sequence[str] | Sequence[Sequence[str]],
    *,
    steering: Steering | Sequence[Steering | None] | None = None,
    norms: Mapping[Layer, float] | None = None,
    batch_rows: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    engine: Any = None,
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
            of these prompts and choices, see `steerkit.steering.dose.median_norms`. The coefficient of a dose then
            depends on all prompts and choices of the call; pass norms for one that does not.
        batch_rows: rows forwarded at once; default by the size of the vocabulary.
        chat_template_kwargs: further arguments of the chat template.
        engine: what computes instead of the model in this process, as for `sk.sweep`; the model may then be None.

    Returns:
        One row per prompt and choice, with the columns prompt (index), choice, log_prob, n_tokens and probability.

    Warns:
        UserWarning: choices whose tokens are others where they are tokenised together with their prompt.

    Raises:
        TypeError: a choice that is no string, or neither a model nor an engine.
        ValueError: no prompts or choices, an empty choice or one given twice, another number of lists than prompts, a
            prompt and choice too long for the context, a steering that does not fit, or logits that are not finite.

    Example:
        >>> steering = sk.Steering(vector, 1.5, layer=14)
        >>> sk.score_choices(model, tokenizer, ["Is the sea calm?"], [" Yes", " No"], steering=steering)

    Source: the log-likelihoods of lm-evaluation-harness (`HFLM.loglikelihood`); Rimsky et al. 2024, arXiv 2312.06681,
    section 4.1 (probabilities of answer letters under steering).
    """
    generator = generator_of(model, engine)
    prompts = listed(prompts)
    each = choices_per_prompt(choices, len(prompts))
    rendered = [render(tokenizer, prompt, chat_template_kwargs) for prompt in prompts]
    places = [(number, choice) for number, several in enumerate(each) for choice in several]
    texts = [choice_ids(tokenizer, choice) for _, choice in places]
    warn_of_merged(tokenizer, {(rendered[i], one, ids): 0 for (i, one), ids in zip(places, texts, strict=True)})
    read = [(rendered[number].ids, ids) for (number, _), ids in zip(places, texts, strict=True)]
    settings = Settings(max(map(len, texts)), batch_rows=batch_rows)
    if engine is None:
        check_fits(model, [(*prompt, *ids) for prompt, ids in read])
    else:
        generator.check([*(Row(prompt) for prompt, _ in read), *(Row((max(ids),)) for ids in texts)], settings)

    def measured(positions: str, operation: str, site: str) -> Mapping[Layer, float]:
        return generator.norms(read, positions, operation, site) if norms is None else norms

    on = contextlib.nullcontext(list[Steering]()) if model is None else suspended(model)
    with on as active:
        steered = with_coefficients(steerings_per_row(steering, active, len(prompts)), measured)
        rows = [Row(rendered[number].ids, steered[number]) for number, _ in places]
        found = {i: value for batch in generator.score(tokenizer, rows, texts, settings) for i, value in batch}
    log_probs = [found[i].log_prob for i in range(len(rows))]
    if overflowed := sorted({number for (number, _), x in zip(places, log_probs, strict=True) if not np.isfinite(x)}):
        raise ValueError(
            f"expected finite logits; got NaN or infinity for the prompts {overflowed[:8]}. Lower the coefficient, or "
            "load the model in bfloat16 or float32."
        )
    frame = pd.DataFrame(places, columns=["prompt", "choice"])
    frame = frame.assign(log_prob=log_probs, n_tokens=[len(ids) for ids in texts])
    return frame.assign(probability=frame.groupby("prompt")["log_prob"].transform(probabilities))
