"""The demo's work after set-up, this code against an earlier commit; one run of each."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.before import COMMIT, FOLDER, ROOT, checkout
from benchmarks.timing import Measured, measured, seconds

CODE = "import sys\nfrom steerkit.cli.main import main\nsys.argv = ['steerkit', 'demo', '--out', sys.argv[1]]\nmain()"
OLD_CODE = CODE.replace("steerkit.cli.main", "steerkit.cli")


def run(folder: Path, code: str) -> None:
    """The whole demo by the code of a folder, in a process of its own; its errors are printed."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-c", code, str(Path(out) / "demo")]
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        subprocess.run(command, env=environment, cwd=out, check=True, stdout=subprocess.DEVNULL)


def demo() -> Iterator[Measured]:
    """One run by each checkout; both have the same grid, which the note names."""
    checkout()
    old, new = (seconds(partial(run, folder, code)) for folder, code in ((FOLDER, OLD_CODE), (ROOT, CODE)))
    yield measured(
        "the demo's work after set-up",
        f"commit {COMMIT}",
        [new],
        [old],
        ">= 2",
        "one run of each; this commit has 8 random directions and 9 coefficients, as the old one has",
    )
