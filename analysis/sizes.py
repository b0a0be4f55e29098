"""Memory and time that a sweep needs by model size, counted from configurations; no weights are loaded.

The memory is that of `training.memory`, with its margin. The seconds assume 40 % of the speed of the device's data
sheet (`training.estimate`). Both are estimates: no sweep of these sizes was run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from transformers import AutoConfig

from training.devices import DEVICES
from training.estimate import GIB, KNOWN, Shape, seconds_to_write
from training.memory import MARGIN, blank, generation, kv_width

QWEN: Mapping[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
LLAMA = KNOWN["meta-llama/Llama-3.1-8B-Instruct"]
LARGE_LLAMA = {
    **LLAMA,
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
MODELS: tuple[tuple[str, Mapping[str, Any], int], ...] = (
    ("Qwen2.5-1.5B", QWEN, 16),
    ("Llama-3.1-8B", LLAMA, 16),
    ("Llama-3.1-8B", LLAMA, 4),
    ("Llama-3.1-70B", LARGE_LLAMA, 16),
    ("Llama-3.1-70B", LARGE_LLAMA, 4),
)
"""Name, configuration, bits of a weight."""
ROWS, PROMPT, NEW = 72, 64, 64
FOUR_BITS = 0.5 + 4 / 64
"""Bytes of a weight in NF4: half a byte, and a float32 scale for each 64 weights."""


def sizes(device: str = "h100") -> pd.DataFrame:
    """Return memory and seconds of a sweep of 72 rows x 64 new tokens, with prompts of 64 tokens, for each of `MODELS`.

    With P parameters, of which E are embeddings: weights take 2 P bytes in bfloat16, and 2 E + 0.5625 (P - E) where the
    linear layers have 4 bits. The seconds of 4 bits are not estimated.

    Args:
        device: a GPU of `training.devices`.

    Returns:
        One row per model: `model`, `parameters`, `bits`, `memory_gib`, `device`, `seconds`.

    Example:
        >>> sizes("h200")["memory_gib"].round()
    """
    rows = []
    for name, given, bits in MODELS:
        config = AutoConfig.for_model(**given)
        parameters: Any = blank(config)
        total = parameters.num_parameters()
        shape = Shape(total, config.num_hidden_layers, config.hidden_size, kv_width(config), config=config)
        embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
        weights = 2 * total if bits == 16 else 2 * embeddings + FOUR_BITS * (total - embeddings)
        beside = generation(config, ROWS, PROMPT, NEW, torch.bfloat16, cpu=False)
        seconds = seconds_to_write(shape, DEVICES[device], ROWS, ROWS, PROMPT, NEW) if bits == 16 else None
        rows.append(
            {
                "model": name,
                "parameters": total,
                "bits": bits,
                "memory_gib": MARGIN * (weights + beside) / GIB,
                "device": device,
                "seconds": seconds,
            }
        )
    return pd.DataFrame(rows)
