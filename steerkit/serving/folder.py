"""The folder of served vectors: read, checked against the served model, and stored by content for the workers.

The folder itself is the state: what is put into it is served, what is removed is not, also while the server runs and by
whichever of its processes. A worker reads a vector from `STORE` by the hash of its content, so that a file that changes
between the check of a request and its use changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from steerkit.models.site_names import DEFAULT
from steerkit.serving.request import LARGEST, LARGEST_WIDE, Served
from steerkit.vectors.convert import read_vectors
from steerkit.vectors.vector import SteeringVector

STORE = ".by-content"
SUFFIXES = (".safetensors", ".gguf", ".pt", ".json")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
File = tuple[str, int, int]
"""A file's name, time of its last change, and size."""


@dataclass(frozen=True)
class Model:
    """What a vector must fit.

    Args:
        model_type: of the configuration.
        n_layers: number of blocks.
        d_model: width of the residual stream.
        fingerprint: of the weights (`steerkit.models.identity.fingerprint`); None where it is not known.
        dtype: number format in which the model runs.
    """

    model_type: str
    n_layers: int
    d_model: int
    fingerprint: str | None = None
    dtype: str = "float32"


@dataclass
class VectorFolder:
    """The vectors of a folder.

    Args:
        path: the folder.
        model: the served model.
        foreign: also serve vectors that were read from other weights.
        capacity: largest number of (vector, layer) pairs that are served; the workers' buffers have this size.
    """

    path: Path
    model: Model
    foreign: bool = False
    capacity: int = 512
    _read: dict[File, list[Served]] = field(default_factory=dict)
    _served: dict[str, Served] = field(default_factory=dict)

    def served(self) -> dict[str, Served]:
        """The vectors by name, those that do not fit with the reason; a file is read again where it has changed."""
        files = sorted(self._files())
        if files != list(self._read):
            self._read = {file: self._read.get(file) or self._vectors_of(self.path / file[0]) for file in files}
            self._served = self._named()
        return self._served

    def _files(self) -> Iterator[File]:
        for file in vector_files(self.path):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                about = file.stat()
                yield file.name, about.st_mtime_ns, about.st_size

    def _vectors_of(self, file: Path) -> list[Served]:
        try:
            vectors = read_vectors(file)
        except (OSError, ValueError, KeyError) as error:
            return [Served(file.stem, "", (), error=f"{file.name} could not be read: {error}")]
        one = len(vectors) == 1
        return [self._check(file.stem if one else f"{file.stem}.{key}", vector) for key, vector in vectors.items()]

    def _named(self) -> dict[str, Served]:
        """All vectors by name, as far as there is room for them."""
        found: dict[str, Served] = {}
        room = self.capacity
        for one in (one for several in self._read.values() for one in several):
            if one.name in found:
                error = "several files have a vector of this name"
            elif len(one.layers) > room:
                error = f"the server has room for {self.capacity} pairs of vector and layer"
            else:
                error = one.error
                room -= len(one.layers)
            found[one.name] = one if error == one.error else Served(one.name, "", (), error=error)
        return found

    def _check(self, name: str, vector: SteeringVector) -> Served:
        """The vector with its content stored, or with the reason why it does not fit."""

        def refused(reason: str) -> Served:
            return Served(name, "", (), error=reason)

        meta, model = vector.meta, self.model
        if NAME.fullmatch(name) is None:
            return refused("its name has other characters than letters, digits, '.', '_' and '-'")
        if vector.site != DEFAULT:
            return refused(f"it was read at {vector.site}, and only resid_post is served")
        if vector.d_model != model.d_model:
            return refused(f"it has width {vector.d_model}, and the served model {model.d_model}")
        if max(vector.layers) >= model.n_layers:
            return refused(f"it has layer {max(vector.layers)}, and the served model {model.n_layers} layers")
        actual = {"model_type": model.model_type, "n_layers": model.n_layers}
        if other := {key: meta[key] for key in actual if meta.get(key) not in (None, actual[key])}:
            return refused(f"it was read from a model with {other}, and the served one has {actual}")
        known = meta.get("model_fingerprint"), model.fingerprint
        if not self.foreign and None not in known and known[0] != known[1]:
            return refused(f"it was read from other weights ({known[0]}) than the served ones ({known[1]})")
        if not self.foreign and meta.get("adapter_fingerprint"):
            return refused("it was read with an adapter, and the served model has none")
        content = vector.content()
        stored = self.path / STORE / f"{content}.safetensors"
        try:
            if not stored.exists():
                stored.parent.mkdir(exist_ok=True)
                SteeringVector(vector.layers).save(stored)
        except OSError as error:
            return refused(f"it could not be stored for the workers: {error}")
        zero = tuple(layer for layer, norm in vector.norms().items() if norm == 0)
        norm = max(vector.norms().values())
        return Served(name, content, tuple(vector.layers), zero, norm, LARGEST.get(model.dtype, LARGEST_WIDE))


def vector_files(folder: Path) -> list[os.DirEntry[str]]:
    """The files of a folder that hold vectors; each request looks at them, so no `Path` is made."""
    with os.scandir(folder) as entries:
        return [
            entry
            for entry in entries
            if entry.name.endswith(SUFFIXES) and not entry.name.endswith(".meta.json") and entry.is_file()
        ]


def stored_vector(folder: Path, content: str) -> SteeringVector:
    """The vector with this content; what a worker reads.

    Raises:
        ValueError: the stored file has another content.
    """
    vector = SteeringVector.load(folder / STORE / f"{content}.safetensors")
    if vector.content() != content:
        raise ValueError(
            f"expected the vector {content} in {folder / STORE}; got {vector.content()}. Delete that folder."
        )
    return vector


def model_of_checkpoint(folder: Path) -> Model:
    """What the checkpoint in a folder is, from its configuration and the headers of its weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    return Model(config["model_type"], text["num_hidden_layers"], text["hidden_size"])
