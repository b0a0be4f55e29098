"""The addition recipe with SmolLM2 on the device: IMAD, GRPO alone and DebateGPT + GRPO, with several training seeds.

Several trainings run at the same time, each in a process of its own: the model is small, so that one process uses
little of a GPU. They start from the same weights in float32 and from the same debates, a file that was carried or else
made here first.
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
from importlib.util import find_spec
from pathlib import Path

import torch

import steerkit as sk
from benchmarks.gpu.measure import Figure
from benchmarks.gpu.sizes import SMALL, Sizes, sizes_for
from benchmarks.gpu.texts import scripted
from steerkit.io.json import write_json
from steerkit.stats.seeds import over_seeds
from steerkit.text.traces import read_traces, write_traces
from training.debates.debate import TRACES
from training.evaluate.methods import Ask, one_answer
from training.imad import Run, ask_single, base_checkpoint, collect_debates, recipes
from training.presets import Preset, get_preset
from training.toy.worlds import bare
from training.train.checkpoints import save

BASE = "base model"
METHODS = ("IMAD", "GRPO without debate", "DebateGPT + GRPO")
ORDER = (METHODS[:2], (BASE,), METHODS[2:])
"""The methods of one group start seed by seed before those of the next."""
ROOT = Path(__file__).parents[2]


def recipe(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """Greedy accuracy on the test questions, of each method and training seed as it ends, and its mean over seeds.

    Raises:
        NotImplementedError: the packages of the extra `train`, the weights, or the package that reads them are missing.
        RuntimeError: after all figures, if some trainings failed.
    """
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise NotImplementedError(f"needs TRL, peft and datasets: {error}. Carry their wheels.") from error
    until = time.monotonic() + sizes.recipe_seconds
    _check_weights(sizes)
    with _quiet():
        sizes = replace(sizes, checkpoint=_in_float32(sizes))
        debates = _debates(sizes, device)
    rows: dict[tuple[str, int], float] = {}
    failed: list[str] = []
    for method, seed, result in train_all(sizes, device, debates, until):
        name = f"{method}, training seed {seed}"
        if not result.exists():
            failed.append(f"{name}: {result.with_suffix('.log').read_text(errors='replace')[-400:]}")
            continue
        row = json.loads(result.read_text())
        rows[method, seed] = row["accuracy"]
        yield {"figure": f"accuracy of {name}", "value": row["accuracy"], "unit": "", "n": row["questions"]}
        yield {"figure": f"seconds of {name}", "value": row["seconds"], "unit": "s"}
    seeds = sizes.recipe_seeds
    for method in (BASE, *METHODS):
        values = {seed: rows[method, seed] for seed in seeds if (method, seed) in rows}
        if len(values) > 1:
            mean = over_seeds(list(values.values()), list(values), of=len(seeds))
            line = {"value": mean.mean, "low": mean.low, "high": mean.high, "n": len(values)}
            yield {"figure": f"accuracy of {method}, mean over training seeds", "unit": "", **line}
    ended = len(rows) / (len(seeds) * (1 + len(METHODS)))
    yield {"figure": "share of the trainings and base models that ended in time", "value": ended, "unit": ""}
    if failed:
        raise RuntimeError(f"expected trainings without an error; {len(failed)} failed: " + "; ".join(failed))


def _check_weights(sizes: Sizes) -> None:
    """`NotImplementedError` where no weights were carried, or nothing reads them; a wrong path stays an error."""
    try:
        given = base_of(sizes)
    except FileNotFoundError as error:
        raise NotImplementedError(f"needs the weights of SmolLM2: {error} Or pass --checkpoint FILE.") from error
    if given is not None and given.suffix == ".gguf" and find_spec("gguf") is None:
        raise NotImplementedError(f"needs the package gguf to read {given}. Carry its wheel.")


def _in_float32(sizes: Sizes) -> Path | None:
    """A folder with the start's weights in float32, read once from a GGUF file; None for a preset with a toy base."""
    given = base_of(sizes)
    if given is None or given.is_dir():
        return given
    folder = sizes.folder / "base"
    return folder if folder.exists() else save(*sk.load(given, dtype="float32"), folder)


def base_of(sizes: Sizes) -> Path | None:
    """The file or folder that the trainings start from, before it is converted."""
    preset = preset_of(sizes, sizes.checkpoint)
    return None if preset.checkpoint is None else Path(base_checkpoint(Run(preset, 0, sizes.folder)))


def _debates(sizes: Sizes, device: torch.device) -> Path:
    """The file of traces: the carried one, or that of debates on the first seed's problems."""
    if sizes.debates is not None:
        read_traces(sizes.debates)  # a file that cannot be read is an error before anything is trained
        return sizes.debates
    run = Run(preset_of(sizes, sizes.checkpoint), sizes.recipe_seeds[0], _folder(sizes, sizes.recipe_seeds[0]))
    base = base_checkpoint(run)
    if run.is_toy:  # the small model reaches no consensus
        write_traces(sizes.folder / TRACES, scripted(run.debate_problems))
        return sizes.folder / TRACES
    collect_debates(run, base, run.cast)
    return run.folder / "debates" / TRACES


def _folder(sizes: Sizes, seed: int) -> Path:
    return sizes.folder / f"seed-{seed}"


def preset_of(sizes: Sizes, checkpoint: Path | None) -> Preset:
    """The preset with all methods; it starts from the checkpoint, if there is one."""
    name, family, settings = sizes.recipe
    preset = replace(get_preset(name, family, settings), what_helps=METHODS[2:], controls=True)
    return preset if checkpoint is None else replace(preset, checkpoint=str(checkpoint))


def accuracy(run: Run, checkpoint: str | Path, ask: Ask) -> float:
    """Greedy accuracy of a checkpoint on the test questions."""
    rows = one_answer(run.test_problems, run.load_answerer(checkpoint), ask, run.sampling(temperature=0.0))
    return float(rows["correct"].mean())


def train_all(sizes: Sizes, device: torch.device, debates: Path, until: float) -> Iterator[tuple[str, int, Path]]:
    """Train and evaluate each method and seed in a process of its own, at most `sizes.processes` at once.

    Yields:
        Method, seed and file of the result as each process ends, and at once where the file exists. A process that
        failed leaves no file, and its output beside it with the ending `.log`. Those that have not ended in time are
        stopped and not yielded.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    waiting = [(method, seed) for group in ORDER for seed in sizes.recipe_seeds for method in group]
    running: dict[tuple[str, int, Path], subprocess.Popen[bytes]] = {}

    def start(method: str, seed: int) -> tuple[str, int, Path]:
        folder = _folder(sizes, seed)
        traces = folder / "debates" / TRACES
        traces.parent.mkdir(parents=True, exist_ok=True)
        if not traces.exists():
            shutil.copyfile(debates, traces)
        result = folder / f"{(BASE, *METHODS).index(method)}.json"
        if not result.exists():
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.recipe", str(seed), method, str(result)]
            command += [device.type, sizes.recipe[0], *([str(sizes.checkpoint)] if sizes.checkpoint else [])]
            with result.with_suffix(".log").open("wb") as log:
                running[method, seed, result] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        return method, seed, result

    try:
        while (waiting or running) and time.monotonic() < until:
            while waiting and len(running) < sizes.processes:
                started = start(*waiting.pop(0))
                if started not in running:
                    yield started
            for ended in [key for key, child in running.items() if child.poll() is not None]:
                del running[ended]
                yield ended
            time.sleep(0.2)
    finally:
        for child in running.values():
            child.kill()
            child.wait()


def main(arguments: Sequence[str]) -> None:
    """Train and evaluate one method with one seed: SEED METHOD FILE DEVICE PRESET [CHECKPOINT]."""
    seed, method, result, device, preset_name, *checkpoint = arguments
    sizes = sizes_for(torch.device(device), small=preset_name == SMALL.recipe[0])
    run = Run(preset_of(sizes, Path(checkpoint[0]) if checkpoint else None), int(seed), Path(result).parent)
    start = time.monotonic()
    with _quiet():
        base = base_checkpoint(run)
        trained, ask = (base, ask_single(run)) if method == BASE else (recipes(run, base)[method](), bare)
        right = accuracy(run, trained, ask)
    seconds = time.monotonic() - start
    row = {"seed": int(seed), "method": method, "accuracy": right, "seconds": seconds, "questions": run.preset.test}
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
