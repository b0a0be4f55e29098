"""Logit lens of texts: what the model would write next, if the stream after each block were the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from steerkit.capture.batches import forward_padded
from steerkit.capture.layers import Layers
from steerkit.capture.resid import resolve_layers
from steerkit.generation.projections import steered, warn_of_overflow
from steerkit.models.active import suspended
from steerkit.models.blocks import Blocks, find_blocks
from steerkit.models.context import check_fits, check_vocabulary
from steerkit.models.identity import fingerprint
from steerkit.models.model import device_of
from steerkit.models.site_names import DEFAULT, Place
from steerkit.models.unembed import unembed
from steerkit.steering.rows import RowSteering
from steerkit.steering.steering import Steering, steerings_per_row
from steerkit.text.prompt import PromptLike, encode_prompt, listed
from steerkit.text.tokens import encode

COLUMNS = ["text", "layer", "position", "token_id", "token", "target_id", "target", "rank", "log_prob", "prob"]
ROWS = 256
"""Streams whose logits are held at once."""
OVERFLOWED = 0
"""In place of a rank: the logits are not finite."""


class _Streams:
    """Keeps the stream after each of some layers in one forward, steered where the layer is steered."""

    def __init__(self, blocks: Blocks, layers: Sequence[int]) -> None:
        self.blocks, self.layers = blocks, layers
        self.places = [(DEFAULT, layer) for layer in layers]
        self.of: dict[int, Tensor] = {}

    def read(self, place: Place, before: Tensor, after: Tensor) -> None:
        self.of[place[1]] = self.blocks.kept(after)


def logit_lens(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[PromptLike],
    tokens: Sequence[str | int] | int = 5,
    *,
    layers: Layers = "all",
    positions: Literal["last", "all"] | int | Sequence[int] = "last",
    steering: Steering | Sequence[Steering | None] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Return the rank and probability of tokens as next token, read from the stream after each block.

    Formula: `log_prob = log_softmax(u(h_l))[token]`, h_l the stream `[d_model]` after block l at one position, u the
    model's own map from its last stream to logits: final norm, unembedding, scale and softcap. At the last layer these
    are the model's own probabilities of the next token. At earlier layers they are a reading, not what the model does:
    the basis of early layers differs from that of the last, so a low rank there does not show that the token is absent.

    Args:
        texts: strings, chats or `Prompt`s.
        tokens: what is looked up: strings that are one token after other text (`" Paris"`, with its space), or token
            ids. A number k: the k most probable tokens at each layer and position.
        layers: `"all"`, one layer, or several.
        positions: `"last"`, `"all"`, an index into the text (-1 is the last token), or several.
        steering: as for `sk.generate`; steerings that `with steering.on(model)` set are applied too. Pass one with a
            dose as `steering.resolved(norms)`.
        chat_template_kwargs: further arguments of the chat template.

    Returns:
        One row per text, layer, position and looked-up token: text (index), layer, position (from 0), token_id and
        token (what the text holds at that position), target_id and target (looked up), rank (1 is the most probable;
        equal logits have equal ranks), log_prob (natural logarithm) and prob. Where the logits are not finite, rank is
        missing (`<NA>`) and log_prob and prob are NaN.

    Raises:
        ValueError: no text, a text longer than the context; no token, a string that is several tokens or none, an id
            outside the vocabulary; an unknown layer, a position outside a text; a steering that does not fit the model;
            a model whose logits are not determined by its last stream.

    Warns:
        UserWarning: a stream whose logits are not finite.

    Example:
        >>> table = sk.logit_lens(model, tokenizer, ["The capital of France is"], [" Paris", " Rome"])
        >>> table.pivot(index="layer", columns="target", values="rank")

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    texts = listed(texts, "texts")
    rows = [encode_prompt(tokenizer, text, chat_template_kwargs) for text in texts]
    check_fits(model, rows)
    places = [_places(positions, number, len(ids)) for number, ids in enumerate(rows)]
    wanted = _targets(model, tokenizer, tokens)
    blocks, weights = find_blocks(model), fingerprint(model)
    reader = _Streams(blocks, [blocks.check(layer) for layer in resolve_layers(model, blocks, layers)])
    frames: dict[int, pd.DataFrame] = {}
    with suspended(model) as active:
        each = steerings_per_row(steering, active, len(rows))
        for one in {id(one): one for row in each for one in row}.values():
            one.check(model, blocks, weights)

        device = device_of(model)

        def forward(batch: Sequence[int], inputs: Mapping[str, Any]) -> None:
            compiled = RowSteering([each[i] for i in batch], [(0, len(rows[i])) for i in batch])
            with steered(model, blocks, compiled, reader, read_only=True):
                model(**inputs)

        for batch in forward_padded(model, blocks, rows, forward):
            for row, number in enumerate(batch):
                streams = torch.cat([reader.of[layer][row, places[number]].to(device) for layer in reader.layers])
                keys = [(layer, place) for layer in reader.layers for place in places[number]]
                frames[number] = _frame(number, rows[number], keys, _looked_up(model, streams, wanted))
    table = pd.concat([frames[number] for number in range(len(rows))], ignore_index=True)
    for column in ("token", "target"):
        text_of = {one: tokenizer.decode([one]) for one in table[f"{column}_id"].unique().tolist()}
        table[column] = table[f"{column}_id"].map(text_of)
    overflowed = table["rank"] == OVERFLOWED
    if overflowed.any():
        table["rank"] = table["rank"].astype("Int64").mask(overflowed)
        warn_of_overflow(table[overflowed], "ranks")
    return table[COLUMNS]


def _places(positions: Any, number: int, length: int) -> list[int]:
    """The positions of one text, from 0."""
    if isinstance(positions, str) and positions in ("last", "all"):
        return [length - 1] if positions == "last" else list(range(length))
    several = [positions] if isinstance(positions, Integral) else positions
    plain = isinstance(several, Sequence | np.ndarray) and not isinstance(several, str)
    if not plain or not len(several) or not all(isinstance(p, Integral) and not isinstance(p, bool) for p in several):
        raise ValueError(f"expected positions 'last', 'all', an index or several; got {positions!r:.80}. Pass one.")
    places = [int(place) for place in several]
    if outside := [place for place in places if not -length <= place < length]:
        raise ValueError(
            f"expected positions inside every text; text {number} has {length} tokens; got {outside[0]}. Pass an index "
            "nearer to 0 or -1."
        )
    return [place % length for place in places]


def _targets(model: nn.Module, tokenizer: Any, tokens: Any) -> list[int] | int:
    """The ids to look up, or how many of the most probable."""
    if isinstance(tokens, Integral) and not isinstance(tokens, bool):
        count = int(tokens)
        if count < 1:
            raise ValueError(f"expected 1 or more of the most probable tokens; got {count}. Pass a larger number.")
        return count
    if isinstance(tokens, str | bool) or not isinstance(tokens, Sequence | np.ndarray) or not len(tokens):
        raise ValueError(f"expected a list of tokens, or a number; got {tokens!r:.80}. Put them in a list.")
    ids = []
    for token in tokens:
        if isinstance(token, Integral) and not isinstance(token, bool):
            if int(token) < 0:
                raise ValueError(f"expected token ids from 0; got {token}. Pass an id, or the text of one token.")
            ids.append(int(token))
            continue
        found = encode(tokenizer, token) if isinstance(token, str) else ()
        if len(found) != 1:
            pieces = [tokenizer.decode([one]) for one in found]
            raise ValueError(
                f"expected one token each; {token!r:.80} is {len(found)}: {pieces!r:.200}. Pass its first token, or "
                "mind the space before a word."
            )
        ids.append(found[0])
    check_vocabulary(model, [ids])
    return ids


def _looked_up(model: nn.Module, streams: Tensor, wanted: list[int] | int) -> list[tuple[int, int, float]]:
    """For each stream and looked-up token, in order: id, rank and log-probability."""
    found = []
    for some in streams.split(ROWS):
        logits = unembed(model, some)
        if isinstance(wanted, int):
            ids = logits.topk(min(wanted, logits.shape[1])).indices
        else:
            ids = torch.tensor(wanted, device=logits.device).expand(len(logits), -1)
        own = logits.gather(1, ids)
        finite = logits.amax(1, keepdim=True).isfinite()  # -inf is the logit of a token that the model never writes
        ranks = torch.stack([(logits > one[:, None]).sum(1) + 1 for one in own.T], 1).where(finite, OVERFLOWED)
        log_probs = (own - logits.logsumexp(1, keepdim=True)).where(finite, torch.nan)
        parts = (ids.flatten().tolist(), ranks.flatten().tolist(), log_probs.flatten().tolist())
        found += list(zip(*parts, strict=True))
    return found


def _frame(
    number: int, ids: Sequence[int], keys: Sequence[tuple[int, int]], found: Sequence[tuple[int, int, float]]
) -> pd.DataFrame:
    per_key = len(found) // len(keys)
    rows = [
        (number, layer, place, ids[place], *found[key * per_key + i])
        for key, (layer, place) in enumerate(keys)
        for i in range(per_key)
    ]
    table = pd.DataFrame(rows, columns=["text", "layer", "position", "token_id", "target_id", "rank", "log_prob"])
    table["prob"] = np.exp(table["log_prob"])
    return table
