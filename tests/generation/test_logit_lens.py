"""The logit lens equals norm and unembedding written out, and at the last layer the model's own logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import steerkit as sk
from steerkit.models.unembed import unembed
from tests.small_models import build
from tests.steering.test_steering import vector
from tests.tiny import CONFIGS, tiny_model, tiny_tokenizer

TEXTS = ["The sea is calm", "Yes", "One two three"]


def slow(model: Any, stream: torch.Tensor) -> torch.Tensor:
    """Final norm, unembedding and softcap of the Llama family and of GPT-2, written out."""
    base = getattr(model, "model", None) or getattr(model, "transformer", None)
    logits = model.lm_head((base.norm if hasattr(base, "norm") else base.ln_f)(stream))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return (cap * torch.tanh(logits / cap) if cap else logits).detach()


def read(model: Any, ids: Any, layer: int, steering: sk.Steering | None = None) -> torch.Tensor:
    with sk.capture_resid(model, layer) as streams, torch.no_grad():
        if steering is None:
            model(torch.tensor([ids]))
        else:
            with steering.on(model):
                model(torch.tensor([ids]))
    return streams[layer][0]


def overflowing(model: Any) -> sk.Steering:
    return sk.Steering(vector(model, 1), 1e38, "all")


def check_rows(table: pd.DataFrame, logits: torch.Tensor, ids: Any) -> None:
    """The rows of one text and layer against logits `[position, vocabulary]`, token by token."""
    own = logits.double().log_softmax(-1).numpy()
    for row in table.to_dict("records"):
        at = own[row["position"]]
        assert row["rank"] == 1 + int((at > at[row["target_id"]]).sum())
        assert abs(row["log_prob"] - at[row["target_id"]]) < 1e-4
        assert abs(row["prob"] - np.exp(row["log_prob"])) < 1e-9
        assert row["token_id"] == ids[row["position"]]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("steered", [False, True])
def test_the_lens_is_norm_unembedding_and_softcap_of_each_stream_in_a_padded_batch(kind: str, steered: bool) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    if kind == "gemma2":
        model.config.final_logit_softcapping = 2.0  # narrow enough that logits without it differ
    steering = sk.Steering(vector(model, 1), 1.0) if steered else None
    table = sk.logit_lens(model, tokenizer, TEXTS, ["a", 7], positions="all", steering=steering)
    assert list(table["target"].unique()) == ["a", tokenizer.decode([7])]
    assert len(table) == 2 * model.config.num_hidden_layers * sum(map(len, TEXTS))
    for number, text in enumerate(TEXTS):
        ids = sk.render(tokenizer, text).ids
        for layer in range(model.config.num_hidden_layers):
            part = table[(table["text"] == number) & (table["layer"] == layer)]
            assert list(part["position"][::2]) == list(range(len(ids))) and "".join(part["token"][::2]) == text
            check_rows(part, slow(model, read(model, ids, layer, steering)), ids)


@pytest.mark.parametrize("kind", [*CONFIGS, "cohere", "granite", "olmo2", "opt", "bamba", "mamba"])
def test_at_the_last_layer_the_lens_is_the_model_s_own_prediction(kind: str) -> None:
    model, tokenizer = tiny_model(kind) if kind in CONFIGS else build(kind), tiny_tokenizer()
    last = model.config.num_hidden_layers - 1
    table = sk.logit_lens(model, tokenizer, TEXTS, 260, layers=last)
    for number, text in enumerate(TEXTS):
        with torch.no_grad():
            own = model(torch.tensor([sk.render(tokenizer, text).ids])).logits[0, -1].double().log_softmax(0)
        part = table[table["text"] == number].sort_values("target_id")
        np.testing.assert_allclose(part["log_prob"], own.numpy(), rtol=1e-4, atol=1e-4)


def test_the_most_probable_tokens_are_in_order_and_each_layer_and_position_has_as_many() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    table = sk.logit_lens(model, tokenizer, TEXTS, 3, layers=[0, 2], positions=[0, -1])
    assert len(table) == 3 * 2 * 2 * len(TEXTS)
    for _, part in table.groupby(["text", "layer", "position"]):
        assert list(part["rank"]) == [1, 2, 3] and part["prob"].is_monotonic_decreasing
    known = sk.logit_lens(model, tokenizer, TEXTS[:1], [int(table["target_id"][0])], layers=0, positions=0)
    assert known["rank"].tolist() == [1]


def test_a_steering_that_is_on_is_applied_where_the_text_is_read_and_not_again_in_the_unembedding() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    steering = sk.Steering(vector(model, 3), 1.0, "all")  # the last layer, which the unembedding runs through
    passed = sk.logit_lens(model, tokenizer, TEXTS, ["a"], steering=steering)
    with steering.on(model), torch.no_grad():
        pd.testing.assert_frame_equal(sk.logit_lens(model, tokenizer, TEXTS, ["a"]), passed)
        own = model(torch.tensor([sk.render(tokenizer, TEXTS[0]).ids])).logits[0, -1].log_softmax(0)
    found = passed[(passed["text"] == 0) & (passed["layer"] == 3)]["log_prob"].item()
    assert found == pytest.approx(float(own[tokenizer("a")["input_ids"][0]]), abs=1e-4)


def test_a_chat_and_more_streams_than_fit_one_forward_are_read_and_compiled_blocks_too() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    chat = [{"role": "user", "content": "x" * 90}]
    table = sk.logit_lens(model, tokenizer, [chat], ["a"], positions="all")
    ids = sk.render(tokenizer, chat).ids
    assert len(table) == 4 * len(ids) > 256
    for block in model.model.layers:
        block.compile(backend="eager")
    pd.testing.assert_frame_equal(sk.logit_lens(model, tokenizer, [chat], ["a"], positions="all"), table, atol=1e-4)
    torch._dynamo.reset()


def test_a_stream_that_overflows_has_no_rank_and_its_text_and_layers_are_named() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    plain = sk.logit_lens(model, tokenizer, TEXTS, ["a", "b"])
    with pytest.warns(UserWarning, match=r"the texts \[1\] at the layers \[1, 2, 3\], which have no ranks"):
        found = sk.logit_lens(model, tokenizer, TEXTS, ["a", "b"], steering=[None, overflowing(model), None])
    overflowed = (found["text"] == 1) & (found["layer"] > 0)
    assert found[overflowed][["rank", "log_prob", "prob"]].isna().all(axis=None)
    left = found[~overflowed].astype({"rank": plain["rank"].dtype})
    pd.testing.assert_frame_equal(left, plain[~overflowed], rtol=1e-4)


def test_most_probable_tokens_of_a_stream_that_overflows_have_no_rank_either() -> None:
    model = tiny_model()
    with pytest.warns(UserWarning, match="expected finite streams"):
        found = sk.logit_lens(model, tiny_tokenizer(), ["a"], 3, layers=1, steering=overflowing(model))
    assert found["rank"].isna().all()


def test_tokens_are_taken_as_an_array() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    found = sk.logit_lens(model, tokenizer, TEXTS, np.array([3, 5]))
    pd.testing.assert_frame_equal(found, sk.logit_lens(model, tokenizer, TEXTS, [3, 5]))


def test_a_negative_token_id_is_refused_as_one() -> None:
    with pytest.raises(ValueError, match="expected token ids from 0; got -1"):
        sk.logit_lens(tiny_model(), tiny_tokenizer(), TEXTS, [-1])


def test_a_model_whose_logits_need_more_than_the_last_stream_is_refused() -> None:
    model = tiny_model(seed=3)
    plain = model.forward

    def mixing(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.logits = out.logits + out.logits[:, :1]
        return out

    mixing.__signature__ = __import__("inspect").signature(plain)  # type: ignore[attr-defined]
    model.forward = mixing
    with pytest.raises(ValueError, match="position by position"):
        sk.logit_lens(model, tiny_tokenizer(), TEXTS)


def test_cohere_scales_its_logits_so_a_lens_without_the_scale_would_differ() -> None:
    model = build("cohere")
    assert model.config.logit_scale != 1
    stream = torch.randn(2, model.config.hidden_size)
    wanted = model.lm_head(model.model.norm(stream)) * model.config.logit_scale
    torch.testing.assert_close(unembed(model, stream), wanted.detach(), rtol=1e-4, atol=1e-4)
