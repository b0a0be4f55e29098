"""PEFT adapters: load one onto a model and check it; which adapters are active."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from steerkit.models.hub import offline_options


def with_adapter(model: nn.Module, adapter: str | Path, trust_pickle: bool) -> nn.Module:
    """The model with a PEFT adapter on it, unmerged.

    Args:
        model: the base model; its modules are replaced in place by PEFT.
        adapter: hub id or folder of the adapter.
        trust_pickle: also read pickled weights, which can hold code.

    Raises:
        ValueError: no safetensors at `adapter`, damaged weights, or tensors for which the model has no parameter.
    """
    import peft
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError
    from transformers.utils import cached_file

    try:
        if not trust_pickle:
            cached_file(str(adapter), "adapter_model.safetensors", **offline_options(str(adapter)))
    except OSError as error:
        raise ValueError(
            f"expected an adapter with safetensors at {adapter}; got none. Check the path, or pass trust_pickle=True "
            "for a pickled adapter, which can hold code."
        ) from error
    try:
        adapted = peft.PeftModel.from_pretrained(model, str(adapter))
        stored = load_peft_weights(str(adapter), device="cpu")
    except SafetensorError as error:
        raise ValueError(f"expected a whole adapter at {adapter}; got {error}. Fetch it again.") from error
    loaded = peft.get_peft_model_state_dict(adapted)
    lost = [
        name
        for name, tensor in stored.items()
        if name not in loaded or not torch.equal(loaded[name].cpu(), tensor.to(loaded[name].dtype))
    ]
    if lost:
        raise ValueError(
            f"expected all {len(stored)} tensors of the adapter {adapter} in the model; {len(lost)} did not land, "
            f"e.g. {lost[0]!r}: the adapter was made for another base model, or other module names. Load it on its own "
            "base model."
        )
    return adapted


def active_adapters(model: nn.Module) -> set[str]:
    """The names of the adapters that are active in a forward; an empty set if they are disabled."""
    if not hasattr(model, "peft_config"):
        return set()
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}
