"""SIGKILL at random moments: a resumed run equals an uninterrupted one, with no row lost or doubled."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.torture.jobs import JOBS, Job


@dataclass(frozen=True)
class Line:
    """A line of the report.

    Args:
        what: what was done.
        times: how often it was done.
        good: how often the result was correct.
        detail: measurements and messages.
        measured: report only; an incorrect result is no failure.
    """

    what: str
    times: int
    good: int
    detail: str
    measured: bool = False


def forked(job: Job, folder: Path, log: Path) -> int:
    """Fork a child that runs the job with the imports of this process; return its process id."""
    child = os.fork()
    if child:
        return child
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        job.run(folder)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def finished(child: int) -> bool:
    """Wait for a child; return whether it succeeded."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


FLIPS = 3
"""This many rows of all resumed runs of a job may differ by a flip; more are an error."""


def kills(folder: Path, times: int, seed: int = 0) -> Iterator[Line]:
    """Kill each job `times` times, at random moments of its run, and resume it each time."""
    rng = random.Random(seed)
    for job in JOBS:
        whole = folder / f"{job.name}-whole"
        began = time.monotonic()
        if not finished(forked(job, whole, folder / f"{job.name}.log")):
            yield Line(f"{job.name}: killed and resumed", times, 0, f"it fails without a kill: see {job.name}.log")
            continue
        took = time.monotonic() - began
        wanted = job.outcome(whole)
        same = flipped = flips = hit = doubled = tries = 0
        while hit < times and tries < 4 * times:  # a run that ended before its signal is not counted
            cut = folder / f"{job.name}-{tries}"
            tries += 1
            child = forked(job, cut, folder / f"{job.name}.log")
            time.sleep(rng.uniform(0.02, 0.9) * took)
            os.kill(child, signal.SIGKILL)
            if finished(child):
                continue
            hit += 1
            ended = finished(forked(job, cut, folder / f"{job.name}.log"))
            doubled += job.repeated(cut) if ended else 0
            if not ended or job.repeated(cut):
                continue
            if job.outcome(cut) == wanted:
                same += 1
            elif differing := job.flips(whole, cut):
                flipped += 1
                flips += differing
        good = same + flipped if flips <= FLIPS else same
        detail = f"a run takes {took:.1f} s; duplicate rows: {doubled}; {same} equal the uninterrupted run"
        detail += f", {flipped} equal it except for {flips} texts, rounded differently in another batch shape" * (
            flips > 0
        )
        yield Line(f"{job.name}: killed and resumed", times, good, detail)
