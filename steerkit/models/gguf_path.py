"""The path of a GGUF file. Imports nothing heavy: the command line checks paths before it loads anything."""

from __future__ import annotations

from pathlib import Path


def split_gguf(checkpoint: str | Path, gguf_file: str | None) -> tuple[str, str | None]:
    """`(folder or hub id, file name)`: a path that ends in `.gguf` is split; otherwise the arguments are returned.

    Raises:
        FileNotFoundError: a path that ends in `.gguf` and does not exist.
    """
    path = Path(checkpoint)
    if gguf_file is None and path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"expected a GGUF file at {path}; there is none. Check the path.")
        return str(path.parent), path.name
    return str(checkpoint), gguf_file
