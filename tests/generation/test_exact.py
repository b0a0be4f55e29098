"""Which batched forwards are exact: patterns that only the mask has, state outside the cache, later changes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import steerkit as sk
from steerkit.generation.batches import exact
from steerkit.models.context import rope_switch
from steerkit.text.prompt import Prompt
from tests.small_models import build, small_config
from tests.tiny import tiny_model, tiny_tokenizer


def made(name: str, **changes: Any) -> Any:
    """A tiny model with other settings, whose attention matters."""
    config = small_config(name)
    for key, value in {"max_position_embeddings": 512, **changes}.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    model.generation_config.eos_token_id = None
    return model


def plainly(model: Any, ids: tuple[int, ...], new: int) -> tuple[int, ...]:
    """Greedy tokens without a cache."""
    row = torch.tensor([ids])
    with torch.no_grad():
        for _ in range(new):
            row = torch.cat([row, model(input_ids=row, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tuple(row[0, len(ids) :].tolist())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("phimoe", {"sliding_window": 96}),
        ("llama4_text", {"attention_chunk_size": 96}),
        ("qwen2_moe", {"sliding_window": 96, "layer_types": ["sliding_attention"] * 4}),
        ("mistral", {"sliding_window": 96}),
    ],
)
def test_a_window_or_chunks_that_only_the_mask_has_are_computed_in_long_prompts(name: str, changes: Any) -> None:
    model, tokenizer = made(name, **changes), tiny_tokenizer()
    assert exact(model).shared == (name == "mistral")  # its layers know their window
    ids = tuple(torch.randint(1, 250, (150,), generator=torch.Generator().manual_seed(1)).tolist())
    found = sk.generate(model, tokenizer, [Prompt.of_ids(tokenizer, ids)], max_new_tokens=6, return_details=True)
    assert tuple(found[0].ids) == plainly(model, ids, 6)


def test_a_model_with_a_state_outside_its_cache_is_refused() -> None:
    with pytest.raises(ValueError, match=r"RecurrentGemmaForCausalLM.*they differ by"):
        sk.generate(build("recurrent_gemma"), tiny_tokenizer(), ["The sea is calm"], max_new_tokens=2)


@pytest.mark.parametrize("error", [KeyError("layers"), AssertionError("no cache")])
def test_a_model_whose_cache_raises_anything_is_refused_with_the_error(error: Exception) -> None:
    model = tiny_model()
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, **given: Any) -> Any:
        if given.get("past_key_values") is not None:
            raise error
        return plain(*args, **given)

    model.forward = forward
    with pytest.raises(ValueError, match=f"expected a model whose logits with a cache.*{type(error).__name__}"):
        exact(model)


def test_what_is_exact_is_found_again_for_another_attention_kernel() -> None:
    model = tiny_model("llama")
    assert exact(model).shared
    model.set_attn_implementation("eager")
    assert not exact(model).shared
    model.set_attn_implementation("sdpa")
    assert exact(model).shared


def test_texts_on_both_sides_of_a_switch_of_longrope_share_no_batch_and_cached_ones_beyond_it_are_refused() -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}
    model = made("llama", rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, **factors})
    tokenizer = tiny_tokenizer()
    assert rope_switch(model) == 64 and rope_switch(tiny_model("llama")) is None
    short, long = "a short text", "a long text " * 9
    alone = sk.collect(model, tokenizer, [short], layers=[2]).resid
    beside = sk.collect(model, tokenizer, [short, long], layers=[2]).resid[:1]
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-4)
    assert sk.generate(model, tokenizer, [short], max_new_tokens=4)
    for text, new in ((short, 60), (long, 1)):
        with pytest.raises(ValueError, match="at most 64 tokens together, where this model changes"):
            sk.generate(model, tokenizer, [text], max_new_tokens=new)
