"""Choices: log-probabilities of given continuations, for many differently steered rows over one shared prefill."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from steerkit.generation.batches import SCORED_ROWS, SCORED_TOKENS, held_logits, in_batches
from steerkit.generation.engine import Engine, Row, prompt_edit
from steerkit.text.prompt import Prompt
from steerkit.text.tokens import encode


class Scored(NamedTuple):
    """The log-probability of a text, and at how many of the positions that decide its tokens the steering acted.

    `steered` is None where no row of the batch has a condition.
    """

    log_prob: float
    steered: int | None = None


def choices_per_prompt(choices: Any, count: int) -> list[list[str]]:
    """The choices of each of `count` prompts: the same for all, or those that are given for each.

    Raises:
        TypeError, ValueError: see `steerkit.sweeps.choices.score_choices`.
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
    by_length = sorted(sharing.values(), key=lambda numbers: len(texts[numbers[0]]))
    for length, some in groupby(by_length, key=lambda numbers: len(texts[numbers[0]])):
        groups = list(some)
        held = batch_rows * length if batch_rows else held_logits(model)
        size = batch_rows or max(SCORED_ROWS, SCORED_TOKENS // length)
        work, first = partial(_score, groups, texts), [rows[numbers[0]] for numbers in groups]
        for done in in_batches(model, first, length - 1, work, size, held):
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
