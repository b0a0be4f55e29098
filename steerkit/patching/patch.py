"""Activation patching: which activations make one run's answer differ from another's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from steerkit.capture.activations import ActivationMeans
from steerkit.capture.layers import EMBED, Layers
from steerkit.capture.resid import resolve_layers
from steerkit.generation.generate import check_numbers
from steerkit.io.files import sha256
from steerkit.io.progress import progress
from steerkit.models.active import suspended
from steerkit.models.blocks import find_blocks
from steerkit.models.context import check_fits, check_vocabulary
from steerkit.models.identity import describe, other_model
from steerkit.models.site_names import DEFAULT, Place, check_name
from steerkit.models.sites import find_sites, width_of
from steerkit.patching.metrics import Measure, Metric, check_metric
from steerkit.patching.result import PatchResult, over_pairs
from steerkit.patching.runs import Patch, Runs, attributed, values_of
from steerkit.text.prompt import Prompt, PromptLike, encode_prompt
from steerkit.text.tokens import decode, encode

Mode = Literal["denoising", "noising"]
Method = Literal["exact", "attribution"]
Span = int | tuple[int, int]
Positions = Literal["all"] | int | Sequence[int] | Mapping[str, Any]
Answers = tuple[str, str] | Sequence[tuple[str, str]]
SMALL_CONTRAST = 0.1


@dataclass(frozen=True)
class _Pair:
    """Two prompts of equal length as token ids, and the ids of the right and the wrong answer."""

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    answers: tuple[tuple[int, ...], tuple[int, ...]] | None


def patch(
    model: nn.Module,
    tokenizer: Any,
    clean: PromptLike | Sequence[PromptLike],
    corrupted: PromptLike | Sequence[PromptLike],
    answers: Answers | None = None,
    *,
    sites: str | Sequence[str] = DEFAULT,
    layers: Layers = "all",
    positions: Positions = "all",
    mode: Mode = "denoising",
    metric: Metric = "logprob_diff",
    source: ActivationMeans | None = None,
    method: Method = "exact",
    batch_rows: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PatchResult:
    """Put activations of one run into another, one place at a time, and measure how far the answer follows.

    With m the metric, `effect = (m_patched - m_base) / (m_other - m_base)`: 0 is the unpatched run, 1 the run that the
    activation was taken from. The table has its mean over pairs.

    Args:
        clean: the prompt with the right answer, or a list of prompts.
        corrupted: a prompt of equal length in tokens that lacks what the answer needs, or one per clean prompt.
        answers: texts that continue the prompts, `(right, wrong)`, the same for all pairs or one per pair. An answer of
            several tokens counts with the log-probability of all of them; its later tokens read the prompt in the
            layers before the patch, too, so that patching a whole stream does not give exactly 1.
        sites: one or several, see `sk.collect`. At `"z"` each head is patched by itself.
        layers: `"all"` where the site was verified, one layer, or several.
        positions: `"all"` tokens one by one (prompts of equal length); a token index or several, -1 the last; or a
            mapping from a name to an index, a span `(start, stop)` that is patched at once, or a list with one of these
            per pair.
        mode: `"denoising"`: activations of the clean run are put into the corrupted one; what restores the answer is
            sufficient. `"noising"`: those of the corrupted run into the clean one; what destroys it is necessary.
        metric: `"logprob_diff"`, log p(right) - log p(wrong); `"kl"`, the divergence of the last token's prediction
            from the clean run's, `KL(clean || run)`; or a function from the logits at the last token,
            `[batch, vocabulary]`, to `[batch]`.
        source: means that are put in instead of the other run's activations (mean ablation): `sk.collect_means` of one
            label of this model, at the site and layers that are patched. The mean of the position that it was read at
            (`"last"` by default) is put in at every patched position. The effect is still relative to the other run's
            metric.
        method: `"exact"`; or `"attribution"`, the first-order approximation `(h_other - h) . dm/dh` of the effect of
            every place, from one forward and one backward pass. Use it to find places, and check them exactly. Not with
            `"kl"` in mode `"noising"`, whose slope at the clean run is 0.
        batch_rows: patches per forward; default 32 on a CPU and 256 on a GPU, halved when memory runs out.
        chat_template_kwargs: arguments of the chat template.

    Returns:
        `PatchResult`, whose `table` has a row per site, layer, head and position.

    Raises:
        ValueError: prompts of different lengths in a pair, a position outside a prompt, an unknown mode, metric, site
            or layer, equal prompts or equal metrics of both runs of a pair, an active steering, or a metric without a
            slope for `"attribution"`. All of these are found before the first patch.

    Warns:
        UserWarning: a pair whose runs differ less than a tenth as much as the median pair's: its effects are large and
            uncertain. Or patched runs whose metric is not finite: these pairs are left out of the effect of a place.
            Or values that are put in at `resid_mid` and arrive with an error of more than 2 %: in 16 bits, at positions
            whose stream is much larger than the value.

    Example:
        >>> result = sk.patch(model, tokenizer, "The Colosseum is in the city of", "The Louvre is in the city of",
        ...     answers=(" Rome", " Paris"), sites=["resid_post", "attn_out"])
        >>> result.table.nlargest(5, "effect")

    Source: Vig et al. 2020, arXiv 2004.12265; Meng et al. 2022, arXiv 2202.05262; Zhang and Nanda 2024, arXiv
    2309.16042 (metrics, modes); Nanda 2023, "Attribution patching".
    """
    if mode not in ("denoising", "noising"):
        raise ValueError(f"expected mode 'denoising' or 'noising'; got {mode!r}. Pass one of them.")
    if method not in ("exact", "attribution"):
        raise ValueError(f"expected method 'exact' or 'attribution'; got {method!r}. Pass one of them.")
    check_metric(metric, answers, mode, method)
    check_numbers(1, 0.0, 1.0, batch_rows)
    pairs = _pairs(tokenizer, clean, corrupted, answers, chat_template_kwargs)
    rows = [
        (*prompt, *answer)
        for pair in pairs
        for prompt in (pair.clean, pair.corrupted)
        for answer in pair.answers or ((),)
    ]
    check_vocabulary(model, rows)
    check_fits(model, rows)
    spans = _spans(positions, pairs)
    names = [sites] if isinstance(sites, str) else list(sites)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected one site at least, and each once; got {names}. List each site once.")
    with suspended(model) as active:
        if active:
            raise ValueError("expected no active steering during patching; got one. Leave the `with` first.")
        blocks = find_blocks(model)
        places: list[Place] = []
        for site in names:
            wanted = resolve_layers(model, blocks, layers, check_name(site))
            if EMBED in wanted:
                raise ValueError("expected block indices as layers; got 'embed'. Pass sites='resid_pre', layers=0.")
            places += [(site, int(layer)) for layer in wanted]
        about = describe(model, tokenizer)
        means = None if source is None else _means(model, source, places, about)
        heads = find_sites(model).heads if "z" in names else {}
        contrasts = [_contrast(model, tokenizer, pair, mode, metric) for pair in pairs]
        _warn_of_small_contrasts(contrasts)
        frames = []
        with progress("patching", len(pairs)) as advance:
            for number, contrast in enumerate(contrasts):
                frames.append(
                    _one_pair(
                        model, tokenizer, contrast, places, heads,
                        {name: span[number] for name, span in spans.items()},
                        means=means, method=method, batch_rows=batch_rows,
                    ).assign(pair=number)
                )  # fmt: skip
                advance(1)
    table = pd.concat(frames, ignore_index=True)
    _warn_of_overflow(table)
    texts = [[decode(tokenizer, ids, skip_special=False) for ids in pair.answers] for pair in pairs if pair.answers]
    meta = {
        **about,
        "kind": "patching",
        "mode": mode,
        "method": method,
        "metric": metric if isinstance(metric, str) else getattr(metric, "__name__", "function"),
        **_described_source(source),
        "n_pairs": len(pairs),
        "answers": texts or None,
        "data_sha256": sha256(repr([(pair.clean, pair.corrupted, pair.answers) for pair in pairs])),
    }
    return PatchResult(over_pairs(table), table, meta)


@dataclass(frozen=True)
class _Contrast:
    """The two runs of a pair and their metrics.

    Args:
        base: token ids of the run that is patched.
        other: token ids of the run that the activations are taken from.
        measure: the metric, with its reference.
        m_base: its value in the run that is patched.
        m_other: its value in the other run.
    """

    base: tuple[int, ...]
    other: tuple[int, ...]
    measure: Measure
    m_base: float
    m_other: float


def _contrast(model: nn.Module, tokenizer: Any, pair: _Pair, mode: Mode, metric: Metric) -> _Contrast:
    """Both runs of a pair; `ValueError` unless their metrics are finite and differ."""
    text = tokenizer.decode(list(pair.clean))
    measure = Measure(metric, pair.answers)
    clean = Runs(model, pair.clean, measure).logits()
    if metric == "kl":
        measure = replace(measure, reference=clean[0][0, -1].float().log_softmax(-1))
    with torch.inference_mode():
        m_clean = float(measure.of(clean)[0])
    m_corrupted = Runs(model, pair.corrupted, measure).metric()
    if not (math.isfinite(m_clean) and math.isfinite(m_corrupted)):
        raise ValueError(
            f"expected finite metrics of both runs of {text!r:.80}; got {m_clean} of the clean and {m_corrupted} of "
            "the corrupted one. Load the model in float32, or pass another metric."
        )
    if not abs(m_clean - m_corrupted) > 1e-6:
        raise ValueError(
            f"expected runs with different metrics; both prompts of {text!r:.80} give {m_clean:.6g}. Pass a corrupted "
            "prompt that changes the answer."
        )
    if mode == "denoising":
        return _Contrast(pair.corrupted, pair.clean, measure, m_corrupted, m_clean)
    return _Contrast(pair.clean, pair.corrupted, measure, m_clean, m_corrupted)


def _one_pair(
    model: nn.Module,
    tokenizer: Any,
    pair: _Contrast,
    places: Sequence[Place],
    heads: Mapping[int, tuple[int, int]],
    spans: Mapping[int | str, tuple[int, int]],
    *,
    means: Mapping[Place, Tensor] | None,
    method: Method,
    batch_rows: int | None,
) -> pd.DataFrame:
    """One row per place of a pair: site, layer, head, position, token, base, other, patched, effect."""
    values = values_of(model, pair.other, places)
    if means is not None:
        values = {place: means[place].expand_as(value) for place, value in values.items()}
    patches, described = [], []
    for site, layer in places:
        for head, columns in _parts(site, layer, heads):
            for name, (start, stop) in spans.items():
                patches.append(Patch((site, layer), start, stop, columns))
                token = tokenizer.decode([pair.base[start]]) if stop == start + 1 else None
                described.append({"site": site, "layer": layer, "head": head, "position": name, "token": token})
    if method == "exact":
        patched = Runs(model, pair.base, pair.measure, batch_rows).patched(patches, values)
    else:
        changes = attributed(model, pair.base, pair.measure, patches, values)
        patched = [pair.m_base + change for change in changes]
    table = pd.DataFrame(described).assign(base=pair.m_base, other=pair.m_other, patched=patched)
    table["head"] = table["head"].astype("Int64")
    effect = (table["patched"] - pair.m_base) / (pair.m_other - pair.m_base)
    return table.assign(effect=effect.where(np.isfinite(effect)))


def _parts(
    site: str, layer: int, heads: Mapping[int, tuple[int, int]]
) -> Iterator[tuple[int | None, tuple[int, int] | None]]:
    """The whole width of a site, or the heads of `z` with their columns."""
    if site != "z":
        yield None, None
        return
    count, width = heads[layer]
    for head in range(count):
        yield head, (head * width, (head + 1) * width)


def _pairs(
    tokenizer: Any, clean: Any, corrupted: Any, answers: Any, chat_template_kwargs: Mapping[str, Any] | None
) -> list[_Pair]:
    """The pairs as token ids; `ValueError` for other numbers or lengths."""
    clean_ids, corrupted_ids = (
        [encode_prompt(tokenizer, prompt, chat_template_kwargs) for prompt in _prompts(several)]
        for several in (clean, corrupted)
    )
    if len(clean_ids) != len(corrupted_ids):
        raise ValueError(
            f"expected a corrupted prompt for each of {len(clean_ids)} clean ones; got {len(corrupted_ids)}. Pair them."
        )
    for number, (first, second) in enumerate(zip(clean_ids, corrupted_ids, strict=True)):
        if len(first) != len(second):
            raise ValueError(
                f"expected prompts of equal length in tokens; those of pair {number} have {len(first)} and "
                f"{len(second)}. Replace words by others with as many tokens."
            )
        if first == second:
            raise ValueError(
                f"expected two different prompts in each pair; those of pair {number} have the same tokens. Change the "
                "corrupted one."
            )
    listed = [None] * len(clean_ids) if answers is None else _answers(tokenizer, answers, len(clean_ids))
    return [_Pair(*three) for three in zip(clean_ids, corrupted_ids, listed, strict=True)]


def _prompts(given: Any) -> list[Any]:
    """One prompt or several as a list."""
    if isinstance(given, str | Prompt):
        return [given]
    listed = list(given)
    if not listed:
        raise ValueError("expected one prompt at least; got none. Pass a string or a list.")
    return [listed] if isinstance(listed[0], Mapping) else listed


def _answers(tokenizer: Any, answers: Any, count: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The right and the wrong answer of each pair as ids."""
    if isinstance(answers, str) or not isinstance(answers, Iterable):
        raise ValueError(f"expected answers as (right, wrong), two texts; got {answers!r:.80}. Pass both.")
    given = list(answers)
    listed = [given] * count if len(given) == 2 and all(isinstance(one, str) for one in given) else given
    found = []
    for two in listed:
        texts = list(two) if not isinstance(two, str) else []
        if len(texts) != 2 or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"expected answers as (right, wrong), two texts; got {two!r:.80}. Pass both.")
        right, wrong = (encode(tokenizer, text) for text in texts)
        if right == wrong or not right or not wrong:
            raise ValueError(f"expected answers with different tokens; got {two!r:.80}. Pass others.")
        found.append((right, wrong))
    if len(found) != count:
        raise ValueError(f"expected answers for each of {count} pairs, or two texts; got {len(found)}. Pass one each.")
    return found


def _spans(positions: Any, pairs: Sequence[_Pair]) -> dict[int | str, list[tuple[int, int]]]:
    """Name or index of a position -> its span of tokens in each pair."""
    lengths = [len(pair.clean) for pair in pairs]
    if isinstance(positions, str):
        if positions != "all":
            raise ValueError(f"expected positions 'all', indices, or a mapping; got {positions!r}. Pass one of these.")
        if len(set(lengths)) > 1:
            raise ValueError(
                f"expected prompts of one length for positions='all'; got {sorted(set(lengths))} tokens. Name the "
                "positions: {'subject': [one index per pair], 'last': -1}."
            )
        return {index: [(index, index + 1)] * len(pairs) for index in range(lengths[0])}
    if isinstance(positions, Mapping):
        named = dict(positions)
    else:
        listed = list(positions) if isinstance(positions, Iterable) else [positions]
        named = {int(index): int(index) for index in listed if isinstance(index, Integral) and type(index) is not bool}
        if len(named) != len(listed):
            raise ValueError(
                f"expected integers as positions, each once; got {positions!r:.80}. Pass e.g. -1, or [0, -1]."
            )
    if not named:
        raise ValueError("expected one position at least; got none. Pass 'all', or indices.")
    found = {}
    for name, given in named.items():
        each = given if isinstance(given, list) else [given] * len(pairs)
        if len(each) != len(pairs):
            raise ValueError(
                f"expected a position of {name!r} for each of {len(pairs)} pairs; got {len(each)}. Pass one per pair."
            )
        found[name] = [_span(name, one, length) for one, length in zip(each, lengths, strict=True)]
    return found


def _span(name: Any, given: Any, length: int) -> tuple[int, int]:
    """An index or a span as `(start, stop)` counted from 0."""
    if isinstance(given, Integral) and not isinstance(given, bool):
        start = int(given) + length if given < 0 else int(given)
        stop = start + 1
    elif isinstance(given, tuple) and len(given) == 2 and all(isinstance(one, Integral) for one in given):
        start, stop = (int(one) + length if one < 0 else int(one) for one in given)
    else:
        raise ValueError(f"expected an index or (start, stop) as position {name!r}; got {given!r:.80}. Pass integers.")
    if not 0 <= start < stop <= length:
        raise ValueError(
            f"expected position {name!r} inside a prompt of {length} tokens; got {given!r}. Count tokens from 0, or "
            "from the end with -1."
        )
    return start, stop


def _means(
    model: nn.Module, source: ActivationMeans, places: Sequence[Place], about: Mapping[str, Any]
) -> dict[Place, Tensor]:
    """The means by place; `ValueError` where they do not hold one, or are another model's."""
    if len(source.labels) != 1 or {site for site, _ in places} != {source.site}:
        raise ValueError(
            f"expected means of one label at {sorted({site for site, _ in places})}; got labels {list(source.labels)} "
            f"at {source.site}. Collect them with site=."
        )
    layers = [layer for _, layer in places]
    if missing := [layer for layer in layers if layer not in source.layers]:
        raise ValueError(f"expected means at the layers {missing} too; got {list(source.layers)}. Collect them.")
    if other := other_model(source.meta, about):
        raise ValueError(
            f"expected means of this model, {about['checkpoint']}; got those of "
            f"{source.meta.get('checkpoint', 'unknown')}, with {other}. Collect them from the model that is patched."
        )
    width = width_of(model, find_blocks(model), source.site, layers)
    if source.mean.shape[-1] != width:
        raise ValueError(
            f"expected means of width {width}, the model's at {source.site}; got {source.mean.shape[-1]}. Collect them "
            "from this model."
        )
    mean = source.of(source.labels[0])
    return {(site, layer): mean[source.layers.index(layer)] for site, layer in places}


def _described_source(source: ActivationMeans | None) -> dict[str, Any]:
    """Where the activations that are put in come from, as plain data."""
    if source is None:
        return {"source": "other run"}
    own = {"label": source.labels[0], "n": source.counts[0]}
    own |= {name: source.meta[name] for name in ("read_position", "data_sha256") if name in source.meta}
    return {"source": "mean", "means": own}


def _warn_of_small_contrasts(contrasts: Sequence[_Contrast]) -> None:
    size = pd.Series([abs(one.m_other - one.m_base) for one in contrasts])
    small = size.index[size < SMALL_CONTRAST * size.median()].tolist()
    if small:
        warnings.warn(
            f"the runs of the pairs {small[:8]} differ less than a tenth as much as those of the median pair; their "
            "effects are large and uncertain. Leave them out.",
            UserWarning,
            stacklevel=3,
        )


def _warn_of_overflow(table: pd.DataFrame) -> None:
    missing = table[table["effect"].isna()]
    if len(missing):
        places = [f"{one.site} {one.layer} at {one.position}" for one in missing.itertuples()]
        warnings.warn(
            f"expected finite metrics of patched runs; got NaN or infinity in {len(missing)} of {len(table)}, of the "
            f"pairs {missing['pair'].drop_duplicates().tolist()[:8]}, at {list(dict.fromkeys(places))[:8]}. The effects "
            "are means without them, see n_missing. Load the model in bfloat16 or float32, or pass another metric.",
            UserWarning,
            stacklevel=3,
        )
