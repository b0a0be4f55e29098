"""Pack what a GPU machine without a network needs beside the source, in pieces of at most 50 MiB: wheels and weights.

`python -m benchmarks.gpu.pack OUT` needs a network, for the wheels. OUT gets folders `piece-1`, `piece-2`, ...; carry
each to the machine, and run there, in the root of the source,

    python3 -m benchmarks.gpu.unpack PIECE KIT

It adds the piece to the folder KIT, installs the wheels into `KIT/site` once they are whole, and prints the commands
that can be run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.unpack import CUT, GSM8K, LARGER, MANIFEST, WEIGHTS, WHEELS, digest

MIB = 2**20
LIMIT = 50 * MIB
"""A piece travels with the source, and both together have at most 64 MiB."""
PACKAGES = ("trl", "datasets", "dill", "multiprocess", "gguf")
"""What the machine lacks: torch, transformers, accelerate, peft, pandas and pyarrow are there."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def pack(
    out: Path,
    weights: Path | None,
    debates: Path | None,
    python: str,
    download: Callable[..., None],
    larger: Path | None = None,
    gsm8k: Path | None = None,
) -> list[Path]:
    """Write the pieces and return their folders.

    Args:
        out: a folder that does not exist.
        weights: GGUF file of SmolLM2.
        debates: traces.jsonl of the recipe.
        python: version of Python on the machine, e.g. "3.12".
        download: `download(packages, folder, python)` writes wheels into a folder.
        larger: GGUF file of Qwen2.5-Coder-0.5B-Instruct, for the paper's arithmetic recipe.
        gsm8k: GSM8K's `test.jsonl`, for the evaluation after it.

    Raises:
        FileExistsError: the folder exists.
    """
    if out.exists():
        raise FileExistsError(f"expected no folder at {out}; one exists. Pass another.")
    staging = out.with_name(f".{out.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    (staging / WHEELS).mkdir(parents=True)
    download(PACKAGES, staging / WHEELS, python)
    files = {f"{WHEELS}/{path.name}": path.read_bytes() for path in sorted((staging / WHEELS).iterdir())}
    files |= {} if weights is None else {f"{WEIGHTS}/{weights.name}": weights.read_bytes()}
    carried = {f"{WEIGHTS}/traces.jsonl": debates, f"{WEIGHTS}/{LARGER}": larger, f"{WEIGHTS}/{GSM8K}": gsm8k}
    files |= {name: path.read_bytes() for name, path in carried.items() if path is not None}
    shutil.rmtree(staging)
    pieces = in_pieces(files, LIMIT)
    manifest = json.dumps({name: digest(data) for name, data in files.items()}, indent=1)
    for number, piece in enumerate(pieces, 1):
        for name, data in piece.items():
            path = staging / f"piece-{number}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        (staging / f"piece-{number}" / MANIFEST).write_text(manifest)
    staging.rename(out)
    return sorted(out.iterdir())


def in_pieces(files: Mapping[str, bytes], limit: int) -> list[dict[str, bytes]]:
    """Return the files in pieces of at most `limit` bytes; a file that does not fit whole is cut, see `unpack.add`.

    Example:
        >>> [list(piece) for piece in in_pieces({"a": b"123", "b": b"45"}, limit=4)]
        [['a', 'b.cut-000'], ['b.cut-001']]
    """
    pieces: list[dict[str, bytes]] = [{}]
    room = limit
    for name, data in files.items():
        parts: list[bytes] = []
        while data or not parts:
            if room == 0:
                pieces.append({})
                room = limit
            parts.append(data[:room])
            cut = len(data) > room or len(parts) > 1
            pieces[-1][f"{name}{CUT}{len(parts) - 1:03d}" if cut else name] = parts[-1]
            room, data = room - len(parts[-1]), data[room:]
    return pieces


def wheels(packages: Sequence[str], folder: Path, python: str) -> None:
    """Download wheels by pip, in the versions of this environment."""
    from importlib.metadata import version

    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    command += [part for platform in PLATFORMS for part in ("--platform", platform)]
    subprocess.run([*command, *(f"{name}=={version(name)}" for name in packages)], check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: pack, and print the size of each piece."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.pack", description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--weights", type=Path, help="GGUF file of SmolLM2 (default: the installed one)")
    parser.add_argument("--debates", type=Path, help="traces.jsonl for the part recipe")
    parser.add_argument("--larger", type=Path, help="GGUF file of Qwen2.5-Coder-0.5B-Instruct, for more time")
    parser.add_argument("--gsm8k", type=Path, help="GSM8K's test.jsonl, for the evaluation of that model")
    parser.add_argument("--python", default="3.12", help="version of Python on the machine (default: 3.12)")
    given = parser.parse_args(arguments)
    from steerkit.demo.checkpoint import default_checkpoint

    try:
        weights = given.weights or default_checkpoint()
        pieces = pack(given.out, weights, given.debates, given.python, wheels, given.larger, given.gsm8k)
    except (OSError, subprocess.CalledProcessError) as error:
        parser.error(str(error))
    for piece in pieces:
        size = sum(path.stat().st_size for path in piece.rglob("*") if path.is_file())
        print(f"{piece}: {size / MIB:.1f} MiB")


if __name__ == "__main__":
    main()
