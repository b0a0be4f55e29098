"""Identity: which weights and adapter a model has, and its provenance."""

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
from steerkit.models.model import unwrap

ORIGIN = "_steerkit_origin"
WRAPPERS = r"^base_model\.model\.|\.base_layer|\.original_module"
ADAPTERS = r"lora_|modules_to_save|trainable_tokens|ia3_"


def fingerprint(model: nn.Module) -> tuple[str, str | None]:
    """What weights these are: `(base, adapter)`, 16 hexadecimal digits each; adapter is None where none is active.

    SHA-256 over each parameter's name, shape and 64 evenly spaced values rounded to bfloat16, so that the same
    checkpoint in float32, float64 or bfloat16 and on any device has the same fingerprint (float16 rounds otherwise and
    has its own). Of several adapters those count that are active now.
    """
    active = active_adapters(model)
    digests = {False: hashlib.sha256(), True: hashlib.sha256()}
    found = {False}
    named = [(re.sub(WRAPPERS, "", name), name, parameter) for name, parameter in model.named_parameters()]
    for plain, name, parameter in sorted(named, key=lambda entry: entry[0]):
        ours = hasattr(model, "peft_config") and bool(re.search(ADAPTERS, name))
        if ours and not any(f".{one}." in f".{name}." for one in active):
            continue
        found.add(ours)
        flat = _stored(model, name, parameter).detach().reshape(-1)
        sample = flat[(torch.arange(64) * max(flat.numel() - 1, 0) // 63).to(flat.device)].cpu()
        sample = sample.to(torch.bfloat16).float() if sample.is_floating_point() else sample
        digests[ours].update(f"{plain}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    base, adapter = (digests[ours].hexdigest()[:16] for ours in (False, True))
    return base, adapter if True in found else None


def _stored(model: nn.Module, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """The values of a parameter, also where accelerate keeps them on the disk and puts them in place for a forward."""
    if not parameter.is_meta:
        return parameter
    owner, _, short = name.rpartition(".")
    hook: Any = getattr(model.get_submodule(owner), "_hf_hook", None)
    if getattr(hook, "weights_map", None) is None:
        raise ValueError(f"expected the values of {name}; the model was built without them. Load its weights first.")
    return hook.weights_map[short]


def describe(model: nn.Module, tokenizer: Any = None) -> dict[str, Any]:
    """Provenance of a model as plain data: checkpoint, type, weights, fingerprints, dtype, kernel, blocks, versions."""
    base = unwrap(model)
    blocks = find_blocks(model)
    origin: Mapping[str, Any] = getattr(base, ORIGIN, {})
    dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
    weights, adapter = fingerprint(model)
    about = {
        "checkpoint": origin.get("checkpoint") or getattr(base.config, "_name_or_path", "") or type(base).__name__,
        "weights": origin.get("weights", dtype),
        "model_fingerprint": weights,
        "adapter_fingerprint": adapter,
        "model_type": getattr(base.config, "model_type", None),
        "dtype": dtype,
        "attention": getattr(base.config, "_attn_implementation", None),
        "device": str(next(base.parameters()).device),
        "blocks": blocks.path,
        "n_layers": len(blocks),
        "d_model": blocks.d_model,
        "versions": versions(),
    }
    if tokenizer is not None:
        template = getattr(tokenizer, "chat_template", None)
        about["template_sha256"] = sha256(str(template)) if template else None
    return about
