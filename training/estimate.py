"""What a run will need, before it begins: tokens and memory by stage, as upper bounds from the preset alone."""

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
    """A model's size.

    Args:
        parameters: all of them.
        layers, width: blocks, and d_model.
        kv_width: numbers that the cache holds for a token in each layer, keys and values together.
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
"""Sizes of the presets' checkpoints, so that an estimate needs no network."""


def shape_of(preset: Preset) -> Shape:
    """The size of a preset's model: known, of the small world's base, or from the checkpoint's configuration."""
    if preset.checkpoint is None:
        from training.toy.model import fresh_model, tokenizer_of
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
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(model.num_parameters(), config.num_hidden_layers, config.hidden_size, 2 * heads * head)


def estimate(preset: Preset, shape: Shape, agents: int = 3, width: int = 2, rows: int = 64) -> pd.DataFrame:
    """A line per stage: texts, the most new tokens there can be, and GiB of memory on one device.

    Memory is weights, plus gradients and Adam's two moments in float32 for what is trained, plus the cache of `rows`
    texts at full length where text is generated, plus `34 tokens layers d_model` bytes of activations for each text of
    a backward pass.

    Args:
        agents: of a debate.
        width: bytes of a weight: 2 in bfloat16, 4 in float32.
        rows: texts generated at once.
    """
    weights = width * shape.parameters / GIB

    def cache(texts: int, tokens: int) -> float:
        return width * texts * tokens * shape.layers * shape.kv_width / GIB

    def training(lora: LoRA | None, texts: int, tokens: int) -> float:
        trained = shape.parameters if lora is None else 14 * lora.r * shape.width * shape.layers * 2
        activations = ACTIVATIONS / 2 * width * texts * tokens * shape.layers * shape.width
        return (12 * trained + activations) / GIB

    calls = agents * preset.debate.rounds
    told = preset.debate.sampling.max_new_tokens
    sft, grpo = preset.sft, preset.grpo
    learnt = sft.steps * sft.batch if sft.steps is not None else round(sft.epochs * preset.debates)
    trace = min(sft.max_length, calls * told)
    rolled = grpo.steps * grpo.prompts * grpo.generations
    clip = grpo.anneal.at(0.0)[1]
    long = preset.sampling.max_new_tokens
    lines = [
        ("debates", preset.debates * calls, told, weights + cache(min(rows, preset.debates * agents), told)),
        ("SFT", learnt, trace, weights + training(sft.lora, sft.micro_batch, trace)),
        ("GRPO", rolled, clip, weights + max(cache(rows, clip), training(grpo.lora, grpo.micro_batch, clip))),
        ("evaluation, one method", preset.test, long, weights + cache(min(rows, preset.test), long)),
        ("evaluation, debates", preset.test * calls, long, weights + cache(min(rows, preset.test), long)),
    ]
    table = pd.DataFrame(lines, columns=["stage", "texts", "tokens_each", "memory_gib"])
    table.insert(3, "tokens", table["texts"] * table["tokens_each"])
    return table
