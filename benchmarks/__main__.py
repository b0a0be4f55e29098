"""`python -m benchmarks [JOB ...]`: run jobs (default: all), store them in results/speed and write RESULTS.md."""

from __future__ import annotations

import datetime
import math
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks import (
    before,
    capture,
    choices,
    decoding,
    demo,
    footprint,
    growth,
    llamacpp,
    operations,
    profile,
    rollouts,
    scores,
    serving,
    startup,
    training,
)
from benchmarks.gpu.page import SMALL_SIZES
from benchmarks.timing import STORE, Measured
from figures.growth import growth as growth_figure
from steerkit.io.files import write_text
from steerkit.io.json import read_json, write_json
from steerkit.io.signals import restore_interrupt
from steerkit.io.versions import versions
from steerkit.show.plots import save_figure

HERE = Path(__file__).parent
GPU_PAGE = STORE.parent / "gpu" / "gpu.md"
PEERS = ("nnsight", "transformer-lens", "steering-vectors", "rouge-score", "scikit-learn", "rapidfuzz")
JOBS: dict[str, Callable[[], Iterator[Measured]]] = {
    "startup": startup.startup,
    "capture": capture.against_peers,
    "turns": capture.turns,
    "sweep": decoding.sweep,
    "kernels": decoding.kernels,
    "one-by-one": decoding.one_by_one,
    "llamacpp": llamacpp.against_llamacpp,
    "before": before.before,
    "torch-kernels": before.on_torch,
    "footprint": footprint.footprint,
    "demo": demo.demo,
    "sft": training.sft,
    "sft-bfloat16": training.sft_bfloat16,
    "grpo": training.grpo,
    "plain-capture": capture.against_plain,
    "prefill": decoding.shared_prefill,
    "choices": choices.choices,
    "beginnings": decoding.common_beginning,
    "compaction": decoding.compaction,
    "operations": operations.operations,
    "sites": operations.sites,
    "conditions": operations.conditions,
    "rollouts": rollouts.written,
    "rouge": scores.rouge,
    "probes": scores.all_probes,
    "memory": capture.memory,
}
ELSEWHERE: dict[str, Callable[[], Iterator[Measured]]] = {
    "vllm-steered": serving.steered,
    "vllm-sweep": serving.sweep,
    "vllm-asleep": serving.asleep,
    "vllm-own": serving.own,
    "vllm-capture": serving.read,
}
"""Jobs of another environment (`make bench-vllm`), which run only where they are named."""
TABLES = ("profile", "growth")


def main(names: list[str]) -> None:
    restore_interrupt()
    known = [*JOBS, *TABLES, *ELSEWHERE]
    wanted = names or [*JOBS, *TABLES]
    if unknown := set(wanted) - set(known):
        raise SystemExit(f"expected jobs among {known}; got {sorted(unknown)}. Pass names of that list.")
    warnings.simplefilter("ignore")
    for name in wanted:
        print(f"# {name}", flush=True)
        if name == "growth":
            table = growth.table()
            save_figure(growth_figure(table), HERE / "growth", {})
            rows: Any = table.to_dict("records")
        elif name == "profile":
            rows = list(profile.shares())
        else:
            rows = []
            for line in {**JOBS, **ELSEWHERE}[name]():
                rows.append({**line.row(), "holds": line.holds})
                print(sentence(rows[-1]), flush=True)
        write_json(STORE / f"{name}.json", {"date": today(), "machine": machine(), "rows": rows})
    write_text(HERE / "RESULTS.md", results())


def today() -> str:
    return datetime.date.today().isoformat()


def machine() -> dict[str, Any]:
    """Hardware, load and versions, which the results depend on."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": unknown")
    installed = versions()
    for package in PEERS:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return {
        "cpu": cpu.split(":", 1)[1].strip(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "versions": installed,
    }


def ratio(row: dict[str, Any]) -> str:
    """A ratio as text, with its interval where there is one."""
    unknown = row["low"] is None or math.isnan(row["low"])
    return f"{row['ratio']:.2f}" + ("" if unknown else f" [{row['low']:.2f}, {row['high']:.2f}]")


def sentence(row: dict[str, Any]) -> str:
    """A row of the results as a line of text."""
    holds = {True: " met", False: " MISSED", None: ""}[row["holds"]]
    return (
        f"{row['job']} | {row['against']}: {ratio(row)}"
        f" {row['target']}{holds} ({row['ours']:.3g} / {row['theirs']:.3g} {row['unit']}) {row['note']}"
    )


def results() -> str:
    """The text of RESULTS.md, from the stored results of the jobs."""
    stored = {
        name: read_json(STORE / f"{name}.json")
        for name in [*JOBS, *ELSEWHERE, *TABLES]
        if (STORE / f"{name}.json").exists()
    }
    about = next(iter(stored.values()))["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    loads = [part["machine"]["load"] for part in stored.values()]
    lines = [
        "# Speed",
        "",
        "Written by `make bench`. The two sides of a row run in turn in one process, after one uncounted call each. "
        "The ratio is the geometric mean over pairs of (other side's seconds / ours): above 1, steerkit is faster. "
        "Against a floor it is ours / floor. Brackets: 95 % interval, Student's t over pairs. A target is met when the "
        "whole interval of at least 11 pairs meets it; with fewer pairs it is not judged. `python -m benchmarks JOB` "
        "runs one job again; the others keep their rows and dates (in `results/speed`).",
        "",
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, {about['system']}; load average when the "
        f"jobs ended {min(loads)} to {max(loads)}. SmolLM2-135M-Instruct, Q4_1 dequantised to float32. {versions}.",
        "",
        "| job | against | ratio | target | pairs | ours, median (spread) | other, median | | date |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, part in stored.items():
        if name in TABLES:
            continue
        for row in part["rows"]:
            holds = {True: "met", False: "**missed**", None: ""}[row["holds"]]
            target = " ".join(filter(None, [row["target"].replace(">=", "\u2265").replace("<=", "\u2264"), holds]))
            lines.append(
                f"| {row['job']} | {row['against']} | {ratio(row)} "
                f"| {target} | {row['pairs']} | {row['ours']:.3g} {row['unit']} ({row['spread']:.0%}) "
                f"| {row['theirs']:.3g} {row['unit']} | {row['note']} | {part['date']} |"
            )
    if "profile" in stored:
        lines += [
            "",
            "## Where the seconds of the sweep go",
            "",
            f"The sweep of 72 rows, on {stored['profile']['date']}. Seconds without a profiler, shares by torch's "
            "profiler. GFLOP/s are those of all linear layers over their seconds; the peak is that of a product of two "
            "2048 x 2048 matrices.",
            "",
        ]
        columns = list(stored["profile"]["rows"][0])
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for row in stored["profile"]["rows"]:
            cells = [
                f"{row[name]:.0%}"
                if name in ("linear layers", "attention", "rest")
                else row[name]
                if isinstance(row[name], str)
                else f"{row[name]:.3g}"
                for name in columns
            ]
            lines.append("| " + " | ".join(cells) + " |")
    if "growth" in stored:
        table = growth.slopes(pd.DataFrame(stored["growth"]["rows"]))
        lines += [
            "",
            "## Growth",
            "",
            "Slopes on logarithmic axes (1: proportional), each size in a process of its own. MiB are counted above "
            "the memory that the process held after a smaller run; the C library's cache changes them by about 50 MiB, "
            "so slopes of jobs that stay below that say nothing. The figure has the seconds. "
            "![Seconds over the size of each job](growth.png)",
            "",
        ]
        lines += ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
        for row in table.itertuples(index=False):
            cells = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row]
            lines.append("| " + " | ".join(cells) + " |")
    page = GPU_PAGE.read_text() if GPU_PAGE.exists() else SMALL_SIZES
    if SMALL_SIZES not in page.partition("\n")[0]:
        lines += ["", page.replace("\n## ", "\n### ").replace("# GPU", "## GPU", 1)]
    else:
        lines += ["", "## GPU", "", "`make gpu` has not been run: no GPU was available."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
