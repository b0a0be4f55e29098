"""The KV cache among the arguments and outputs of a forward: the only module that knows its names.

transformers 5.24 renamed the argument `past_key_values` (recurrent models: `cache_params`) to `cache`, in forwards and
in their outputs. All code that passes, reads or returns a cache uses these functions.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import DynamicCache, cache_utils

from steerkit.models.model import unwrap

NAMES = ("past_key_values", "cache_params", "cache")


def cache_argument(model: nn.Module) -> str | None:
    """The name under which the model's forward takes a KV cache; None if it takes none."""
    parameters = inspect.signature(unwrap(model).forward).parameters
    return next((name for name in NAMES if name in parameters), None)


def counts_tokens(model: nn.Module) -> bool:
    """Whether the model's forward takes a KV cache that counts its tokens; the state of a recurrent model does not.

    Recurrent models take a cache whose layers have no length, or a class of their own, such as `xLSTMCache`.
    """
    name = cache_argument(model)
    if name is None:
        return False
    annotation = str(inspect.signature(unwrap(model).forward).parameters[name].annotation)
    own = {word for word in re.findall(r"\w+", annotation) if word.endswith("Cache")} - set(vars(cache_utils))
    layers = DynamicCache(config=unwrap(model).config).layers
    return not own and (not layers or any(hasattr(layer, "get_seq_length") for layer in layers))


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward, under any of its names; None if there is none."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The cache in the output of a forward, under any of its names; None if there is none.

    Only declared fields are read: the old names are properties of newer outputs, and reading them logs a warning.
    """
    fields = {field.name for field in dataclasses.fields(output)} if dataclasses.is_dataclass(output) else set(NAMES)
    return next((getattr(output, name, None) for name in NAMES if name in fields), None)


def cache_field(output_class: type) -> str:
    """The name of the cache among the fields of an output class.

    Raises:
        TypeError: the class has no such field.
    """
    fields = {field.name for field in dataclasses.fields(output_class)}
    name = next((name for name in NAMES if name in fields), None)
    if name is None:
        raise TypeError(
            f"expected a field among {NAMES} in {output_class.__name__}; got {sorted(fields)}. Pass the output class "
            "of a causal language model with a cache."
        )
    return name
