"""Sweeps and capture through an engine of vLLM in this process, on SmolLM2, against this process's own.

Run by `python -m pytest tests/vllm/jobs.py` in the environment of vLLM.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest
import torch

import steerkit as sk
from steerkit.serving.remote import Sent
from steerkit.serving.vllm import VLLM
from tests.vllm.__main__ import OUT, prepare
from tests.vllm.cases import PROMPTS

SAME = ["vector", "role", "layer", "coefficient", "prompt_id", "sample", "text", "n_tokens", "finished"]
ENGINE: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "block_size": 32}


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any, sk.SteeringVector]:
    prepare()
    return (*sk.load(OUT / "model"), sk.SteeringVector.load(OUT / "vectors" / "mood.safetensors"))


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[VLLM]:
    with VLLM(OUT / "model", vectors=tmp_path_factory.mktemp("vectors"), sums=2, **ENGINE) as engine:
        yield engine


def same(first: sk.SweepResult, second: sk.SweepResult) -> None:
    a, b = first.table, second.table
    pd.testing.assert_frame_equal(a[SAME], b[SAME])
    assert [list(ids) for ids in a["ids"]] == [list(ids) for ids in b["ids"]]
    pd.testing.assert_series_equal(a["relative_dose"], b["relative_dose"], rtol=1e-4)
    assert first.meta["vectors"] == second.meta["vectors"]


@pytest.mark.parametrize(
    "options",
    [
        {"coefficients": [-2, 1, 2], "layers": [14, (12, 16)]},
        {"coefficients": [1.5], "layers": 16, "samples": 2, "temperature": 0.9, "top_p": 0.9, "seed": 5},
        {"coefficients": [1], "layers": 16, "operation": "ablate", "positions": "all"},
    ],
)
def test_a_sweep_has_the_same_table_through_vllm(real, engine, options) -> None:
    model, tokenizer, vector = real
    more = {**options, "max_new_tokens": 24, "foreign": False}
    own = sk.sweep(model, tokenizer, {"mood": vector}, PROMPTS[:6], **more)
    same(own, sk.sweep(None, tokenizer, {"mood": vector}, PROMPTS[:6], **more, engine=engine))
    assert own.table["text"].nunique() > 6


@pytest.mark.parametrize(
    "options",
    [
        {"coefficients": [-2, 1, 2], "layers": [14, (12, 16)]},
        {"doses": [-0.4, 0.4], "layers": 16, "positions": "all"},
        {"coefficients": [1], "layers": 16, "operation": "ablate", "positions": "all"},
    ],
)
def test_choices_and_doses_have_the_same_table_through_vllm(real, engine, options) -> None:
    model, tokenizer, vector = real
    more = {**options, "choices": [" yes", " no", " (A) not at all"]}
    own = sk.sweep(model, tokenizer, {"mood": vector}, PROMPTS[:6], **more).table
    found = sk.sweep(None, tokenizer, {"mood": vector}, PROMPTS[:6], **more, engine=engine).table
    assert list(found) == list(own)
    for column in own:
        if pd.api.types.is_float_dtype(own[column]):
            pd.testing.assert_series_equal(found[column], own[column], rtol=1e-3, atol=1e-4)
        elif column != "weights":
            assert found[column].tolist() == own[column].tolist(), column


def test_a_sweep_that_was_interrupted_goes_on_through_vllm_with_the_same_table(real, engine, tmp_path) -> None:
    model, tokenizer, vector = real
    options = {"coefficients": [-1, 1, 2], "layers": [14, 16], "max_new_tokens": 16}
    whole = sk.sweep(model, tokenizer, vector, PROMPTS, **options)
    original, taken = engine.complete, 0

    def complete(requests: Any) -> Any:
        nonlocal taken
        for found in original(requests):
            taken += 1
            if taken == 70:
                raise KeyboardInterrupt
            yield found

    engine.complete = complete
    with pytest.raises(KeyboardInterrupt):
        sk.sweep(None, tokenizer, vector, PROMPTS, **options, engine=engine, out=tmp_path / "run")
    engine.complete = original
    rows = (tmp_path / "run" / "rows.jsonl").read_text().count("\n")
    assert 0 < rows < 112
    same(whole, sk.sweep(None, tokenizer, vector, PROMPTS, **options, engine=engine, out=tmp_path / "run"))
    with pytest.raises(ValueError, match="configuration"):  # another engine's rounding is another run
        sk.sweep(model, tokenizer, vector, PROMPTS, **options, out=tmp_path / "run")


def test_a_row_whose_logits_overflow_has_no_text_and_is_named(real, engine) -> None:
    _, tokenizer, vector = real
    with pytest.warns(UserWarning, match="overflowed"):
        result = sk.sweep(
            None, tokenizer, vector, PROMPTS[:2], coefficients=[1, 1e37], layers=16, max_new_tokens=6, engine=engine
        )
    lost = result.table["text"].isna()
    assert lost.sum() == 2
    assert set(result.table.loc[lost, "coefficient"]) == {1e37}


def test_what_does_not_fit_is_refused_before_a_row_is_generated(real, engine) -> None:
    _, tokenizer, vector = real
    options: dict[str, Any] = {"coefficients": [1], "max_new_tokens": 4, "engine": engine}
    narrow = sk.SteeringVector({16: torch.ones(5)})
    for bad, message, more in (
        (narrow, "width 5", {}),
        (sk.SteeringVector({30: torch.ones(576)}), "layer 30", {}),
        (sk.SteeringVector({3: torch.ones(576)}, {"model_fingerprint": "0" * 16}), "other weights", {}),
        (vector, "context of 512", {"max_new_tokens": 600, "layers": 16}),
        (vector, "max_new_tokens", {"max_new_tokens": 0, "layers": 16}),
    ):
        with pytest.raises(ValueError, match=message):
            sk.sweep(None, tokenizer, bad, PROMPTS[:1], **{**options, **more})
    foreign = sk.SteeringVector({3: torch.ones(576)}, {"model_fingerprint": "0" * 16})
    assert len(sk.sweep(None, tokenizer, foreign, PROMPTS[:1], **options, foreign=True).table) == 2
    with torch.no_grad():
        other = sk.load(OUT / "model")[0]
        next(iter(other.parameters())).mul_(1.5)
    with pytest.raises(ValueError, match="weights that the engine serves"):
        sk.sweep(other, tokenizer, vector, PROMPTS[:1], **options, layers=16)


CAPTURE: dict[str, dict[str, Any]] = {
    "warm prefix cache": {"enable_prefix_caching": True},
    "chunked prefill": {"enable_prefix_caching": False, "max_num_batched_tokens": 48, "max_num_seqs": 24},
    "preemption": {
        "enable_prefix_caching": True,
        "num_gpu_blocks_override": 14,
        "max_model_len": 256,
        "max_num_batched_tokens": 40,
        "max_num_seqs": 24,
        "disable_log_stats": False,
    },
}


def crowded(engine: VLLM, count: int = 5) -> None:
    """Send plain requests, whose growing texts drive others out of the cache, ahead of every job's."""
    original, prompt = engine.complete, tuple(range(100, 130))

    def complete(requests: Any) -> Any:
        plain = [Sent((*prompt, i), 90) for i in range(count)]
        for number, ids in original([*plain, *requests]):
            if number >= count:
                yield number - count, ids

    engine.complete = complete


def preemptions(engine: VLLM) -> float:
    return sum(one.value for one in engine.llm.get_metrics() if one.name == "vllm:num_preemptions")


READ_AT: dict[str, tuple[Any, ...]] = {
    "warm prefix cache": ("mean", "last", 0), "chunked prefill": ("mean", "last"), "preemption": ("mean",),
}  # fmt: skip


@pytest.mark.parametrize("mode", CAPTURE)
def test_means_read_in_the_engine_are_those_of_collect_means(real, tmp_path, mode) -> None:
    model, tokenizer, _ = real
    ends = (" It is wonderful, a joy from the first minute.", " It is dreadful.")
    pairs = [sk.ContrastPair(prompt, *ends, str(i)) for i, prompt in enumerate(PROMPTS)]
    with VLLM(OUT / "model", vectors=tmp_path / "vectors", sums=2, **{**ENGINE, **CAPTURE[mode]}) as engine:
        if mode == "preemption":
            crowded(engine)
        for position in READ_AT[mode]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                own = sk.collect_means(model, tokenizer, pairs, position=position)
                for _ in range(2):  # the second time from a warm cache
                    found = engine.collect_means(tokenizer, pairs, position=position)
            assert found.labels == own.labels
            assert found.counts == own.counts
            difference = (found.mean - own.mean).norm(dim=-1) / own.mean.norm(dim=-1)
            assert float(difference.max()) <= 1e-5
        if mode == "chunked prefill":
            assert engine.call("counts", None)[0]["partial_prefills"] > 0
        if mode == "preemption":
            assert preemptions(engine) > 0
