"""Safetensors files: those of this project, and the probes of the PyPI package steerkit (0.3.0, another project)."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from steerkit.io.tensors import HEADER, read_tensors
from steerkit.vectors.file import layers_of
from steerkit.vectors.vector import SteeringVector

PROBE = {"layer", "n_total_layers", "hook_site", "model_id", "default_method"}


def read_safetensors(path: Path) -> dict[str, SteeringVector] | None:
    """Return the vectors of the file by name; None for an unknown format.

    Raises:
        ValueError: not a complete safetensors file, or vectors for another hook point than a block's output.
    """
    metadata, tensors = read_tensors(path)
    if HEADER in metadata:
        return {path.stem: SteeringVector.load(path)}
    if metadata.get("kind") == "multinomial":
        raise ValueError("expected directions to add; got the weights of a classifier. Fit a probe for each.")
    return _probe(metadata, tensors) if metadata.keys() >= PROBE else None


def _probe(metadata: dict[str, str], tensors: dict[str, Tensor]) -> dict[str, SteeringVector]:
    """Return one vector per method (`direction.logistic`, ...), all read at the last token after the same block.

    That project counts the embedding as layer -1 and the final norm as layer `n_total_layers`; neither is a block.
    """
    layer, depth = metadata["layer"], metadata["n_total_layers"]
    hook = metadata.get("hook_name", f"blocks.{layer}.hook_{metadata['hook_site']}")
    is_block = re.fullmatch(r"[0-9]{1,6}", layer) and re.fullmatch(r"[0-9]{1,6}", depth) and int(layer) < int(depth)
    if not is_block or metadata["hook_site"] != "resid_post" or hook != f"blocks.{layer}.hook_resid_post":
        raise ValueError(
            f"expected directions for the stream after a block; got layer {layer} of {depth} at {hook!r}. "
            "Fit them at resid_post of a block."
        )
    vectors = {}
    for name, value in tensors.items():
        prefix, _, method = name.partition(".")
        meta = {
            "checkpoint": metadata["model_id"],
            "n_layers": int(depth),
            "read_position": "last",
            "method": method,
            "source": {"format": "probe of the PyPI package steerkit", **metadata},
        }
        vectors[method] = SteeringVector(layers_of({f"{prefix}.{int(layer)}": value}, "direction"), meta)
    return vectors
