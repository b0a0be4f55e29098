"""Files of torch.save, read without running code in them: layouts of the paper's scripts and of steering-vectors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerkit.vectors.vector import SteeringVector

PAPER = "scripts of arXiv 2604.24881"


def read_torch(path: Path) -> dict[str, SteeringVector] | None:
    """Return the vectors of the file by name; None for an unknown layout.

    `{"vectors": {"A1_vs_others": [d_model], ...}, "round_specific_vectors": {"round_1": {...}}, "config": {"layer"}}`
    and `{"steering_vector": [d_model], "config": {"layer"}}` are the paper's; `{"layer_activations": {layer:
    [d_model]}, "layer_type"}` or the inner dictionary alone are steering-vectors'.

    Raises:
        ValueError: damaged; code would have to run; a tensor that is no vector; another hook point.

    Warns:
        UserWarning: the scripts of the paper add their vectors one block earlier than they read them; a dictionary of
            layers alone does not name its hook point.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises various exceptions on a damaged file
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        message = " ".join(str(error).split())[:200]
        reason = f"a pickle that runs {code[1]}" if code else f"a file that cannot be read ({message})"
        raise ValueError(
            f"expected a complete file of tensors, numbers and texts only; got {reason}. No code in it was run. Save "
            "the tensors alone where it was made, e.g. torch.save(vector.layer_activations, path)."
        ) from error
    if not isinstance(content, dict) or not content:
        return None
    if "config" in content and ("vectors" in content or "steering_vector" in content):
        return _paper(content, path)
    if isinstance(content.get("layer_activations"), dict):
        return {path.stem: _steering_vectors(content["layer_activations"], content.get("layer_type"))}
    if all(isinstance(key, int) for key in content):
        return {path.stem: _steering_vectors(content, None)}
    return None


def from_steering_vectors(vector: Any) -> SteeringVector:
    """Return a `steering_vectors.SteeringVector` as a `SteeringVector`; both act on the output of the 0-based block l.

    To convert back: `steering_vectors.SteeringVector(dict(vector.layers))`.

    Raises:
        ValueError: it is for another hook point than the decoder blocks' outputs, or has a layer below 0.
    """
    return _steering_vectors(vector.layer_activations, vector.layer_type)


def _steering_vectors(layers: Mapping[Any, Any], layer_type: object) -> SteeringVector:
    if layer_type not in (None, "decoder_block"):
        raise ValueError(
            f"expected layer_type 'decoder_block', the stream after a block; got {layer_type!r}. Train the vector on "
            "decoder blocks."
        )
    tensors = {layer: _vector(value, layer) for layer, value in layers.items()}
    vector = SteeringVector(tensors, {"source": {"format": "steering-vectors", "layer_type": layer_type}})
    if layer_type is None:
        warnings.warn(
            "the file does not name the hook point of its vectors; the outputs of 0-based decoder blocks are assumed, "
            "steering-vectors' default.",
            stacklevel=4,
        )
    return vector


def _paper(content: dict[Any, Any], path: Path) -> dict[str, SteeringVector]:
    config = content["config"]
    layer = config.get("layer") if isinstance(config, dict) else None
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise ValueError(f"expected config['layer'] to be a block index from 0; got {layer!r:.80}. Correct the file.")
    if "vectors" in content:
        rounds = _dict(content.get("round_specific_vectors", {}), "round_specific_vectors")
        named = dict(_dict(content["vectors"], "vectors"))
        for number, vectors in rounds.items():
            named |= {f"{number}_{name}": value for name, value in _dict(vectors, str(number)).items()}
        common: dict[str, Any] = {"read_position": "last", "method": "one_against_others"}
        counts = _dict(content.get("counts", {}), "counts")
    else:
        named, counts = {path.stem: content["steering_vector"]}, {path.stem: config.get("num_samples")}
        common = {"read_position": -2, "method": "difference_in_means"}
    if not named:
        raise ValueError("expected one vector at least; got none. Save the file again.")
    plain = {str(key): value for key, value in config.items() if isinstance(value, str | int | float)}
    if isinstance(config.get("base_model"), str):
        common["checkpoint"] = config["base_model"]
    vectors = {}
    for name, value in named.items():
        count = {"n": counts[name]} if type(counts.get(name)) is int else {}
        meta = {**common, **count, "source": {"format": PAPER, "name": str(name), **plain}}
        vectors[str(name)] = SteeringVector({layer: _vector(value, name)}, meta)
    earlier = f"layer {layer - 1} here, SteeringVector({{{layer - 1}: ...}})" if layer else "the embedding's output"
    warnings.warn(
        f"imported at layer {layer}, the block after which it was read; the scripts that wrote it add it before block "
        f"{layer}, which is {earlier}.",
        stacklevel=4,
    )
    return vectors


def _dict(value: Any, name: str) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected {name} to be a dictionary by name; got {type(value).__name__}. Correct the file.")
    return value


def _vector(value: Any, name: object) -> Tensor:
    """Return the value as float32; ValueError unless it is a dense real vector whose storage holds all its numbers."""
    is_dense = isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"
    if not is_dense or not value.is_floating_point() or value.ndim != 1:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"expected {name!r:.80} to be a vector [d_model] of real numbers; got {got}. Convert it.")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"expected {name!r:.80} to hold its {value.numel()} numbers; got fewer. Save it again.")
    return value.detach().float()
