"""Capture: texts (and spans in them) to vectors of the residual stream."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit import artifacts, models, residual
from steerkit.activations import EMBED, ActivationMeans, Activations, Layer
from steerkit.blocks import Blocks, evaluating, find_blocks, unwrap
from steerkit.pairs import ContrastPair
from steerkit.texts import Passage, Prompt, SpannedText, check_fits, encode, encode_prompt, pad, passage_of

Text = str | SpannedText | ContrastPair
Layers = str | int | Sequence[Layer]
Position = str | int
BATCH_TOKENS = {"cpu": 512, "cuda": 16384}
WINDOW = 1000


@contextlib.contextmanager
def capture_resid(
    model: nn.Module, layers: Layers = "all"
) -> Iterator[dict[Layer, Float[Tensor, "batch pos d_model"]]]:
    """Read the residual stream of the one forward that runs inside the `with`.

    Yields a dictionary, filled by that forward: layer -> stream after that block (`resid_post`), before the final norm
    also at the last layer; `"embed"` -> what enters block 0. The tensors are the model's own, not copies.

    Raises:
        ValueError: a layer that the model does not have.
        RuntimeError: a second forward inside the same `with`.
    """
    blocks = find_blocks(model)
    wanted = resolve_layers(blocks, layers)
    streams: dict[Layer, Tensor] = {}

    def see(layer: int, entered: Tensor | None, left: Tensor | None) -> None:
        for key, stream in ((EMBED, entered if layer == 0 else None), (layer, left)):
            if key in wanted and stream is not None:
                if key in streams:
                    raise RuntimeError(
                        "expected one forward inside capture_resid; got a second. Use `collect` for many texts."
                    )
                streams[key] = stream

    with residual.reading(_hooked(blocks, wanted), see):
        yield streams


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
    pools = [_pool(position, passages) for position in positions]
    resid = torch.empty(len(pools), len(items), len(wanted), blocks.d_model)

    def pool(stream: Tensor, rows: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
        return torch.cat([one(stream, rows, starts, stops).float() for one in pools], dim=-1)

    for where, pooled in _read(model, blocks, wanted, passages, pool, batch_tokens):
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
        for where, pooled in _read(model, blocks, wanted, passages, pool, batch_tokens):
            for span, streams in zip(where.tolist(), pooled.cpu().double(), strict=True):
                total[names[span]] += streams
    labels = tuple(sorted(total))
    mean = torch.stack([total[label] / found[label] for label in labels])
    if not torch.isfinite(mean).all():
        raise ValueError("expected finite activations; got NaN or infinity. Load the model in float32 or bfloat16.")
    count = sum(2 if isinstance(text, ContrastPair) else 1 for text in texts)
    meta = _meta(model, tokenizer, texts, wanted, position, count)
    return ActivationMeans(mean, tuple(found[label] for label in labels), labels, wanted, meta)


def stream_norms(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], texts: Sequence[str], layers: Layers = "all"
) -> dict[Layer, float]:
    """The mean L2 norm of the stream per layer, over the tokens of `texts` as continuations of `prompts`.

    Position 0 of a row, an attention sink whose norm is a hundred times the others', never counts.

    Raises:
        ValueError: no text has a token.
    """
    rows = [(encode_prompt(tokenizer, p), encode(tokenizer, t)) for p, t in zip(prompts, texts, strict=True)]
    passages = [Passage((*p, *t), ((len(p), len(p) + len(t)),), ("",), "") for p, t in rows if t]
    if not passages:
        raise ValueError("expected at least one text with a token; all are empty. Generate longer ones.")
    check_fits(model, [passage.ids for passage in passages])
    blocks = find_blocks(model)
    wanted = resolve_layers(blocks, layers)
    total = torch.zeros(len(wanted), dtype=torch.float64)

    def pool(stream: Tensor, rows: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
        return _mean(stream.float().norm(dim=-1, keepdim=True), rows, starts, stops) * (stops - starts)[:, None]

    for _, pooled in _read(model, blocks, wanted, passages, pool, None):
        total += pooled.double().cpu().sum(0).squeeze(-1)
    tokens = sum(stop - start for passage in passages for start, stop in passage.spans)
    return dict(zip(wanted, (total / tokens).tolist(), strict=True))


def resolve_layers(blocks: Blocks, layers: Layers) -> tuple[Layer, ...]:
    """`"all"`, one layer or several as a tuple of block indices (and `"embed"`), each checked, none twice."""
    if isinstance(layers, str) and layers == "all":
        return tuple(blocks.modules)
    several = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    found = tuple(EMBED if isinstance(layer, str) and layer == EMBED else blocks.check(layer) for layer in several)
    if not found or len(set(found)) != len(found):
        raise ValueError(f"expected one layer at least, and each once; got {several}. Say 'all', or list them.")
    return found


def token_batches(lengths: Sequence[int], batch_tokens: int, max_rows: int | None = None) -> list[list[int]]:
    """Row indices in batches of similar length, longest first, each of at most `batch_tokens` padded tokens."""
    batches: list[list[int]] = []
    width = 0
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = batches and ((len(batches[-1]) + 1) * width > batch_tokens or len(batches[-1]) == max_rows)
        if not batches or full:
            batches.append([])
            width = lengths[row]
        batches[-1].append(row)
    return batches


Pool = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _pool(position: Position, passages: Sequence[Passage]) -> Pool:
    if position == "mean":
        return _mean
    index = {"last": -1, "first": 0}.get(position, position) if isinstance(position, str) else position
    if isinstance(index, bool) or not isinstance(index, int):
        raise ValueError(f"expected position 'last', 'first', 'mean' or an integer; got {position!r}. Choose one.")
    shortest = min(stop - start for passage in passages for start, stop in passage.spans)
    if not -shortest <= index < shortest:
        raise ValueError(
            f"expected a position inside every span; {index} is outside the shortest, of {shortest} tokens. Take "
            "one nearer to its end, or leave that text out."
        )

    def at(stream: Tensor, rows: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
        return stream[rows, (starts if index >= 0 else stops) + index]

    return at


def _mean(stream: Float[Tensor, "batch pos d"], rows: Tensor, starts: Tensor, stops: Tensor) -> Float[Tensor, "span d"]:
    columns = torch.arange(stream.shape[1], device=stream.device)
    inside = (columns >= starts[:, None]) & (columns < stops[:, None])
    weights = inside.to(torch.float32) / (stops - starts)[:, None]
    if len(rows) == len(stream):  # one span per row, in order: no copy of the stream
        return torch.bmm(weights[:, None], stream.float()).squeeze(1)
    return torch.stack(
        [w[a:b] @ stream[r, a:b].float() for r, a, b, w in zip(rows, starts, stops, weights, strict=True)]
    )


def _read(
    model: nn.Module,
    blocks: Blocks,
    layers: Sequence[Layer],
    passages: Sequence[Passage],
    pool: Pool,
    batch_tokens: int | None,
) -> Iterator[tuple[Tensor, Float[Tensor, "span layer d"]]]:
    """Yield `(span indices, pooled streams)` batch by batch; spans are numbered through all passages in order."""
    base = unwrap(model)
    device = next(base.parameters()).device
    first = torch.tensor([0, *(len(p.spans) for p in passages)]).cumsum(0)
    hooked = _hooked(blocks, layers)
    deepest = max(hooked)
    size = batch_tokens or BATCH_TOKENS.get(device.type, 512)
    queue = token_batches([len(p.ids) for p in passages], size)[::-1]
    with evaluating(base), torch.inference_mode():
        while queue:
            batch = queue.pop()
            ids, mask, positions = pad([passages[i].ids for i in batch], "right", device)
            spans = [(row, *span) for row, i in enumerate(batch) for span in passages[i].spans]
            where = torch.cat([torch.arange(int(first[i]), int(first[i + 1])) for i in batch])
            read: dict[Layer, Tensor] = {}
            see = _pooling(read, layers, deepest, pool, torch.tensor(spans, device=device).T)
            inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            if blocks.positions:
                inputs["position_ids"] = positions
            try:
                with residual.reading(hooked, see), contextlib.suppress(residual.Leave):
                    model(**inputs)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                half = len(batch) // 2
                queue += [batch[half:], batch[:half]]
                continue
            yield where, torch.stack([read[layer].to(device) for layer in layers], dim=1)


def _pooling(
    read: dict[Layer, Tensor], layers: Sequence[Layer], deepest: int, pool: Pool, spans: Tensor
) -> Callable[[int, Tensor | None, Tensor | None], None]:
    """A reader that fills `read` with the pooled streams of `layers`, and leaves the forward after the deepest."""

    def see(layer: int, entered: Tensor | None, left: Tensor | None) -> None:
        for key, stream in ((EMBED, entered if layer == 0 else None), (layer, left)):
            if key in layers and stream is not None:
                rows, starts, stops = spans.to(stream.device)
                read[key] = pool(stream, rows, starts, stops)
        if layer == deepest:
            raise residual.Leave

    return see


def _hooked(blocks: Blocks, layers: Sequence[Layer]) -> dict[int, nn.Module]:
    return {layer: blocks.modules[layer] for layer in sorted({0 if k == EMBED else int(k) for k in layers})}


def _windows(
    model: nn.Module, tokenizer: Any, texts: Sequence[Text], position: Position
) -> Iterator[tuple[list[Passage], Pool]]:
    """The texts tokenised, some at a time, so that memory stays; all of them are checked before the first is read."""
    windows = range(0, max(1, len(texts)), WINDOW)
    if len(windows) > 1:
        for start in windows:
            _pool(position, _passages(model, tokenizer, texts[start : start + WINDOW], start))
    for start in windows:
        passages = _passages(model, tokenizer, texts[start : start + WINDOW], start)
        yield passages, _pool(position, passages)


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
    data = artifacts.sha256("\n".join(map(repr, texts)))
    return {
        **models.describe(model, tokenizer),
        "read_position": position,
        "read_layers": list(layers),
        "n_texts": n,
        "data_sha256": data,
    }
