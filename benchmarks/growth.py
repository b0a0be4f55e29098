"""Growth: time and peak memory over the size of the job, with their slopes on logarithmic axes.

Each size runs in a process of its own (`python -m benchmarks.growth JOB SIZE`): memory that is left from an earlier job
would hide the memory that a later one takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

NEW = 16
SIZES: dict[str, tuple[int, ...]] = {
    "prompts of a sweep": (8, 16, 32, 64, 128),
    "coefficients of a sweep": (1, 2, 4, 8, 16),
    "new tokens": (8, 16, 32, 64, 128),
    "prompt tokens": (64, 128, 256, 512),
    "texts of a capture": (64, 128, 256, 512),
    "layers of a capture": (2, 4, 8, 16, 30),
}


def _status(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def _job(name: str, size: int) -> Callable[[], object]:
    """The work of a job at a size."""
    import steerkit as sk
    from benchmarks import decoding, inputs
    from steerkit.generation.engine import Row

    model, tokenizer = inputs.model()
    steering = sk.Steering(inputs.vector().at(decoding.LAYER), positions="from_last_prompt_token")
    prompts = decoding.prompt_ids(8)

    def sweep(rows: list[tuple[tuple[int, ...], float]], new: int = NEW) -> Callable[[], object]:
        return lambda: decoding.run(model, tokenizer, [Row(prompt, (steering.scaled(c),)) for prompt, c in rows], new)

    if name == "prompts of a sweep":
        return sweep([((*prompts[i % 8], i), 1.0) for i in range(size)])
    if name == "coefficients of a sweep":
        return sweep([(prompt, 0.01 * (c + 1)) for prompt in prompts for c in range(size)])
    if name == "new tokens":
        return sweep([(prompt, 1.0) for prompt in prompts], size)
    if name == "prompt tokens":
        return sweep([((*prompt[:1] * (size - len(prompt)), *prompt), 1.0) for prompt in prompts], 4)
    if name == "texts of a capture":
        some = inputs.texts(size)
        return lambda: sk.collect_means(model, tokenizer, some, position="mean")
    some = inputs.texts(128)
    return lambda: sk.collect(model, tokenizer, some, layers=list(range(size)))


def measure(name: str, size: int) -> tuple[float, float]:
    """Seconds (the smaller of two runs), and the MiB by which the first run raised the peak memory of the process."""
    from benchmarks import decoding
    from benchmarks.timing import seconds

    with decoding.endless():
        _job(name, SIZES[name][0])()
        work = _job(name, size)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        first = seconds(work)
        peak = max(_status("VmHWM") - before, 0.0)
        return min(first, seconds(work)), peak


def table() -> pd.DataFrame:
    """Columns `grows`, `size`, `seconds`, `mib`."""
    rows = []
    for name, sizes in SIZES.items():
        for size in sizes:
            command = [sys.executable, "-m", "benchmarks.growth", name, str(size)]
            shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rows.append((name, size, *json.loads(shown.splitlines()[-1])))
    return pd.DataFrame(rows, columns=["grows", "size", "seconds", "mib"])


def slopes(measured: pd.DataFrame) -> pd.DataFrame:
    """Per job the least-squares slope of log seconds (and MiB) over log size, and of seconds at the end."""
    rows = []
    for grows, part in measured.groupby("grows", sort=False):
        size = np.log(part["size"])
        time = np.log(part["seconds"])
        memory = np.log(part["mib"].clip(lower=1.0))
        ends = part.iloc[[0, -1]]
        rows.append(
            {
                "grows": grows,
                "from": part["size"].min(),
                "to": part["size"].max(),
                "slope of seconds": np.polyfit(size, time, 1)[0],
                "at the end": float(np.diff(time)[-1] / np.diff(size)[-1]),
                "seconds": " to ".join(f"{s:.2f}" for s in ends["seconds"]),
                "slope of MiB": np.polyfit(size, memory, 1)[0],
                "peak MiB": " to ".join(f"{m:.0f}" for m in ends["mib"]),
            }
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
