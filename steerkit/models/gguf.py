"""GGUF files: their path and their quantisation."""

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


def quantization_of(path: Path) -> str | None:
    """The quantisation of most weights of a GGUF file, e.g. `"Q4_1, dequantised"`.

    Raises:
        ValueError: the file is damaged, or holds no tensors.
    """
    if not path.is_file():
        return "GGUF, dequantised"
    from gguf import GGUFReader

    sizes: dict[str, int] = {}
    try:
        for tensor in GGUFReader(path).tensors:
            sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    except (ValueError, LookupError, ArithmeticError) as error:
        raise ValueError(f"expected a whole GGUF file at {path}; got {error}. Fetch it again.") from error
    if not sizes:
        raise ValueError(f"expected weights in {path}; got a GGUF file without any. Fetch it again.")
    return f"{max(sizes, key=lambda kind: sizes[kind])}, dequantised"
