"""Identity: fingerprints of the weights and the adapter of a model, and its provenance."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from steerkit.io.files import sha256
from steerkit.io.versions import versions
from steerkit.models.adapters import active_adapters
from steerkit.models.blocks import find_blocks
from steerkit.models.model import device_of, unwrap

ORIGIN = "_steerkit_origin"
WRAPPERS = r"^base_model\.model\.|\.base_layer|\.original_module"
ADAPTERS = r"lora_|modules_to_save|trainable_tokens|ia3_"


def fingerprint(model: nn.Module) -> tuple[str, str | None]:
    """Fingerprints of the weights: `(base, adapter)`, 16 hexadecimal digits each; None if no adapter is active.

    A fingerprint is the SHA-256 of the name, the shape and 64 evenly spaced values of each parameter. The values are
    rounded to bfloat16, so a checkpoint has the same fingerprint in float32, float64 and bfloat16 and on any device.
    float16 rounds differently and has its own. Only adapters that are active now are counted.
    """
    active = active_adapters(model)
    base = hashlib.sha256()
    adapter = hashlib.sha256()
    has_adapter = False
    named = [(re.sub(WRAPPERS, "", name), name, parameter) for name, parameter in model.named_parameters()]
    for plain_name, name, parameter in sorted(named, key=lambda entry: entry[0]):
        in_adapter = hasattr(model, "peft_config") and bool(re.search(ADAPTERS, name))
        if in_adapter and not any(f".{adapter_name}." in f".{name}." for adapter_name in active):
            continue
        has_adapter |= in_adapter
        flat = _values_of(model, name, parameter).detach().reshape(-1)
        sample = flat[(torch.arange(64) * max(flat.numel() - 1, 0) // 63).to(flat.device)].cpu()
        sample = sample.to(torch.bfloat16).float() if sample.is_floating_point() else sample
        digest = adapter if in_adapter else base
        digest.update(f"{plain_name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return base.hexdigest()[:16], adapter.hexdigest()[:16] if has_adapter else None


def _values_of(model: nn.Module, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """The values of a parameter, also if accelerate keeps them on the disk and loads them for each forward."""
    if not parameter.is_meta:
        return parameter
    owner, _, attribute = name.rpartition(".")
    hook: Any = getattr(model.get_submodule(owner), "_hf_hook", None)
    if getattr(hook, "weights_map", None) is None:
        raise ValueError(
            f"expected the values of {name}; got a parameter on the meta device. Load the weights of the model first."
        )
    return hook.weights_map[attribute]


def describe(model: nn.Module, tokenizer: Any = None) -> dict[str, Any]:
    """The provenance of a model as plain data, for the metadata of what is read from it.

    Returns:
        A dict with checkpoint, stored weights, fingerprints, model type, dtype, attention kernel, device, blocks,
        numbers of layers and dimensions, and versions; with a tokenizer also the hash of its chat template.
    """
    base = unwrap(model)
    blocks = find_blocks(model)
    origin: Mapping[str, Any] = getattr(base, ORIGIN, {})
    dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
    base_fingerprint, adapter_fingerprint = fingerprint(model)
    description = {
        "checkpoint": origin.get("checkpoint") or getattr(base.config, "_name_or_path", "") or type(base).__name__,
        "weights": origin.get("weights", dtype),
        "model_fingerprint": base_fingerprint,
        "adapter_fingerprint": adapter_fingerprint,
        "model_type": getattr(base.config, "model_type", None),
        "dtype": dtype,
        "attention": getattr(base.config, "_attn_implementation", None),
        "device": str(device_of(base)),
        "blocks": blocks.path,
        "n_layers": len(blocks),
        "d_model": blocks.d_model,
        "versions": versions(),
    }
    if tokenizer is not None:
        template = getattr(tokenizer, "chat_template", None)
        description["template_sha256"] = sha256(str(template)) if template else None
        description["tokenizer_sha256"] = tokenizer_sha256(tokenizer)
    return description


def tokenizer_sha256(tokenizer: Any) -> str:
    """A hash of what the tokenizer does."""
    import json

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True))
    state = json.loads(backend.to_str())
    return sha256(json.dumps({**state, "truncation": None, "padding": None}, sort_keys=True))
