"""What a direction says: its slope on the logits equals the derivative."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import steerkit as sk
from steerkit.vectors.lens import tokens_of
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["one two", "three four five"]


def vector(model, layers=(1, 3)) -> sk.SteeringVector:
    torch.manual_seed(0)
    return sk.SteeringVector({layer: torch.randn(model.config.hidden_size) for layer in layers})


def test_the_slope_is_the_derivative_of_final_norm_and_unembedding_along_the_direction() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    v = vector(model)
    table = tokens_of(model, tokenizer, v, PROMPTS, k=260)
    for layer in v.layers:
        wanted = torch.zeros(260)
        for prompt in PROMPTS:
            with sk.capture_resid(model, 3) as stream, torch.no_grad():
                model(torch.tensor([tokenizer(prompt)["input_ids"]]))

            def rest(h: torch.Tensor) -> torch.Tensor:
                return model.lm_head(model.model.norm(h))

            _, slope = torch.func.jvp(rest, (stream[3][0, -1],), (v.unit().layers[layer],))
            wanted += slope / len(PROMPTS)
        wanted = (wanted - wanted.mean()).detach()
        part = table[(table["layer"] == layer) & (table["side"] == "raised")]
        got = torch.tensor(part.sort_values("token_id")["slope"].to_numpy())
        torch.testing.assert_close(got.float(), wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))
        assert part["slope"].is_monotonic_decreasing
        lowered = table[(table["layer"] == layer) & (table["side"] == "lowered")]
        assert lowered.iloc[0]["token_id"] == int(wanted.argmin())


def test_reading_without_prompts_or_tokens_is_refused() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(ValueError, match="a non-empty list of prompts"):
        tokens_of(model, tokenizer, vector(model), [])
    with pytest.raises(ValueError, match="one token at least"):
        tokens_of(model, tokenizer, vector(model), PROMPTS, k=0)


def test_a_vector_that_is_no_direction_of_this_models_stream_is_refused() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    fitting = sk.SteeringVector({1: torch.ones(32)})
    z = replace(fitting, site="z")
    with pytest.raises(ValueError, match=r"expected a direction of the stream; got one of the head outputs, z"):
        tokens_of(model, tokenizer, z, PROMPTS)
    for width in (1, 16):
        with pytest.raises(ValueError, match=rf"expected a vector of width 32, the model's; got {width}"):
            tokens_of(model, tokenizer, sk.SteeringVector({1: torch.ones(width)}), PROMPTS)
    with pytest.raises(ValueError, match="99"):
        tokens_of(model, tokenizer, sk.SteeringVector({99: torch.ones(32)}), PROMPTS)
    other = replace(fitting, meta={"model_fingerprint": "other", "adapter_fingerprint": None})
    with pytest.raises(ValueError, match=r"expected a vector read from this model, .*Pass foreign=True"):
        tokens_of(model, tokenizer, other, PROMPTS)
    assert len(tokens_of(model, tokenizer, other, PROMPTS, k=1, foreign=True)) == 2
    assert len(tokens_of(model, tokenizer, replace(fitting, site="mlp_out"), PROMPTS, k=1)) == 2
