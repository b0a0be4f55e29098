"""Rollouts equal plain forwards of the policy token by token, and depend neither on the batch nor on a resume."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from steerkit.generation.generate import decode
from steerkit.generation.sampling import random_stream, sample
from steerkit.models.ends import ends_of
from tests.tiny import tiny_model, tiny_tokenizer
from training.train import rollouts as module
from training.train.checkpoints import LoRA, with_adapter
from training.train.rollouts import merged, rollouts

pytest.importorskip("peft", reason="the extra `train` is not installed")
PROMPTS = ["Problem: 1+2\n\n"] * 3 + ["Problem: 31+20\n\n"] * 3
NEW = 24


def policy() -> torch.nn.Module:
    """A model with an adapter that acts."""
    model = with_adapter(tiny_model(kind="llama"), LoRA(4, 8, 0.5), train_embeddings=False)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model.train()


def trainer(model: torch.nn.Module, step: int = 3) -> SimpleNamespace:
    return SimpleNamespace(
        model=model, processing_class=tiny_tokenizer(), args=SimpleNamespace(seed=5),
        state=SimpleNamespace(global_step=step), accelerator=SimpleNamespace(process_index=0),
        max_completion_length=NEW, temperature=0.9, top_p=0.95,
    )  # fmt: skip


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError


def by_hand(model: torch.nn.Module, prompt: str, index: int) -> list[int]:
    """One completion, the whole text forwarded again for every token."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(prompt)["input_ids"]
    uniform = torch.from_numpy(random_stream((5, "rollout", 3, 0, index), NEW))
    new_ids: list[int] = []
    model.eval()
    with torch.no_grad():
        for step in range(NEW):
            logits = model(input_ids=torch.tensor([ids + new_ids])).logits[:, -1]
            new_ids.append(int(sample(logits, uniform[step : step + 1], 0.9, 0.95)))
            if new_ids[-1] in ends_of(model, tokenizer):
                break
    return new_ids


def test_rollouts_are_those_of_plain_forwards_of_the_adapted_model_one_completion_at_a_time() -> None:
    model = policy()
    made = rollouts(PROMPTS, trainer(model))
    assert all(module.training for module in model.modules())  # as it was, though it wrote without dropout
    assert made["prompt_ids"] == [tiny_tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
    assert made["completion_ids"] == [by_hand(model, prompt, index) for index, prompt in enumerate(PROMPTS)]
    ends = ends_of(model, tiny_tokenizer())
    assert all(len(ids) == NEW or ids[-1] in ends for ids in made["completion_ids"])
    with model.disable_adapter():
        assert rollouts(PROMPTS, trainer(model))["completion_ids"] != made["completion_ids"]


def test_completions_of_a_prompt_differ_by_place_and_step_and_come_again_for_the_same() -> None:
    model = policy()
    first, again, later = (rollouts(PROMPTS, trainer(model, step))["completion_ids"] for step in (3, 3, 4))
    assert first == again
    assert first != later
    assert first[0] != first[1]


def test_a_merged_adapter_gives_the_same_logits_and_leaves_the_bits_of_all_weights() -> None:
    model, ids = policy().eval(), torch.tensor([[3, 4, 5, 6]])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with merged(model):
            changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
            torch.testing.assert_close(module.unwrap(model)(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(input_ids=ids).logits, adapted)
    assert len(changed) == 28  # seven projections in each of four blocks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_completions_of_a_merged_adapter_are_those_of_plain_forwards(monkeypatch) -> None:
    model = policy()
    monkeypatch.setattr(module, "device_of", lambda _: torch.device("cuda"))  # the way of a GPU, on a CPU
    used = []
    monkeypatch.setattr(
        module, "decode", lambda given, *rest, **more: used.append(given) or decode(given, *rest, **more)
    )
    made = rollouts(PROMPTS, trainer(model))
    assert used == [module.unwrap(model)]
    assert made["completion_ids"] == [by_hand(model, prompt, index) for index, prompt in enumerate(PROMPTS)]


def test_quantised_weights_weights_without_room_for_a_copy_and_models_without_an_adapter_are_not_merged() -> None:
    plain = tiny_model(kind="llama")
    with merged(plain):
        assert module.unwrap(plain) is plain
    model = policy()
    layer = module.unwrap(model).model.layers[0].self_attn.q_proj
    layer.base_layer.weight = torch.nn.Parameter(torch.zeros(32, 32, dtype=torch.uint8), requires_grad=False)
    with merged(model):
        assert not layer.merged
    layer.base_layer.weight = torch.nn.Parameter(torch.zeros(32, 32), requires_grad=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", out_of_memory)
        with merged(model):
            assert not layer.merged
