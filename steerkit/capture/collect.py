"""Collect: texts (and spans in them) to vectors of the residual stream."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from steerkit.capture.activations import ActivationMeans, Activations
from steerkit.capture.batches import read_passages
from steerkit.capture.layers import EMBED, Layer, Layers
from steerkit.capture.pooling import Position, pool_at, token_index, with_letter_found
from steerkit.capture.resid import block_numbers, resolve_layers
from steerkit.capture.texts import LabelledText, Texts, labelled_texts, texts_sha256, tokenise
from steerkit.models.blocks import find_blocks
from steerkit.models.identity import describe
from steerkit.models.site_names import DEFAULT
from steerkit.models.sites import width_of
from steerkit.text.pairs import ContrastPair
from steerkit.text.spans import Passage

WINDOW = 1000
"""Texts that `collect_means` tokenises at a time."""


def collect(
    model: nn.Module,
    tokenizer: Any,
    texts: Texts,
    *,
    layers: Layers = "all",
    site: str = DEFAULT,
    position: Position = "last",
    labels: Iterable[object] | None = None,
    groups: Iterable[object] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    batch_tokens: int | None = None,
) -> Activations:
    """Read one vector per text (or span) and layer.

    Texts are tokenised once, sorted by length and right-padded in batches. Each forward stops after the deepest layer
    that is read, so the vocabulary logits are never computed.

    Args:
        texts: a list of texts, or a mapping from label to such a list, `{"harmful": [...], "harmless": [...]}`. A text
            is one of:
            a string, used verbatim (one item);
            a chat, a list of `{"role", "content"}` messages rendered by the chat template (one item);
            a `SpannedText` (one item per span, one forward per text);
            a `ContrastPair` (two items, `positive` then `negative`, over the tokens of those continuations only).
        layers: `"all"` blocks, one layer, or several (list, range, numpy array, torch tensor), which may include
            `"embed"`.
        site: what is read of a block: `"resid_post"`, the stream after it; `"resid_pre"`, the stream before it;
            `"attn_out"` and `"mlp_out"`, what attention and MLP add to the stream; `"resid_mid"`, the stream between
            the two; `"z"`, the outputs of the attention heads side by side, `[n_heads * head width]`, before the output
            projection. `"all"` layers are those at which the site was verified; a warning names the others. Not all
            models have every site, see docs/architectures.md.
        position: the tokens of a span that are read: `"last"`, `"first"`, `"mean"`, `"letter"` (the first token with a
            letter or digit: `A` of the answer ` (A)`), or an integer index into the span (-1 is the last). The tokens
            that were read are shown by `print(activations)` and in `items["token"]`.
        labels: one per text, stored as text; for strings and chats.
        groups: one group id per text, stored as text; for strings and chats. Default: each text is its own group,
            named by its index.
        chat_template_kwargs: arguments of the chat template, e.g. `{"add_generation_prompt": False}`.
        batch_tokens: padded tokens per batch; default 512 on a CPU and 16,384 on a GPU. Halved when memory runs out.

    Returns:
        `Activations` with `resid` of shape `[item, layer, d_model]`.

    Raises:
        TypeError: a text of another type.
        ValueError: no texts, an empty one, one longer than the model's context; an unknown layer or position; a site
            that the model does not have; another number of labels or groups than of texts; labels given twice.

    Warns:
        UserWarning: items that are read at position 0, an attention sink, such as the only token of a text, or a mean
            that includes it; `"all"` layers of a site that was not verified at some.

    Example:
        >>> acts = sk.collect(model, tokenizer, {"harmful": harmful, "harmless": harmless}, layers=14)
        >>> vector = sk.difference_in_means(acts, "harmful", "harmless")
    """
    items = labelled_texts(texts, labels, groups)
    read = _collect(model, tokenizer, items, [position], layers, site, chat_template_kwargs, batch_tokens)
    return read[position]


def collect_each(
    model: nn.Module,
    tokenizer: Any,
    texts: Texts,
    *,
    positions: Sequence[Position],
    layers: Layers = "all",
    site: str = DEFAULT,
    labels: Iterable[object] | None = None,
    groups: Iterable[object] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    batch_tokens: int | None = None,
) -> dict[Position, Activations]:
    """Return `collect`'s activations at several read positions, from the same forwards.

    Args:
        positions: the read positions; the other arguments are those of `collect`.

    Returns:
        Position -> `Activations`.

    Raises:
        ValueError: no positions, or one given twice; and see `collect`.

    Example:
        >>> read = sk.collect_each(model, tokenizer, pairs, positions=["last", "mean"])
        >>> read["mean"].at(14)
    """
    items = labelled_texts(texts, labels, groups)
    return _collect(
        model, tokenizer, items, checked_positions(positions), layers, site, chat_template_kwargs, batch_tokens
    )


def collect_means(
    model: nn.Module,
    tokenizer: Any,
    texts: Texts,
    *,
    layers: Layers = "all",
    site: str = DEFAULT,
    position: Position = "last",
    labels: Iterable[object] | None = None,
    groups: Iterable[object] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    batch_tokens: int | None = None,
) -> ActivationMeans:
    """Return the means of `collect`'s activations per label, in float64, without keeping the activations.

    Memory beyond the model's is one batch and `labels x layers x d_model` sums, for any number of texts. The arguments
    are those of `collect`.

    Example:
        >>> means = sk.collect_means(model, tokenizer, pairs, layers=14)
        >>> vector = sk.difference_in_means(means)
    """
    items = labelled_texts(texts, labels, groups)
    blocks = find_blocks(model)
    wanted = resolve_layers(model, blocks, layers, site)
    width = width_of(model, blocks, site, block_numbers(wanted))
    total: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    at_zero = 0
    for passages, read in _windows(model, tokenizer, items, position, chat_template_kwargs):
        names = [label for passage in passages for label in passage.labels]
        pool = pool_at(read, passages)
        at_zero += _read_at_zero(passages, read)
        counts.update(names)
        for label in {*names} - {*total}:
            total[label] = torch.zeros(len(wanted), width, dtype=torch.float64)
        for numbers, pooled in read_passages(model, blocks, wanted, passages, pool, batch_tokens, site):
            for span, streams in zip(numbers.tolist(), pooled.cpu().double(), strict=True):
                total[names[span]] += streams
    _warn_of_sink(position, wanted, at_zero, counts.total(), stacklevel=3)
    sorted_labels = tuple(sorted(total))
    mean = torch.stack([total[label] / counts[label] for label in sorted_labels])
    if not torch.isfinite(mean).all():
        raise ValueError("expected finite activations; got NaN or infinity. Load the model in float32 or bfloat16.")
    meta = {**_meta(model, tokenizer, items, wanted, chat_template_kwargs), "read_position": position}
    return ActivationMeans(mean, tuple(counts[label] for label in sorted_labels), sorted_labels, wanted, meta, site)


def checked_positions(positions: Any) -> list[Any]:
    """Several read positions as a list; `ValueError` for none, no list, or one given twice."""
    several = isinstance(positions, Iterable) and not isinstance(positions, str)
    listed = list(positions) if several else []
    if not listed or len(set(map(repr, listed))) < len(listed):
        raise ValueError(f"expected a list of read positions that differ; got {positions!r:.80}. Pass e.g. [-2, -1].")
    return listed


def _collect(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[LabelledText],
    positions: Sequence[Position],
    layers: Layers,
    site: str,
    chat_template_kwargs: Mapping[str, Any] | None,
    batch_tokens: int | None,
) -> dict[Position, Activations]:
    passages = tokenise(model, tokenizer, items, chat_template_kwargs)
    blocks = find_blocks(model)
    wanted = resolve_layers(model, blocks, layers, site)
    reads = [with_letter_found(tokenizer, passages, position) for position in positions]
    pools = [pool_at(read, passages) for read in reads]
    spans = sum(len(passage.spans) for passage in passages)
    for position, read in zip(positions, reads, strict=True):
        _warn_of_sink(position, wanted, _read_at_zero(passages, read), spans, stacklevel=4)
    resid = torch.empty(len(pools), spans, len(wanted), width_of(model, blocks, site, block_numbers(wanted)))

    def pool_all(stream: Tensor, rows: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
        return torch.cat([pool(stream, rows, starts, stops).float() for pool in pools], dim=-1)

    for numbers, pooled in read_passages(model, blocks, wanted, passages, pool_all, batch_tokens, site):
        resid[:, numbers] = pooled.cpu().unflatten(-1, (len(pools), -1)).permute(2, 0, 1, 3)
    meta = _meta(model, tokenizer, items, wanted, chat_template_kwargs)
    return {
        position: Activations(
            resid[i], wanted, _items(tokenizer, passages, reads[i]), {**meta, "read_position": position}, site
        )
        for i, position in enumerate(positions)
    }


def _windows(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[LabelledText],
    position: Position,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> Iterator[tuple[list[Passage], Position]]:
    """Yield the texts tokenised, `WINDOW` at a time to bound memory; all of them are checked before the first read."""
    letters: dict[int, str] = {}

    def window(start: int) -> tuple[list[Passage], Position]:
        passages = tokenise(model, tokenizer, items[start : start + WINDOW], chat_template_kwargs, first=start)
        return passages, with_letter_found(tokenizer, passages, position, letters)

    starts = range(0, len(items), WINDOW)
    if len(starts) > 1:
        for start in starts:
            passages, read = window(start)
            pool_at(read, passages)  # raises for an index outside a span
    yield from map(window, starts)


def _items(tokenizer: Any, passages: Sequence[Passage], position: Position) -> pd.DataFrame:
    index = token_index(position)
    decoded: dict[int, str] = {}
    rows = []
    for number, passage in enumerate(passages):
        for label, (start, stop) in zip(passage.labels, passage.spans, strict=True):
            token = None
            if index is not None:
                token_id = passage.ids[index + (start if index >= 0 else stop)]
                if token_id not in decoded:
                    decoded[token_id] = tokenizer.decode([token_id])
                token = decoded[token_id]
            rows.append((number, label, passage.group, start, stop - start, token))
    return pd.DataFrame(rows, columns=["text", "label", "group", "start", "n_tokens", "token"])


def _read_at_zero(passages: Sequence[Passage], position: Position) -> int:
    """Return the number of spans that are read at token 0 of their text."""
    index = token_index(position) or 0  # a mean includes the first token
    return sum((start if index >= 0 else stop) + index == 0 for passage in passages for start, stop in passage.spans)


def _warn_of_sink(position: Position, layers: Sequence[Layer], at_zero: int, spans: int, stacklevel: int) -> None:
    """Warn where position 0 of a block's output is read; at `"embed"` it is a token like any other."""
    if at_zero and set(layers) != {EMBED}:
        does, instead = ("includes", "position='last', or ") if position == "mean" else ("reads", "")
        warnings.warn(
            f"position={position!r} {does} position 0 in {at_zero} of {spans} spans. Position 0 is an attention sink: "
            "its norm exceeds that of other positions about 100 times, and it is nearly equal in unrelated texts "
            f"(cosine 0.999 in SmolLM2). Pass {instead}a SpannedText or ContrastPair that starts after position 0, as "
            "SpannedText(' joyful', ((0, 7),), prompt='The word is') does.",
            UserWarning,
            stacklevel=stacklevel,
        )


def _meta(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[LabelledText],
    layers: Sequence[Layer],
    chat_template_kwargs: Mapping[str, Any] | None,
) -> dict[str, Any]:
    return {
        **describe(model, tokenizer),
        "read_layers": list(layers),
        "n_texts": sum(2 if isinstance(one.text, ContrastPair) else 1 for one in items),
        "data_sha256": texts_sha256(items, chat_template_kwargs),
        **({"chat_template_kwargs": dict(chat_template_kwargs)} if chat_template_kwargs else {}),
    }
