"""Full disks, cut files, dead ranks, and thousands of made-up inputs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from steerkit.io.rows import append_rows, read_rows
from tests.torture.jobs import JOBS
from tests.torture.killed import Line

ROOT = Path(__file__).parents[2]


def faults(folder: Path) -> Iterator[Line]:
    """All faults, each a line."""
    yield cut_files(folder)
    yield unwritable(folder)
    yield from full_disk(folder)
    yield dead_rank(folder)


def cut_files(folder: Path) -> Line:
    """A sweep's rows cut at every byte of the last one: all whole rows are read, and the run ends the same."""
    job = JOBS[0]
    whole = folder / "cut-whole"
    job.run(whole)
    data = (whole / "rows.jsonl").read_bytes()
    last = data.rstrip(b"\n").rfind(b"\n") + 1
    rows = read_rows(whole / "rows.jsonl")
    places = range(last, len(data))
    good = 0
    for place in places:
        path = folder / "cut.jsonl"
        path.write_bytes(data[:place])
        read = read_rows(path)
        append_rows(path, [rows[-1]] if len(read) < len(rows) else [])
        good += read in (rows, rows[:-1]) and read_rows(path) == rows
    return Line("rows cut at every byte of the last one, read and appended to", len(places), good, f"{len(rows)} rows")


def unwritable(folder: Path) -> Line:
    """A file where the run's folder should be: an error that says so before anything is generated."""
    place = folder / "taken"
    place.write_text("mine")
    try:
        JOBS[0].run(place)
        said = "no error"
    except OSError as error:
        said = str(error).replace(str(folder), "...")
    return Line(
        "sweep into a place that is no folder",
        1,
        int("expected a folder" in said and place.read_text() == "mine"),
        said,
    )


def full_disk(folder: Path) -> Iterator[Line]:
    """A sweep on a disk of 64 KiB that is enlarged after it has failed: an error that names it, and nothing lost."""
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        yield Line("sweep on a full disk", 0, 0, "not run: this user may not mount a file system")
        return
    job = JOBS[0]
    try:
        message = ""
        try:
            job.run(disk / "run")
        except OSError as error:
            message = str(error)
        kept = len(read_rows(disk / "run" / "rows.jsonl"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        job.run(disk / "run")
        same = job.outcome(disk / "run") == job.outcome(folder / "cut-whole")
        good = "No space left" in message and kept > 0 and same and job.repeated(disk / "run") == 0
        yield Line(
            "sweep on a full disk, gone on with when there was room", 1, int(good), f"{kept} rows were kept: {message}"
        )
    finally:
        subprocess.run(["umount", str(disk)], check=False)


RANKS = """
import sys
from pathlib import Path
from tests.torture.jobs import JOBS
JOBS[0].run(Path(sys.argv[1]))
"""


def dead_rank(folder: Path) -> Line:
    """One of two processes of a sweep killed: the run ends with an error, and goes on from what both had written."""
    script = folder / "ranks.py"
    script.write_text(RANKS)
    out = folder / "ranks"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
        str(out),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    other = out / "rows-1.jsonl"
    for _ in range(1200):
        if other.exists() and other.stat().st_size:
            break
        time.sleep(0.05)
    workers = subprocess.run(
        ["pgrep", "-f", f"ranks.py {out}"], capture_output=True, text=True, check=False
    ).stdout.split()
    ranked = {_rank(pid): int(pid) for pid in workers if _rank(pid) is not None}
    os.kill(ranked["1"], signal.SIGKILL)
    said, _ = running.communicate(timeout=300)
    clear = running.returncode != 0 and ("Signal 9" in said or "has ended" in said)
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    same = again.returncode == 0 and JOBS[0].outcome(out) == JOBS[0].outcome(folder / "cut-whole")
    rows = [str(row["key"]) for name in ("rows.jsonl", "rows-1.jsonl") for row in read_rows(out / name)]
    good = clear and same and len(rows) == len(set(rows))
    found = re.search(r"(Signal 9[^\n]*|expected all[^\n]*has ended[^\n]*)", said)
    return Line(
        "sweep by two processes, one killed, then gone on with", 1, int(good), found[1][:100] if found else said[-100:]
    )


def _rank(pid: str) -> str | None:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((entry[5:].decode() for entry in entries if entry.startswith(b"RANK=")), None)


TESTED = {
    "a server that errs, hangs, closes, limits the rate or sends half a reply": (
        "tests/test_chat.py", "tests/test_server.py", "tests/test_server_calls.py", "tests/test_server_keys.py",
    ),
    "memory that runs out in a batch": ("tests", "-k", "out_of_memory"),
    "each wrong way of the silent-wrong list caught, and ours not": ("tests/test_silent_wrong.py",),
    "bad inputs refused with what was expected, what came and what to do": (
        "tests/test_bad_input.py", "tests/test_bad_commands.py",
    ),
    "hostile files, names, keys and texts": (
        "tests/test_security.py", "tests/test_explorer.py", "tests/test_explorer_page.py", "-k", "not narrow",
    ),
    "batch sizes, orders and interruptions that change no text": ("tests/test_determinism.py",),
    "two processes for one": ("tests/test_ranks.py",),
}  # fmt: skip


def tested() -> Iterator[Line]:
    """What the tests hold, counted."""
    for what, chosen in TESTED.items():
        yield _counted(what, chosen, os.environ)


def fuzzed(examples: int) -> Iterator[Line]:
    """The properties of tests/test_fuzz.py with as many examples each as are asked for."""
    environment = {**os.environ, "STEERKIT_EXAMPLES": str(examples)}
    what = f"properties that hold of {examples} made-up inputs each, a quarter where each is a file"
    yield _counted(what, ("tests/test_fuzz.py",), environment)


def _counted(what: str, chosen: Sequence[str], environment: Mapping[str, str]) -> Line:
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)}
    ran = sum(n for word, n in counts.items() if word != "skipped")
    said = f"{', '.join(part for part in chosen if part.startswith('tests/'))}; {counts.get('skipped', 0)} skipped"
    return Line(what, max(1, ran), counts.get("passed", 0), said.removeprefix("; "))
