"""`python -m tests.torture` (`make torture`): counts of survived faults; writes docs/reliability.md."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path

from steerkit.io.files import write_text
from steerkit.io.signals import restore_interrupt
from steerkit.io.versions import versions

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def main() -> None:
    restore_interrupt()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="kills per job")
    parser.add_argument("--examples", type=int, default=2_500, help="examples per property")
    parser.add_argument("--no-page", action="store_true", help="print without writing the page")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: forking a process with threads is unsafe
    warnings.simplefilter("ignore")

    import torch

    torch.set_num_threads(1)
    from tests.torture.faults import faults, fuzzed, tested
    from tests.torture.flips import flips
    from tests.torture.killed import kills

    start = time.monotonic()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for part in (kills(Path(folder), given.kills), faults(Path(folder)), flips(), tested(), fuzzed(given.examples)):
            for line in part:
                lines.append(line)
                print(f"{line.good} of {line.times}  {line.what}. {line.detail}", flush=True)
    about = versions()
    text = [
        "# Reliability",
        "",
        f"Written by `make torture` in {(time.monotonic() - start) / 60:.0f} minutes, with torch {about['torch']} and "
        f"transformers {about['transformers']} on {os.cpu_count()} cores.",
        "",
        "Each row is a fault or a kind of input that is tried in several cases. `passed` is the number of cases with "
        "the expected result.",
        "",
        "| test | passed | cases | details |",
        "|---|---|---|---|",
        *(f"| {line.what} | {line.good} | {line.times} | {line.detail} |" for line in lines),
    ]
    if not given.no_page:
        write_text(PAGE, "\n".join(text) + "\n")
    if any(line.good < line.times and not line.measured for line in lines):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
