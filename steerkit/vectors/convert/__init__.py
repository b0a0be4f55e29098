"""Convert vector files from and to the formats of other projects; no file can run code."""

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
    """Return the vectors of a file by name, in any known format; a single one has the file's stem as its name.

    The format is recognised by the first bytes, not by the suffix (docs/vector-format.md). Layers are 0-based blocks
    and the hook point is the output of the block. Other fields of the file are in `meta["source"]`; `missing_fields`
    lists the provenance that the file does not hold.

    Returns:
        Name -> vector.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: damaged, of no known format, for another hook point, or a pickle that needs code to run.

    Example:
        >>> vectors = sk.read_vectors("agents.pt")
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a vector file at {path}; there is no such file. Check the path.")
    with path.open("rb") as file:
        first_bytes = file.read(9)
    vectors = None
    try:
        if first_bytes.startswith(b"GGUF"):
            vectors = {path.stem: read_gguf(path)}
        elif first_bytes[8:] == b"{" and int.from_bytes(first_bytes[:8], "little") <= path.stat().st_size - 8:
            vectors = read_safetensors(path)  # begins with the header's length, whose first byte may be any
        elif first_bytes.startswith((b"PK\x03\x04", b"\x80")):
            vectors = read_torch(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if vectors is None:
        raise ValueError(
            f"expected a file of a known format at {path}: {'; '.join(READABLE)}; got another format, or one that does "
            "not identify itself. If you know its hook point, build SteeringVector({layer: tensor}) from its tensors."
        )
    return vectors


def write_vector(vector: SteeringVector, path: str | Path) -> None:
    """Write a vector atomically in the format of the suffix, `.safetensors` or `.gguf`.

    Raises:
        ValueError: another suffix, or a vector that the format cannot hold; nothing is written.

    Example:
        >>> sk.write_vector(vector, "calm.gguf")
    """
    _writer(path)(vector, path)


def write_vectors(vectors: Mapping[str, SteeringVector], path: str | Path) -> dict[str, Path]:
    """Write all vectors or none: one vector to `path`, several each to its own file `STEM-NAME.suffix`.

    Returns:
        Name -> file.

    Raises:
        ValueError: see `write_vector`; two names give the same file name.
    """
    path, write = Path(path), _writer(path)
    names = {name: re.sub(r"[^\w.+-]+", "_", name) for name in vectors}
    paths = {name: path.with_name(f"{path.stem}-{safe}{path.suffix}") for name, safe in names.items()}
    paths = paths if len(paths) > 1 else dict.fromkeys(vectors, path)
    if len(set(paths.values())) < len(paths):
        raise ValueError(f"expected names that differ in letters or digits; got {list(vectors)}. Rename one of them.")
    with contextlib.ExitStack() as stack:
        for name, vector in vectors.items():
            write(vector, stack.enter_context(atomic_path(paths[name])))
    return paths


def missing_fields(vector: SteeringVector) -> list[str]:
    """Return the fields of provenance that the vector's `meta` does not hold."""
    return [key for key in PROVENANCE if key not in vector.meta]


def _writer(path: str | Path) -> Writer:
    suffix = Path(path).suffix
    if suffix not in WRITERS:
        raise ValueError(
            f"expected an output that ends in {' or '.join(WRITERS)}; got {str(path)!r}. Change the file name."
        )
    return WRITERS[suffix]
