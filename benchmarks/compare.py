"""`python -m benchmarks.compare OLD_CHECKOUT`: speed of this checkout over an older one, capture and sweep.

Each checkout runs in a process of its own that keeps the model loaded. The two are timed in turn, in pairs; the order
within a pair alternates. A ratio is old seconds / new seconds: above 1, this checkout is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.inputs import traces
from benchmarks.timing import Measured, measured
from steerkit.demo.checkpoint import default_checkpoint
from steerkit.demo.questions import read_questions
from steerkit.io.signals import restore_interrupt

HERE = Path(__file__).parent
LAYER, TEXTS, PROMPTS, NEW = 14, 96, 8, 24
COEFFICIENTS = (-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
JOBS = {
    "capture": f"capture of {TEXTS} texts at one layer",
    "sweep": f"sweep of {PROMPTS * len(COEFFICIENTS)} rows x {NEW} tokens",
    "turns": "six turns of a two-round trace, 3 traces",
    "prefill": f"sweep of {PROMPTS * len(COEFFICIENTS)} rows of long prompts x 4 tokens",
    "beginnings": "48 questions after three worked examples, 8 new tokens",
    "doctor": "the doctor's first eight checks",
}
DEFAULT = ("capture", "sweep")
SLOWER = 0.95
"""A job whose interval lies below this ratio is reported as slower."""


def workload(checkpoint: str | Path) -> dict[str, Any]:
    """What both checkouts work on: the demo's answers, cut to 15 to 45 words, and its chat prompts."""
    questions = list(read_questions())
    words = " ".join(answer for question in questions for answer in question.answers.values()).split()
    lengths = [15 + (number * 37) % 31 for number in range(TEXTS)]
    starts = [(number * 53) % (len(words) - 45) for number in range(TEXTS)]
    return {
        "checkpoint": str(checkpoint),
        "layer": LAYER,
        "norm": 10.0,
        "texts": [" ".join(words[start : start + length]) for start, length in zip(starts, lengths, strict=True)],
        "prompts": [question.messages() for question in questions[:PROMPTS]],
        "long_prompts": [
            " ".join(words[start : start + 230]) + "\n\n" + question.question
            for start, question in zip(range(0, 53 * PROMPTS, 53), questions[:PROMPTS], strict=True)
        ],
        "worked": [
            f"What is 23 + 45?\n68\n\nWhat is 38 + 26?\n64\n\nWhat is 52 + 17?\n69\n\nWhat is {a} + {b}?\n"
            for a in range(11, 23, 2)
            for b in range(31, 63, 4)
        ],
        "traces": [(str(text.text), text.spans) for text in (trace.spans() for trace in traces(3))],
        "coefficients": COEFFICIENTS,
        "max_new_tokens": NEW,
    }


class Worker:
    """A process that runs jobs on the steerkit of a checkout; use it inside `with`.

    Args:
        checkout: folder that contains the package `steerkit`.
        setup: see `workload`; further arguments of `steerkit.load` under `load`.
    """

    def __init__(self, checkout: Path, setup: dict[str, Any]) -> None:
        self.checkout = checkout
        code = (HERE / "worker.py").read_text(encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=checkout,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._write(setup)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        with self.process:  # closes its pipes and waits for it
            pass

    def run(self, job: str) -> tuple[float, str]:
        """Seconds that a job took, and a hash of its output.

        Raises:
            RuntimeError: the process ended.
        """
        assert self.process.stdout is not None
        self._write(job)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"expected an answer of the worker in {self.checkout}; it ended. Its error is above.")
        answer = json.loads(line)
        return answer["seconds"], answer["output"]

    def _write(self, request: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()


def compare_checkouts(old: Worker, new: Worker, pairs: int, jobs: Sequence[str] = DEFAULT) -> list[Measured]:
    """Time jobs on both sides in turn, after one uncounted run each."""
    lines = []
    for job, title in ((job, JOBS[job]) for job in jobs):
        outputs = {old.run(job)[1], new.run(job)[1]}
        seconds: dict[Worker, list[float]] = {old: [], new: []}
        for number in range(pairs):
            for worker in (old, new) if number % 2 else (new, old):
                took, output = worker.run(job)
                seconds[worker].append(took)
                outputs.add(output)
        note = "equal outputs" if len(outputs) == 1 else "OUTPUTS DIFFER"
        lines.append(measured(title, str(old.checkout), seconds[new], seconds[old], note=note))
        print(sentence(lines[-1]), flush=True)
    return lines


def sentence(line: Measured) -> str:
    """A line of the comparison as text."""
    verdict = "; SLOWER" if line.high < SLOWER else ""
    return (
        f"{line.job}: new/old speed {line.ratio:.3f} [{line.low:.3f}, {line.high:.3f}] over {line.pairs} pairs "
        f"(median seconds {line.ours:.2f} new, {line.theirs:.2f} old; {line.note}){verdict}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT", help="folder of the older checkout")
    parser.add_argument("--new", type=Path, default=HERE.parent, help="default: the checkout of this file")
    parser.add_argument("--pairs", type=int, default=11, help="number of timed pairs of each job")
    given = parser.parse_args(arguments)
    restore_interrupt()
    for checkout in (given.old, given.new):
        if not (checkout / "steerkit" / "__init__.py").is_file():
            parser.error(f"expected a checkout with the package steerkit; got {checkout}. Pass its folder.")
    setup = workload(default_checkpoint())
    with Worker(given.old.resolve(), setup) as old, Worker(given.new.resolve(), setup) as new:
        lines = compare_checkouts(old, new, given.pairs)
    if any(line.high < SLOWER for line in lines):
        sys.exit(1)


if __name__ == "__main__":
    main()
