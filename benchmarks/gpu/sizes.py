"""Sizes of models and batches: those for a GPU, and small ones with which the tests run the same code on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
LLAMA_SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True)
class Sizes:
    """What is run.

    Args:
        llama: configuration of the random model whose speed is measured.
        dtype: of its weights.
        layer: the steered and captured layer.
        rows: texts decoded at once.
        prompts: different prompts among them.
        width: tokens of a prompt.
        new: new tokens of a row.
        texts: captured texts, each of `width` tokens at most.
        pairs: timed pairs of each comparison.
        train_tokens: tokens of each text of an SFT step.
        completions: completions of a GRPO step.
        completion: new tokens of each of them.
        grpo_prompts: different prompts among them.
        grpo_micro_batch: completions per backward pass.
        recipe: preset, family and changed settings of the trainings of a real model.
        recipe_seeds: training seeds.
        processes: trainings at the same time.
        recipe_seconds: seconds after which trainings that have not ended are stopped.
        checkpoint: folder or GGUF file from which these trainings start; None is the preset's own.
        debates: file of their traces; None runs the debates first.
        folder: folder of their runs and of all other files that are no results.
        exact: configuration of the random model on which equivalences are tested.
    """

    llama: dict[str, Any]
    dtype: torch.dtype
    layer: int
    rows: int
    prompts: int
    width: int
    new: int
    texts: int
    pairs: int
    train_tokens: int = 2048
    completions: int = 32
    completion: int = 2000
    grpo_prompts: int = 8
    grpo_micro_batch: int = 2
    recipe: tuple[str, str, tuple[str, ...]] = ("smollm2", "addition", ())
    recipe_seeds: tuple[int, ...] = (20, 21, 22, 23)
    processes: int = 6
    recipe_seconds: float = 900.0
    checkpoint: Path | None = None
    debates: Path | None = None
    folder: Path = Path("runs/gpu-work")
    exact: dict[str, Any] = field(default_factory=lambda: dict(LLAMA_SMALL, hidden_size=512, num_hidden_layers=6))


FEW = (
    "base.width=16", "base.heads=2", "base.inner=32", "base.layers=1", "base.stop_at=0.0", "base.revised_at=0.0",
    "base.check_from=2", "base.check_every=2", "base.steps=4", "base.batch=8", "base.held=4", "debates=24", "fresh=24",
    "test=6", "debate.sampling.max_new_tokens=12", "sft.steps=2", "sft.batch=4", "sft.micro_batch=4", "grpo.steps=2",
    "grpo.prompts=2", "grpo.generations=2", "grpo.micro_batch=4", "grpo.must_end=false", "sampling.max_new_tokens=12",
)  # fmt: skip
"""Settings with which the preset `tiny` runs in seconds and learns nothing."""
CUDA = Sizes(LLAMA_8B, torch.bfloat16, layer=15, rows=72, prompts=8, width=128, new=64, texts=512, pairs=4)
SMALL = Sizes(
    LLAMA_SMALL,
    torch.float32,
    layer=1,
    rows=6,
    prompts=2,
    width=16,
    new=4,
    texts=8,
    pairs=3,
    train_tokens=128,
    completions=4,
    completion=8,
    grpo_prompts=2,
    recipe=("tiny", "arithmetic", FEW),
    recipe_seeds=(20,),
    exact=dict(LLAMA_SMALL),
)


def sizes_for(device: torch.device, small: bool = False) -> Sizes:
    """The sizes for a device; a CPU always has the small ones."""
    return SMALL if small or device.type != "cuda" else CUDA


HEAD = 8.0
"""Factor of the output matrix: with random weights a nucleus would otherwise hold most of the vocabulary."""


def random_llama(config: dict[str, Any], device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A Llama with random weights: speed and memory do not depend on their values, except for the width of a nucleus.

    The output matrix is multiplied by `HEAD`, so that a nucleus has few tokens, as in a trained model.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**config, **tokens), dtype=dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(HEAD)
    return model.eval()
