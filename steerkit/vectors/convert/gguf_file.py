"""GGUF control vectors: tensors `direction.k`, which llama.cpp and repeng add after the 0-based block k, as we do."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from steerkit.io.files import atomic_path
from steerkit.vectors.file import PROVENANCE, compose, layers_of, parse
from steerkit.vectors.vector import SteeringVector

ARCHITECTURE = "controlvector"
HINT, COUNT, HEADER = f"{ARCHITECTURE}.model_hint", f"{ARCHITECTURE}.layer_count", "steerkit.header"
FLOATS = ("F16", "F32", "F64")


def read_gguf(path: str | Path) -> SteeringVector:
    """Read a control vector; one of ours comes back as it was, one of another project with its fields in `meta`.

    llama.cpp keeps `direction.k` at offset `(k - 1) * n_embd` of its buffer and adds what stands at
    `(layer - 1) * n_embd` after block `layer`, so k is the layer (common.cpp, llama-adapter.cpp); repeng uses the same
    index. `direction.0`, which others write and llama.cpp refuses, is layer 0.

    Raises:
        ValueError: no whole GGUF file, no control vector, a tensor that is no layer, a place that is not after a block.
    """
    try:
        reader = _Whole(path)
        said = {
            name: field.contents()
            for name, field in reader.fields.items()
            if field.types[0] != GGUFValueType.ARRAY and not name.startswith("GGUF.")
        }
    except Exception as error:  # the package raises whatever a damaged file makes it stumble over
        raise ValueError(f"expected a whole GGUF file; got one that is not ({error!r}). Fetch it anew.") from error
    architecture = said.pop("general.architecture", None)
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"expected a GGUF file of architecture {ARCHITECTURE!r}; got {architecture!r}. "
            "If it is a model, load it with steerkit.load."
        )
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    if not set(kinds.values()) <= set(FLOATS):
        raise ValueError(f"expected tensors of {', '.join(FLOATS)}; got {sorted({*kinds.values()} - {*FLOATS})}.")
    tensors = {tensor.name: _native(tensor.data).float() for tensor in reader.tensors}
    layers = layers_of(tensors, "direction")
    if HEADER in said:
        return SteeringVector(layers, parse(str(said[HEADER]), layers))
    _check_place(said, list(layers))
    meta = {"source": {"format": "GGUF control vector", **said}}
    for key, field in (("model_type", HINT), ("checkpoint", "model.id"), ("method", "steerkit.method")):
        if isinstance(said.get(field), str):
            meta[key] = said[field]
    return SteeringVector(layers, meta)


def write_gguf(vector: SteeringVector, path: str | Path) -> None:
    """Write a control vector that llama.cpp and repeng read; our header goes with it, and only we read that.

    `controlvector.model_hint` is the model's type, `controlvector.layer_count` the number of directions, as repeng
    writes them.

    Raises:
        ValueError: a vector at layer 0, after which llama.cpp adds nothing.

    Warns:
        UserWarning: what other readers will not see.
    """
    if 0 in vector.layers:
        rest = [layer for layer in vector.layers if layer]
        raise ValueError(
            "expected layers from 1, since llama.cpp adds nothing after block 0 and refuses 'direction.0'; got "
            f"{list(vector.layers)}. " + (f"Leave it out with .at(*{rest})." if rest else "Write a .safetensors file.")
        )
    header = compose(vector.meta, vector.layers)
    with (
        atomic_path(path) as temporary,
        contextlib.closing(GGUFWriter(temporary, ARCHITECTURE)) as writer,  # closed before it takes its place
    ):
        writer.add_string(HINT, str(vector.meta.get("model_type") or "unknown"))
        writer.add_uint32(COUNT, len(vector.layers))
        writer.add_string(HEADER, header)
        for layer, value in vector.layers.items():
            writer.add_tensor(f"direction.{layer}", value.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    unseen = ["hook point", "units", *(key for key in PROVENANCE if key in vector.meta and key != "model_type")]
    warnings.warn(
        f"other readers of GGUF control vectors see the directions and the model hint alone, not: {', '.join(unseen)}. "
        "They add it at every position, to whatever model they are given.",
        stacklevel=3,
    )


class _Whole(GGUFReader):
    """The package's reader, which would read on past the end of a file for as long as an array in it claims to be."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *more: Any, **options: Any) -> Any:
        values = super()._get(offset, dtype, count, *more, **options)
        if len(values) != int(count):
            raise ValueError(f"it ends inside what it says stands at byte {offset}")
        return values


def _native(data: np.ndarray) -> torch.Tensor:
    """A copy in memory, in this machine's byte order."""
    return torch.from_numpy(np.array(data, dtype=data.dtype.newbyteorder("=")))


def _check_place(said: dict[str, Any], layers: list[int]) -> None:
    """`ValueError` where the fields of the PyPI package steerkit say another place than after a block."""
    site, depth = said.get("hook_site", "resid_post"), said.get("n_total_layers", max(layers) + 1)
    names = {f"blocks.{layer}.hook_resid_post" for layer in layers}
    beyond = not isinstance(depth, int) or max(layers) >= depth
    if site != "resid_post" or said.get("hook_name", min(names)) not in names or beyond:
        raise ValueError(
            f"expected vectors for the stream after a block; got hook_site {site!r}, hook_name "
            f"{said.get('hook_name')!r}, layers {layers} of {depth}. Fit them at resid_post of a block."
        )
