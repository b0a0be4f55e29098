"""Relative dose: the norm of a push over the norm of the residual stream where it is added."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.capture.activations import Layer
from steerkit.capture.batches import read_passages
from steerkit.capture.resid import resolve_layers
from steerkit.models.blocks import find_blocks
from steerkit.models.site_names import DEFAULT
from steerkit.steering.positions import steered_columns
from steerkit.steering.steering import ADDING, Steering
from steerkit.text.spans import Passage

Texts = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Token ids of prompts, each with those of its continuation."""


def relative_dose(steering: Steering, norms: Mapping[Layer, float]) -> float:
    """`|coefficient| * |v_l| / norm_l`, averaged over the steered layers.

    Args:
        steering: its coefficient is one number.
        norms: norm of the stream per layer, e.g. from `median_norms`.

    Returns:
        NaN for operations that do not add the vector, whose effect has no fixed norm, and where `norms` lacks a
        steered layer.
    """
    if steering.operation not in ADDING or not all(layer in norms for layer in steering.vector.layers):
        return float("nan")
    return abs(float(steering.coefficient)) * steering.dose_of_one(norms)


def with_coefficients(
    rows: Sequence[Sequence[Steering]], norms_at: Callable[[str, str, str], Mapping[Layer, float]]
) -> list[tuple[Steering, ...]]:
    """The steerings of each row with the coefficients that their doses mean.

    Args:
        norms_at: `(positions, operation, site)` -> norms of the stream; called once for each with a dose.
    """
    needed = {_where(one) for row in rows for one in row if one.dose is not None}
    norms = {place: norms_at(*place) for place in sorted(needed)}
    return [tuple(one.resolved(norms.get(_where(one), {})) for one in row) for row in rows]


def _where(steering: Steering) -> tuple[str, str, str]:
    return steering.positions, str(steering.operation), str(steering.site)


def median_norms(
    model: nn.Module,
    texts: Texts,
    layers: Sequence[int] | None = None,
    positions: str = "from_last_prompt_token",
    operation: str = "add",
    site: str = DEFAULT,
) -> dict[Layer, float]:
    """The median L2 norm of the unsteered stream per layer, over the steered positions of texts.

    `norm_l = median over texts and steered positions t >= 1 of |h_l(t)|`. Position 0, an attention sink whose norm is
    about 100 times that of other positions, is left out.

    Args:
        texts: `(prompt, continuation)` as token ids.
        layers: block indices; None: all that have the site.
        positions: those of the steering.
        operation: that of the steering.
        site: that of the steering.

    Returns:
        Layer -> norm; empty where no position is steered.

    Example:
        >>> written = sk.generate(model, tokenizer, [prompt], max_new_tokens=40, return_details=True)[0]
        >>> norms = median_norms(model, [(prompt.ids, written.ids)], positions="generated")
        >>> with sk.Steering(vector, dose=0.4, layer=14).on(model, norms=norms):
        ...     ...
    """
    blocks = find_blocks(model)
    wanted = resolve_layers(model, blocks, "all" if layers is None else layers, site, warn=layers is not None)
    passages = []
    for prompt, ids in texts:
        low, high = steered_columns(positions, 0, len(prompt), operation)
        spans = tuple((at, at + 1) for at in range(max(low, 1), min(high, len(prompt) + len(ids))))
        if spans:
            passages.append(Passage((*prompt, *ids), spans, ("",) * len(spans), ""))
    if not passages:
        return {}
    found = [pooled[..., 0].cpu() for _, pooled in read_passages(model, blocks, wanted, passages, _norm, None, site)]
    medians = np.median(torch.cat(found).double().numpy(), axis=0)
    return dict(zip(wanted, medians.tolist(), strict=True))


def _norm(stream: Tensor, rows: Tensor, starts: Tensor, stops: Tensor) -> Float[Tensor, "span 1"]:
    return stream[rows, starts].float().norm(dim=-1, keepdim=True)
