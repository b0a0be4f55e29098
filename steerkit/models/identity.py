"""Identity: fingerprints of the weights and the adapter of a model, and its provenance."""

from __future__ import annotations

import datetime
import hashlib
import json
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from steerkit.io.files import sha256
from steerkit.io.versions import versions
from steerkit.models.adapters import active_adapter_parts, base_parameters, has_merged_adapter
from steerkit.models.blocks import find_blocks
from steerkit.models.kernels import kernels_of
from steerkit.models.memory import few_values, is_released, is_unchanged, release_file_pages
from steerkit.models.model import device_of, unwrap
from steerkit.text.tokens import tokenizer_rules

ORIGIN = "_steerkit_origin"


def fingerprint(model: nn.Module) -> tuple[str, str | None]:
    """Fingerprints of the weights: `(base, adapter)`, 16 hexadecimal digits each; None if no adapter is active.

    A fingerprint is the SHA-256 of the name, the shape and 64 evenly spaced values of each parameter. The values are
    rounded to bfloat16, so a checkpoint has the same fingerprint in float32, float64 and bfloat16 and on any device.
    float16 rounds differently and has its own.

    The base fingerprint is that of the model without adapters, also inside `disable_adapter()`. The adapter's covers
    the tensors and the scaling of all adapters that are active now, of any PEFT type, and not their names.
    """
    base, adapter = hashlib.sha256(), hashlib.sha256()
    parts: list[tuple[str, bytes]] = []
    for name, tensor in sorted(_base_tensors(model), key=lambda entry: entry[0]):
        base.update(_sample(name, tensor))
    for name, value in active_adapter_parts(model):
        parts.append((name, _sample(name, value) if isinstance(value, torch.Tensor) else f"{name}={value!r}".encode()))
    for _, part in sorted(parts):
        adapter.update(part)
    return base.hexdigest()[:16], adapter.hexdigest()[:16] if parts else None


def fingerprint_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """The base fingerprint of a model with these parameters, by name; see `fingerprint`."""
    base = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        base.update(_sample(name, tensor))
    return base.hexdigest()[:16]


def _base_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The parameters of the model without adapters, under the names that they have there."""
    return [
        (name, _values_of(owner, attribute, parameter))
        for name, owner, attribute, parameter in base_parameters(unwrap(model))
    ]


def _sample(name: str, tensor: torch.Tensor) -> bytes:
    """The name, shape and 64 values of a tensor."""
    return f"{name}{tuple(tensor.shape)}".encode() + _spaced_values(tensor.detach().reshape(-1))


_known_values: dict[int, tuple[Any, bytes]] = {}
"""By address, for weights whose pages were given back: what they were like, and their 64 values.

Reading 64 places of a mapped weight brings most of it back into memory.
"""


def _spaced_values(flat: torch.Tensor) -> bytes:
    """64 evenly spaced values, rounded to bfloat16."""
    address = flat.data_ptr()
    given_back = is_released(flat)
    state: Any = None
    if given_back:
        version = -1 if flat.is_inference() else flat._version
        state = version, flat.numel(), flat.dtype, few_values(flat)
        if address in _known_values and _known_values[address][0] == state and is_unchanged(flat):
            return _known_values[address][1]
    chosen = torch.arange(64) * max(flat.numel() - 1, 0) // 63
    sample = flat[chosen.to(flat.device)].cpu() if flat.numel() else flat.cpu()
    sample = sample.to(torch.bfloat16).float() if sample.is_floating_point() else sample
    values = sample.numpy().tobytes()
    if given_back:
        release_file_pages(flat)
        _known_values[address] = state, values
    return values


def _values_of(owner: nn.Module, attribute: str, parameter: torch.Tensor) -> torch.Tensor:
    """The values of a parameter, also if accelerate keeps them on the disk and loads them for each forward."""
    if not parameter.is_meta:
        return parameter
    hook: Any = getattr(owner, "_hf_hook", None)
    if getattr(hook, "weights_map", None) is None:
        raise ValueError(
            f"expected the values of {attribute} of a {type(owner).__name__}; got a parameter on the meta device. Load "
            "the weights of the model first."
        )
    return hook.weights_map[attribute]


def describe(model: nn.Module, tokenizer: Any = None) -> dict[str, Any]:
    """The provenance of a model as plain data, for the metadata of what is read from it.

    Returns:
        A dict with checkpoint, stored weights, fingerprints, model type, dtype, attention kernel, device, kernels of
        its linear layers, blocks, numbers of layers and dimensions, and versions; with a tokenizer also its hash and
        that of its chat template.
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
        "kernels": kernels_of(model),
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


def other_model(meta: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """What `meta` says of its model and `about` says otherwise: of model type, depth and fingerprints.

    What one of them does not say is no difference.
    """
    said = [name for name in ("model_type", "n_layers") if None not in (meta.get(name), about.get(name))]
    if None not in (meta.get("model_fingerprint"), about.get("model_fingerprint")):
        said += ["model_fingerprint", "adapter_fingerprint"]
    return {name: meta.get(name) for name in said if meta.get(name) != about.get(name)}


def check_origin(
    what: str, meta: Mapping[str, Any], model: nn.Module, weights: tuple[str, str | None], foreign: bool = False
) -> None:
    """`ValueError` where the provenance of a vector or a condition names another model.

    Args:
        what: is checked, for the message.
        meta: its provenance.
        weights: the model's fingerprints.
        foreign: other weights are allowed; another type or depth never is.
    """
    about = {
        "model_type": getattr(unwrap(model).config, "model_type", None),
        "n_layers": len(find_blocks(model)),
        "model_fingerprint": weights[0],
        "adapter_fingerprint": weights[1],
    }
    other = other_model(meta, about)
    fingerprints = {name: other.pop(name) for name in ("model_fingerprint", "adapter_fingerprint") if name in other}
    if other:
        actual = {name: about[name] for name in ("model_type", "n_layers")}
        raise ValueError(
            f"expected {what} of a model like this one, {actual}; it was read from one with {other} "
            f"({meta.get('checkpoint', 'unknown')}). Extract it from this model, or the one it was trained from."
        )
    if fingerprints and not foreign:
        read_from = meta.get("model_fingerprint"), meta.get("adapter_fingerprint")
        merged = " An adapter is merged into the weights: call model.unmerge_adapter() first."
        raise ValueError(
            f"expected {what} read from this model, {weights}; it was read from {read_from} "
            f"({meta.get('checkpoint', 'unknown')}). Pass foreign=True to use a vector from another model."
            + (merged if has_merged_adapter(model) else "")
        )


IDENTITY = (
    "model_fingerprint",
    "adapter_fingerprint",
    "dtype",
    "attention",
    "kernels",
    "template_sha256",
    "tokenizer_sha256",
)


def identity(about: Mapping[str, Any]) -> dict[str, Any]:
    """What of a model's description decides its results: a resumed run with another one is refused.

    The fingerprint has 64 numbers of each weight: an edit of one head or neuron may leave it as it is. Use another
    folder after such an edit.
    """
    return {key: about[key] for key in IDENTITY}


def provenance(about: Mapping[str, Any]) -> dict[str, Any]:
    """What of a model's description may differ when a run is resumed, with a warning: device kind and versions."""
    return {"device_kind": str(about["device"]).partition(":")[0], "versions": about["versions"]}


_tokenizer_hashes: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()


def tokenizer_sha256(tokenizer: Any) -> str:
    """A hash of what the tokenizer does: vocabulary, merges, normaliser, pre-tokeniser, decoder, BOS and EOS rules.

    Its use (padding, truncation) does not change it, nor does saving and loading. It is kept per tokenizer, and made
    again when tokens were added or a rule was changed.
    """
    known, now = _tokenizer_hashes.get(tokenizer), tokenizer_rules(tokenizer)
    if known is None or known[0] != now:
        known = now, _hash_of(tokenizer)
        _tokenizer_hashes[tokenizer] = known
    return known[1]


def _hash_of(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    if backend is None:
        settings = {
            key: getattr(tokenizer, key, None) for key in ("add_bos_token", "add_eos_token", "add_prefix_space")
        }
        state: Any = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), **settings}
    else:
        state = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    return sha256(json.dumps([state, special], sort_keys=True))


def template_changes(tokenizer: Any) -> bool:
    """Whether the chat template renders the same messages otherwise on another day, or at random."""
    from unittest import mock

    from transformers.utils import chat_template_utils

    if not getattr(tokenizer, "chat_template", None):
        return False
    rendered = set()
    for year in (2001, 2001, 2011):
        clock = mock.Mock(wraps=datetime.datetime)
        clock.now = lambda tz=None, year=year: datetime.datetime(year, 2, 3, 4, 5, 6, tzinfo=tz)
        with mock.patch.object(chat_template_utils, "datetime", clock):
            messages = [{"role": "user", "content": "Hi"}]
            rendered.add(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return len(rendered) > 1
