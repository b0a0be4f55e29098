"""Projections: the component of each token's stream along a direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.capture.layers import plain_layer
from steerkit.capture.resid import capture_resid
from steerkit.models.kernels import running
from steerkit.models.model import device_of
from steerkit.text.prompt import PromptLike, encode_prompt
from steerkit.vectors.vector import SteeringVector


def projections(
    model: nn.Module, tokenizer: Any, vector: SteeringVector, texts: Sequence[PromptLike], layer: int
) -> pd.DataFrame:
    """Return the projection of each token's stream on a direction, `h . v / |v|` at one layer, in units of the stream.

    Args:
        texts: strings, chats or `Prompt`s.
        layer: the layer of the vector and of the stream.

    Returns:
        A table with columns `text` (index), `position`, `token_id`, `token`, `projection`, `cosine`
        (`projection / |h|`).

    Raises:
        ValueError: the vector does not hold the layer, or is zero there.

    Example:
        >>> projections(model, tokenizer, vector, ["The sea is calm."], layer=14)
    """
    layer = plain_layer(layer)
    unit = vector.at(layer).unit().layers[layer].double()
    rows = []
    for number, text in enumerate(texts):
        ids = encode_prompt(tokenizer, text)
        h = streams_of_text(model, ids, [layer])[layer]
        along = h @ unit
        cosine = along / h.norm(dim=-1)
        for position, (token, *values) in enumerate(zip(ids, along.tolist(), cosine.tolist(), strict=True)):
            rows.append((number, position, token, tokenizer.decode([token]), *values))
    return pd.DataFrame(rows, columns=["text", "position", "token_id", "token", "projection", "cosine"])


def streams_of_text(
    model: nn.Module, ids: Sequence[int], layers: Sequence[int]
) -> dict[int, Float[Tensor, "pos d_model"]]:
    """Return the stream of one text after each of these layers, `[pos, d_model]` in float64 on the CPU."""
    with torch.inference_mode(), running(model), capture_resid(model, layers) as streams:
        model(input_ids=torch.tensor([list(ids)], device=device_of(model)), use_cache=False)
    return {layer: streams[layer][0].cpu().double() for layer in layers}
