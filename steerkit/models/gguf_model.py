"""Load a model from a GGUF file: dequantised once, then from the dense cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from steerkit.io.json import read_json
from steerkit.models.checkpoint import explained, from_transformers, quiet
from steerkit.models.dense_cache import ABOUT, entry_of, is_complete, write_entry
from steerkit.models.gguf import (
    Header,
    apply_rope,
    check_tensors,
    follow_flags,
    header_in_place,
    read_header,
    shards_of,
)

CACHED_OPTIONS = {"dtype"}  # a model with other options is not kept


def from_gguf(
    checkpoint: str, gguf_file: str, options: Mapping[str, Any], model_options: Mapping[str, Any], keep: bool
) -> tuple[Any, Any, dict[str, Any], str]:
    """Read a GGUF file as a dense model.

    Args:
        checkpoint: its folder or hub id.
        gguf_file: its name; for a split model the first file.
        options: arguments of `from_pretrained` of both tokenizer and model.
        model_options: further arguments of the model's.
        keep: read the dense cache, and write it.

    Returns:
        `(model, tokenizer, report, weights)`: the report is transformers' `output_loading_info`, `weights` names the
        file's quantisation.

    Raises:
        ValueError: a damaged file, or content that cannot be computed: the architecture, the RoPE scaling, a tensor.
        OSError: there is no such file.
    """
    path = _local(checkpoint, gguf_file, options)
    dtype = str(model_options["dtype"]).removeprefix("torch.")
    keep = keep and set(model_options) <= {*CACHED_OPTIONS, "adapter_kwargs"}
    entry = entry_of(shards_of(path), dtype) if keep else None
    if entry is not None and is_complete(entry):
        own = {"trust_remote_code": options.get("trust_remote_code", False)}
        dense = {"dtype": model_options["dtype"], "use_safetensors": True}
        model, tokenizer, report = from_transformers(str(entry), own, dense)
        return model, tokenizer, report, str(read_json(entry / ABOUT)["weights"])
    header = read_header(path)
    model, tokenizer, report = _dequantised(header, options, model_options)
    if entry is not None:
        write_entry(entry, model, tokenizer, {"weights": header.quantization, "file": path.name})
    return model, tokenizer, report, header.quantization


def gguf_config(path: Path) -> Any:
    """Return the configuration of transformers that a GGUF file's header describes; weights are not read.

    Raises:
        ValueError: a damaged file, or an architecture that transformers does not read.
        OSError: there is no such file.

    Example:
        >>> gguf_config(Path("SmolLM2-135M-Instruct.Q4_1.gguf")).num_hidden_layers
        30
    """
    header = read_header(path)
    with header_in_place(header):
        return _config(header)


def _config(header: Header) -> Any:
    from transformers import AutoConfig

    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(header.path.parent), gguf_file=header.path.name)
    except Exception as error:  # each parser of transformers raises its own
        raise explained(error, str(header.path), False) from error
    apply_rope(config, header)
    return config


def _dequantised(
    header: Header, options: Mapping[str, Any], model_options: Mapping[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    from transformers import GgufConfig

    folder, name = str(header.path.parent), header.path.name
    given = {**options, "gguf_file": name}
    with header_in_place(header):
        config = _config(header)
        further = {"config": config, "quantization_config": GgufConfig(dequantize=True)}
        model, tokenizer, report = from_transformers(folder, given, {**model_options, **further})
        check_tensors(model, header)
    follow_flags(tokenizer, header)
    if any(parameter.dtype != model.dtype for parameter in model.parameters()) and model.dtype == torch.float32:
        raise ValueError(f"expected all weights of {name} in float32; got other types. Pass a dtype.")
    return model, tokenizer, report


def _local(checkpoint: str, gguf_file: str, options: Mapping[str, Any]) -> Path:
    """The file on this machine; one of a hub's repository is fetched."""
    path = Path(checkpoint) / gguf_file
    if path.is_file():
        return path
    from transformers.utils import cached_file

    further = {name: value for name, value in options.items() if name == "local_files_only"}
    try:
        return Path(str(cached_file(checkpoint, gguf_file, **further)))
    except OSError as error:
        raise explained(error, f"{checkpoint}/{gguf_file}", bool(further)) from error
