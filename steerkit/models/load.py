"""Load a checkpoint: hub id, folder or GGUF file, with its tokenizer and an adapter."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from steerkit.io.progress import line, spinner
from steerkit.models.adapters import base_of_adapter, with_adapter
from steerkit.models.blocks import find_blocks
from steerkit.models.checkpoint import check_folder, check_weights, from_transformers
from steerkit.models.gguf_model import from_gguf
from steerkit.models.gguf_path import split_gguf
from steerkit.models.hub import offline_options
from steerkit.models.identity import ORIGIN, tokenizer_sha256
from steerkit.models.kernels import Kernels, check_kernels, set_kernels


def load(
    checkpoint: str | Path,
    *,
    adapter: str | Path | None = None,
    gguf_file: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | Mapping[str, str | int] | None = None,
    bits: int | None = None,
    blocks: str | None = None,
    backend: str | None = None,
    gguf_cache: bool = True,
    kernels: Kernels = "auto",
    trust_remote_code: bool = False,
    trust_pickle: bool = False,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, ready to be read and steered.

    Args:
        checkpoint: a hub id, a local folder, or the path of a `.gguf` file (dequantised to a dense model). A folder
            that holds an adapter alone is loaded with the base model that it names.
        adapter: a PEFT adapter (hub id or folder) to add, unmerged. If its folder holds a tokenizer, that one is
            returned, with its chat template.
        gguf_file: the name of the GGUF file inside `checkpoint`.
        dtype: default float32 on a CPU, the checkpoint's own dtype elsewhere.
        device: default the first GPU if there is one, else the CPU. `"auto"`, or a map from module to device, spreads
            the model over several devices, which may include the disk.
        bits: 4 or 8 quantises the weights while loading; needs a GPU and the package bitsandbytes.
        blocks: path of the list of decoder blocks, for models where `find_blocks` does not find it.
        backend: `"transformer_lens"` or `"nnsight"`: run forwards by that package (see
            `steerkit.models.backends.through`).
        gguf_cache: keep the dequantised model of a GGUF file as a checkpoint folder beside the hub's cache
            (`HF_HOME`/steerkit/gguf), from which the next load reads it. It is found by the content of the file.
        kernels: what computes the linear layers on a CPU: `"onednn"`, `"torch"`, or `"auto"`, the faster one (see
            `use_kernels`, which also sets it for a model that was loaded otherwise).
        trust_remote_code: run the Python code in the checkpoint. It can do anything that you can.
        trust_pickle: also read pickled weights (`.bin`) if there are no safetensors. A pickle can hold code. torch's
            restricted reader refuses it, but has had security holes.

    Returns:
        `(model, tokenizer)`: plain transformers (or PEFT) objects; the model in eval mode, its blocks verified.

    Raises:
        OSError: no checkpoint at `checkpoint`, or an unreachable hub.
        ImportError: a broken installation: the code of the model, or a package that it needs, cannot be imported.
        NoResidualStream: no list of decoder blocks passes verification.
        ValueError: damaged weights, pickled weights that are not trusted, or more or fewer weights than configured; an
            adapter that does not fit the model; an unknown device or dtype; `bits` that are not available.

    Warns:
        UserWarning: the adapter's tokenizer or chat template differs from the base model's.

    Example:
        >>> model, tokenizer = sk.load("HuggingFaceTB/SmolLM2-135M-Instruct", dtype="float32")
    """
    if adapter is None and (base := base_of_adapter(checkpoint)) is not None:
        checkpoint, adapter = base, checkpoint
    checkpoint, gguf_file = split_gguf(checkpoint, gguf_file)
    activity = f"loading {gguf_file or checkpoint}"
    with spinner(activity), line(activity):
        return _load(
            checkpoint,
            adapter,
            gguf_file,
            dtype,
            device,
            bits,
            blocks,
            backend,
            gguf_cache,
            kernels,
            trust_remote_code,
            trust_pickle,
        )


def _load(
    checkpoint: str,
    adapter: str | Path | None,
    gguf_file: str | None,
    dtype: torch.dtype | str | None,
    device: str | torch.device | Mapping[str, str | int] | None,
    bits: int | None,
    blocks: str | None,
    backend: str | None,
    gguf_cache: bool,
    kernels: Kernels,
    trust_remote_code: bool,
    trust_pickle: bool,
) -> tuple[Any, Any]:
    """`load`, without its progress display."""
    device_map = device if device == "auto" or isinstance(device, Mapping) else None
    target = _target(device if device_map is None else None)
    _check_dtype(dtype)
    check_kernels(kernels)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    model_options: dict[str, Any] = {}
    weights = None
    if gguf_file is None:
        check_folder(checkpoint, trust_pickle)
    if not trust_pickle and gguf_file is None:
        model_options["use_safetensors"] = True
    if offline := offline_options(checkpoint):
        options |= offline
        model_options["adapter_kwargs"] = offline
    if device_map is not None:
        model_options["device_map"] = device_map
    if bits is not None:
        model_options["quantization_config"] = _quantization(bits, gguf_file)
    if dtype is None:
        dtype = torch.float32 if target.type == "cpu" else "auto"
    model_options["dtype"] = dtype
    if gguf_file is not None:
        keeps = gguf_cache and device_map is None
        model, tokenizer, report, weights = from_gguf(checkpoint, gguf_file, options, model_options, keeps)
    else:
        model, tokenizer, report = from_transformers(checkpoint, options, model_options)
    if not getattr(model, "hf_device_map", None) and bits is None:
        model = model.to(target)
    name = f"{checkpoint}/{gguf_file}" if gguf_file else str(checkpoint)
    weights = weights or _stored_weights(model, bits)
    setattr(model, ORIGIN, {"checkpoint": name, "weights": weights})
    if adapter is not None:
        model = with_adapter(model, adapter, trust_pickle)
        tokenizer = _tokenizer_of_adapter(str(adapter), tokenizer, trust_remote_code)
    model.eval()
    check_weights(checkpoint, find_blocks(model, blocks), report)
    if backend is not None:
        from steerkit.models.backends import through

        model = through(model, tokenizer, backend)
    set_kernels(model, kernels)
    return model, tokenizer


def _stored_weights(model: Any, bits: int | None) -> str:
    """How the weights are held: quantised, or their data type."""
    if bits is not None:
        return f"{bits} bits (bitsandbytes)"
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    return str(getattr(method, "value", method)) if method else str(model.dtype).removeprefix("torch.")


def _tokenizer_of_adapter(adapter: str, tokenizer: Any, trust_remote_code: bool) -> Any:
    """The tokenizer in an adapter's folder, which it was trained with; the base model's if the folder holds none."""
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    options = offline_options(adapter)
    held = cached_file(
        adapter,
        "tokenizer_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
        **options,
    )
    if held is None:
        return tokenizer
    own = AutoTokenizer.from_pretrained(adapter, trust_remote_code=trust_remote_code, **options)
    differences = []
    if tokenizer_sha256(own) != tokenizer_sha256(tokenizer):
        differences.append("tokens")
    if own.chat_template != tokenizer.chat_template:
        differences.append("chat template")
    if differences:
        warnings.warn(
            f"the tokenizer of the adapter {adapter} differs from the base model's in its {' and '.join(differences)}; "
            "the adapter's is used.",
            UserWarning,
            stacklevel=3,
        )
    return own


def _target(device: str | torch.device | Mapping[str, str | int] | None) -> torch.device:
    """The device to which the whole model is moved; by default the first GPU if there is one, else the CPU."""
    if not isinstance(device, str | torch.device):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"expected an available device; got {device!r} without a GPU. Pass device='cpu'.")
    return target


def _check_dtype(dtype: torch.dtype | str | None) -> None:
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"expected a dtype such as 'float32' or 'bfloat16'; got {dtype!r}. Choose one.")


def _quantization(bits: int, gguf_file: str | None) -> Any:
    """The bitsandbytes configuration for weights of 4 or 8 bits."""
    from importlib.util import find_spec

    if bits not in (4, 8) or gguf_file is not None:
        raise ValueError(
            f"expected bits to be 4 or 8, and no GGUF file, which has its own quantisation; got {bits!r}. Leave it out."
        )
    if not torch.cuda.is_available() or find_spec("bitsandbytes") is None:
        raise ValueError(
            f"expected a GPU and the package bitsandbytes for {bits}-bit weights; one is missing. Leave `bits` out."
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
