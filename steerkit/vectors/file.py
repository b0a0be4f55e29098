"""Vector files: the header, metadata that fixes the hook point, the operation and the model of a vector."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import NoneType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.io.files import sha256, utf8
from steerkit.io.json import canonical_json
from steerkit.io.tensors import parsed_object
from steerkit.models.site_names import DEFAULT, SITES

FORMAT = "steerkit.vector/1"
FIXED = {
    "format": FORMAT,
    "operation": "add",
    "layer_convention": "0-based block index",
}
DERIVED = ("units", "content")
HOOK_POINT = "hook_point"
PROVENANCE: dict[str, tuple[type, ...]] = {  # field of `meta` -> its allowed types
    "checkpoint": (str,),
    "model_type": (str, NoneType),
    "model_fingerprint": (str, NoneType),
    "adapter_fingerprint": (str, NoneType),
    "n_layers": (int,),
    "d_model": (int,),
    "read_position": (str, int),
    "template_sha256": (str, NoneType),
    "data_sha256": (str,),
    "n": (int,),
    "method": (str,),
}
Layers = Mapping[int, Float[Tensor, " d_model"]]


def compose(meta: Mapping[str, Any], layers: Layers, site: str = DEFAULT) -> str:
    """Return the header of these vectors as JSON: `meta`, the fixed fields, the hook point, and the computed fields.

    Raises:
        ValueError: `meta` contradicts a fixed field, or `parse` would refuse the header.
    """
    fixed = {**FIXED, HOOK_POINT: site}
    clash = {key: meta[key] for key, value in fixed.items() if meta.get(key, value) != value}
    if clash:
        raise ValueError(f"expected meta that agrees with {fixed}; got {clash}. Remove these keys from meta.")
    text = canonical_json({**meta, **fixed, "units": units(layers), "content": content(layers, site)})
    utf8(text)
    parse(text, layers)
    return text


def parse(text: str, layers: Layers) -> tuple[dict[str, Any], str]:
    """Return the `meta` and the site in a header, after checking that it has this format and belongs to these vectors.

    Old files may lack `operation`, `units` and `content`; the other fixed fields are required.

    Raises:
        ValueError: larger than 1 MiB, not a JSON object, a duplicate key, NaN; another format, operation or layer
            convention; an unknown hook point; a field of a wrong type; a layer or width that its own model does not
            have; `units` or `content` that do not match the vectors.
    """
    header = parsed_object(text)
    for key, expected in FIXED.items():
        value = header.get(key, expected if key == "operation" else None)
        if value != expected:
            raise ValueError(
                f"expected {key} {expected!r} in the header; got {_shortened(value)}. "
                "Convert it with the program that wrote it."
            )
    site = header.get(HOOK_POINT)
    if site not in SITES:
        raise ValueError(
            f"expected hook_point among {SITES} in the header; got {_shortened(site)}. Convert it with the program "
            "that wrote it."
        )
    for key, kinds in PROVENANCE.items():
        if key in header and (isinstance(header[key], bool) or not isinstance(header[key], kinds)):
            names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
            raise ValueError(
                f"expected {key} in the header to be {names}; got {_shortened(header[key])}. Correct it in meta and "
                "save the vector again."
            )
    last, width = max(layers), next(iter(layers.values())).shape[0]
    depth, d_model = header.get("n_layers", last + 1), header.get("d_model", width)
    if last >= depth or (width != d_model and site != "z"):
        raise ValueError(
            f"expected layers below {depth} of width {d_model}, the model's in the header; got layer {last} of "
            f"width {width}. Header and tensors belong to different files: save the vector again."
        )
    for key, computed in (("units", units(layers)), ("content", content(layers, site))):
        if header.get(key, computed) != computed:
            raise ValueError(
                f"expected the values that the header was written with, {key} {_shortened(header[key])}; got "
                f"{computed!r}. The file was damaged or changed: download or save it again."
            )
    return {key: value for key, value in header.items() if key not in (*FIXED, HOOK_POINT, *DERIVED)}, site


def layers_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[int, Float[Tensor, " d_model"]]:
    """Return tensors named `PREFIX.N` as layer N -> vector, in the order of the layers.

    Raises:
        ValueError: no tensor, a name that is not `PREFIX.N` (leading zeros included), or a tensor that is not float32
            `[d_model]`.
    """
    layers = {}
    for name, value in tensors.items():
        match = re.fullmatch(rf"{re.escape(prefix)}\.(0|[1-9][0-9]{{0,5}})", name)
        if match is None:
            raise ValueError(
                f"expected tensors named {prefix}.N, N a block index from 0; got {name!r:.80}. Rename it, or download "
                "the file again."
            )
        if value.ndim != 1 or value.dtype != torch.float32:
            raise ValueError(
                f"expected {name} to be float32 [d_model]; got {value.dtype} {list(value.shape)}. Convert it and save "
                "the file again."
            )
        layers[int(match[1])] = value
    if not layers:
        raise ValueError(f"expected one tensor {prefix}.N at least; got none. Save or download the file again.")
    return dict(sorted(layers.items()))


def units(layers: Layers) -> str:
    """Return `"unit"` if every vector has an L2 norm of 1 (to 1e-4), else `"raw"`; computed, so never stale."""
    return "unit" if all(abs(float(value.norm()) - 1) < 1e-4 for value in layers.values()) else "raw"


def content(layers: Layers, site: str = DEFAULT) -> str:
    """Return 16 hexadecimal digits that depend on the site, layers and values alone (SHA-256)."""
    values = b"" if site == DEFAULT else f"{site}:".encode()
    values += b"".join(f"{layer}:".encode() + value.numpy().tobytes() for layer, value in layers.items())
    return sha256(values)[:16]


def _shortened(value: Any) -> str:
    return repr(value)[:80]
