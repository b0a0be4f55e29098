"""Models and tokenizers built in memory: small, random, whole."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

VOCABULARY = 260
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SMALL = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": None}
LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, **SMALL,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**LLAMA),
    "gemma2": lambda: Gemma2Config(**LLAMA, head_dim=8, sliding_window=8),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=256, **SMALL),
    "gpt_neox": lambda: GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        **SMALL,
    ),
}


def tiny_model(kind: str = "llama", seed: int = 0, context: int = 256) -> Any:
    """A random model of a few thousand parameters, wide enough in its weights that its texts are not constant."""
    config = CONFIGS[kind]()
    if context != 256:
        config.max_position_embeddings = context
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = Auto.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.12)
    finally:
        torch.random.set_rng_state(state)
    model.generation_config.eos_token_id = 256
    return model.eval()


def tiny_tokenizer(template: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: every text is 256 bytes' worth of ids, plus four special tokens; it has no pad token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|system|>", "<|assistant|>"]})
    tokenizer.chat_template = CHAT if template else None
    return tokenizer
