"""Vectors made up, and files of them as other projects write theirs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

import steerkit as sk
from steerkit.vectors.vector import SteeringVector

WIDTH = 32


def values(*layers: int, seed: int = 0, size: float = 4.0) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: size * torch.randn(WIDTH, generator=generator) for layer in layers}


def made(*layers: int, **meta) -> SteeringVector:
    about = {"checkpoint": "tiny", "model_type": "llama", "model_fingerprint": "0" * 16, "adapter_fingerprint": None}
    rest = {"n_layers": 4, "d_model": WIDTH, "read_position": "mean", "template_sha256": None, "data_sha256": "f" * 64}
    return SteeringVector(values(*layers or (1, 2)), {**about, **rest, "n": 6, "method": "pca", **meta})


def same(a: SteeringVector, b: SteeringVector) -> bool:
    return list(a.layers) == list(b.layers) and all(torch.equal(a.layers[k], b.layers[k]) for k in a.layers)


def raw_safetensors(path: Path, header: object, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """A file with this header, as text or to be turned into JSON."""
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors or {"layer.1": torch.ones(WIDTH)}, path, metadata={"steerkit": text})


def raw_gguf(path: Path, tensors: dict[str, np.ndarray], architecture: str = "controlvector", **fields) -> None:
    """A GGUF file as another program writes it, with the package's own writer; `__` in a field's name is a dot."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add[type(value)](name.replace("__", "."), value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def their_gguf(path: Path, layers: dict[int, torch.Tensor]) -> None:
    directions = {f"direction.{k}": v.numpy() for k, v in layers.items()}
    raw_gguf(path, directions, controlvector__model_hint="llama", controlvector__layer_count=len(layers))


def their_script(path: Path, layers: dict[int, torch.Tensor]) -> None:
    ((layer, value),) = layers.items()
    torch.save({"steering_vector": value, "config": {"layer": layer, "base_model": "b", "num_samples": 9}}, path)


def their_agents(path: Path, layers: dict[int, torch.Tensor]) -> None:
    ((layer, value),) = layers.items()
    torch.save({"vectors": {"A1_vs_others": value}, "counts": {"A1_vs_others": 7}, "config": {"layer": layer}}, path)


def their_activations(path: Path, layers: dict[int, torch.Tensor]) -> None:
    torch.save({"layer_activations": layers, "layer_type": "decoder_block"}, path)


def their_probe(path: Path, layers: dict[int, torch.Tensor], **changed: str) -> None:
    ((layer, value),) = layers.items()
    about = {"schema_version": "3", "layer": str(layer), "n_total_layers": "4", "model_id": "tiny"}
    about |= {"hook_site": "resid_post", "hook_name": f"blocks.{layer}.hook_resid_post", "default_method": "logistic"}
    save_file({"direction.logistic": value}, path, metadata={**about, **changed})


THEIRS = [their_gguf, their_script, their_agents, their_activations, their_probe]


def read(path: Path) -> dict[str, SteeringVector]:
    """The file's vectors, whatever is said along the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return sk.read_vectors(path)


def write(vector: SteeringVector, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        sk.write_vector(vector, path)
