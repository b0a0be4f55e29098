"""This code against the last commit without oneDNN's kernels and cascade attention, on four jobs."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.compare import Worker, compare_checkouts, workload
from benchmarks.timing import Measured
from steerkit.demo.checkpoint import default_checkpoint

COMMIT = "c658a45"
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "before"
JOBS = ("turns", "prefill", "beginnings", "doctor")


def before() -> Iterator[Measured]:
    """Four jobs through public names, a process per checkout."""
    checkout()
    setup = workload(default_checkpoint())
    with Worker(FOLDER, setup) as old, Worker(ROOT, setup) as new:
        for line in compare_checkouts(old, new, 11, JOBS):
            yield replace(line, against=f"commit {COMMIT}", target=">= 1.5")


def on_torch() -> Iterator[Measured]:
    """Three jobs with torch's own linear layers, as where these are as fast: processors of Intel, and GPUs."""
    checkout()
    setup = workload(default_checkpoint())
    with Worker(FOLDER, setup) as old, Worker(ROOT, {**setup, "load": {"kernels": "torch"}}) as new:
        for line in compare_checkouts(old, new, 11, ("capture", "sweep", "turns")):
            yield replace(line, job=f"{line.job}, torch's kernels", against=f"commit {COMMIT}", target=">= 0.95")


def checkout() -> None:
    """Lay the old commit's package into `FOLDER`."""
    if not (FOLDER / "steerkit").is_dir():
        FOLDER.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(["git", "archive", COMMIT, "steerkit"], cwd=ROOT, capture_output=True, check=True)
        subprocess.run(["tar", "x", "-C", str(FOLDER)], input=archive.stdout, check=True)
