"""Patching that puts in the wrong run's values, or measures its effect on the wrong scale."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import steerkit as sk
from steerkit.patching import patch as patching
from steerkit.patching.metrics import Measure
from steerkit.patching.runs import Patch, Runs, values_of
from steerkit.text.prompt import encode_prompt
from tests.silent_wrong import plain
from tests.tiny import tiny_model, tiny_tokenizer

CLEAN, CORRUPTED, ANSWERS = "The sea is", "The fog is", ("A", "B")
Effect = Callable[[Any, Any, str], float]


def check_the_whole_stream_gives_the_other_run(effect: Effect) -> None:
    """All positions of one layer's stream determine the answer: 1 in both modes."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert [effect(model, tokenizer, mode) for mode in ("denoising", "noising")] == pytest.approx([1, 1], abs=1e-3)


def ours(model: Any, tokenizer: Any, mode: Any) -> float:
    result = sk.patch(model, tokenizer, CLEAN, CORRUPTED, ANSWERS, layers=1, positions={"all": (0, 10)}, mode=mode)
    return float(result.table["effect"][0])


def always_into_the_corrupted_run(model: Any, tokenizer: Any, mode: str) -> float:
    """The effect of restoring, whatever the mode, on the scale of the mode."""
    clean, corrupted = (encode_prompt(tokenizer, text) for text in (CLEAN, CORRUPTED))
    runs = Runs(model, corrupted, Measure("logprob_diff", ((32,), (33,))))
    base, other = runs.metric(), Runs(model, clean, runs.measure).metric()
    (patched,) = runs.patched([Patch(("resid_post", 1), 0, 10)], values_of(model, clean, [("resid_post", 1)]))
    return (patched - base) / (other - base) if mode == "denoising" else (patched - other) / (base - other)


def check_positions_before_a_patch_stay(metric: Callable[[Any, Any], float]) -> None:
    """The same patch with and without the cached tokens before it."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    clean, corrupted = (encode_prompt(tokenizer, text) for text in (CLEAN, CORRUPTED))
    values = values_of(model, clean, [("resid_post", 1)])
    runs = Runs(model, corrupted, Measure("logprob_diff", ((65,), (66,))))
    with torch.no_grad():
        found = metric(runs, values)
        runs._prefix = None
        (plain,) = runs.patched([Patch(("resid_post", 1), 6, 7)], values)
    assert found == pytest.approx(plain, abs=1e-4)


def with_the_prefix(runs: Any, values: Any) -> float:
    return float(runs.patched([Patch(("resid_post", 1), 6, 7)], values)[0])


def at_the_index_in_the_chunk(runs: Any, values: Any) -> float:
    """The patch at its absolute index, in a forward that begins at its start."""
    moved = {place: value.roll(-6, 0) for place, value in values.items()}
    return float(runs.patched([Patch(("resid_post", 1), 6, 7)], moved)[0])


def check_attribution_finds_what_exact_patching_finds(attribution: Callable[..., list[float] | None]) -> None:
    """The effects of the last position at each layer: either refused, or of the size of the exact ones."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for metric in ("kl", "logprob_diff"):
        options: dict[str, Any] = {"positions": [-1], "mode": "noising", "metric": metric}
        exact = sk.patch(model, tokenizer, CLEAN, CORRUPTED, ANSWERS, **options).table["effect"]
        fast = attribution(model, tokenizer, CLEAN, CORRUPTED, ANSWERS, **options)
        assert fast is None or max(map(abs, fast)) > 0.1 * exact.abs().max()


def or_refused(*args: Any, **options: Any) -> list[float] | None:
    try:
        return sk.patch(*args, **options, method="attribution").table["effect"].tolist()
    except ValueError:
        return None


def of_any_metric(*args: Any, **options: Any) -> list[float] | None:
    """Also of the divergence from the run itself, whose slope is 0."""
    with mock.patch.object(patching, "check_metric", lambda *_: None):
        return sk.patch(*args, **options, method="attribution").table["effect"].tolist()


SILENT: dict[str, tuple[Callable[[Any, Path], None], Any, Any]] = {
    "the whole stream gives the other run": (
        plain(check_the_whole_stream_gives_the_other_run), ours, always_into_the_corrupted_run
    ),
    "positions before a patch stay": (
        plain(check_positions_before_a_patch_stay), with_the_prefix, at_the_index_in_the_chunk
    ),
    "attribution finds what exact patching finds": (
        plain(check_attribution_finds_what_exact_patching_finds), or_refused, of_any_metric
    ),
}  # fmt: skip
