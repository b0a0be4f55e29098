"""Capture: texts (and spans in them) to vectors of the residual stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from steerkit.capture.activations import ActivationMeans, Activations, Layer
from steerkit.capture.batches import read_passages
from steerkit.capture.pooling import Pool, Position, pool_at
from steerkit.capture.resid import Layers, resolve_layers
from steerkit.io.files import sha256
from steerkit.models.blocks import find_blocks
from steerkit.models.context import check_fits
from steerkit.models.identity import describe
from steerkit.text.pairs import ContrastPair
from steerkit.text.spans import Passage, SpannedText, passage_of

Text = str | SpannedText | ContrastPair
WINDOW = 1000


def collect(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    layers: Layers = "all",
    position: Position = "last",
    batch_tokens: int | None = None,
) -> Activations:
    """Read one vector per text (or span) and layer.

    Texts are tokenised once, sorted by length, right-padded in batches of at most `batch_tokens` tokens (512 on a CPU
    and 16 384 on a GPU unless given; halved when memory runs out), pooled inside the hook; each forward is left after
    the deepest layer that is read, so the vocabulary logits are never computed.

    Args:
        texts: strings (used verbatim), `SpannedText`s (one item per span, one forward per text), or `ContrastPair`s
            (two items each, `positive` then `negative`, over the tokens of those continuations only).
        layers: `"all"` blocks, one layer, or a list of layers, which may include `"embed"`.
        position: which tokens of a span: `"last"`, `"first"`, `"mean"`, or an integer index into the span (-1 = last).

    Raises:
        ValueError: no texts, an empty one, one longer than the model's context, an unknown layer or position.
    """
    each = collect_each(model, tokenizer, texts, layers=layers, positions=[position], batch_tokens=batch_tokens)
    return each[position]


def collect_each(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    positions: Sequence[Position],
    layers: Layers = "all",
    batch_tokens: int | None = None,
) -> dict[Position, Activations]:
    """`collect` for several read positions from the same forwards."""
    passages = _passages(model, tokenizer, texts)
    blocks = find_blocks(model)
    wanted = resolve_layers(blocks, layers)
    items = _items(passages)
    pools = [pool_at(position, passages) for position in positions]
    resid = torch.empty(len(pools), len(items), len(wanted), blocks.d_model)

    def pool(stream: Tensor, rows: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
        return torch.cat([one(stream, rows, starts, stops).float() for one in pools], dim=-1)

    for where, pooled in read_passages(model, blocks, wanted, passages, pool, batch_tokens):
        resid[:, where] = pooled.cpu().unflatten(-1, (len(pools), -1)).permute(2, 0, 1, 3)
    return {
        position: Activations(resid[i], wanted, items, _meta(model, tokenizer, texts, wanted, position, len(passages)))
        for i, position in enumerate(positions)
    }


def collect_means(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    layers: Layers = "all",
    position: Position = "last",
    batch_tokens: int | None = None,
) -> ActivationMeans:
    """The means of `collect`'s activations per label, in float64, without keeping the activations.

    Memory above the model's is one batch and `labels x layers x d_model` sums, however many texts there are.
    """
    blocks = find_blocks(model)
    wanted = resolve_layers(blocks, layers)
    total: dict[str, Tensor] = {}
    found: Counter[str] = Counter()
    for passages, pool in _windows(model, tokenizer, texts, position):
        names = [label for passage in passages for label in passage.labels]
        for label in {*names} - {*total}:
            total[label] = torch.zeros(len(wanted), blocks.d_model, dtype=torch.float64)
        found.update(names)
        for where, pooled in read_passages(model, blocks, wanted, passages, pool, batch_tokens):
            for span, streams in zip(where.tolist(), pooled.cpu().double(), strict=True):
                total[names[span]] += streams
    labels = tuple(sorted(total))
    mean = torch.stack([total[label] / found[label] for label in labels])
    if not torch.isfinite(mean).all():
        raise ValueError("expected finite activations; got NaN or infinity. Load the model in float32 or bfloat16.")
    count = sum(2 if isinstance(text, ContrastPair) else 1 for text in texts)
    meta = _meta(model, tokenizer, texts, wanted, position, count)
    return ActivationMeans(mean, tuple(found[label] for label in labels), labels, wanted, meta)


def _windows(
    model: nn.Module, tokenizer: Any, texts: Sequence[Text], position: Position
) -> Iterator[tuple[list[Passage], Pool]]:
    """The texts tokenised, some at a time, so that memory stays; all of them are checked before the first is read."""
    windows = range(0, max(1, len(texts)), WINDOW)
    if len(windows) > 1:
        for start in windows:
            pool_at(position, _passages(model, tokenizer, texts[start : start + WINDOW], start))
    for start in windows:
        passages = _passages(model, tokenizer, texts[start : start + WINDOW], start)
        yield passages, pool_at(position, passages)


def _passages(model: nn.Module, tokenizer: Any, texts: Sequence[Text], first: int = 0) -> list[Passage]:
    if isinstance(texts, str | Mapping) or not len(texts):
        raise ValueError(f"expected a non-empty list of texts; got {texts!r:.80}. Put them in a list.")
    passages: list[Passage] = []
    for number, text in enumerate(texts, first):
        if isinstance(text, ContrastPair):
            passages += text.passages(tokenizer, str(number))
        elif isinstance(text, str | SpannedText):
            passages.append(passage_of(tokenizer, text, str(number)))
        else:
            got = f"got {type(text).__name__}. Convert it."
            raise TypeError(f"expected a string, SpannedText or ContrastPair as text {number}; {got}")
    check_fits(model, [passage.ids for passage in passages])
    for passage in passages:
        if any(start >= stop for start, stop in passage.spans):
            raise ValueError(
                f"expected at least one token in every span; group {passage.group} has one without. Leave it out."
            )
    return passages


def _items(passages: Sequence[Passage]) -> pd.DataFrame:
    rows = [
        (number, label, passage.group, start, stop - start)
        for number, passage in enumerate(passages)
        for label, (start, stop) in zip(passage.labels, passage.spans, strict=True)
    ]
    return pd.DataFrame(rows, columns=["text", "label", "group", "start", "n_tokens"])


def _meta(
    model: nn.Module, tokenizer: Any, texts: Sequence[Text], layers: Sequence[Layer], position: Position, n: int
) -> Mapping[str, Any]:
    data = sha256("\n".join(map(repr, texts)))
    return {
        **describe(model, tokenizer),
        "read_position": position,
        "read_layers": list(layers),
        "n_texts": n,
        "data_sha256": data,
    }
