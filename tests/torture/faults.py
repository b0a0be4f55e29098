"""Full disks, cut files, killed ranks, and thousands of random inputs."""

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
    """Yield the line of each fault."""
    yield cut_files(folder)
    yield unwritable(folder)
    yield from full_disk(folder)
    yield killed_rank(folder)


def cut_files(folder: Path) -> Line:
    """Cut a sweep's rows at every byte of the last one: all whole rows are read, and a resumed run ends the same."""
    job = JOBS[0]
    whole = folder / "cut-whole"
    job.run(whole)
    data = (whole / "rows.jsonl").read_bytes()
    last = data.rstrip(b"\n").rfind(b"\n") + 1
    rows = read_rows(whole / "rows.jsonl")
    cuts = range(last, len(data))
    good = 0
    for cut in cuts:
        path = folder / "cut.jsonl"
        path.write_bytes(data[:cut])
        read = read_rows(path)
        append_rows(path, [rows[-1]] if len(read) < len(rows) else [])
        good += read in (rows, rows[:-1]) and read_rows(path) == rows
    what = "file of rows, truncated at each byte of its last row, then read and appended to"
    return Line(what, len(cuts), good, f"{len(rows)} rows in the file")


def unwritable(folder: Path) -> Line:
    """Run into a path that is a file: an error before anything is generated."""
    path = folder / "taken"
    path.write_text("mine")
    try:
        JOBS[0].run(path)
        message = "no error"
    except OSError as error:
        message = str(error).replace(str(folder), "...")
    good = "expected a folder" in message and path.read_text() == "mine"
    return Line("sweep into a path that is not a folder", 1, int(good), message)


def full_disk(folder: Path) -> Iterator[Line]:
    """Sweep on a disk of 64 KiB that is enlarged after the failure: an error names it, and no row is lost."""
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
            "sweep on a full disk, resumed when there was space", 1, int(good), f"{kept} rows kept; error: {message}"
        )
    finally:
        subprocess.run(["umount", str(disk)], check=False)


RANKS = """
import sys
from pathlib import Path
from tests.torture.jobs import JOBS
JOBS[0].run(Path(sys.argv[1]))
"""


def killed_rank(folder: Path) -> Line:
    """Kill one of two processes of a sweep: the run ends with an error and resumes from the rows of both."""
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
    output, _ = running.communicate(timeout=300)
    clear = running.returncode != 0 and ("Signal 9" in output or "has ended" in output)
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    same = again.returncode == 0 and JOBS[0].outcome(out) == JOBS[0].outcome(folder / "cut-whole")
    rows = [str(row["key"]) for name in ("rows.jsonl", "rows-1.jsonl") for row in read_rows(out / name)]
    good = clear and same and len(rows) == len(set(rows))
    reason = re.search(r"(Signal 9[^\n]*|expected all[^\n]*has ended[^\n]*)", output)
    shown = reason[1][:100] if reason else output[-100:]
    return Line("sweep by two processes, one killed, then resumed", 1, int(good), shown)


def _rank(pid: str) -> str | None:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((entry[5:].decode() for entry in entries if entry.startswith(b"RANK=")), None)


TESTED = {
    "a server that errs, hangs, closes, limits the rate or sends half a reply": (
        "tests/text/test_chat.py", "tests/training/test_server.py", "tests/training/test_server_calls.py",
        "tests/training/test_server_keys.py",
    ),
    "out of memory in a batch": ("tests", "-k", "out_of_memory"),
    "known silent errors: the tests detect the wrong code and accept steerkit": ("tests/test_silent_wrong.py",),
    "bad inputs refused with what was expected, what came and the fix": (
        "tests/test_bad_input.py", "tests/cli/test_bad_commands.py",
    ),
    "hostile files, names, keys and texts": (
        "tests/test_security.py", "tests/show/test_explorer.py", "tests/show/test_explorer_page.py", "-k", "not narrow",
    ),
    "batch sizes, orders and interruptions change no text": ("tests/generation/test_determinism.py",),
    "two processes give the results of one": ("tests/io/test_ranks.py",),
}  # fmt: skip


def tested() -> Iterator[Line]:
    """Yield a count of passed tests for each claim."""
    for what, chosen in TESTED.items():
        yield _counted(what, chosen, os.environ)


def fuzzed(examples: int) -> Iterator[Line]:
    """Yield the counts of tests/test_fuzz.py with this many examples per property."""
    environment = {**os.environ, "STEERKIT_EXAMPLES": str(examples)}
    what = f"properties checked on {examples} random inputs each, or on a quarter of these if each input is a file"
    yield _counted(what, ("tests/test_fuzz.py",), environment)


def _counted(what: str, chosen: Sequence[str], environment: Mapping[str, str]) -> Line:
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)}
    ran = sum(n for word, n in counts.items() if word != "skipped")
    detail = f"{', '.join(part for part in chosen if part.startswith('tests/'))}; {counts.get('skipped', 0)} skipped"
    return Line(what, max(1, ran), counts.get("passed", 0), detail.removeprefix("; "))
