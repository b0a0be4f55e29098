"""A small random model of any causal language model type of transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from tests.tiny import VOCABULARY

LAYERS, WIDTH, HEADS, HEAD, INNER, EXPERTS, ROPE = 4, 64, 4, 16, 96, 4, 8
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "decoder_hidden_size", "embedding_size"), WIDTH),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "kv_channels", "linear_head_dim"), HEAD),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), INNER),
    **dict.fromkeys(("d_ff", "ffn_hidden_size", "dff", "feed_forward_size", "mlp_dim"), INNER),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": ROPE,
    "rotary_dim": ROPE,
    "index_topk": 8,
    "encoder_hash_byte_group_vocab": 500,
    "ngram_vocab_size_base": 500,
    "index_n_heads": 16,  # few heads would score several tokens 0, and ties fall either way
    "index_head_dim": 16,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "audio_vocab_size"), VOCABULARY),
    "hidden_size_per_layer_input": 16,
    "pad_token_id": 258,  # not 0, with which rows are filled up: a model that looks for it finds none
    "bos_token_id": 1,
    "eos_token_id": 256,
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size", "attention_chunk_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads"), 2),
    "linear_num_value_heads": 4,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "n_mamba_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    "mamba_d_ssm": 128,
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 8),
    "use_mamba_kernels": False,
    "is_decoder": True,
    "image_size": 32,
    "patch_size": 8,
    "type_vocab_size": 2,
    "depth": 2,
    **dict.fromkeys(("backbone_hidden_size", "adapter_in_dim", "adapter_out_dim", "adapter_input_size"), WIDTH),
    "tie_word_embeddings": False,  # tied random models repeat one token, steered or not: no text to compare
}
"""What one rule makes small; a configuration takes what it has a field for."""
LATENT = {"head_dim": ROPE, "num_key_value_heads": HEADS}
ROTARY = {"rope_type": "default", "rope_theta": 1e4}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
TURNS = {"layer_types": ["linear_attention", "full_attention"] * 2}
DRAFT: dict[str, Any] = {
    "text_config": {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "num_kv_shared_layers": 2,
        **SLIDING,
    }
}
PARTICULAR: dict[str, dict[str, Any]] = {
    "bailing_hybrid": TURNS,
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": SLIDING | {"rope_parameters": dict.fromkeys(SLIDING["layer_types"], ROTARY)},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": INNER},
    },
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense"] * LAYERS},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {
        "text_config": DRAFT["text_config"] | {"model_type": "gemma4_text", "num_kv_shared_layers": LAYERS}
    },
    "gemma4_unified_assistant": DRAFT,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": TURNS,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "moshi": {"sliding_window": 512},  # its forward without a cache has no window; its checkpoints have the context
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"] * 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
"""Per model type, what the rule does not know."""


def small_config(name: str) -> Any:
    """The configuration of a model type, made small."""
    kind = CONFIG_MAPPING[name]
    return kind(**_small(kind))


def _small(kind: Any) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(kind)}
    found: dict[str, Any] = {name: value for name, value in SIZES.items() if name in fields}
    if "kv_lora_rank" in fields:  # with latent attention every head has keys, and `head_dim` is their rotated part
        found |= {name: value for name, value in LATENT.items() if name in fields}
    for name, part in kind.sub_configs.items():
        if part is AutoConfig:
            chosen = PARTICULAR.get(kind.model_type, {}).get(name, {}).get("model_type")
            part = CONFIG_MAPPING[chosen] if chosen else type(getattr(kind(), name))
            found[name] = {"model_type": part.model_type}
        if dataclasses.is_dataclass(part):
            found[name] = found.get(name, {}) | _small(part)
    for name, value in PARTICULAR.get(kind.model_type, {}).items():
        found[name] = found.get(name, {}) | value if isinstance(value, dict) else value
    return found


def build(name: str) -> Any:
    """A small random model of a type; of a composite one that cannot be built, or not without other packages, its text
    part.
    """
    config = small_config(name)
    text = config.get_text_config(decoder=True)
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (AttributeError, ImportError, ValueError):
        if text is config:
            raise
        mapped = type(text) in MODEL_FOR_CAUSAL_LM_MAPPING
        make = AutoModelForCausalLM.from_config if mapped else getattr(transformers, CLASSES[name])._from_config
        model = make(text, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    return model.eval()
