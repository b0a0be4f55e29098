"""SIGKILL at random moments: what is resumed ends as what was never killed, nothing lost, nothing doubled."""

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
        what: was done.
        times: how often.
        good: how often it ended as it should.
        said: what else one has to know.
        measured: reported only; it is no failure where some did not.
    """

    what: str
    times: int
    good: int
    said: str
    measured: bool = False


def forked(job: Job, folder: Path, log: Path) -> int:
    """The process id of a child that runs the job; its imports are those that this process has."""
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
    """Wait for a child; whether it ended well."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


FLIPS = 3
"""So many rows of all resumed runs of a job may differ by a flip; more would be a fault of ours."""


def kills(folder: Path, times: int, seed: int = 0) -> Iterator[Line]:
    """Each job killed `times` times, at moments spread over the time that it takes, and taken up again each time."""
    rng = random.Random(seed)
    for job in JOBS:
        whole = folder / f"{job.name}-whole"
        began = time.monotonic()
        if not finished(forked(job, whole, folder / f"{job.name}.log")):
            yield Line(f"{job.name}: killed and resumed", times, 0, f"it fails by itself: see {job.name}.log")
            continue
        took = time.monotonic() - began
        wanted = job.outcome(whole)
        same = flipped = flips = hit = doubled = tries = 0
        while hit < times and tries < 4 * times:  # a run that was over before its signal came is not counted
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
            elif found := job.flips(whole, cut):
                flipped += 1
                flips += found
        good = same + flipped if flips <= FLIPS else same
        said = f"a run takes {took:.1f} s; rows doubled: {doubled}; {same} end as the one that nobody killed"
        said += f", {flipped} so but for {flips} texts in which a batch of another shape rounded otherwise" * (
            flips > 0
        )
        yield Line(f"{job.name}: killed and resumed", times, good, said)
