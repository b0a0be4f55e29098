"""`python -m analysis.paper.reproduce`: every run, analysis, table and figure from nothing, as one resumable command.

The steps are commands of their own, two at a time on two cores; a step that is done is not run again, and one that was
interrupted goes on where it stopped. Each writes to `logs/NAME.log`.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from steerkit.io.files import sha256
from steerkit.io.json import canonical_json, read_json, write_json
from training.presets import get_preset

ARENAS = {
    "MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_TOP_PAD_": "200000000",
}  # fmt: skip
"""Without these the C library gives memory back, and asks for it again, in every training step."""
TRAIT = "fools,ha"
RUNS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "tiny": {"clues": ("test=500", "self_check=false"), "malice": ()},
    "smollm2": {"addition": (), "malice": ()},
}
"""The families that a preset's reproduction runs, and what is changed so that a seed takes less: the analyses need no
more."""
STEPS = {"clues": ("25", "75", "125"), "addition": ("8", "16", "24")}
"""Of GRPO, between SFT and IMAD."""
SMALL = ('sources=["asked","trace"]', "max_new_tokens=48")
GRIDS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "tiny": {"clues": SMALL, "malice": SMALL},
    "smollm2": {
        "addition": (
            'sources=["asked","trace"]', 'positions=["last","mean"]', "layers=[8,14,20]", "coefficients=[0.5,1,2]",
            'extents=["all","from_last_prompt_token:4"]', "negative=[]", "train=150", "validation=16", "test=24",
            "controls=4", "bands=1", "max_new_tokens=40",
        ),
    },
}  # fmt: skip
"""What the analysis of agents tries; one forward of the real model costs as much as a thousand of the tiny one."""
SUPPRESSION = {
    "tiny": ("test=120",),
    "smollm2": (
        "layers=[8,14,20]", "coefficients=[-5,-4,-3,-2,-1,1,3,5]", "train=150", "validation=16", "test=80",
        "max_new_tokens=40",
    ),
}  # fmt: skip
"""What the analysis of suppression sweeps."""


@dataclass(frozen=True)
class Step:
    """A command and what has to be done before it.

    Args:
        name: of its log and its mark; unique.
        module: what `python -m` runs.
        arguments: of the module.
        needs: names of steps.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()


def plan(preset: str, seeds: Sequence[int], out: Path) -> list[Step]:
    """All steps, in the order in which they are taken up.

    The shorter chains come first, since the longest has a worker of its own all the time. A run is four steps: its
    debates, then SFT and GRPO beside all other training, then the evaluation. So the agents of one checkpoint are
    analysed while the next is trained.
    """
    families = tuple(RUNS[preset])
    steps = [step for seed in seeds for family in reversed(families) for step in _of_seed(preset, family, seed, out)]
    runs = tuple(str(_run(out, family, seed)) for family in families for seed in seeds)
    tables, every = out / "tables", tuple(step.name for step in steps)
    steps.append(Step("main-table", "analysis.paper.main_table", (*runs, "--out", str(tables)), every))
    steps.append(Step("results", "analysis.paper.results", (str(out), "--out", str(tables)), (*every, "main-table")))
    folders = {"figures": tables, **{f"figures-{family}": tables / family for family in families}}
    steps += [Step(name, "figures", (str(folder),), ("main-table", "results")) for name, folder in folders.items()]
    return steps


def _of_seed(preset: str, family: str, seed: int, out: Path) -> list[Step]:
    run, name, settings = _run(out, family, seed), f"{family}-{seed}", RUNS[preset][family]
    imad = (preset, "--family", family, *_each("--set", settings), "--seed", str(seed), "--out", str(run))
    common = ("--run", str(run), "--out", str(out / "analysis" / run.relative_to(out)))
    grid = _each("--set", GRIDS[preset].get(family, ()))
    if family == "malice":
        suppression = (*common, "--words", TRAIT, *_each("--set", SUPPRESSION[preset]))
        return [
            Step(name, "training.imad", imad),
            Step(f"suppression-{name}", "analysis.suppression.suppression", suppression, (name,)),
            *([Step(f"agents-{name}", "analysis.agents.subspaces", (*common, *grid), (name,))] if grid else []),
        ]
    trained = get_preset(preset, family, settings).trained
    main, others = trained[:2], trained[2:]
    debates, both, controls = (f"{name}-{part}" for part in ("debates", "imad", "controls"))
    step = STEPS[family][1]
    stages = (
        ("base", "SFT", f"GRPO step {step}", "IMAD"),
        tuple(m for m in others if m in ("SFT without tags", "SFT on single turns")),
    )
    agents = (*common, "--step", step, *grid)
    parts = {f"agents-{name}-main": (stages[0], both), f"agents-{name}-controls": (stages[1], controls)}
    parts = {part: (only, need) for part, (only, need) in parts.items() if only}
    return [
        Step(debates, "training.imad", (*imad, "--only", "Debate")),
        Step(both, "training.imad", (*imad, *_each("--only", main)), (debates,)),
        *(
            Step(part, "analysis.agents.subspaces", (*agents, *_each("--only", only)), (need,))
            for part, (only, need) in parts.items()
        ),
        Step(controls, "training.imad", (*imad, *_each("--only", others)), (debates,)),
        Step(name, "training.imad", imad, (both, controls)),
        Step(f"agents-{name}", "analysis.agents.subspaces", agents, (name, *parts)),
        Step(f"probes-{name}", "analysis.probes.separability", (*common, *_each("--step", STEPS[family])), (name,)),
    ]


def _each(option: str, values: Sequence[str]) -> tuple[str, ...]:
    return tuple(part for value in values for part in (option, value))


def _run(out: Path, family: str, seed: int) -> Path:
    return out / family / f"seed-{seed}"


def carry_out(steps: Sequence[Step], out: Path, workers: int) -> None:
    """Run steps as soon as what they need is done, some at a time.

    Raises:
        RuntimeError: a step failed; the others that run are waited for, and the end of its log is in the message.
    """
    marks, logs = out / "done", out / "logs"
    marks.mkdir(parents=True, exist_ok=True)
    logs.mkdir(exist_ok=True)
    by_name = {step.name: step for step in steps}
    configs = {step.name: config(step, by_name) for step in steps}
    done = {name for name, found in configs.items() if _marked(marks / name, found)}
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    failed: list[str] = []
    try:
        while len(done) < len(steps) and (running or not failed):
            ready = [s for s in steps if s.name not in done and s.name not in running and done.issuperset(s.needs)]
            alone = len(ready) == 1 and not running  # nothing can begin before it has ended
            for step in ready[: 0 if failed else workers - len(running)]:
                print(f"{step.name}: begun", flush=True)
                with (logs / f"{step.name}.log").open("ab") as log:
                    command = [sys.executable, "-m", step.module, *step.arguments]
                    threads = max(1, (os.cpu_count() or 1) // (1 if alone else workers))
                    environment = {**os.environ, **ARENAS, "OMP_NUM_THREADS": str(threads)}
                    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
                running[step.name] = (process, time.monotonic())
            for name, (process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                took = time.monotonic() - began
                if process.returncode:
                    failed.append(name)
                    print(f"{name}: failed after {took:.0f} s", flush=True)
                else:
                    write_json(marks / name, {"step": configs[name], "seconds": round(took, 1)})
                    done.add(name)
                    print(f"{name}: done in {took:.0f} s ({len(done)} of {len(steps)})", flush=True)
            time.sleep(0.2)
    finally:
        for process, _ in running.values():
            process.terminate()
            process.wait()  # then its folders are free
    if failed:
        said = logs / f"{failed[0]}.log"
        end = "\n".join(said.read_text(errors="replace").splitlines()[-12:])
        raise RuntimeError(f"expected every step to succeed; {failed} did not. The end of {said}:\n{end}")


def config(step: Step, by_name: Mapping[str, Step]) -> str:
    """What a step's mark is of: its command and, in turn, those of what it needs. If any differs, it is run again."""
    needs = [config(by_name[name], by_name) for name in step.needs]
    return sha256(canonical_json([step.module, step.arguments, needs]))


def _marked(mark: Path, found: str) -> bool:
    return mark.is_file() and read_json(mark)["step"] == found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis.paper.reproduce", description=__doc__)
    parser.add_argument("--preset", choices=tuple(RUNS), default="tiny")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=8, help="the first seed; those from 100 on chose the recipes")
    parser.add_argument("--out", type=Path, help="default: runs/reproduce/PRESET")
    parser.add_argument("--workers", type=int, default=2, help="steps at a time")
    given = parser.parse_args(arguments)
    if given.seeds < 1 or given.workers < 1:
        parser.error(f"expected a seed and a worker at least; got {given.seeds} and {given.workers}.")
    out = given.out or Path("runs") / "reproduce" / given.preset
    seeds = range(given.first, given.first + given.seeds)
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or its steps would go on without it
    try:
        carry_out(plan(given.preset, seeds, out), out, given.workers)
    except RuntimeError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it stopped.")
    print(
        f"All steps done after {(time.monotonic() - began) / 60:.1f} minutes; tables and figures in {out / 'tables'}."
    )


if __name__ == "__main__":
    main()
