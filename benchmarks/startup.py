"""Start-up: seconds of `import steerkit` over `import torch`, and of `steerkit --help` over an empty Python."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.timing import Measured, measured, seconds


def _seconds(*command: str) -> float:
    return seconds(lambda: subprocess.run(command, check=True, capture_output=True))


def startup(pairs: int = 7) -> Iterator[Measured]:
    """Differences in seconds instead of ratios: the targets are absolute."""
    python = sys.executable
    script = str(Path(python).with_name("steerkit"))
    for job, against, ours, theirs, limit in (
        ("import steerkit and torch", "import torch", "import torch, steerkit", "import torch", 0.3),
        ("import steerkit, use every public name", "import torch, transformers' auto classes", USE, PLAIN, None),
        ("steerkit --help", "an empty Python", None, "pass", 0.5),
    ):
        mine, other = [], []
        for number in range(pairs + 1):
            first = _seconds(*([script, "--help"] if ours is None else [python, "-c", ours]))
            second = _seconds(python, "-c", theirs)
            if number:
                mine.append(first)
                other.append(second)
        extra = sorted(a - b for a, b in zip(mine, other, strict=True))
        middle = extra[len(extra) // 2]
        verdict = "" if limit is None else f"; target {limit} s: {'met' if middle < limit else 'MISSED'}"
        yield measured(
            job,
            against,
            mine,
            other,
            "",
            f"median {middle:+.2f} s ({extra[0]:+.2f} to {extra[-1]:+.2f}){verdict}",
            inverse=True,
        )


USE = "import steerkit\nfor name in steerkit.__all__: getattr(steerkit, name)"
PLAIN = "import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer"
