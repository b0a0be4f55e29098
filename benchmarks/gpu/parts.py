"""The parts of `benchmarks.gpu`: what each measures and how long it takes, in this process or in one of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.equivalence import equivalences
from benchmarks.gpu.measure import Figure
from benchmarks.gpu.recipe import recipe
from benchmarks.gpu.sizes import Sizes, sizes_for
from benchmarks.gpu.speed import capture, decoding, static_cache
from benchmarks.gpu.training import grpo_step, sft_step
from steerkit.io.files import write_text

Outcome = dict[str, Any]
"""`state` (running, ran, skipped or failed), `figures`, `seconds`, and the `reason` of a part that did not end."""
STOPPING = 5.0
"""Seconds that the recipe's trainings get less than its process, to write the figures of those that have ended."""
ROOT = Path(__file__).parents[2]
TRAINED = (
    "Products of the training steps are in bfloat16 on a GPU and in float32 on a CPU. On a GPU completions are "
    "generated without autocast, with the adapter merged."
)


@dataclass(frozen=True)
class Part:
    """One part.

    Args:
        work: yields its figures.
        seconds: expected seconds on an H200, the start of its process included: estimated, not measured. The part
            starts only if they fit into the time that is left.
        limit: seconds after which its process is stopped.
        note: what a reader of its figures has to know.
    """

    work: Callable[[Sizes, torch.device], Iterator[Figure]]
    seconds: float
    limit: float
    note: str = ""


PARTS: dict[str, Part] = {
    "equivalence": Part(equivalences, 30, 70),
    "decoding": Part(decoding, 52, 110),
    "capture": Part(capture, 32, 70),
    "sft-4": Part(partial(sft_step, 4), 45, 80, TRAINED),
    "sft-1": Part(partial(sft_step, 1), 40, 70, TRAINED),
    "grpo": Part(grpo_step, 120, 190, TRAINED),
    "static-cache": Part(static_cache, 32, 70, "Nothing is steered here."),
    "recipe": Part(
        recipe,
        120,
        900,
        f"{TRAINED} Weights are in float32; the seeds share their debates. Reported results of this recipe are "
        "from a CPU in float32.",
    ),
}


@dataclass(frozen=True)
class Settings:
    """What a part needs to know.

    Args:
        device: "cuda" or "cpu".
        small: use the small sizes on a GPU too.
        checkpoint: see `Sizes`.
        debates: see `Sizes`.
        work: folder of everything that is no result.
    """

    device: str
    small: bool
    checkpoint: Path | None
    debates: Path | None
    work: Path

    @property
    def apart(self) -> bool:
        """Whether each part runs in a process of its own: at full size, where it may fill the memory or hang."""
        return self.device == "cuda" and not self.small

    def sizes(self, seconds: float) -> Sizes:
        """The sizes, with the folders and the seconds of the trainings."""
        folder = self.work / "recipe"
        given = {"checkpoint": self.checkpoint, "debates": self.debates, "folder": folder, "recipe_seconds": seconds}
        return replace(sizes_for(torch.device(self.device), self.small), **given)


def run_here(name: str, settings: Settings, seconds: float, report: Callable[[Outcome], None]) -> Outcome:
    """Run a part in this process; `report` gets its outcome so far after each figure."""
    start = time.monotonic()
    outcome: Outcome = {"state": "running", "figures": []}
    try:
        for figure in PARTS[name].work(settings.sizes(seconds), torch.device(settings.device)):
            outcome["figures"].append(figure)
            report(outcome)
        outcome["state"] = "ran"
    except NotImplementedError as error:
        outcome |= {"state": "skipped", "reason": str(error)}
    except Exception as error:  # reported, so that the other parts run
        traceback.print_exc(file=sys.stderr)
        outcome |= {"state": "failed", "reason": f"{type(error).__name__}: {error}"[:4000]}
    return {**outcome, "seconds": round(time.monotonic() - start, 1)}


def run_apart(name: str, settings: Settings, seconds: float, report: Callable[[Outcome], None], log: Path) -> Outcome:
    """Run a part in a process of its own, which is stopped with all of its children after `seconds`.

    Figures that were written before it ended are kept.

    Args:
        log: file to which its output is appended.
    """
    settings.work.mkdir(parents=True, exist_ok=True)
    result = settings.work / f"{name}.json"
    result.unlink(missing_ok=True)
    given = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.parts", name]
    command += [str(time.time() + seconds - STOPPING), json.dumps(given)]
    paths = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    start, seen = time.monotonic(), 0
    outcome: Outcome = {"state": "running", "figures": []}
    with log.open("ab") as output:
        output.write(f"# {name}\n".encode())
        output.flush()
        child = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            while child.poll() is None and time.monotonic() - start < seconds:
                time.sleep(0.2)
                found = _read(result)
                if len(found["figures"]) > seen:
                    seen = len(found["figures"])
                    report(found)
        finally:
            stopped = child.poll() is None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    outcome = _read(result)
    if outcome["state"] == "running":
        reason = f"stopped after {seconds:.0f} s" if stopped else f"its process ended with {child.returncode}"
        outcome |= {"state": "failed", "reason": f"{reason}: {log.read_text(errors='replace')[-400:]}"}
    return {**outcome, "seconds": round(time.monotonic() - start, 1)}


def _read(result: Path) -> Outcome:
    """The outcome that a process has written so far."""
    found: Outcome = json.loads(result.read_text()) if result.exists() else {"state": "running", "figures": []}
    return found


def main(name: str, until: str, given: str) -> None:
    """Run one part and write its outcome into its file: NAME UNTIL SETTINGS, with `until` in seconds of the clock."""
    known = json.loads(given)
    paths = {key: Path(known[key]) for key in ("checkpoint", "debates", "work") if known[key] is not None}
    settings = Settings(**{**known, **paths})

    def write(outcome: Outcome) -> None:
        write_text(settings.work / f"{name}.json", json.dumps(outcome))

    write(run_here(name, settings, float(until) - time.time(), write))


if __name__ == "__main__":
    main(*sys.argv[1:])
