"""Inputs of commands, checked before a model is loaded; only vectors and pairs need torch."""

from __future__ import annotations

import math
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steerkit.io.files import read_bytes
from steerkit.io.json import parse_json, read_json
from steerkit.io.rows import read_rows
from steerkit.models.gguf_path import split_gguf
from steerkit.sweeps.layers import LayerSet, layer_sets

LAYERS_EXAMPLE = "Pass block indices such as 8,12,16, or all."


def check_checkpoint(checkpoint: str) -> None:
    """Check that a local path holds a checkpoint; a hub id passes.

    Raises:
        FileNotFoundError: no GGUF file, no folder, or no `config.json` in it.
        ValueError: a `config.json` that is not JSON.
    """
    folder, gguf_file = split_gguf(checkpoint, None)
    path = Path(folder)
    if gguf_file is None and not path.exists() and _is_path(checkpoint):
        raise FileNotFoundError(
            f"expected a checkpoint at {path}; there is none. Check the path, or pass a hub id: owner/name."
        )
    if gguf_file is None and path.is_dir() and not (path / "adapter_config.json").is_file():
        read_json(path / "config.json")


def check_adapter(adapter: str) -> None:
    """Check that a local path holds an adapter; a hub id passes.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if _is_path(adapter) and not Path(adapter).is_dir():
        raise FileNotFoundError(
            f"expected an adapter with safetensors at {adapter}; there is none. Check the path, or pass a hub id."
        )


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~"))


def check_vectors(paths: Sequence[Path]) -> None:
    """Check that vector files exist and have different names, without importing torch.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: two files of one name.
    """
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"expected a steering vector at {path}; there is no such file. Check the path.")
    if len({path.stem for path in paths}) < len(paths):
        raise ValueError(
            f"expected files with different names; got {[path.name for path in paths]}. Rename one of them."
        )


def read_pairs_file(path: Path) -> list[Any]:
    """The contrast pairs of a file; see `steerkit.read_pairs`."""
    read_bytes(path)  # a missing file is reported without importing torch
    from steerkit.text.pairs import read_pairs

    return list(read_pairs(path))


def parse_position(text: str) -> str | int:
    """A read position: `last`, `first`, `mean`, `letter` or an integer; `ValueError` for anything else."""
    if text.removeprefix("-").isdecimal():
        return int(text)
    if text not in ("last", "first", "mean", "letter"):
        raise ValueError(
            f"expected position 'last', 'first', 'mean', 'letter' or an integer; got {text!r}. Pass one of these "
            "as --position."
        )
    return text


def parse_layers(text: str) -> list[int] | str:
    """Layers to read: `all`, or block indices with commas; `ValueError` for anything else."""
    if text == "all":
        return text
    sets = parse_layer_sets(text)
    if not all(isinstance(layer, int) for layer in sets):
        raise ValueError(f"expected single layers with commas between them; got {text!r}. {LAYERS_EXAMPLE}")
    return [layer for layer in sets if isinstance(layer, int)]


def parse_layer_sets(text: str) -> list[LayerSet]:
    """Layers of a sweep: `8,12+14,all` is layer 8, layers 12 and 14 at once, and all layers of the vector at once.

    Raises:
        ValueError: anything else, a negative layer, or a layer given twice.
    """
    return layer_sets([parse_layer(part) for part in text.split(",")])


def parse_layer(text: str) -> LayerSet:
    """Where one steering acts: a layer `14`, several at once `12+14`, or `all`; `ValueError` for anything else."""
    if text == "all":
        return "all"
    try:
        layers = tuple(int(layer) for layer in text.split("+"))
    except ValueError:
        raise ValueError(
            f"expected layers as integers, 12+14 for two at once, or all; got {text!r}. {LAYERS_EXAMPLE}"
        ) from None
    if min(layers) < 0:
        raise ValueError(f"expected layers as block indices from 0; got {min(layers)}. {LAYERS_EXAMPLE}")
    return layers if len(layers) > 1 else layers[0]


def parse_coefficients(text: str) -> list[float]:
    """Numbers with commas between them; `ValueError` unless all are finite and differ."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"expected floats with commas between; got {text!r}. Write 1,2,3.") from None
    for value in values:
        check_coefficient(value)
    if len(set(values)) < len(values):
        raise ValueError(f"expected coefficients that differ; got {values}. List each once.")
    return values


def check_coefficient(value: float) -> None:
    """`ValueError` unless the coefficient is finite."""
    if not math.isfinite(value):
        raise ValueError(f"expected a finite coefficient; got {value}. Pass another number.")


def parse_choices(text: str) -> list[str]:
    """Continuations to score: texts with commas between them, or a JSON list of texts.

    Raises:
        ValueError: an empty text, one given twice, or a list that is no JSON.
    """
    try:
        given = parse_json(text) if text.startswith("[") else text.split(",")
    except ValueError:
        given = []
    if not all(isinstance(one, str) and one for one in given) or len(set(given)) < len(given) or not given:
        raise ValueError(
            f"expected texts that differ, with commas between them, or a JSON list of texts; got {text!r}. Write "
            '" (A), (B)": the space before each is its own.'
        )
    return list(given)


def check_output(path: Path, suffixes: Sequence[str], inputs: Sequence[Path] = ()) -> None:
    """Refuse an output file that is a folder, has another ending, or is an input.

    Raises:
        IsADirectoryError: a folder.
        ValueError: another ending than `suffixes`, or the path of an input.
    """
    if path.is_dir():
        raise IsADirectoryError(f"expected a file to write at {path}; got a folder. Name a file in it.")
    if path.suffix not in suffixes:
        raise ValueError(f"expected an output that ends in {' or '.join(suffixes)}; got {str(path)!r}. Rename it.")
    if any(path.resolve() == one.resolve() for one in inputs):
        raise ValueError(f"expected another file to write than the input; got {str(path)!r} for both. Name another.")


def check_new_folder(path: Path) -> None:
    """`FileExistsError` where the folder to write is a file, or holds something."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"expected a new or empty folder at {path}; it holds something. Name another.")


def check_port(host: str, port: int) -> None:
    """`ValueError` if a server cannot listen there: it would say so only after a model is loaded."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"expected a free port; {host}:{port} cannot be used: {error.strerror}. Pass --port."
            ) from None


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The prompts of a sweep: JSON lines of objects with `prompt`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is not a JSON object, has no `prompt`, or has choices that are not texts.
    """
    rows = read_rows(path, complete=True)
    for number, row in enumerate(rows, 1):
        if "prompt" not in row:
            raise ValueError(f"expected a key 'prompt' in {path}, row {number}; got {sorted(row)}. Add or rename it.")
        choices = row.get("choices")
        if not (choices is None or (isinstance(choices, list) and all(isinstance(one, str) for one in choices))):
            raise ValueError(
                f"expected choices as a list of texts in {path}, row {number}; got {choices!r:.80}. Write e.g. [\" Yes\", \" No\"]."
            )
    return rows
