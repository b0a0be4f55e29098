"""GGUF control vectors: tensors `direction.k`, which llama.cpp and repeng add after the 0-based block k."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from steerkit.io.files import atomic_path
from steerkit.models.site_names import DEFAULT
from steerkit.vectors.file import PROVENANCE, compose, layers_of, parse
from steerkit.vectors.vector import SteeringVector

ARCHITECTURE = "controlvector"
MODEL_HINT = f"{ARCHITECTURE}.model_hint"
LAYER_COUNT = f"{ARCHITECTURE}.layer_count"
HEADER = "steerkit.header"
FLOATS = ("F16", "F32", "F64")


def read_gguf(path: str | Path) -> SteeringVector:
    """Read a control vector: a file of this project with its header, one of another with its fields in `meta`.

    llama.cpp keeps `direction.k` at offset `(k - 1) * n_embd` of its buffer, and adds the values at offset
    `(layer - 1) * n_embd` after block `layer`, so k is the layer (common.cpp, llama-adapter.cpp). repeng uses the same
    index. `direction.0`, which others write and llama.cpp refuses, is layer 0.

    Raises:
        ValueError: not a complete GGUF file, no control vector, a tensor that is no layer, or another hook point.
    """
    try:
        reader = _BoundsCheckedReader(path)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if field.types[0] != GGUFValueType.ARRAY and not name.startswith("GGUF.")
        }
    except Exception as error:  # the package raises various exceptions on a damaged file
        raise ValueError(f"expected a complete GGUF file; got a damaged one ({error!r}). Download it again.") from error
    architecture = fields.pop("general.architecture", None)
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"expected a GGUF file of architecture {ARCHITECTURE!r}; got {architecture!r}. "
            "If it is a model, load it with steerkit.load."
        )
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    if not set(kinds.values()) <= set(FLOATS):
        raise ValueError(
            f"expected tensors of {', '.join(FLOATS)}; got {sorted({*kinds.values()} - {*FLOATS})}. Convert them."
        )
    tensors = {tensor.name: _native(tensor.data).float() for tensor in reader.tensors}
    layers = layers_of(tensors, "direction")
    if HEADER in fields:
        return SteeringVector(layers, *parse(str(fields[HEADER]), layers))
    _check_hook_point(fields, list(layers))
    meta = {"source": {"format": "GGUF control vector", **fields}}
    for key, field in (("model_type", MODEL_HINT), ("checkpoint", "model.id"), ("method", "steerkit.method")):
        if isinstance(fields.get(field), str):
            meta[key] = fields[field]
    return SteeringVector(layers, meta)


def write_gguf(vector: SteeringVector, path: str | Path) -> None:
    """Write a control vector for llama.cpp and repeng, with a steerkit header that they ignore.

    `controlvector.model_hint` is the model's type, `controlvector.layer_count` the number of directions, as repeng
    writes them.

    Raises:
        ValueError: a vector at layer 0, after which llama.cpp adds nothing, or at another site than `resid_post`.

    Warns:
        UserWarning: names the fields that other readers ignore.
    """
    if vector.site != DEFAULT:
        raise ValueError(
            f"expected a vector at resid_post, where llama.cpp adds; got {vector.site}. Write a .safetensors file."
        )
    if 0 in vector.layers:
        rest = [layer for layer in vector.layers if layer]
        raise ValueError(
            "expected layers from 1, since llama.cpp adds nothing after block 0 and refuses 'direction.0'; got "
            f"{list(vector.layers)}. " + (f"Leave layer 0 out: .at(*{rest})." if rest else "Write a .safetensors file.")
        )
    header = compose(vector.meta, vector.layers, vector.site)
    with (
        atomic_path(path) as temporary,
        contextlib.closing(GGUFWriter(temporary, ARCHITECTURE)) as writer,  # closed before the file is renamed
    ):
        writer.add_string(MODEL_HINT, str(vector.meta.get("model_type") or "unknown"))
        writer.add_uint32(LAYER_COUNT, len(vector.layers))
        writer.add_string(HEADER, header)
        for layer, value in vector.layers.items():
            writer.add_tensor(f"direction.{layer}", value.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    ignored = ["hook point", "units", *(key for key in PROVENANCE if key in vector.meta and key != "model_type")]
    warnings.warn(
        "other readers of GGUF control vectors read only the directions and the model hint, not: "
        f"{', '.join(ignored)}. They add the vector at every position, to any model.",
        stacklevel=3,
    )


class _BoundsCheckedReader(GGUFReader):
    """The package's reader, with an error where a damaged file claims an array longer than the file."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *more: Any, **options: Any) -> Any:
        values = super()._get(offset, dtype, count, *more, **options)
        if len(values) != int(count):
            raise ValueError(f"the file ends inside the field at byte {offset}")
        return values


def _native(data: np.ndarray) -> torch.Tensor:
    """Return a copy in memory, in this machine's byte order."""
    return torch.from_numpy(np.array(data, dtype=data.dtype.newbyteorder("=")))


def _check_hook_point(fields: dict[str, Any], layers: list[int]) -> None:
    """Raise ValueError where the fields of the PyPI package steerkit name another hook point than a block's output."""
    site = fields.get("hook_site", "resid_post")
    depth = fields.get("n_total_layers", max(layers) + 1)
    names = {f"blocks.{layer}.hook_resid_post" for layer in layers}
    beyond = not isinstance(depth, int) or max(layers) >= depth
    if site != "resid_post" or fields.get("hook_name", min(names)) not in names or beyond:
        raise ValueError(
            f"expected vectors for the stream after a block; got hook_site {site!r}, hook_name "
            f"{fields.get('hook_name')!r}, layers {layers} of {depth}. Fit them at resid_post of a block."
        )
