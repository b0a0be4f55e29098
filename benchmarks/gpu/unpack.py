"""Join the pieces of `benchmarks.gpu.pack` on the machine: `python3 KIT/piece-1/unpack.py KIT`. No other packages."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

UNPACK, SOURCE, WHEELS, WEIGHTS, CUT = "unpack.py", "source.tar.gz", "wheels", "weights", ".cut-"
LARGER, GSM8K = "qwen2.5-coder-0.5b.gguf", "gsm8k/test.jsonl"


def joined(pieces: Path) -> dict[str, bytes]:
    """Return the files of all pieces; cut ones are joined.

    Raises:
        ValueError: a piece is missing.
    """
    folders = sorted(pieces.glob("piece-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    numbers = [int(folder.name.rpartition("-")[2]) for folder in folders]
    if not numbers or numbers != list(range(1, len(numbers) + 1)):
        raise ValueError(f"expected piece-1, piece-2, ... in {pieces}; got {numbers}. Carry the missing ones.")
    files: dict[str, bytes] = {}
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != UNPACK):
            name, cut, number = str(path.relative_to(folder)).partition(CUT)
            if cut and int(number) and name not in files:
                raise ValueError(f"expected the first part of {name} in {pieces}; it is missing. Carry all pieces.")
            files[name] = files.get(name, b"") + path.read_bytes()
    return files


def unpack(pieces: Path) -> Path:
    """Write the files into `pieces/kit`, install the wheels into `pieces/kit/site`, and return the folder."""
    kit = pieces / "kit"
    for name, data in joined(pieces).items():
        path = kit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    with tarfile.open(kit / SOURCE) as archive:
        archive.extractall(kit, filter="data")
    wheels = sorted(str(path) for path in (kit / WHEELS).glob("*.whl"))
    if wheels:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*command, "--target", str(kit / "site"), *wheels], check=True)
    return kit


def commands(kit: Path) -> list[str]:
    """Return the commands to run: two with a time limit, and those of the larger model where it was carried."""
    weights = kit / WEIGHTS
    small = next((path for path in weights.glob("*.gguf") if path.name != LARGER), None)
    debates = weights / "traces.jsonl"
    options = [f" --checkpoint {small}" if small else "", f" --debates {debates}" if debates.exists() else ""]
    python = f"cd {kit} && PYTHONPATH=.:site {sys.executable} -m"
    gpu = f"{python} benchmarks.gpu"
    found = [
        f"{gpu} --parts equivalence,decoding,capture,static-cache,training --out OUT",
        f"{gpu} --parts recipe --out OUT{''.join(options)}",
    ]
    if (weights / LARGER).exists():
        preset = f"{python} training imad qwen2.5-coder-0.5b --set checkpoint={weights / LARGER} --out OUT/qwen"
        found += [f"{preset} --dry-run", preset]
    if (weights / LARGER).exists() and (weights / GSM8K).exists():
        asked = f"{python} training benchmark --data {weights} --benchmark gsm8k --rows 256"
        found += [f"{asked} --checkpoint {weights / LARGER} --out OUT/gsm8k"]
        found += [f"{asked} --trained IMAD=OUT/qwen/grpo/checkpoint --out OUT/gsm8k"]
    return found


def main() -> None:
    """Unpack, and print the commands to run."""
    print("\n".join(commands(unpack(Path(sys.argv[1])))))


if __name__ == "__main__":
    main()
