from __future__ import annotations

import pytest
import torch
from torch import nn

import steerkit as sk
from steerkit.models.blocks import NoResidualStream, find_blocks
from steerkit.models.identity import describe, fingerprint
from tests.capture.test_capture import TEXTS, hooks, relative
from tests.tiny import CONFIGS, tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter(folder, seed: int = 0, **options):
    """A LoRA adapter with weights that do something, saved beside its base."""
    import peft

    model = tiny_model()
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    return adapted


def test_a_saved_model_comes_back_with_its_fingerprint_in_eval_mode(folder) -> None:
    model, tokenizer = sk.load(folder)
    assert fingerprint(model) == fingerprint(tiny_model())
    assert not model.training and hooks(model) == 0
    about = describe(model, tokenizer)
    assert about["dtype"] == about["weights"] == "float32" and about["n_layers"] == 4 and about["d_model"] == 32
    assert about["checkpoint"] == str(folder) and len(about["template_sha256"]) == 64
    assert about["blocks"] == "model.layers" and about["adapter_fingerprint"] is None


def test_the_gguf_file_says_that_its_weights_were_quantised(smollm) -> None:
    model, tokenizer = smollm
    about = describe(model, tokenizer)
    assert about["weights"] == "Q4_1 (Q4_1 210, F32 61, Q8_0 1), dequantised" and about["dtype"] == "float32"
    assert about["n_layers"] == 30 and about["d_model"] == 576
    assert about["checkpoint"].endswith("SmolLM2-135M-Instruct.Q4_1.gguf")
    assert not getattr(model, "is_quantized", False)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_the_dtype_can_be_chosen(folder, dtype) -> None:
    model, _ = sk.load(folder, dtype=dtype)
    assert str(model.dtype).endswith(str(dtype).removeprefix("torch."))


@pytest.mark.filterwarnings("ignore:position='mean' includes position 0")
def test_an_adapter_unmerged_and_merged_read_and_steer_alike(folder, tmp_path) -> None:
    adapter(tmp_path / "adapter")
    model, tokenizer = sk.load(folder, adapter=tmp_path / "adapter")
    base, _ = sk.load(folder)
    unmerged = sk.collect(model, tokenizer, TEXTS, position="mean")
    steering = sk.Steering(sk.SteeringVector({1: 3 * torch.ones(32)}), 1.0, "from_last_prompt_token")
    text = sk.generate(model, tokenizer, TEXTS, max_new_tokens=6, steering=steering)
    assert fingerprint(model)[0] == fingerprint(base)[0]
    assert fingerprint(model)[1] is not None
    merged = model.merge_and_unload()
    assert relative(unmerged.resid, sk.collect(merged, tokenizer, TEXTS, position="mean").resid) < 1e-4
    assert text == sk.generate(merged, tokenizer, TEXTS, max_new_tokens=6, steering=steering)
    assert relative(unmerged.resid, sk.collect(base, tokenizer, TEXTS, position="mean").resid) > 1e-2
    assert text != sk.generate(merged, tokenizer, TEXTS, max_new_tokens=6)


def test_a_vector_of_the_base_is_foreign_to_its_adapter(folder, tmp_path) -> None:
    adapter(tmp_path / "adapter")
    base, tokenizer = sk.load(folder)
    vector = sk.difference_in_means(sk.collect(base, tokenizer, [sk.ContrastPair("a", "yes", "no")], layers=[1]))
    adapted, _ = sk.load(folder, adapter=tmp_path / "adapter")
    with pytest.raises(ValueError, match="foreign=True"):
        sk.generate(adapted, tokenizer, ["a"], max_new_tokens=1, steering=sk.Steering(vector))
    sk.generate(adapted, tokenizer, ["a"], max_new_tokens=1, steering=sk.Steering(vector, foreign=True))


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is none.*Check the path"):
        sk.load(tmp_path / "nothing.gguf")
    with pytest.raises(OSError, match="nothing"):
        sk.load(tmp_path / "nothing")


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_blocks_are_found_by_rule(kind: str) -> None:
    model = tiny_model(kind)
    blocks = find_blocks(model)
    assert len(blocks) == model.config.num_hidden_layers and blocks.d_model == 32
    assert hooks(model) == 0


def test_a_stream_that_is_changed_between_blocks_is_refused_with_the_reason() -> None:
    model = tiny_model()
    model.model.layers[2].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    with pytest.raises(NoResidualStream, match=r"model\.layers: block 2 does not receive what block 1 returned"):
        find_blocks(model)


def test_a_list_of_blocks_can_be_named_and_is_verified_all_the_same(folder) -> None:
    assert find_blocks(sk.load(folder, blocks="model.layers")[0]).path == "model.layers"
    with pytest.raises(NoResidualStream, match="there is no list of modules"):
        sk.load(folder, blocks="model.norm")


def test_a_shared_block_that_runs_twice_is_refused() -> None:
    model = tiny_model()
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(NoResidualStream, match="run once each, in order"):
        find_blocks(model)
