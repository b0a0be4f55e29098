"""Peak memory of the whole process in a sweep of 128 prompts, against the commit before: packed copies included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import before
from benchmarks.compare import workload
from benchmarks.timing import Measured, measured
from steerkit.demo.checkpoint import default_checkpoint

SMALL, LARGE, NEW, RUNS = 8, 128, 16, 3
CHILD = """
import json, sys
import torch
import steerkit as sk
setup = json.loads(sys.stdin.read())
model, tokenizer = sk.load(setup["checkpoint"])
direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
vector = sk.SteeringVector({14: 10.0 * direction / direction.norm()})
def sweep(count):
    prompts = [f"{i}. {prompt}" for i, prompt in zip(range(count), setup["prompts"] * count)]
    sk.sweep(model, tokenizer, vector, prompts, coefficients=[1.0], layers=[14], max_new_tokens=setup["new"],
             positions="from_last_prompt_token", stream_norms={14: 1.0})
def field(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) / 1024
sweep(setup["small"])
open("/proc/self/clear_refs", "w").write("5")
held = field("VmRSS")
sweep(setup["large"])
print(json.dumps([field("VmHWM"), field("VmHWM") - held]))
"""


def footprint() -> Iterator[Measured]:
    """The peak of the process, and its growth over a process that has swept 8 prompts."""
    before.checkout()
    questions = [prompt[-1]["content"] for prompt in workload(default_checkpoint())["prompts"]]
    setup = json.dumps(
        {"checkpoint": str(default_checkpoint()), "prompts": questions, "small": SMALL, "large": LARGE, "new": NEW}
    )
    found: dict[Path, list[list[float]]] = {before.FOLDER: [], before.ROOT: []}
    for _ in range(RUNS):
        for checkout, peaks in found.items():
            environment = {**os.environ, "PYTHONPATH": str(checkout)}
            command = [sys.executable, "-c", CHILD]
            done = subprocess.run(
                command, input=setup, cwd=checkout, env=environment, capture_output=True, text=True, check=True
            )
            peaks.append(json.loads(done.stdout.splitlines()[-1]))
    old, new = (max(peaks) for peaks in found.values())
    job, against = f"sweep of {LARGE} prompts x 1 coefficient x {NEW} tokens", f"commit {before.COMMIT}"
    note = f"the largest of {RUNS} runs each"
    yield measured(f"{job}: peak memory of the process", against, [new[0]], [old[0]], ">= 1", note, unit="MiB")
    job = f"{job}: growth over a sweep of {SMALL} prompts"
    yield measured(
        job,
        against,
        [max(p[1] for p in found[before.ROOT])],
        [max(p[1] for p in found[before.FOLDER])],
        ">= 2",
        note,
        unit="MiB",
    )
