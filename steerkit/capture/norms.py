"""Mean norms of the residual stream per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.capture.batches import read_passages
from steerkit.capture.layers import Layer, Layers
from steerkit.capture.pooling import mean_pool
from steerkit.capture.resid import resolve_layers
from steerkit.models.blocks import find_blocks
from steerkit.models.context import check_fits
from steerkit.models.site_names import DEFAULT
from steerkit.text.prompt import PromptLike, encode_prompt
from steerkit.text.spans import Passage
from steerkit.text.tokens import Ids, continuation_ids


def stream_norms(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[PromptLike],
    texts: Sequence[str | Ids],
    layers: Layers = "all",
    *,
    site: str = DEFAULT,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[Layer, float]:
    """Return the mean L2 norm of the stream per layer, over the tokens of `texts` as continuations of `prompts`.

    The prompts are not counted. Position 0, an attention sink whose norm is about 100 times that of other positions,
    is therefore never counted.

    Args:
        prompts: strings, chats or `Prompt`s.
        texts: one continuation per prompt, as text or token ids.
        layers: `"all"`, one layer, or several.
        site: what is read of a block, see `collect`.
        chat_template_kwargs: arguments of the chat template, e.g. `{"enable_thinking": False}`.

    Returns:
        Layer -> mean norm.

    Raises:
        ValueError: no text has a token.

    Example:
        >>> stream_norms(model, tokenizer, ["How are you?"], [" I am well."], [14])
    """
    rows = [
        (encode_prompt(tokenizer, prompt, chat_template_kwargs), continuation_ids(tokenizer, text))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    passages = [
        Passage((*prompt, *ids), ((len(prompt), len(prompt) + len(ids)),), ("",), "") for prompt, ids in rows if ids
    ]
    if not passages:
        raise ValueError("expected at least one text with a token; got only empty texts. Generate longer ones.")
    check_fits(model, [passage.ids for passage in passages])
    blocks = find_blocks(model)
    wanted = resolve_layers(model, blocks, layers, site)
    total = torch.zeros(len(wanted), dtype=torch.float64)

    def pool(stream: Tensor, rows: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
        return mean_pool(stream.float().norm(dim=-1, keepdim=True), rows, starts, stops) * (stops - starts)[:, None]

    for _, pooled in read_passages(model, blocks, wanted, passages, pool, None, site):
        total += pooled.cpu().double().sum(0).squeeze(-1)
    tokens = sum(stop - start for passage in passages for start, stop in passage.spans)
    return dict(zip(wanted, (total / tokens).tolist(), strict=True))
