"""Tiny random models in both engines: every form of a block's output, `add` and `ablate`, at one layer and several.

Run by `python -m pytest tests/vllm/tiny_models.py` in the environment of vLLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Olmo2Config,
    Qwen2Config,
    StableLmConfig,
)

import steerkit as sk
from steerkit.generation.engine import Row
from steerkit.generation.generate import decode
from steerkit.generation.generator import Settings
from steerkit.serving.vllm import VLLM
from steerkit.vectors.vector import SteeringVector
from tests.tiny import tiny_tokenizer

WIDE = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 256,
    "pad_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**WIDE),
    "qwen2": lambda: Qwen2Config(**WIDE),
    "gemma3": lambda: Gemma3TextConfig(**WIDE, head_dim=32, sliding_window=16),
    "gpt2": lambda: GPT2Config(
        vocab_size=260, n_embd=64, n_layer=4, n_head=2, n_positions=256, bos_token_id=None, eos_token_id=256
    ),
    "cohere": lambda: CohereConfig(**WIDE),
    "stablelm": lambda: StableLmConfig(**WIDE),
    "olmo2": lambda: Olmo2Config(**WIDE),
}
"""olmo2 has no implementation of its own in vLLM 0.32: it runs through the Transformers backend."""
PROMPTS = ((65,), (66, 67, 68), tuple(range(70, 110)), (70, 71, 72, 73, 74), (200, 3, 5), tuple(range(70, 140)))
NEW_TOKENS = 16


def steerings(vector: SteeringVector) -> list[tuple[sk.Steering, ...]]:
    return [
        (),
        (sk.Steering(vector, 2.0, layer=1),),
        (sk.Steering(vector, -2.0, "all", layer=3),),
        (sk.Steering(vector, 1.0, "prompt", layer=(0, 1, 2, 3)),),
        (sk.Steering(vector, 1.0, "all", "ablate", layer=2),),
        (sk.Steering(vector, 1.0, "all+0", "ablate", layer="all"),),
        (sk.Steering(vector, 1.0, "all", "ablate", layer="all"),),
        (sk.Steering(vector, 1.0, "generated", "ablate", layer="all"),),
        (sk.Steering(vector, 2.0, "all", layer=1), sk.Steering(vector, 1.0, "all", "ablate", layer=1)),
    ]


@pytest.fixture(params=CONFIGS)
def checkpoint(request, tmp_path) -> Path:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param](), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_tokens_of_both_engines_are_equal(checkpoint, tmp_path) -> None:
    model, tokenizer = sk.load(checkpoint)
    width, count = model.config.hidden_size, model.config.num_hidden_layers
    generator = torch.Generator().manual_seed(1)
    vector = SteeringVector({layer: torch.randn(width, generator=generator) for layer in range(count)})
    rows = [Row(prompt, some) for prompt in PROMPTS for some in steerings(vector)]
    own = dict(p for batch in decode(model, tokenizer, rows, [], max_new_tokens=NEW_TOKENS) for p in batch)
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 160, "block_size": 32}
    with VLLM(checkpoint, vectors=tmp_path / "vectors", **options) as engine:
        found = engine.decode(tokenizer, rows, [()] * len(rows), Settings(NEW_TOKENS))
        theirs = dict(pair for batch in found for pair in batch)
    assert [theirs[i].all_ids for i in range(len(rows))] == [own[i].all_ids for i in range(len(rows))]
    plain = {row.prompt: own[i].all_ids for i, row in enumerate(rows) if not row.steerings}
    changed = sum(own[i].all_ids != plain[row.prompt] for i, row in enumerate(rows))
    assert changed >= len(rows) // 2
