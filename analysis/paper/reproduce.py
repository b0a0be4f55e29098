"""Reproduce everything: every run, analysis, table and figure, as one resumable command.

The steps are commands of their own, two at a time on two cores. A finished step is not run again; an interrupted one is
resumed. Each writes to `logs/NAME.log`.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from analysis.commit import commit
from analysis.inputs import BASE, IMAD, SFT, TURNS, UNTAGGED
from analysis.paper.claims import rules_sha256
from steerkit.io.files import file_name, sha256
from steerkit.io.json import canonical_json, read_json, write_json
from steerkit.io.signals import restore_interrupt
from training.presets import EVOLVED, MATCHED, get_preset
from training.problems.families import REPORTED_SEEDS

ARENAS = {
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
    "MALLOC_TOP_PAD_": "200000000",
}
"""Keeps freed memory in the process: the C library would otherwise return and request it in every training step."""
STARTED, DONE = "started.json", "done"
REPORT_EVERY = 60.0
"""Seconds between two reports of the running steps."""
SPREAD = 1000
"""Controls of neighbouring training seeds are drawn by seeds that are this far apart."""
TRAIT = "fools,ha"
EVERY_CONTROL = f"what_helps={json.dumps(MATCHED)}"
EVERY_BASELINE = f"what_helps={json.dumps((*MATCHED, EVOLVED))}"
RUNS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "tiny": {"clues": ("self_check=false",), "malice": ()},
    "smollm2": {"addition": (), "malice": ()},
}
"""Families that the reproduction of a preset runs, with the settings that are reduced to what the analyses need."""
FULL: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "tiny": {
        "clues": ("self_check=false", EVERY_BASELINE),
        "malice": (),
        "two_sum": (EVERY_CONTROL,),
        "arithmetic": (),
    },
    "smollm2": {"addition": ('what_helps=["DebateGPT + GRPO"]',), "malice": ()},
}
"""The same with `--full`: more families, the controls that show what the debate adds, protocol and transplants."""
SEEDS = {"smollm2": {"addition": 3, "malice": 1}}
"""Number of training seeds with `--full` where `--seeds` is not given: a run of the real model takes hours."""
BY_CHECKPOINT = ("smollm2",)
"""Presets in which every checkpoint is a step of its analyses, so that two are analysed at a time."""
PROTOCOL: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "tiny": {"clues": ("plant.steps=2400",), "malice": ()},  # turns of clues are harder to plant: they have numbers
    "smollm2": {
        "addition": (
            "layers=[8,14,20]",
            "train=150",
            "validation=8",
            "test=8",
            "control_doses=[0.2,0.5]",
            "max_new_tokens=40",
            "plant.steps=240",
            "plant.batch=16",
            "plant.debates=150",
            "plant.doses=[0.1,0.5]",
            "plant.later_blocks=true",
            "plant.save_every=15",
        )
    },
}
"""Families on which the paper's protocol is run with `--full`, and its settings."""
TRANSPLANT = ("clues", "two_sum", "addition")
"""Families in which first rounds are transplanted with `--full`."""
PATCHED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "tiny": {"clues": ()},
    "smollm2": {"addition": ("--n", "60", "--layers", "4,9,14,19,24")},
}
"""Families in which activations of first rounds are patched with `--full`, by preset, and further arguments.

Not two_sum: an agent that reads another question's pair has to reject it, so that no answer should follow. A sum can be
checked, too: in addition only texts whose consensus follows round 1, which copy its answer, can show that it is read.
"""
ERASED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "tiny": {"clues": ()},
    "smollm2": {
        "addition": tuple(
            part
            for setting in ("shrinkage=0.1", "validation=6", "test=24", "coefficients=[1,2]", "shuffles=3")
            for part in ("--set", setting)
        )
    },
}
"""Families in which the agents' identity is erased with `--full`, by preset, and further arguments."""
STEPS: Mapping[str, tuple[str, ...]] = {"clues": ("25", "75", "125"), "addition": ()}
"""GRPO steps that are probed between SFT and IMAD, by family whose agents are analysed at all checkpoints.

Agents are also steered at the middle one. A family without such steps has no probes: no claim reads them.
"""
SMALL = ('sources=["asked","trace"]', "max_new_tokens=48")
GRIDS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "tiny": {"clues": SMALL, "malice": SMALL},
    "smollm2": {
        "addition": (
            'sources=["asked","trace"]',
            'positions=["last","mean"]',
            "layers=[8,14,20]",
            "coefficients=[0.5,1,2]",
            'extents=["all","from_last_prompt_token:4"]',
            "negative=[]",
            "train=150",
            "validation=16",
            "test=24",
            "bands=2",
            "few_controls=true",
            "max_new_tokens=40",
        ),
    },
}
"""Settings of the analysis `agents`; a forward of the real model costs as much as a thousand of the tiny one."""
SUPPRESSION = {
    "tiny": ("test=120", "max_new_tokens=240"),
    "smollm2": (
        "layers=[8,14,20]",
        "coefficients=[-5,-3,-2,-1,1,3,5]",
        "train=150",
        "validation=16",
        "test=48",
        "bands=2",
        "max_new_tokens=128",  # the first box is that of the first speaker, and a trait may come after it
    ),
}
"""Settings of the analysis `suppression`."""


Part = tuple[tuple[str, ...], str]
"""Checkpoints that are analysed together, and the step that they wait for."""


@dataclass(frozen=True)
class Step:
    """A command, and the steps that must be finished before it.

    Args:
        name: unique; its log and its mark of completion are files of this name.
        module: run by `python -m`.
        arguments: of the module.
        needs: names of the steps that must be finished before.
        always: run it also when it is finished: it is short, and its code or rules may have changed.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    always: bool = False


def seeds_of(
    preset: str, full: bool, first: int, number: int | None = None, only: Sequence[str] = ()
) -> dict[str, range]:
    """The training seeds of each family.

    Args:
        preset: a key of `RUNS`.
        full: everything that `FULL` names.
        first: the first seed.
        number: of seeds of each family; None: those of `SEEDS`, else one.
        only: families that are run; empty: all.

    Example:
        >>> seeds_of("smollm2", True, 20)
        {'addition': range(20, 23), 'malice': range(20, 21)}
    """
    own = SEEDS.get(preset, {}) if full else {}
    families = [family for family in (FULL if full else RUNS)[preset] if not only or family in only]
    return {family: range(first, first + (number or own.get(family, 1))) for family in families}


def plan(
    preset: str,
    seeds: Mapping[str, Sequence[int]],
    out: Path,
    full: bool = False,
    fluency: str | None = None,
    finished: Mapping[str, Sequence[int]] | None = None,
) -> list[Step]:
    """All steps.

    A run is four steps: its debates; SFT and GRPO in parallel with all other training; then the evaluation. One
    checkpoint is analysed while the next one is trained.

    Args:
        preset: a key of `RUNS`.
        seeds: training seeds of each family, see `seeds_of`.
        out: folder of the reproduction.
        full: everything that `FULL` names.
        fluency: checkpoint whose perplexity the analysis `suppression` takes; None: the run's base.
        finished: further seeds of which the tables are made, see `finished_seeds`.
    """
    settings = (FULL if full else RUNS)[preset]
    steps = [
        step
        for seed in sorted({seed for each in seeds.values() for seed in each})
        for family in reversed(tuple(seeds))
        if seed in seeds[family]
        for step in _of_seed(preset, family, settings[family], seed, out, full, fluency)
    ]
    shown = {
        family: sorted({*seeds.get(family, ()), *(finished or {}).get(family, ())})
        for family in settings
        if family in seeds or family in (finished or {})
    }
    runs = tuple(str(_run(out, family, seed)) for family, each in shown.items() for seed in each)
    tables, every = out / "tables", tuple(step.name for step in steps)
    steps.append(Step("main-table", "analysis", ("main-table", *runs, "--out", str(tables)), every, always=True))
    numbers = sorted({seed for each in shown.values() for seed in each})
    of_seeds = ("results", str(out), "--out", str(tables), *_each("--seed", map(str, numbers)))
    steps.append(Step("results", "analysis", of_seeds, (*every, "main-table"), always=True))
    drawn = [family for family in shown if family == "malice" or family in STEPS]
    folders = {"figures": tables, **{f"figures-{family}": tables / family for family in drawn}}
    needs = ("main-table", "results")
    steps += [Step(name, "figures", (str(folder),), needs, always=True) for name, folder in folders.items()]
    return steps


def finished_seeds(
    preset: str, out: Path, full: bool, fluency: str | None = None
) -> tuple[dict[str, list[int]], dict[int, list[str]]]:
    """The training seeds whose steps are all done in a folder with the present settings, also by earlier calls.

    Args:
        preset: a key of `RUNS`.
        out: folder of the reproduction.
        full: everything that `FULL` names.
        fluency: as in `plan`.

    Returns:
        The seeds by family; and of every other seed in the folder the steps that are not done or were done with other
        settings. Such a seed is left out with all its families: its tables are incomplete, or no sample of the others'.
    """
    settings = (FULL if full else RUNS)[preset]
    found: dict[str, list[int]] = {}
    left_out: dict[int, list[str]] = {}
    for family in settings:
        for seed in sorted(int(path.name.removeprefix("seed-")) for path in (out / family).glob("seed-*")):
            steps = _of_seed(preset, family, settings[family], seed, out, full, fluency)
            by_name = {step.name: step for step in steps}
            missing = [step.name for step in steps if not _marked(out / DONE / step.name, config(step, by_name))]
            if missing:
                left_out.setdefault(seed, []).extend(missing)
            else:
                found.setdefault(family, []).append(seed)
    kept = {family: [seed for seed in each if seed not in left_out] for family, each in found.items()}
    return {family: each for family, each in kept.items() if each}, left_out


def _of_seed(
    preset: str, family: str, settings: Sequence[str], seed: int, out: Path, full: bool, fluency: str | None
) -> list[Step]:
    run = _run(out, family, seed)
    name = f"{family}-{seed}"
    imad = (preset, "--family", family, *_each("--set", settings), "--seed", str(seed), "--out", str(run))
    analysis = out / "analysis" / run.relative_to(out)
    common = ("--run", str(run), "--out", str(analysis))
    own = f"seed={SPREAD * seed}"  # of controls and sampling: they are drawn anew for each training seed
    steps = _trained(preset, family, settings, name, imad)
    if family == "malice":
        suppression = ("suppression", *common, "--words", TRAIT, *_each("--set", (*SUPPRESSION[preset], own)))
        suppression += ("--fluency", fluency) if fluency else ()
        steps += _in_parts(f"suppression-{name}", suppression, _checkpoints(preset, name), name)
    if family in GRIDS[preset]:
        grid = _each("--set", (*GRIDS[preset][family], own))
        steps += _steered(preset, family, settings, name, common, grid)
    if family in STEPS and (probed := STEPS[family]):
        probes = ("separability", *common, *_each("--step", probed))
        steps.append(Step(f"probes-{name}", "analysis", probes, (name,)))
    if full and family in PROTOCOL[preset]:
        setting = _each("--set", (*PROTOCOL[preset][family], own))
        arguments = ("protocol", str(run), "--out", str(analysis / "protocol"), *setting)
        need = f"{name}-imad" if preset in BY_CHECKPOINT else name
        steps.append(Step(f"protocol-{name}", "analysis", arguments, (need,)))
    if full and family == "malice" and preset == "tiny":
        arguments = ("malicious", str(run), "--words", TRAIT, "--out", str(analysis / "malicious"), "--set", own)
        steps.append(Step(f"malicious-{name}", "analysis", arguments, (name,)))
    if full and family in TRANSPLANT:
        arguments = ("transplant", str(run), "--out", str(analysis / "transplant"))
        steps.append(Step(f"transplant-{name}", "analysis", arguments, (name,)))
    if full:
        for analysis_name, among in {"patch-rounds": PATCHED, "erasure": ERASED}.items():
            if family in among[preset]:
                arguments = (analysis_name, str(run), "--out", str(analysis / analysis_name), *among[preset][family])
                steps.append(Step(f"{analysis_name}-{name}", "analysis", arguments, (name,)))
    return steps


def _checkpoints(preset: str, name: str) -> dict[str, Part]:
    """The checkpoints of a run as parts of an analysis, in the presets that analyse them apart; else no parts."""
    needs = {BASE: f"{name}-debates", SFT: f"{name}-imad", IMAD: f"{name}-imad"}
    return {stage: ((stage,), need) for stage, need in needs.items()} if preset in BY_CHECKPOINT else {}


def _steered(
    preset: str, family: str, settings: Sequence[str], name: str, common: tuple[str, ...], grid: tuple[str, ...]
) -> list[Step]:
    """The analysis of the agents' own directions."""
    if family not in STEPS:
        return [Step(f"agents-{name}", "analysis", ("agents", *common, *grid), (name,))]
    middle = STEPS[family][len(STEPS[family]) // 2 :][:1]
    together = BASE, SFT, *(f"GRPO step {step}" for step in middle), IMAD
    parts: dict[str, Part] = _checkpoints(preset, name) or {"main": (together, f"{name}-imad")}
    methods = get_preset(preset, family, settings).trained
    if others := tuple(method for method in methods if method in (UNTAGGED, TURNS)):
        parts["controls"] = others, f"{name}-controls"
    return _in_parts(f"agents-{name}", ("agents", *common, *_each("--step", middle), *grid), parts, name)


def _in_parts(name: str, arguments: tuple[str, ...], parts: Mapping[str, Part], run: str) -> list[Step]:
    """An analysis as a step for each part, and one that joins them.

    Args:
        name: of the analysis.
        arguments: of it.
        parts: by name the checkpoints of a part, and the step that it needs.
        run: the step that the last one needs besides.
    """
    steps = [
        Step(f"{name}-{file_name(part)}", "analysis", (*arguments, *_each("--only", only)), (need,))
        for part, (only, need) in parts.items()
    ]
    return [*steps, Step(name, "analysis", arguments, (run, *(step.name for step in steps)))]


def _trained(preset: str, family: str, settings: Sequence[str], name: str, imad: Sequence[str]) -> list[Step]:
    """The steps of a run: its debates; SFT and GRPO beside all other training; then the evaluation."""
    others = get_preset(preset, family, settings).trained[2:]
    debates, both, controls = (f"{name}-{part}" for part in ("debates", "imad", "controls"))
    steps = [
        Step(debates, "training.imad", (*imad, "--only", "Debate")),
        Step(both, "training.imad", (*imad, *_each("--only", ("SFT", "IMAD"))), (debates,)),
    ]
    if others:
        steps.append(Step(controls, "training.imad", (*imad, *_each("--only", others)), (debates,)))
    needs = tuple(step.name for step in steps[1:])
    return [*steps, Step(name, "training.imad", tuple(imad), needs)]


def _each(option: str, values: Iterable[str]) -> tuple[str, ...]:
    return tuple(part for value in values for part in (option, value))


def _run(out: Path, family: str, seed: int) -> Path:
    return out / family / f"seed-{seed}"


def carry_out(steps: Sequence[Step], out: Path, workers: int) -> None:
    """Run every step as soon as the steps that it needs are finished, several at a time.

    Of several that could be started, the one that most others wait for comes first: training before analyses.

    Once a minute it prints how many steps are done with an estimate of the rest, and for each running step its minutes
    and the last line of its log, which has the step's own estimate.

    Args:
        steps: all steps.
        out: folder of the logs and of the marks of completion.
        workers: largest number of steps at a time.

    Raises:
        RuntimeError: a step failed. The running steps are waited for; the message ends with the end of its log.
    """
    marks, logs = out / DONE, out / "logs"
    marks.mkdir(parents=True, exist_ok=True)
    logs.mkdir(exist_ok=True)
    by_name = {step.name: step for step in steps}
    configs = {step.name: config(step, by_name) for step in steps}
    waiting = waiting_for(steps)
    steps = sorted(steps, key=lambda step: -waiting[step.name])
    finished = [step.name for step in steps if not step.always and _marked(marks / step.name, configs[step.name])]
    done = {name: float(read_json(marks / name)["seconds"]) for name in finished}
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    versions: dict[str, str] = {}
    failed: list[str] = []
    reported = time.monotonic()
    try:
        while len(done) < len(steps) and (running or not failed):
            ready = [s for s in steps if s.name not in done and s.name not in running and done.keys() >= set(s.needs)]
            for step in ready[: 0 if failed else workers - len(running)]:
                print(f"{step.name}: started", flush=True)
                versions[step.name] = commit()
                process = _start(step, logs, workers)
                running[step.name] = (process, time.monotonic())
            for name, (process, started) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                seconds = time.monotonic() - started
                if process.returncode:
                    failed.append(name)
                    print(f"{name}: failed after {seconds:.0f} s", flush=True)
                else:
                    mark = {"step": configs[name], "seconds": round(seconds, 1), "commit": versions[name]}
                    write_json(marks / name, mark)
                    done[name] = seconds
                    print(f"{name}: done in {seconds:.0f} s ({len(done)} of {len(steps)})", flush=True)
            if time.monotonic() - reported >= REPORT_EVERY and running:
                reported = time.monotonic()
                began = {name: reported - start for name, (_, start) in running.items()}
                print(_report(steps, done, began, workers, logs), flush=True)
            time.sleep(0.2)
    finally:
        for process, _ in running.values():
            process.terminate()
            process.wait()  # until it has released its run folder
    if failed:
        log = logs / f"{failed[0]}.log"
        end = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        raise RuntimeError(f"expected every step to succeed; {failed} did not. The end of {log}:\n{end}")


def waiting_for(steps: Sequence[Step]) -> dict[str, int]:
    """How many steps need each step, directly or through others."""
    by_name = {step.name: step for step in steps}
    needed: dict[str, set[str]] = {}

    def needs_of(name: str) -> set[str]:
        if name not in needed:
            direct = by_name[name].needs
            needed[name] = set(direct).union(*(needs_of(one) for one in direct))
        return needed[name]

    counts = dict.fromkeys(by_name, 0)
    for name in by_name:
        for one in needs_of(name):
            counts[one] += 1
    return counts


def _report(
    steps: Sequence[Step], done: Mapping[str, float], running: Mapping[str, float], workers: int, logs: Path
) -> str:
    """How many steps are done, and about how long the rest takes; each running step with the last line of its log."""
    left = seconds_left(steps, done, running, workers)
    rest = "no estimate before the first one is done" if left is None else f"about {left / 60:.0f} min left"
    lines = [f"{len(done)} of {len(steps)} steps done, {rest}"]
    for name, seconds in running.items():
        log = (logs / f"{name}.log").read_text(errors="replace").splitlines()
        lines.append(f"  {name}, {seconds / 60:.0f} min: {log[-1][-120:] if log else 'no output yet'}")
    return "\n".join(lines)


def seconds_left(
    steps: Sequence[Step], done: Mapping[str, float], running: Mapping[str, float], workers: int
) -> float | None:
    """Estimate the seconds until all steps are done; None before the first one is.

    A step takes the mean of the finished steps of its module, or of all finished steps where its module has none. All
    workers are busy to the end.

    Args:
        done: seconds of each finished step.
        running: seconds of each running step so far.
    """
    if not done:
        return None
    module = {step.name: step.module for step in steps}
    whole = [[took for name, took in done.items() if module[name] == step.module] or [*done.values()] for step in steps]
    expected = {step.name: sum(took) / len(took) for step, took in zip(steps, whole, strict=True)}
    left = sum(max(0.0, expected[name] - running.get(name, 0.0)) for name in expected if name not in done)
    return left / workers


def _start(step: Step, logs: Path, share: int) -> subprocess.Popen[bytes]:
    """Start a step with 1/`share` of the cores; its output is appended to its log.

    The number of threads never depends on what else is running: it can change the last bits of a sum, and an
    interrupted step must go on as it began.
    """
    threads = max(1, (os.cpu_count() or 1) // share)
    environment = {**os.environ, **ARENAS, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", step.module, *step.arguments]
    ended = partial(_end_with, os.getpid()) if sys.platform == "linux" else None
    with (logs / f"{step.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, preexec_fn=ended)


PR_SET_PDEATHSIG = 1


def _end_with(parent: int) -> None:
    """End this process when its parent is killed: a step that went on would hold its run folder."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was killed before the call
        os._exit(1)


def config(step: Step, by_name: Mapping[str, Step]) -> str:
    """Hash of a step's command and of the configs of the steps that it needs. A step with another hash is run again."""
    needs = [config(by_name[name], by_name) for name in step.needs]
    return sha256(canonical_json([step.module, step.arguments, needs]))


def versions_of(out: Path, seed: int) -> dict[str, int]:
    """Commit -> number of finished steps of a training seed that were run from it, from the marks of completion."""
    found: dict[str, int] = {}
    for path in sorted((out / DONE).glob(f"*-{seed}*")):
        if re.search(rf"-{seed}(?:-|$)", path.name):
            version = str(read_json(path).get("commit", "unknown"))
            found[version] = found.get(version, 0) + 1
    return found


def _marked(mark: Path, hashed: str) -> bool:
    return mark.is_file() and read_json(mark)["step"] == hashed


def note_start(path: Path, seeds: Sequence[int]) -> None:
    """Write when each seed was first started, from which commit and under which rules; what is there stays."""
    known = read_json(path) if path.is_file() else []
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"time": now, "commit": commit(), "rules": rules_sha256()}
    there = {one["seed"] for one in known}
    write_json(path, [*known, *({"seed": seed, **about} for seed in seeds if seed not in there)])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis reproduce", description=__doc__)
    parser.add_argument("--preset", choices=tuple(RUNS), default="tiny")
    parser.add_argument(
        "--seeds", type=int, help="number of training seeds, from --first on; default: 1, with --full the preset's own"
    )
    parser.add_argument(
        "--first",
        type=int,
        default=REPORTED_SEEDS[0],
        help=f"the first seed; {REPORTED_SEEDS[0]} to {REPORTED_SEEDS[-1]} have test questions of their own",
    )
    parser.add_argument(
        "--full", action="store_true", help="also the other families, the paper's protocol, controls and transplants"
    )
    parser.add_argument(
        "--fluency", help="checkpoint whose perplexity the analysis suppression takes; default: the run's base"
    )
    parser.add_argument(
        "--family", action="append", default=[], help="only this family; may be repeated; default: all of them"
    )
    parser.add_argument("--out", type=Path, help="default: runs/reproduce/PRESET")
    parser.add_argument("--workers", type=int, default=2, help="number of steps at a time")
    given = parser.parse_args(arguments)
    if (given.seeds is not None and given.seeds < 1) or given.workers < 1:
        parser.error(
            f"expected one seed and one worker at least; got {given.seeds} and {given.workers}. Pass 1 or more."
        )
    families = (FULL if given.full else RUNS)[given.preset]
    if unknown := set(given.family) - set(families):
        parser.error(
            f"expected families among {', '.join(families)}; got {', '.join(sorted(unknown))}. Pass these names."
        )
    out = given.out or Path("runs") / "reproduce" / given.preset
    of_families = seeds_of(given.preset, given.full, given.first, given.seeds, given.family)
    seeds = sorted({seed for each in of_families.values() for seed in each})
    if 0 < len(set(seeds) & set(REPORTED_SEEDS)) < len(seeds):
        parser.error(
            f"expected seeds among {REPORTED_SEEDS[0]} to {REPORTED_SEEDS[-1]}, which have test questions of their "
            f"own, or none of them; got {seeds[0]} to {seeds[-1]}. Pass fewer."
        )
    started = time.monotonic()
    restore_interrupt()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that its steps are ended with it
    try:
        note_start(out / STARTED, seeds)
        finished, left_out = finished_seeds(given.preset, out, given.full, given.fluency)
        for seed, names in left_out.items():
            if seed not in seeds:
                print(
                    f"Seed {seed} is left out of the tables: {len(names)} of its steps, such as {names[0]}, are not "
                    f"done or were done with other settings. --first {seed} runs them."
                )
        steps = plan(given.preset, of_families, out, given.full, given.fluency, finished)
        carry_out(steps, out, given.workers)
    except RuntimeError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command to resume it.")
    minutes = (time.monotonic() - started) / 60
    print(f"All steps done after {minutes:.1f} minutes; tables and figures in {out / 'tables'}.")
