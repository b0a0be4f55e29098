"""Logit lens of a direction: the tokens whose logits it raises and lowers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.capture.resid import capture_resid
from steerkit.models.blocks import find_blocks
from steerkit.models.hooks import check_called, edit_streams
from steerkit.models.identity import check_origin, fingerprint
from steerkit.models.kernels import running
from steerkit.models.model import device_of
from steerkit.models.sites import width_of
from steerkit.text.prompt import PromptLike, encode_prompt, listed
from steerkit.vectors.vector import SteeringVector

RELATIVE_STEP = 0.1
"""Step of the finite difference, as a share of the norm of the stream."""


def tokens_of(
    model: nn.Module,
    tokenizer: Any,
    vector: SteeringVector,
    prompts: Sequence[PromptLike],
    k: int = 10,
    foreign: bool = False,
) -> pd.DataFrame:
    """Return the tokens whose logits a direction raises and lowers most if it is added right before the final norm.

    Formula: `(u(h + e d) - u(h - e d)) / (2 e)`, mean over prompts, minus its mean over the vocabulary (which changes
    no probability). d is the unit direction of one layer, h the stream after the last block at a prompt's last token,
    u the map from the stream to the logits (final norm and unembedding), and `e = 0.1 |h|`. The effect of later blocks
    on the direction is not included.

    Args:
        vector: each of its layers is evaluated. Its site is one whose values are added to the stream, so not `"z"`.
        prompts: strings, chats or `Prompt`s.
        k: number of tokens per side.
        foreign: allow a vector that was read from other weights, as for `Steering`.

    Returns:
        A table with columns `layer`, `side` (`raised` or `lowered`), `rank` from 1, `token_id`, `token`, `slope`
        (logits per unit of the stream).

    Raises:
        ValueError: no prompt, `k` below 1, or a vector of `"z"`, of another width or depth, or of another model.

    Example:
        >>> tokens_of(model, tokenizer, vector.at(14), ["How are you?"], k=5)

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    blocks = find_blocks(model)
    last = max(blocks.modules)
    if vector.site == "z":
        raise ValueError("expected a direction of the stream; got one of the head outputs, z. Read it at attn_out.")
    width = width_of(model, blocks, vector.site, vector.layers)
    if vector.d_model != width:
        raise ValueError(f"expected a vector of width {width}, the model's; got {vector.d_model}. Extract it from it.")
    check_origin("a vector", vector.meta, model, fingerprint(model), foreign)
    ids = [torch.tensor([encode_prompt(tokenizer, prompt)], device=device_of(model)) for prompt in listed(prompts)]
    if k < 1:
        raise ValueError(f"expected one token at least; got k={k}. Pass a larger k.")
    norms = []
    for row in ids:
        with torch.inference_mode(), running(model), capture_resid(model, last) as stream:
            model(input_ids=row, use_cache=False)
        norms.append(float(stream[last][0, -1].float().norm()))
    rows = []
    for layer in vector.layers:
        unit = vector.unit().layers[layer]
        slope = torch.zeros(())
        for row, norm in zip(ids, norms, strict=True):
            step = RELATIVE_STEP * norm
            plus, minus = (_pushed_logits(model, row, sign * step * unit) for sign in (1, -1))
            slope = slope + (plus - minus) / (2 * step * len(ids))
        slope = slope - slope.mean()
        for side, sign in (("raised", 1), ("lowered", -1)):
            best = (sign * slope).topk(min(k, len(slope)))
            for rank, token in enumerate(best.indices.tolist(), 1):
                rows.append((layer, side, rank, token, tokenizer.decode([token]), float(slope[token])))
    return pd.DataFrame(rows, columns=["layer", "side", "rank", "token_id", "token", "slope"])


def _pushed_logits(model: nn.Module, ids: Tensor, push: Float[Tensor, " d_model"]) -> Float[Tensor, " vocabulary"]:
    """Return the logits at the last token when `push` is added to the stream after the last block."""
    blocks = find_blocks(model)
    last = len(blocks) - 1
    with (
        torch.inference_mode(),
        running(model),
        edit_streams(
            {last: blocks.modules[last]}, lambda _, stream: stream + push.to(stream.device, stream.dtype)
        ) as ran,
    ):
        logits = model(input_ids=ids, use_cache=False).logits[0, -1].float().cpu()
    check_called(ran, {last})
    return logits
