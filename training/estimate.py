"""Estimate of a run before it starts: tokens and memory of each stage, computed from the preset alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from training.presets import Preset
from training.train.checkpoints import LoRA

GIB = 2**30
ACTIVATIONS = 34  # bytes per token, layer and unit of width in 16 bits (Korthikanti et al. 2022, arXiv 2205.05198)


@dataclass(frozen=True)
class Shape:
    """Size of a model.

    Args:
        parameters: number of parameters.
        layers: number of decoder blocks.
        width: d_model.
        kv_width: cached numbers per token and layer, keys and values together.
    """

    parameters: int
    layers: int
    width: int
    kv_width: int


KNOWN: Mapping[str, Shape] = {
    "smollm2": Shape(134_515_008, 30, 576, 2 * 3 * 64),
    "meta-llama/Llama-3.1-8B-Instruct": Shape(8_030_261_248, 32, 4096, 2 * 8 * 128),
    "Qwen/Qwen2.5-7B-Instruct": Shape(7_615_616_512, 28, 3584, 2 * 4 * 128),
    "mistralai/Mistral-Nemo-Instruct-2407": Shape(12_247_782_400, 40, 5120, 2 * 8 * 128),
}
"""Sizes of the presets' checkpoints; an estimate of a preset needs no network."""


def shape_of(preset: Preset) -> Shape:
    """Return the size of a preset's model.

    It is read from `KNOWN`, or computed from the toy base model, or from the checkpoint's configuration.

    Example:
        >>> shape_of(get_preset("smollm2")).layers
        30
    """
    if preset.checkpoint is None:
        from training.toy.base_model import fresh_model, tokenizer_of
        from training.toy.worlds import WORLDS

        model = fresh_model(tokenizer_of(WORLDS[preset.family]), preset.base)
        base = preset.base
        return Shape(model.num_parameters(), base.layers, base.width, 2 * base.width)
    if preset.checkpoint in KNOWN:
        return KNOWN[preset.checkpoint]
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.from_pretrained(preset.checkpoint).get_text_config(decoder=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(model.num_parameters(), config.num_hidden_layers, config.hidden_size, 2 * kv_heads * head_width)


def estimate(
    preset: Preset, shape: Shape, agents: int = 3, width: int = 2, rows: int = 64, packed: bool = False
) -> pd.DataFrame:
    """Estimate the number of new tokens and the memory of each stage of a run.

    With P parameters, T trained ones, L layers, d_model d, and texts of t tokens, the memory in bytes is

        width P                                 weights, twice where they are packed (without training)
        + 12 T                                  float32 gradients and Adam's two moments, while training
        + width rows t L kv_width               cache, while generating `rows` texts of full length
        + 34 (width / 2) micro_batch t L d      activations of a backward pass (Korthikanti et al., arXiv 2205.05198)

    It leaves out prompts in the cache, trained embeddings and logits, and assumes no gradient checkpointing.

    Args:
        preset: the run.
        shape: size of its model, see `shape_of`.
        agents: agents of a debate.
        width: bytes per weight: 2 in bfloat16, 4 in float32.
        rows: texts generated at once.
        packed: generate with oneDNN's kernels, which keep a second copy of the weights (on a CPU).

    Returns:
        One row per stage: `texts`, `tokens_each` (maximum new tokens per text), `tokens`, and `memory_gib` of one
        device.

    Example:
        >>> preset = get_preset("llama-3.1-8b")
        >>> estimate(preset, shape_of(preset))
    """
    weights = width * shape.parameters / GIB

    def cache(texts: int, tokens: int) -> float:
        return width * texts * tokens * shape.layers * shape.kv_width / GIB

    def training(lora: LoRA | None, texts: int, tokens: int) -> float:
        trained = shape.parameters if lora is None else 14 * lora.r * shape.width * shape.layers * 2
        activations = ACTIVATIONS / 2 * width * texts * tokens * shape.layers * shape.width
        return (12 * trained + activations) / GIB

    sft, grpo = preset.sft, preset.grpo
    calls = agents * preset.debate.rounds
    answer_tokens = preset.debate.sampling.max_new_tokens
    sft_texts = sft.steps * sft.batch if sft.steps is not None else round(sft.epochs * preset.debates)
    trace_tokens = min(sft.max_length or calls * answer_tokens, calls * answer_tokens)
    grpo_texts = grpo.steps * grpo.prompts * grpo.generations
    clip = grpo.anneal.at(0.0)[1]
    test_tokens = preset.sampling.max_new_tokens
    copies = weights if packed else 0.0
    debate_memory = weights + copies + cache(min(rows, preset.debates * agents), answer_tokens)
    sft_memory = weights + training(sft.lora, sft.micro_batch, trace_tokens)
    grpo_memory = weights + copies + max(cache(rows, clip), training(grpo.lora, grpo.micro_batch, clip))
    test_memory = weights + copies + cache(min(rows, preset.test), test_tokens)
    stages = [
        ("debates", preset.debates * calls, answer_tokens, debate_memory),
        ("SFT", sft_texts, trace_tokens, sft_memory),
        ("GRPO", grpo_texts, clip, grpo_memory),
        ("evaluation, one method", preset.test, test_tokens, test_memory),
        ("evaluation, debates", preset.test * calls, test_tokens, test_memory),
    ]
    table = pd.DataFrame(stages, columns=["stage", "texts", "tokens_each", "memory_gib"])
    table.insert(3, "tokens", table["texts"] * table["tokens_each"])
    return table
