"""Projections of generated and of given tokens equal those of a slow hook on one text at a time, without a cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import steerkit as sk
from steerkit.generation.batches import exact
from steerkit.models.blocks import find_blocks
from tests.steering.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["Hello", "A rather longer prompt than that", "x = 1", "?", "Hello", "once upon a time", "12 + 3", "abc"]
NEW = 12


def slow(model: Any, ids: Any, watched: sk.SteeringVector, push: Any, first: int) -> tuple[Any, Any]:
    """Before and after, `[pos]` each: one text, no cache; `push` is added after its layer from column `first` on."""
    ((layer, direction),) = watched.layers.items()
    found: dict[str, torch.Tensor] = {}

    def hook(at: int, out: Any) -> Any:
        stream = (out if isinstance(out, torch.Tensor) else out[0]).clone()
        if at == layer:
            found["before"] = stream[0].double() @ direction.double() / direction.double().norm()
        if push is not None and at in push.layers:
            stream[0, first:] += push.layers[at]
        if at == layer:
            found["after"] = stream[0].double() @ direction.double() / direction.double().norm()
        return stream if isinstance(out, torch.Tensor) else (stream, *out[1:])

    blocks = find_blocks(model).modules
    handles = [block.register_forward_hook(lambda _, __, out, at=at: hook(at, out)) for at, block in blocks.items()]
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found["before"].numpy(), found["after"].numpy()


def same(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-4, atol=1e-4)


def ends_early(model: Any, tokenizer: Any, steerings: Any) -> None:
    """Make a token that some rows write an end token, so that rows leave the batch at different steps."""
    model.generation_config.eos_token_id = None
    free = sk.generate(model, tokenizer, PROMPTS, max_new_tokens=NEW, steering=steerings, return_details=True)
    model.generation_config.eos_token_id = free[1].ids[3]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_watched_projections_equal_a_slow_hook_in_mixed_batches_whose_rows_end_at_different_steps(kind: str) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    push = vector(model, 1, 2)
    each = [sk.Steering(push, 1.0, layer="all") if i % 2 else None for i in range(len(PROMPTS))]
    ends_early(model, tokenizer, each)
    watch = {"same layer": vector(model, 2, seed=5), "earlier": vector(model, 0, seed=6), "same too": push.at(2)}
    found = sk.generate(model, tokenizer, PROMPTS, max_new_tokens=NEW, steering=each, watch=watch)
    assert len({len(one.ids) for one in found}) > 1 and {one.finish_reason for one in found} == {"stop", "length"}
    for prompt, steering, one in zip(PROMPTS, each, found, strict=True):
        read = sk.render(tokenizer, prompt).ids
        for name, watched in watch.items():
            table = one.projections[name]
            assert tuple(table["token_id"]) == one.ids
            truth = slow(model, (*read, *one.ids), watched, steering and steering.vector, len(read) - 1)
            for column, values in zip(("before", "after"), truth, strict=True):
                same(table[column], values[len(read) :])
        moved = not np.allclose(one.projections["same too"]["before"], one.projections["same too"]["after"])
        assert moved == (steering is not None)
        assert one.projections["earlier"]["before"].equals(one.projections["earlier"]["after"])


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_watching_changes_no_text_and_implies_details(temperature: float) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": temperature, "seed": 2}
    steering = sk.Steering(vector(model, 1), 1.0)
    ends_early(model, tokenizer, steering)
    plain = sk.generate(model, tokenizer, PROMPTS, steering=steering, return_details=True, **options)
    watched = sk.generate(model, tokenizer, PROMPTS, steering=steering, watch={"v": vector(model, 2)}, **options)
    assert [one.ids for one in watched] == [one.ids for one in plain]
    for one, other in zip(watched, plain, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-5, atol=1e-5)
    assert plain[0].projections == {}


def test_projections_do_not_depend_on_the_batch_size_and_survive_a_batch_that_is_halved(monkeypatch) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    options: dict[str, Any] = {"max_new_tokens": 6, "watch": {"v": vector(model, 2)}}
    whole = sk.generate(model, tokenizer, PROMPTS, **options)
    one_by_one = sk.generate(model, tokenizer, PROMPTS, batch_rows=1, **options)
    forward = model.forward

    def small(**kwargs: Any) -> Any:
        if len(kwargs["input_ids"]) > 3:
            raise torch.OutOfMemoryError
        return forward(**kwargs)

    small.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", small)
    halved = sk.generate(model, tokenizer, PROMPTS, **options)
    for found in (one_by_one, halved):
        for a, b in zip(found, whole, strict=True):
            pd.testing.assert_frame_equal(a.projections["v"], b.projections["v"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("positions", ["from_last_prompt_token", "generated:2", "prompt", "all"])
def test_project_agrees_with_watch_on_the_same_ids(kind: str, positions: str) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    steering = sk.Steering(vector(model, 1), 1.0, positions)
    watch = {"a": vector(model, 1, seed=5), "b": vector(model, 2, seed=6)}
    with steering.on(model):  # an active steering and a passed one are the same
        written = sk.generate(model, tokenizer, PROMPTS, max_new_tokens=6, watch=watch)
    texts = [one.ids for one in written]
    read = sk.project(model, tokenizer, texts, watch, prompts=PROMPTS, steering=steering)
    for number, one in enumerate(written):
        for name, table in one.projections.items():
            part = read[(read["text"] == number) & (read["vector"] == name)]
            own = part[~part["in_prompt"]]
            assert tuple(own["token_id"]) == one.ids and list(own["token"]) == list(table["token"])
            same(own[["before", "after"]], table[["before", "after"]])
            assert list(part.index[part["prompt_end"]]) == [part.index[part["in_prompt"]][-1]]
    with steering.on(model):
        pd.testing.assert_frame_equal(sk.project(model, tokenizer, texts, watch, prompts=PROMPTS), read)


def test_projections_of_given_texts_are_the_captured_streams_along_the_unit_direction() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    v = vector(model, 0, 1)
    texts = ["one two", [{"role": "user", "content": "three four five"}]]
    table = sk.project(model, tokenizer, texts, v * 5.0)
    assert set(table["vector"]) == {"vector"} and table["in_prompt"].all()
    for number, text in enumerate(texts):
        prompt = sk.render(tokenizer, text)
        with sk.capture_resid(model, [0, 1]) as streams, torch.no_grad():
            model(torch.tensor([prompt.ids]))
        for layer in (0, 1):
            part = table[(table["text"] == number) & (table["layer"] == layer)]
            unit = v.layers[layer] / v.layers[layer].norm()
            same(part["before"], (streams[layer][0] @ unit).numpy())
            assert part["before"].equals(part["after"]) and "".join(part["token"]) == prompt.text


def test_blocks_compiled_one_by_one_are_read_as_before() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    options: dict[str, Any] = {"max_new_tokens": 4, "watch": {"v": vector(model, 2)}}
    options["steering"] = sk.Steering(vector(model, 2), 1.0)
    plain = sk.generate(model, tokenizer, PROMPTS[:3], **options)
    for block in find_blocks(model).modules.values():
        block.compile(backend="eager")
    for a, b in zip(sk.generate(model, tokenizer, PROMPTS[:3], **options), plain, strict=True):
        pd.testing.assert_frame_equal(a.projections["v"], b.projections["v"], rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_the_models_of_these_tests_run_both_engines() -> None:
    assert {exact(tiny_model(kind)).shared for kind in ("llama", "gpt2", "gemma2")} == {True, False}


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        ({}, "at least one"),
        ({"v": sk.SteeringVector({1: torch.ones(32), 2: torch.ones(32)})}, r"Pass v\.at\(2\)"),
        ({"v": sk.SteeringVector({1: torch.zeros(32)})}, "no direction"),
        ({"v": sk.SteeringVector({9: torch.ones(32)})}, "expected a layer"),
        ({"v": sk.SteeringVector({1: torch.ones(8)})}, "width 32"),
    ],
)
def test_a_vector_that_cannot_be_watched_is_refused_before_anything_runs(watch: Any, message: str) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(ValueError, match=message):
        sk.generate(model, tokenizer, ["a"], max_new_tokens=2, watch=watch)


def test_a_projection_of_a_stream_that_overflows_is_named_by_text_and_layer() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    push = sk.Steering(vector(model, 1), 1e38, "all")
    with pytest.warns(UserWarning, match=r"the texts \[1\] at the layers \[1, 2\], which have no projections"):
        found = sk.project(model, tokenizer, ["ab", "cd"], {"v": vector(model, 0, 1, 2)}, steering=[None, push])
    assert np.isfinite(found[(found["text"] == 0) | (found["layer"] == 0)][["before", "after"]]).all(axis=None)


def test_texts_and_prompts_that_do_not_pair_are_refused() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    for texts, prompts in (("one string", None), ([], None), (["a", "b"], ["only one"])):
        with pytest.raises(ValueError, match="expected a"):
            sk.project(model, tokenizer, texts, vector(model, 1), prompts=prompts)
    with pytest.raises(TypeError, match="expected a SteeringVector"):
        sk.project(model, tokenizer, ["a"], {"v": torch.ones(32)})  # type: ignore[dict-item]
