"""`python -m benchmarks.gpu.merge FILE FILE ... --out results/gpu`: join several `gpu.json` into one, and its page.

Of a part that is in several files, the last one that ran counts; else the last one with figures; else the last one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.page import markdown
from steerkit.io.files import write_text

VARYING = ("date", "commit")
"""What may differ between the files; the page names the commit of a part that has another one than the first file."""


def merged(files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The joint results; those of the machine are the first file's.

    Raises:
        ValueError: the files are of different devices or versions.
    """
    first = files[0]["machine"]
    for results in files[1:]:
        differing = {
            name: (first.get(name), value)
            for name, value in results["machine"].items()
            if name not in VARYING and first.get(name) != value
        }
        if differing:
            raise ValueError(f"expected files of one machine; they differ in {differing}. Merge those of one machine.")
    parts: dict[str, dict[str, Any]] = {}
    for results in files:
        for name, part in results["parts"].items():
            if name not in parts or _rank(part) >= _rank(parts[name]):
                parts[name] = {"commit": results["machine"]["commit"], **part}
    return {"machine": first, "parts": parts}


def _rank(part: dict[str, Any]) -> tuple[bool, bool]:
    return part["state"] == "ran", bool(part["figures"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: write gpu.json and gpu.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.merge", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="gpu.json of several calls, the latest last")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder to write")
    given = parser.parse_args(arguments)
    try:
        results = merged([json.loads(path.read_text()) for path in given.files])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    given.out.mkdir(parents=True, exist_ok=True)
    write_text(given.out / "gpu.json", json.dumps(results, indent=1))
    write_text(given.out / "gpu.md", markdown(results))


if __name__ == "__main__":
    main()
