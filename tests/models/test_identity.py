"""Identity: what a fingerprint of weights, adapter and tokenizer covers, for every PEFT type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import steerkit as sk
from steerkit.models.identity import fingerprint, template_changes, tokenizer_sha256
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of PEFT and transformers

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
OPTIONS: dict[str, dict[str, Any]] = {  # what a type needs on a model of 32 dimensions
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4, "r": 0},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [3, 5]},
    "VBLORA": {"vector_length": 8, "num_vectors": 4, "topk": 2},
    "WAVEFT": {"n_frequency": 10},
}
NOT_OF_LAYERS = {"ADAPTION_PROMPT", "XLORA"}
"""Types that change more than single layers; `find_blocks` refuses the first, and the second forwards twice."""


def is_of_layers(kind: Any) -> bool:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    return not issubclass(config, peft.PromptLearningConfig) and kind.value not in NOT_OF_LAYERS


KINDS = sorted(kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING if is_of_layers(kind))


def adapted(kind: str, name: str = "default", dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A model with a random adapter of this type."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    options = {**ATTENTION, **OPTIONS.get(kind, {}), **more, "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model(), config(**options), adapter_name=name)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 9)[None]).logits


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainable_tensor_of_an_adapter_is_in_its_fingerprint_and_none_in_the_base(kind: str) -> None:
    model = adapted(kind)
    base, adapter = before = fingerprint(model)
    assert base == fingerprint(tiny_model())[0] and adapter is not None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.numel()]
    assert trained
    for parameter in trained:
        with torch.no_grad():
            kept = parameter.clone()
            parameter.add_(1.0)
            assert fingerprint(model)[0] == base and fingerprint(model)[1] != adapter
            parameter.copy_(kept)
    assert fingerprint(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_disabled_adapter_is_not_counted(kind: str) -> None:
    model = adapted(kind)
    with model.disable_adapter():
        assert fingerprint(model) == fingerprint(tiny_model())


@pytest.mark.parametrize("kind", KINDS)
def test_the_name_of_an_adapter_is_not_part_of_it(kind: str) -> None:
    assert fingerprint(adapted(kind)) == fingerprint(adapted(kind, name="other"))


@pytest.mark.parametrize("kind", ["LORA", "LOHA", "LOKR"])
def test_another_scaling_is_another_adapter(kind: str) -> None:
    key = "lora_alpha" if kind == "LORA" else "alpha"
    weak, strong = (adapted(kind, **{key: alpha}) for alpha in (8, 64))
    assert not torch.allclose(logits(weak), logits(strong), atol=1e-2)
    assert fingerprint(weak)[0] == fingerprint(strong)[0] and fingerprint(weak)[1] != fingerprint(strong)[1]


def test_a_scaling_that_is_changed_on_the_loaded_model_is_another_adapter() -> None:
    model = adapted("LORA")
    before = fingerprint(model)
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(2.0)
    assert fingerprint(model)[0] == before[0] and fingerprint(model)[1] != before[1]


@pytest.mark.parametrize("kind", ["LORA", "LOHA", "IA3", "LN_TUNING"])
def test_the_dtype_is_not_part_of_an_adapter(kind: str) -> None:
    assert fingerprint(adapted(kind)) == fingerprint(adapted(kind, dtype=torch.bfloat16))


def test_modules_to_save_and_trainable_tokens_belong_to_the_adapter() -> None:
    plain = fingerprint(tiny_model())
    for more in ({"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [3, 5]}):
        model = adapted("LORA", **more)
        base, adapter = fingerprint(model)
        assert base == plain[0] and adapter != fingerprint(adapted("LORA"))[1]
        with model.disable_adapter():
            assert fingerprint(model) == plain


def test_two_active_adapters_are_counted_in_any_order_and_an_inactive_one_is_not() -> None:
    def two(first: str, second: str) -> Any:
        model = adapted("LORA", name=first)
        config = peft.LoraConfig(**ATTENTION, r=8, task_type="CAUSAL_LM")
        model.add_adapter(second, config)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if f".{second}." in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    one, other = two("one", "two"), two("three", "four")
    assert fingerprint(one) == fingerprint(other) == fingerprint(adapted("LORA"))
    for model, names in ((one, ["one", "two"]), (other, ["four", "three"])):
        model.base_model.set_adapter(names)
    assert fingerprint(one) == fingerprint(other) != fingerprint(adapted("LORA"))


# Tokenizers


def test_a_tokenizers_hash_follows_what_it_does_and_not_its_use(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    before = tokenizer_sha256(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_sha256(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    assert tokenizer_sha256(AutoTokenizer.from_pretrained(tmp_path)) == before
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_sha256(tokenizer) != before


def with_bos(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", tokenizer.eos_token_id)]
    )


def with_lower_case(tokenizer: Any) -> None:
    from tokenizers.normalizers import Lowercase

    tokenizer.backend_tokenizer.normalizer = Lowercase()


@pytest.mark.parametrize("change", [with_bos, with_lower_case])
def test_another_normaliser_or_bos_rule_is_another_tokenizer(change: Callable[[Any], None]) -> None:
    plain, changed = tiny_tokenizer(), tiny_tokenizer()
    change(changed)
    assert tokenizer_sha256(plain) != tokenizer_sha256(changed)


def test_a_template_that_writes_the_date_is_found() -> None:
    tokenizer = tiny_tokenizer()
    assert not template_changes(tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + tokenizer.chat_template
    assert template_changes(tokenizer)
    assert not template_changes(tiny_tokenizer(template=False))


def test_a_sweep_is_not_resumed_with_another_scaling_or_tokenizer(tmp_path: Path) -> None:
    from steerkit.io.run_folder import ConfigurationChanged
    from tests.steering.test_steering import vector

    def run(model: Any, tokenizer: Any) -> Any:
        push = sk.SteeringVector(dict(vector(tiny_model(), 1).layers))
        return sk.sweep(model, tokenizer, push, ["ab"], coefficients=[1], max_new_tokens=2, out=tmp_path)

    run(adapted("LORA", lora_alpha=8), tiny_tokenizer())
    with pytest.raises(ConfigurationChanged, match="adapter_fingerprint"):
        run(adapted("LORA", lora_alpha=64), tiny_tokenizer())
    other = tiny_tokenizer()
    with_lower_case(other)
    with pytest.raises(ConfigurationChanged, match="tokenizer_sha256"):
        run(adapted("LORA", lora_alpha=8), other)


# Adapters with a tokenizer of their own


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def saved_adapter(base: Path, folder: Path, tokenizer: Any, **more: Any) -> Any:
    """An adapter on the base, saved with a tokenizer; a larger one makes the embeddings grow."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    config = peft.LoraConfig(r=4, **ATTENTION, init_lora_weights=False, task_type="CAUSAL_LM", **more)
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], ["embed_tokens"]])
def test_an_adapter_with_more_tokens_makes_the_model_grow(base: Path, tmp_path: Path, saved: list[str]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|new1|>", "<|new2|>"])
    trained = saved_adapter(base, tmp_path / "grown", tokenizer, modules_to_save=saved)
    with pytest.warns(UserWarning, match="differs from the base model's in its tokens; the adapter's is used"):
        model, found = sk.load(base, adapter=tmp_path / "grown")
    assert len(found) == len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    ids = found("a<|new1|>b<|new2|>")["input_ids"]
    assert len(ids) == 4
    with torch.no_grad():
        ours, theirs = (m(input_ids=torch.tensor([ids])).logits for m in (model, trained))
    torch.testing.assert_close(ours, theirs)


def test_an_adapter_of_a_smaller_vocabulary_is_refused_in_plain_words(base: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    saved_adapter(base, tmp_path / "small", tokenizer, modules_to_save=["embed_tokens"])
    larger = tiny_model()
    larger.resize_token_embeddings(280)
    larger.save_pretrained(tmp_path / "larger")
    tokenizer.save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match=r"embeddings of at least 280 tokens.*got \[260\]. Resize the base model"):
        sk.load(tmp_path / "larger", adapter=tmp_path / "small")


def test_the_template_in_an_adapters_folder_is_used(base: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}### assistant:\n"
    )
    trained = saved_adapter(base, tmp_path / "styled", tokenizer)
    with pytest.warns(UserWarning, match="differs from the base model's in its chat template"):
        model, found = sk.load(base, adapter=tmp_path / "styled")
    chat = [{"role": "user", "content": "hi"}]
    assert sk.render(found, chat).text.startswith("### user:")
    with pytest.warns(UserWarning, match="chat template"):
        alone, own = sk.load(tmp_path / "styled")
    assert sk.render(own, chat).text.startswith("### user:")
    assert fingerprint(alone) == fingerprint(model) and fingerprint(alone)[1] is not None
    torch.testing.assert_close(logits(alone), logits(trained))


def test_an_adapter_without_a_tokenizer_keeps_the_base_models(base: Path, tmp_path: Path) -> None:
    import warnings

    saved_adapter(base, tmp_path / "bare", tiny_tokenizer())
    for file in [*(tmp_path / "bare").glob("token*"), *(tmp_path / "bare").glob("chat*")]:
        file.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, found = sk.load(base, adapter=tmp_path / "bare")
    assert tokenizer_sha256(found) == tokenizer_sha256(tiny_tokenizer())


# What is compared


def test_a_vector_of_another_type_or_depth_is_refused_also_as_foreign() -> None:
    model = tiny_model()
    layers = {1: torch.ones(32)}
    for meta in ({"model_type": "qwen2"}, {"n_layers": 12}):
        steering = sk.Steering(sk.SteeringVector(layers, meta), foreign=True)
        with pytest.raises(ValueError, match="expected a vector of a model like this one"), steering.on(model):
            pass
    fine = sk.Steering(sk.SteeringVector(layers, {"model_type": "llama", "n_layers": 4, "model_fingerprint": "0"}))
    with pytest.raises(ValueError, match="foreign=True"), fine.on(model):
        pass


def test_another_device_or_version_warns_and_goes_on(tmp_path: Path) -> None:
    from steerkit.io.run_folder import run_folder

    with run_folder(tmp_path / "run", {"seed": 0}, {"device_kind": "cpu", "versions": {"torch": "1"}}):
        pass
    with (
        pytest.warns(UserWarning, match=r'device_kind: "cpu" -> "cuda"(?s:.*)versions.torch: "1" -> "2"'),
        run_folder(tmp_path / "run", {"seed": 0}, {"device_kind": "cuda", "versions": {"torch": "2"}}),
    ):
        pass


def test_a_vector_of_a_model_whose_adapter_is_merged_now_is_refused_with_the_reason_and_fits_again_afterwards() -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model, tokenizer = peft.get_peft_model(tiny_model(), config).eval(), tiny_tokenizer()
    pairs = [sk.ContrastPair(f"{i}", " yes", " no") for i in range(4)]
    steering = sk.Steering(sk.difference_in_means(sk.collect(model, tokenizer, pairs, position="last")), 1.0, layer=1)
    before = fingerprint(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into the weights: call model.unmerge_adapter\(\)"):
        sk.generate(model, tokenizer, ["x"], max_new_tokens=1, steering=steering)
    model.unmerge_adapter()
    assert fingerprint(model) == before
    assert len(sk.generate(model, tokenizer, ["x"], max_new_tokens=1, steering=steering)) == 1
