"""`python3 -m benchmarks.gpu [--device cpu] [--parts NAME,NAME] [--out FOLDER]`: run the parts, write their figures.

Needs torch and transformers, and no network. On a GPU each part runs in a process of its own with a time limit. A part
that fails or does not fit into the time is reported, and the others go on. Results: FOLDER/gpu.json, FOLDER/gpu.md and
FOLDER/log.txt, updated with each figure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.page import markdown
from benchmarks.gpu.parts import PARTS, ROOT, Outcome, Settings, run_apart, run_here
from steerkit.io.files import write_text
from steerkit.io.signals import restore_interrupt

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen parts; returns 1 if one failed."""
    restore_interrupt()
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cuda, or cpu with small sizes.")
    parser.add_argument(
        "--small", action="store_true", help="Small sizes on the GPU too, in this process: a first try."
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="Parts to run, with commas.")
    parser.add_argument("--seconds", type=float, default=math.inf, help="Seconds for all parts together.")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="Folder of gpu.json, gpu.md and log.txt.")
    parser.add_argument("--work", type=Path, help="Folder of checkpoints; kept, to resume (default: a temporary one).")
    parser.add_argument("--checkpoint", type=Path, help="Folder or GGUF file of SmolLM2 for the part recipe.")
    parser.add_argument("--debates", type=Path, help="traces.jsonl for the part recipe (default: debate first).")
    parser.add_argument("--commit", help="Commit of the source, where git does not know it.")
    given = parser.parse_args(arguments)
    chosen = given.parts.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"expected parts among {list(PARTS)}; got {unknown}.")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a GPU; torch sees none. Pass --device cpu to run small sizes on the CPU.")
    with tempfile.TemporaryDirectory() as temporary:
        work = (given.work or Path(temporary)).absolute()
        settings = Settings(given.device, given.small, given.checkpoint, given.debates, work)
        results = {"machine": machine(settings, given.commit), "parts": {}}
        run_all(chosen, settings, given.seconds, results, given.out)
    print(markdown(results))
    return int(any(part["state"] == "failed" for part in results["parts"].values()))


def run_all(chosen: Sequence[str], settings: Settings, seconds: float, results: dict[str, Any], out: Path) -> None:
    """Run the chosen parts in the order of `PARTS`, and write the results after each figure."""
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    for name in (name for name in PARTS if name in chosen):
        part, left = PARTS[name], seconds - (time.monotonic() - start)
        needed = part.seconds if settings.apart else 0.0

        def report(outcome: Outcome, name: str = name) -> None:
            results["parts"][name] = {**outcome, "note": PARTS[name].note}
            write_text(out / "gpu.json", json.dumps(results, indent=1))
            write_text(out / "gpu.md", markdown(results))

        if left < needed:
            reason = f"expected {needed:.0f} s; {left:.0f} s are left"
            report({"state": "skipped", "figures": [], "reason": reason})
        elif settings.apart:
            report(run_apart(name, settings, min(part.limit, left), report, out / "log.txt"))
        else:
            report(run_here(name, settings, min(part.limit, left), report))
        shown = {key: value for key, value in results["parts"][name].items() if key not in ("figures", "note")}
        print(name, json.dumps(shown), flush=True)


def machine(settings: Settings, commit: str | None) -> dict[str, str]:
    """The device, the commit and the versions that figures depend on."""
    device = torch.cuda.get_device_name() if settings.device == "cuda" else "CPU"
    if not settings.apart:
        device += ", small sizes: no figures to publish"
    about = {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "commit": commit or _commit(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
    }
    for package in PACKAGES:
        try:
            about[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            about[package] = "not installed"
    return about


def _commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
