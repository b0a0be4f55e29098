"""Files of erasers and probes: safetensors with a JSON header that fixes the format and the hook point."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from steerkit.capture.layers import EMBED, Layer
from steerkit.io.files import sha256
from steerkit.io.json import canonical_json
from steerkit.io.tensors import HEADER, parsed_object, read_tensors, write_tensors
from steerkit.models.site_names import SITES

FIXED = {"layer_convention": "0-based block index"}


def save(
    path: str | Path,
    kind: str,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    site: str,
    fields: Mapping[str, Any],
) -> None:
    """Write an eraser or a probe atomically: its tensors, and a header with `meta` and what `load` checks.

    Args:
        kind: "eraser" or "probe".
        fields: further fields of the header: `classes` and the layers.

    Raises:
        ValueError: classes that JSON does not keep, or `meta` with a key of the header; nothing is written.
    """
    if other := [one for one in fields["classes"] if not isinstance(one, str | int | float)]:
        raise ValueError(
            f"expected classes that are strings or numbers; got {other[0]!r:.80}. Fit on labels that are strings."
        )
    own = {**FIXED, "format": f"steerkit.{kind}/1", "hook_point": site, **fields, "content": content(tensors)}
    if clash := sorted({*meta} & {*own}):
        raise ValueError(f"expected meta without the fields of the file; got {clash}. Remove these keys from meta.")
    write_tensors(path, tensors, canonical_json({**meta, **own}))


def load(
    path: str | Path, kind: str, fields: Mapping[str, tuple[type, ...]]
) -> tuple[dict[str, Tensor], dict[str, Any], str, dict[str, Any]]:
    """Return the tensors, `meta`, site and further fields of a file that `save` wrote.

    Args:
        fields: name of each further field -> its allowed types.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: not a safetensors file of this kind, damaged, without one of the fields, or of an unknown site.
    """
    metadata, tensors = read_tensors(path, f"the {kind}")
    if HEADER not in metadata:
        raise ValueError(f"expected the header {HEADER!r} in {path}; got none. Save the {kind} again with .save(path).")
    header = parsed_object(metadata[HEADER])
    wanted = {**FIXED, "format": f"steerkit.{kind}/1", "content": content(tensors)}
    for name, value in wanted.items():
        if header.get(name) != value:
            raise ValueError(
                f"expected {name} {value!r} in the header of {path}; got {header.get(name)!r:.80}. It is another "
                f"file, or was damaged: save the {kind} again."
            )
    site = header.get("hook_point")
    if site not in SITES:
        raise ValueError(f"expected hook_point among {SITES} in the header of {path}; got {site!r:.80}. Save it again.")
    for name, kinds in fields.items():
        if name not in header or isinstance(header[name], bool) or not isinstance(header[name], kinds):
            names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
            raise ValueError(
                f"expected {name} in the header of {path} to be {names}; got {header.get(name)!r:.80}. Save it again."
            )
    meta = {name: value for name, value in header.items() if name not in (*wanted, "hook_point", *fields)}
    return tensors, meta, site, {name: header[name] for name in fields}


def content(tensors: Mapping[str, Tensor]) -> str:
    """Return 16 hexadecimal digits that depend on the names, types, shapes and values of tensors."""
    parts = [
        f"{name}:{value.dtype}:{tuple(value.shape)}:".encode() + value.contiguous().numpy().tobytes()
        for name, value in sorted(tensors.items())
    ]
    return sha256(b"".join(parts))[:16]


def classes_of(given: list[Any]) -> tuple[Hashable, ...]:
    """The classes in a header; `ValueError` unless they are several strings or numbers that differ."""
    if not all(isinstance(one, str | int | float) for one in given) or len(set(given)) < max(2, len(given)):
        raise ValueError(f"expected classes as a list of strings or numbers; got {given!r:.80}")
    return tuple(given)


def checked_layer(given: Any) -> Layer:
    """A layer in a header; `ValueError` unless it is a block index from 0 or `"embed"`."""
    if given == EMBED or (isinstance(given, int) and not isinstance(given, bool) and given >= 0):
        return given
    raise ValueError(f"expected a block index from 0, or {EMBED!r}, as layer; got {given!r:.80}")


def check_tensor(name: str, given: Tensor, shape: tuple[int, ...]) -> None:
    """`ValueError` unless a tensor has this shape, in float64, and is finite."""
    if given.dtype != torch.float64 or given.shape != shape or not torch.isfinite(given).all():
        raise ValueError(
            f"expected {name} in float64 of shape {list(shape)}, finite; got {given.dtype} {list(given.shape)}"
        )
