"""Properties of a loaded model: the model inside a wrapper, its mode, its device, the arguments of its forward."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

RAISED = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a model's own code raises for inputs that it does not take."""


def unwrap(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper; any other model is returned as it is.

    Raises:
        TypeError: None, a path, or the pair that `sk.load` returns.
    """
    if model is None or isinstance(model, str | tuple):
        got = "a tuple" if isinstance(model, tuple) else repr(model)
        raise TypeError(
            f"expected a model in this process; got {got:.80}. Load one: model, tokenizer = sk.load(...). For a served "
            "model, sk.sweep and sk.score_choices have engine=."
        )
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set the model to eval mode (no dropout) inside the `with`, and restore the mode of each module afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def text_config(model: nn.Module) -> Any:
    """The configuration of the text decoder."""
    config = unwrap(model).config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def device_of(model: nn.Module) -> torch.device:
    """The device to which the model's inputs are moved: that of its first parameter.

    Where accelerate keeps this one elsewhere and loads it for each forward, it is the device of the forward.
    """
    base = unwrap(model)
    first = next(base.parameters())
    if not first.is_meta:
        return first.device
    hooks = (getattr(module, "_hf_hook", None) for module in base.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), first.device))


def widest_float(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device: float64, except on MPS, which has float32 at most."""
    return torch.float32 if device.type == "mps" else torch.float64


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return argument in inspect.signature(unwrap(model).forward).parameters
