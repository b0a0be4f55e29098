"""The addition recipe with SmolLM2 on the device: IMAD, GRPO alone and DebateGPT + GRPO, as many training seeds as end.

All trainings run at the same time, each in a process of its own: the model is small, so that one process leaves most of
a GPU idle. They start from the same debates, a file that was carried or else made here first.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.sizes import Sizes, sizes_for
from benchmarks.gpu.texts import scripted
from steerkit.io.json import write_json
from steerkit.stats.seeds import over_seeds
from steerkit.text.traces import read_traces, write_traces
from training.debates.debate import TRACES
from training.evaluate.methods import Ask, one_answer
from training.imad import Run, ask_single, base_checkpoint, collect_debates, recipes
from training.presets import Preset, get_preset
from training.toy.worlds import bare

METHODS = ("IMAD", "GRPO without debate", "DebateGPT + GRPO")
ROOT = Path(__file__).parents[2]
Figure = dict[str, Any]


def recipe(sizes: Sizes, device: torch.device) -> list[Figure]:
    """Accuracy of each method on the test questions, greedy: each seed, the mean and its 95 % interval over seeds.

    Raises:
        NotImplementedError: the packages of the extra `train` are missing.
    """
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise NotImplementedError(f"needs TRL, peft and datasets: {error}. Carry their wheels.") from error
    until = time.monotonic() + sizes.recipe_seconds
    run = Run(preset_of(sizes, sizes.checkpoint), 0, sizes.folder / "seed-0")
    debates = sizes.debates
    if debates is not None:
        read_traces(debates)  # a file that cannot be read is an error before anything is trained
    with _quiet():
        base = base_checkpoint(run)
        if debates is None and device.type == "cpu":  # the small model of a CPU reaches no consensus
            debates = sizes.folder / TRACES
            write_traces(debates, scripted(run.debate_problems))
        elif debates is None:
            collect_debates(run, base, run.cast)
            debates = run.folder / "debates" / TRACES
        before = accuracy(run, base, ask_single(run))
    rows = train_all(sizes, device, debates, until)
    figures: list[Figure] = [
        {"figure": "accuracy of the base model", "value": before, "unit": "", "n": run.preset.test}
    ]
    for method in METHODS:
        found = {row["seed"]: row["accuracy"] for row in rows if row["method"] == method}
        for seed, value in sorted(found.items()):
            figures.append({"figure": f"accuracy of {method}, training seed {seed}", "value": value, "unit": ""})
        if len(found) > 1:
            mean = over_seeds(list(found.values()), list(found))
            row = {"value": mean.mean, "low": mean.low, "high": mean.high, "n": len(found)}
            figures.append({"figure": f"accuracy of {method}, mean over training seeds", "unit": "", **row})
    ended = len(rows) / (len(METHODS) * sizes.recipe_seeds)
    return [*figures, {"figure": "share of the trainings that ended in time", "value": ended, "unit": ""}]


def preset_of(sizes: Sizes, checkpoint: Path | None) -> Preset:
    """The preset with all methods; it starts from the checkpoint, if there is one."""
    name, family, settings = sizes.recipe
    preset = replace(get_preset(name, family, settings), what_helps=METHODS[2:], controls=True)
    return preset if checkpoint is None else replace(preset, checkpoint=str(checkpoint))


def accuracy(run: Run, checkpoint: str | Path, ask: Ask) -> float:
    """Greedy accuracy of a checkpoint on the test questions."""
    rows = one_answer(run.test_problems, run.load_answerer(checkpoint), ask, run.sampling(temperature=0.0))
    return float(rows["correct"].mean())


def train_all(sizes: Sizes, device: torch.device, debates: Path, until: float) -> list[dict[str, Any]]:
    """Start a process per seed and method; return the rows of those that end in time, and stop the others.

    Raises:
        RuntimeError: a process failed.
    """
    children: dict[Path, subprocess.Popen[bytes]] = {}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    for seed in range(sizes.recipe_seeds):
        traces = sizes.folder / f"seed-{seed}" / "debates" / TRACES
        traces.parent.mkdir(parents=True, exist_ok=True)
        if not traces.exists():
            shutil.copyfile(debates, traces)
        for number, method in enumerate(METHODS):
            result = sizes.folder / f"seed-{seed}" / f"{number}.json"
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.recipe", str(seed), method, str(result)]
            command += [device.type, *([str(sizes.checkpoint)] if sizes.checkpoint else [])]
            if not result.exists():
                with result.with_suffix(".log").open("wb") as log:
                    children[result] = subprocess.Popen(
                        command, stdout=log, stderr=log, env=environment, cwd=Path.cwd()
                    )
    try:
        while time.monotonic() < until and any(child.poll() is None for child in children.values()):
            time.sleep(0.2)
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    if failed := [result for result, child in children.items() if child.returncode > 0]:
        log_text = failed[0].with_suffix(".log").read_text(errors="replace")
        raise RuntimeError(f"expected trainings without an error; {len(failed)} failed, the first: {log_text[-300:]}")
    return [json.loads(path.read_text()) for path in sorted(sizes.folder.glob("seed-*/[0-9].json"))]


def main(arguments: Sequence[str]) -> None:
    """Train and evaluate one method with one seed: SEED METHOD FILE DEVICE [CHECKPOINT]."""
    seed, method, result, device, *checkpoint = arguments
    preset = preset_of(sizes_for(torch.device(device)), Path(checkpoint[0]) if checkpoint else None)
    run = Run(preset, int(seed), Path(result).parent)
    start = time.monotonic()
    with _quiet():
        trained = recipes(run, base_checkpoint(run))[method]()
        seconds = time.monotonic() - start
        row = {"seed": int(seed), "method": method, "accuracy": accuracy(run, trained, bare), "seconds": seconds}
    write_json(Path(result), row)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars inside the `with`."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    yield


if __name__ == "__main__":
    main(sys.argv[1:])
