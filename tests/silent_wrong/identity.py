"""Models, adapters and tokenizers that pass for others."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import steerkit as sk
from steerkit.models.identity import describe, fingerprint, tokenizer_sha256
from steerkit.steering.steering import Steering
from tests.models.test_identity import adapted, with_bos
from tests.silent_wrong import plain
from tests.tiny import tiny_model, tiny_tokenizer

Fingerprint = Callable[[Any], tuple[str, str | None]]


def check_another_scaling_is_another_adapter(identify: Fingerprint) -> None:
    weak, strong = adapted("LORA", lora_alpha=8), adapted("LORA", lora_alpha=64)
    assert identify(weak)[0] == identify(strong)[0]
    assert identify(weak)[1] != identify(strong)[1]


def check_an_adapter_is_none_of_the_base(identify: Fingerprint) -> None:
    for kind in ("LORA", "LOHA", "OFT", "VERA"):
        assert identify(adapted(kind))[0] == identify(tiny_model())[0]


def check_a_disabled_adapter_is_not_counted(identify: Fingerprint) -> None:
    model = adapted("LOHA")
    with model.disable_adapter():
        assert identify(model) == identify(tiny_model())


def by_names(model: Any, pattern: str = r"lora_|modules_to_save|trainable_tokens|ia3_") -> tuple[str, str | None]:
    """Adapters found by the names of their tensors, without their scaling."""
    base, adapter, found = hashlib.sha256(), hashlib.sha256(), False
    for name, parameter in sorted(model.named_parameters()):
        plain = re.sub(r"^base_model\.model\.|\.base_layer", "", name)
        found |= bool(re.search(pattern, name))
        digest = adapter if re.search(pattern, name) else base
        digest.update(plain.encode() + parameter.detach().double().numpy().tobytes())
    return base.hexdigest(), adapter.hexdigest() if found else None


def by_more_names(model: Any) -> tuple[str, str | None]:
    return by_names(model, r"lora_|hada_|lokr_|oft_|vera_|ln_tuning|modules_to_save|trainable_tokens|ia3_")


def by_the_base_of_names(model: Any) -> tuple[str, str | None]:
    return by_names(model, r"lora_|hada_")


def check_a_first_token_makes_another_tokenizer(identify: Callable[[Any], str]) -> None:
    plain, changed = tiny_tokenizer(), tiny_tokenizer()
    with_bos(changed)
    assert plain("a")["input_ids"] != changed("a")["input_ids"]
    assert identify(plain) != identify(changed)
    assert identify(plain) == identify(tiny_tokenizer())


def vocabulary_alone(tokenizer: Any) -> str:
    return hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def check_a_vector_of_another_architecture_is_refused(apply: Callable[[Any, sk.SteeringVector], Any]) -> None:
    of_another = sk.SteeringVector({1: torch.ones(32)}, {"model_type": "qwen2", "n_layers": 24})
    with pytest.raises(ValueError, match="of a model like this one"):
        apply(tiny_model(), of_another)


def checked(model: Any, vector: sk.SteeringVector) -> None:
    with Steering(vector, 1.0, "all", foreign=True).on(model), torch.no_grad():
        model(input_ids=torch.tensor([[1, 2]]))


def by_width(model: Any, vector: sk.SteeringVector) -> None:
    assert vector.d_model == model.config.hidden_size and max(vector.layers) < model.config.num_hidden_layers


def check_a_vector_of_other_weights_is_refused(apply: Callable[[Any, sk.SteeringVector], Any]) -> None:
    """One architecture, other weights: the vector fits, and means nothing there."""
    model, changed = tiny_model(), tiny_model()
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    of_model = sk.SteeringVector({1: torch.ones(32)}, describe(model))
    apply(model, of_model)
    with pytest.raises(ValueError, match="foreign=True"):
        apply(changed, of_model)


def by_weights(model: Any, vector: sk.SteeringVector) -> None:
    with Steering(vector, 1.0, "all").on(model), torch.no_grad():
        model(input_ids=torch.tensor([[1, 2]]))


def by_architecture(model: Any, vector: sk.SteeringVector) -> None:
    names = ("model_type", "n_layers", "d_model", "dtype")
    if {name: vector.meta[name] for name in names} != {name: describe(model)[name] for name in names}:
        raise ValueError("expected a vector of this model. Pass foreign=True.")


SILENT: dict[str, tuple[Callable[[Any, Path], None], Any, Any]] = {
    "another scaling is another adapter": (plain(check_another_scaling_is_another_adapter), fingerprint, by_more_names),
    "an adapter is none of the base": (plain(check_an_adapter_is_none_of_the_base), fingerprint, by_names),
    "a disabled adapter is not counted": (
        plain(check_a_disabled_adapter_is_not_counted),
        fingerprint,
        by_the_base_of_names,
    ),
    "a first token makes another tokenizer": (
        plain(check_a_first_token_makes_another_tokenizer),
        tokenizer_sha256,
        vocabulary_alone,
    ),
    "a vector of other weights is refused": (
        plain(check_a_vector_of_other_weights_is_refused),
        by_weights,
        by_architecture,
    ),
    "a vector of another architecture is refused": (
        plain(check_a_vector_of_another_architecture_is_refused),
        checked,
        by_width,
    ),
}
