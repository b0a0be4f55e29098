"""Adapters of training: which layers they cover, and that what is trained is float32 and saved in the model's type."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import steerkit as sk
from tests.tiny import tiny_model, tiny_tokenizer
from training.train.checkpoints import MODULES, LoRA, save, with_adapter
from training.train.sft import SFT

pytest.importorskip("trl", reason="the extra `train` is not installed")
from tests.training.test_training import model_and_tokenizer, traces
from training.train.sft import train_sft

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


def covered(model: torch.nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}


def test_an_adapter_covers_all_linear_layers_of_an_architecture_with_other_names_and_says_so() -> None:
    phi3 = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3", **SMALL))
    with pytest.warns(UserWarning, match="Phi3ForCausalLM lacks q_proj, k_proj, v_proj, gate_proj, up_proj"):
        adapted = with_adapter(phi3, LoRA(2, 2), train_embeddings=False)
    assert covered(adapted) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    llama = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert covered(with_adapter(llama, LoRA(2, 2), train_embeddings=False)) == set(MODULES)


@pytest.mark.parametrize("tied", [True, False])
def test_the_embeddings_of_a_bfloat16_model_are_trained_in_float32_and_read_in_bfloat16(tied) -> None:
    config = AutoConfig.for_model("llama", **SMALL, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    adapted = with_adapter(model, LoRA(2, 2), train_embeddings=True)
    trained = {name: weight.dtype for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert set(trained.values()) == {torch.float32} and any("embed_tokens" in name for name in trained)
    inner = adapted.get_base_model()
    assert inner.get_input_embeddings()(torch.tensor([[1, 2]])).dtype is torch.bfloat16
    shared = inner.get_input_embeddings().weight is inner.get_output_embeddings().weight
    assert shared == tied


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lora", [None, LoRA(4, 8)], ids=["full", "lora"])
def test_small_updates_of_a_bfloat16_model_are_kept_and_its_checkpoint_stays_bfloat16(
    tmp_path, lora, monkeypatch
) -> None:
    import training.train.sft as module

    model, tokenizer = model_and_tokenizer()
    before = model.to(torch.bfloat16).get_input_embeddings().weight.detach().clone()
    held = {}

    def looked_at(trained, *rest):
        held["table"] = trained.get_input_embeddings().weight.detach().clone()
        return save(trained, *rest)

    monkeypatch.setattr(module, "save", looked_at)
    setting = SFT(steps=3, batch=4, micro_batch=4, lora=lora, learning_rate=1e-6, bf16=True, warmup=0)
    checkpoint = train_sft(model, tokenizer, traces(), setting, tmp_path / "sft")
    moved = (held["table"][: len(before)].double() - before.double()).abs()
    assert held["table"].dtype is torch.float32 and 0 < moved.max() < 1e-5  # far below a step of bfloat16
    loaded, _ = sk.load(checkpoint, dtype="auto")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["untagged", "answer", "response", "first"])
def test_every_target_trains_the_embeddings_beside_an_adapter_as_the_whole_trace_does(tmp_path, target) -> None:
    model, tokenizer = model_and_tokenizer()
    before = model.get_input_embeddings().weight.detach().clone()
    setting = SFT(target=target, steps=1, batch=4, micro_batch=4, lora=LoRA(4, 8), learning_rate=1e-2, warmup=0)
    loaded, _ = sk.load(train_sft(model, tokenizer, traces(), setting, tmp_path / target))
    assert not torch.equal(loaded.get_input_embeddings().weight, before)


def test_a_float32_model_is_saved_as_it_is(tmp_path) -> None:
    model = tiny_model("llama")
    folder = save(with_adapter(model, None, train_embeddings=True), tiny_tokenizer(), tmp_path / "x", torch.float32)
    again = sk.load(folder)[0].state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())
