"""The demo's work after set-up, this code against an earlier commit; one run of each."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.before import COMMIT, FOLDER, ROOT, checkout
from benchmarks.timing import Measured, measured, seconds

CODE = "import sys\nfrom steerkit.cli.main import main\nsys.argv = ['steerkit', 'demo', '--out', sys.argv[1]]\nmain()"
OLD_CODE = CODE.replace("steerkit.cli.main", "steerkit.cli")


def demo() -> Iterator[Measured]:
    """The whole demo by each checkout, on the present grid, in a process of its own."""
    checkout()
    times = {}
    for name, folder, code in (("old", FOLDER, OLD_CODE), ("new", ROOT, CODE)):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "-c", code, str(Path(out) / "demo")]
            environment = {**os.environ, "PYTHONPATH": str(folder)}

            def run(command: list[str] = command, environment: dict[str, str] = environment, cwd: str = out) -> None:
                subprocess.run(command, env=environment, cwd=cwd, check=True, capture_output=True)

            times[name] = seconds(run)
    yield measured(
        "the demo's work after set-up",
        f"commit {COMMIT}",
        [times["new"]],
        [times["old"]],
        ">= 2",
        "one run of each; this commit has 8 random directions and 9 coefficients, as the old one has",
    )
