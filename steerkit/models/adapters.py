"""PEFT adapters: load one onto a model and check it; which adapters are active."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steerkit.io.json import read_json
from steerkit.models.hub import offline_options
from steerkit.models.model import unwrap


def with_adapter(model: nn.Module, adapter: str | Path, trust_pickle: bool) -> nn.Module:
    """The model with a PEFT adapter on it, unmerged.

    Args:
        model: the base model; its modules are replaced in place by PEFT.
        adapter: hub id or folder of the adapter.
        trust_pickle: also read pickled weights, which can hold code.

    If the adapter was trained with more tokens than the model has, the model's embeddings grow before.

    Raises:
        ValueError: no safetensors at `adapter`, damaged weights, tensors for which the model has no parameter, or more
            tokens than the adapter has embeddings for.
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
        stored = load_peft_weights(str(adapter), device="cpu")
        _grow(model, stored, adapter)
        adapted = peft.PeftModel.from_pretrained(model, str(adapter))
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


def _grow(model: Any, stored: Mapping[str, torch.Tensor], adapter: str | Path) -> None:
    """Add rows to the embeddings where the adapter holds embeddings of more tokens.

    Raises:
        ValueError: the adapter's matrices have fewer rows than the model's, or differ in their number.
    """
    embeddings = {id(layer): layer for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    names = {name for name, module in model.named_modules() if id(module) in embeddings}
    rows = {
        tensor.shape[0]
        for name, tensor in stored.items()
        if name.removeprefix("base_model.model.").removesuffix(".weight") in names and tensor.ndim == 2
    }
    old = model.get_input_embeddings().weight.shape[0]
    if not rows or rows == {old}:
        return
    if len(rows) > 1 or max(rows) < old:
        raise ValueError(
            f"expected embeddings of at least {old} tokens, the model's, all of one number, in the adapter {adapter}; "
            f"got {sorted(rows)}. Resize the base model's embeddings to the adapter's, or load its own base model."
        )
    model.resize_token_embeddings(max(rows), mean_resizing=False)


def base_of_adapter(folder: str | Path) -> str | None:
    """The base model that an adapter's folder names; None if the folder holds no adapter alone.

    Raises:
        ValueError: the adapter's configuration names no base model.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        return None
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"expected the name of a base model in {folder / 'adapter_config.json'}; got none. Load the base model and "
            f"pass adapter={str(folder)!r}."
        )
    return str(base)


def has_merged_adapter(model: nn.Module) -> bool:
    """Whether an adapter is merged into the weights of a model, so that these are not those of its base."""
    return any(getattr(layer, "merged", False) is True for layer in model.modules() if _is_adapter_layer(layer))


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """The parameters of a model without its adapters: `(name, owner, attribute, parameter)`, each tensor once.

    PEFT replaces a layer by one that holds it. The names are those of the model before that.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
        module = _base_of(module)
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield path + attribute, module, attribute, parameter
        for name, child in module.named_children():
            yield from walk(child, f"{path}{name}.")

    yield from walk(model, "")


def active_adapter_parts(model: nn.Module) -> list[tuple[str, Any]]:
    """What the active adapters add: `(name, tensor or number)`, without the adapters' own names.

    The numbers are an adapter's scaling and its other settings per layer.
    """
    if not hasattr(model, "peft_config"):
        return []
    seen = {id(parameter) for *_, parameter in base_parameters(unwrap(model))}
    layers = {path: layer for path, layer in model.named_modules() if _is_adapter_layer(layer)}
    active = {name for layer in layers.values() if not layer.disable_adapters for name in layer.active_adapters}
    found = [
        (f"{path}.{name}", value)
        for path, layer in layers.items()
        if not layer.disable_adapters
        for name, value in _own_parts(layer, set(layer.active_adapters))
    ]
    for name, parameter in model.named_parameters():  # beside the layers, as in Shadow's own small model
        keys = name.split(".")
        beside = not any(".".join(keys[:depth]) in layers for depth in range(len(keys)))
        if active & set(keys) and beside:
            found.append((".".join(key for key in keys if key not in active), parameter))
    parts = []
    for name, value in found:
        if not isinstance(value, torch.Tensor):
            parts.append((name, value))
        elif id(value) not in seen:
            seen.add(id(value))
            parts.append((name, value))
    return parts if any(isinstance(value, torch.Tensor) for _, value in parts) else []


def _own_parts(layer: Any, active: set[str]) -> Iterator[tuple[str, Any]]:
    """The tensors and settings of a layer that belong to the active adapters, named without the adapter."""
    held = [*layer.named_parameters(), *layer.named_buffers()]
    settings = {*getattr(layer, "other_param_names", ()), *layer.adapter_layer_names, "scaling"}
    plain = [(name, getattr(layer, name, None)) for name in sorted(settings)]
    held += [
        (f"{name}.{key}", value) for name, group in plain if isinstance(group, dict) for key, value in group.items()
    ]
    for name, value in held:
        keys = name.split(".")
        adapters = [number for number, key in enumerate(keys) if key in active]
        if adapters and isinstance(value, torch.Tensor | int | float | str | bool):
            yield ".".join(keys[: adapters[0]] + keys[adapters[0] + 1 :]), value


def _is_adapter_layer(module: Any) -> bool:
    """Whether PEFT put this module in place of a layer: it can be turned off, and names its adapters' tensors."""
    return all(hasattr(module, name) for name in ("adapter_layer_names", "disable_adapters", "active_adapters"))


def _base_of(module: nn.Module) -> nn.Module:
    """The layer that an adapter's layer holds; any other module itself."""
    while _is_adapter_layer(module):
        inner = getattr(module, "original_module", None)
        module = module.base_layer if inner is None else inner  # type: ignore[assignment]
    return module
