"""PEFT adapters: loaded onto a model and checked, and which of them are active."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from steerkit.models.hub import offline_options


def with_adapter(model: nn.Module, adapter: str | Path, trust_pickle: bool) -> nn.Module:
    import peft
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError
    from transformers.utils import cached_file

    try:
        if not trust_pickle:
            cached_file(str(adapter), "adapter_model.safetensors", **offline_options(str(adapter)))
    except OSError as error:
        raise ValueError(
            f"expected an adapter with safetensors at {adapter}; got none. Check the path; a pickled one needs "
            "trust_pickle=True, and can hold code."
        ) from error
    try:
        adapted = peft.PeftModel.from_pretrained(model, str(adapter))
        wanted = load_peft_weights(str(adapter), device="cpu")
    except SafetensorError as error:
        raise ValueError(f"expected a whole adapter at {adapter}; got {error}. Fetch it again.") from error
    there = peft.get_peft_model_state_dict(adapted)
    lost = [k for k, v in wanted.items() if k not in there or not torch.equal(there[k].cpu(), v.to(there[k].dtype))]
    if lost:
        raise ValueError(
            f"expected all {len(wanted)} tensors of the adapter {adapter} in the model; {len(lost)} did not land, "
            f"e.g. {lost[0]!r}: it was made for another base model, or other module names. Load it on that one."
        )
    return adapted


def active_adapters(model: nn.Module) -> set[str]:
    """The names of the adapters that act in a forward now; none where they are disabled."""
    if not hasattr(model, "peft_config"):
        return set()
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}
