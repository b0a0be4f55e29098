"""Add a piece of `benchmarks.gpu.pack` to a kit: `python3 -m benchmarks.gpu.unpack PIECE KIT`. No other packages."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from training.settings import shell

WHEELS, WEIGHTS, CUT, MANIFEST = "wheels", "weights", ".cut-", "manifest.json"
LARGER, GSM8K = "qwen2.5-coder-0.5b.gguf", "gsm8k/test.jsonl"
SPEED = "equivalence,decoding,capture,sft-4,sft-1,grpo,static-cache"
"""Parts that need no weights."""
SECONDS = 360
"""Of all these parts together; their expected seconds are fewer."""


def digest(data: bytes) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def add(piece: Path, kit: Path) -> list[str]:
    """Copy a piece into a kit, join the files that are now whole, and install the wheels once all of them are.

    Returns:
        Names of the files that need further pieces.

    Raises:
        ValueError: the folder is no piece, or a file is larger than the packed one or differs from it.
    """
    if not (piece / MANIFEST).is_file():
        raise ValueError(
            f"expected a piece with {MANIFEST} at {piece}; got none. Pass a folder of benchmarks.gpu.pack."
        )
    shutil.copytree(piece, kit, dirs_exist_ok=True)
    manifest: dict[str, dict[str, Any]] = json.loads((kit / MANIFEST).read_text())
    waiting = [name for name, packed in manifest.items() if not _join(kit / name, packed)]
    wheels = [str(kit / name) for name in manifest if name.startswith(f"{WHEELS}/") and name.endswith(".whl")]
    if wheels and not (kit / "site").exists() and not any(name.startswith(f"{WHEELS}/") for name in waiting):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*command, "--target", str(kit / "site"), *wheels], check=True)
    return waiting


def _join(path: Path, packed: dict[str, Any]) -> bool:
    """Write a file from its parts if it is not there and all parts are; returns whether it is there."""
    parts = sorted(path.parent.glob(f"{path.name}{CUT}*"))
    if path.exists():
        data = path.read_bytes()
    elif not parts or sum(part.stat().st_size for part in parts) < packed["bytes"]:
        return False
    else:
        data = b"".join(part.read_bytes() for part in parts)
    if (got := digest(data)) != packed:
        raise ValueError(f"expected {path.name} with {packed}; got {got}. Remove {path.parent}, and carry all pieces.")
    path.write_bytes(data)
    for part in parts:
        part.unlink()
    return True


def commands(kit: Path) -> list[str]:
    """Return the commands that can be run, in the root of the source; OUT is the folder of the results."""
    kit = kit.absolute()
    weights = kit / WEIGHTS
    small = next((path for path in weights.glob("*.gguf") if path.name != LARGER), None)
    debates = weights / "traces.jsonl"
    python = shell("env", f"PYTHONPATH={kit / 'site'}", "HF_HUB_OFFLINE=1", sys.executable, "-m")
    gpu = f"{python} benchmarks.gpu"
    found = [f"{gpu} --parts {SPEED} --seconds {SECONDS} --out OUT"]
    if small:
        carried = ("--debates", debates) if debates.exists() else ()
        options = shell("--checkpoint", small, *carried, "--work", kit / "work")
        found.append(f"{gpu} --parts recipe --seconds 300 {options} --out OUT")
    if (weights / LARGER).exists():
        run = kit / "qwen"
        options = shell("--set", f"checkpoint={weights / LARGER}", "--out", run)
        preset = f"{python} training imad qwen2.5-coder-0.5b {options}"
        found += [f"{preset} --dry-run", preset]
        if (weights / GSM8K).exists():
            asked = f"{python} training benchmark --benchmark gsm8k --rows 256"
            for model in (("--checkpoint", weights / LARGER), ("--trained", f"IMAD={run / 'grpo' / 'checkpoint'}")):
                found += [f"{asked} {shell('--data', weights, *model, '--out', kit / 'gsm8k')}"]
    return found


def main() -> None:
    """Add a piece, and print the commands that can be run."""
    piece, kit = Path(sys.argv[1]), Path(sys.argv[2])
    if waiting := add(piece, kit):
        print(f"further pieces are needed for {', '.join(waiting)}")
    print("\n".join(commands(kit)))


if __name__ == "__main__":
    main()
