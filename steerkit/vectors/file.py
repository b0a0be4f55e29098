"""Headers: what a vector file says of itself, so that it is not added elsewhere, otherwise, or to another model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.io.files import sha256, utf8
from steerkit.io.json import canonical_json

FORMAT = "steerkit.vector/1"
FIXED = {
    "format": FORMAT,
    "operation": "add",
    "hook_point": "resid_post",
    "layer_convention": "0-based block index",
}
DERIVED = ("units", "content")
PROVENANCE: dict[str, tuple[type, ...]] = {  # field of `meta` -> the types that it may have
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
LIMIT = 2**20
Layers = Mapping[int, Float[Tensor, " d_model"]]


def compose(meta: Mapping[str, Any], layers: Layers) -> str:
    """The header of these vectors as JSON: `meta`, what the format fixes, and what can be computed.

    Raises:
        ValueError: `meta` contradicts what the format fixes, or `parse` would refuse the header.
    """
    clash = {key: meta[key] for key, value in FIXED.items() if meta.get(key, value) != value}
    if clash:
        raise ValueError(f"expected a vector as {FIXED} says; its meta says {clash}. Take these keys out of its meta.")
    text = canonical_json({**meta, **FIXED, "units": units(layers), "content": content(layers)})
    utf8(text)
    parse(text, layers)
    return text


def parse(text: str, layers: Layers) -> dict[str, Any]:
    """The `meta` that a header holds, once it is shown to be ours and to belong to these vectors.

    Files written before there were `operation`, `units` and `content` lack them; the other fixed fields must be there.

    Raises:
        ValueError: larger than 1 MiB, no JSON object, a key twice, NaN; another format, operation, hook point or layer
            convention; a field of a wrong type; a layer or width that its own model does not have; other values than
            those that it was written with.
    """
    header = _object(text)
    for key, ours in FIXED.items():
        said = header.get(key, ours if key == "operation" else None)
        if said != ours:
            raise ValueError(
                f"expected {key} {ours!r} in the header; got {_short(said)}. "
                "A vector of another kind has to be converted by what wrote it."
            )
    for key, kinds in PROVENANCE.items():
        if key in header and (isinstance(header[key], bool) or not isinstance(header[key], kinds)):
            names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
            raise ValueError(f"expected {key} in the header to be {names}; got {_short(header[key])}. Write it anew.")
    last, width = max(layers), next(iter(layers.values())).shape[0]
    depth, d_model = header.get("n_layers", last + 1), header.get("d_model", width)
    if last >= depth or width != d_model:
        raise ValueError(
            f"expected layers below {depth} of width {d_model}, as the header says of its model; got layer {last} of "
            f"width {width}. Header and tensors are not of one file."
        )
    for key, found in (("units", units(layers)), ("content", content(layers))):
        if header.get(key, found) != found:
            raise ValueError(
                f"expected the values that the header was written with, {key} {_short(header[key])}; got {found!r}. "
                "The file was damaged or changed; fetch or write it anew."
            )
    return {key: value for key, value in header.items() if key not in (*FIXED, *DERIVED)}


def read_tensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors by name of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"expected a steering vector at {path}; there is no such file. Check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"expected a safetensors file with a steering vector at {path}; got {error}. Write or fetch it anew."
        ) from error


def layers_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[int, Float[Tensor, " d_model"]]:
    """Tensors named `PREFIX.N` as layer N -> vector, in the order of the layers.

    Raises:
        ValueError: no tensor, unequal widths, a name that is no layer (leading zeros included), or one that is no
            float32 `[d_model]`.
    """
    found = {}
    for name, value in tensors.items():
        match = re.fullmatch(rf"{re.escape(prefix)}\.(0|[1-9][0-9]{{0,5}})", name)
        if match is None:
            raise ValueError(
                f"expected tensors named {prefix}.N, N a block index from 0; got {name!r:.80}. Write or fetch it anew."
            )
        if value.ndim != 1 or value.dtype != torch.float32:
            raise ValueError(
                f"expected {name} to be float32 [d_model]; got {value.dtype} {list(value.shape)}. Write it anew."
            )
        found[int(match[1])] = value
    if not found:
        raise ValueError(f"expected one tensor {prefix}.N at least; got none. Fetch or write the file anew.")
    return dict(sorted(found.items()))


def units(layers: Layers) -> str:
    """`"unit"` where every vector has an L2 norm of 1 (to 1e-4), else `"raw"`: computed, so that it cannot be stale."""
    return "unit" if all(abs(float(value.norm()) - 1) < 1e-4 for value in layers.values()) else "raw"


def content(layers: Layers) -> str:
    """16 hexadecimal digits that depend on the layers and values alone."""
    values = b"".join(f"{layer}:".encode() + value.numpy().tobytes() for layer, value in layers.items())
    return sha256(values)[:16]


def _object(text: str) -> dict[str, Any]:
    if len(text) > LIMIT:
        raise ValueError(f"expected a header of at most {LIMIT} characters; got {len(text)}. Keep data out of `meta`.")
    try:
        header = json.loads(text, object_pairs_hook=_once, parse_constant=_number)
        canonical_json(header)  # what is nested too deep to be written again is refused here
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in the header; got {text[:40]!r} ({error}). Write the file anew.") from error
    if not isinstance(header, dict):
        raise ValueError(f"expected a JSON object in the header; got {text[:40]!r}. Write the file anew.")
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _short(value: Any) -> str:
    return repr(value)[:80]
