"""Vectors that travel: what other projects wrote is read, and ours is written for them; no file runs code."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from steerkit.io.files import atomic_path
from steerkit.vectors.convert.gguf_file import read_gguf, write_gguf
from steerkit.vectors.convert.tensor_file import read_safetensors
from steerkit.vectors.convert.torch_file import from_steering_vectors as from_steering_vectors
from steerkit.vectors.convert.torch_file import read_torch
from steerkit.vectors.file import PROVENANCE
from steerkit.vectors.vector import SteeringVector

READABLE = (
    "our own .safetensors",
    "GGUF control vectors (llama.cpp, repeng, EasySteer)",
    "the .pt files of the scripts of arXiv 2604.24881",
    "the layer_activations of steering-vectors, saved with torch.save",
    "the .safetensors probes of the PyPI package steerkit",
)
Writer = Callable[[SteeringVector, str | Path], None]
WRITERS: dict[str, Writer] = {".safetensors": SteeringVector.save, ".gguf": write_gguf}


def read_vectors(path: str | Path) -> dict[str, SteeringVector]:
    """The vectors of a file by name, whoever wrote it; a lone one is named by the file (docs/vector-format.md).

    The first bytes say what it is, not the suffix. Layers are 0-based blocks and vectors stand where they were read,
    after the block; what the file says besides is in `meta["source"]`, and `unsaid` lists what it does not say.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: damaged, of no known format, read elsewhere than after a block, or a pickle that needs code to run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a vector file at {path}; there is no such file.")
    with path.open("rb") as file:
        first = file.read(9)
    found = None
    try:
        if first.startswith(b"GGUF"):
            found = {path.stem: read_gguf(path)}
        elif first.startswith((b"PK\x03\x04", b"\x80")):
            found = read_torch(path)
        elif first[8:] == b"{":
            found = read_safetensors(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if found is None:
        raise ValueError(
            f"expected a file of a known format at {path}: {'; '.join(READABLE)}; got none of these, or one that does "
            "not say which. Build a SteeringVector from its tensors yourself, if you know the place that they are for."
        )
    return found


def write_vector(vector: SteeringVector, path: str | Path) -> None:
    """Write a vector in the format that the suffix says, `.safetensors` or `.gguf`; atomically.

    Raises:
        ValueError: another suffix, or a vector that the format cannot say; nothing is written.
    """
    _writer(path)(vector, path)


def write_vectors(vectors: Mapping[str, SteeringVector], path: str | Path) -> dict[str, Path]:
    """Write all or none: one vector to `path`, several each to its own file, `STEM-NAME.suffix`; name -> file.

    Raises:
        ValueError: see `write_vector`; two names that make one file.
    """
    path, write = Path(path), _writer(path)
    names = {name: re.sub(r"[^\w.+-]+", "_", name) for name in vectors}
    paths = {name: path.with_name(f"{path.stem}-{safe}{path.suffix}") for name, safe in names.items()}
    paths = paths if len(paths) > 1 else dict.fromkeys(vectors, path)
    if len(set(paths.values())) < len(paths):
        raise ValueError(f"expected names that differ in letters or digits; got {list(vectors)}. Write one by one.")
    with contextlib.ExitStack() as stack:
        for name, vector in vectors.items():
            write(vector, stack.enter_context(atomic_path(paths[name])))
    return paths


def unsaid(vector: SteeringVector) -> list[str]:
    """The fields of provenance that the vector's file did not say."""
    return [key for key in PROVENANCE if key not in vector.meta]


def _writer(path: str | Path) -> Writer:
    suffix = Path(path).suffix
    if suffix not in WRITERS:
        raise ValueError(f"expected an output that ends in {' or '.join(WRITERS)}; got {str(path)!r}.")
    return WRITERS[suffix]
