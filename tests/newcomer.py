"""`python -m tests.newcomer --seed N`: terms drawn by lot, whose file a newcomer should find from the tree alone.

The terms come from the public names, the options in the help texts, and the standard terms of CONTRIBUTING.md. With
`--answers` each is printed with the files that are right.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from pathlib import Path

import steerkit

ROOT = Path(__file__).parents[1]


def public_names() -> dict[str, set[str]]:
    """`sk.NAME` -> the file that defines it."""
    return {f"sk.{name}": {_file_of(getattr(steerkit, name))} for name in steerkit.__all__}


def options() -> dict[str, set[str]]:
    """`steerkit COMMAND --option` -> the file of the command, or that of the shared options; each option once."""
    import typer.main

    from steerkit.cli.main import app

    group = typer.main.get_command(app)
    found, seen = {}, set[str]()
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        files = {_file_of(command.callback), "steerkit/cli/options.py"}
        for parameter in command.params:
            flag = parameter.opts[0]
            if flag.startswith("--") and flag not in seen | {"--help"}:
                seen.add(flag)
                found[f"steerkit {name} {flag}"] = files
    return found


def standard_terms() -> dict[str, set[str]]:
    """A term of CONTRIBUTING.md -> its files."""
    rows = re.findall(r"^\| ([^|`]+?) \|[^|]*\| (`.+?`) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    return {term: set(re.findall(r"`([^`]+)`", files)) for term, files in rows}


def _file_of(thing: object) -> str:
    function = getattr(thing, "__wrapped__", thing)
    return str(Path(sys.modules[function.__module__].__file__ or "").relative_to(ROOT))


def drawn(seed: int, count: int) -> dict[str, set[str]]:
    """`count` terms, a third of each source in turn, drawn by this seed."""
    rng = random.Random(seed)
    sources = [sorted(source().items()) for source in (public_names, options, standard_terms)]
    for source in sources:
        rng.shuffle(source)
    return dict(sources[number % 3][number // 3] for number in range(count))


def main() -> None:
    """Print the drawn terms, one a line."""
    parser = argparse.ArgumentParser(prog="python -m tests.newcomer", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="Seed of the draw.")
    parser.add_argument("--count", type=int, default=20, help="Number of terms.")
    parser.add_argument("--answers", action="store_true", help="Print the right files too.")
    given = parser.parse_args()
    for number, (term, files) in enumerate(drawn(given.seed, given.count).items(), 1):
        print(f"{number}. {term}" + (f": {', '.join(sorted(files))}" if given.answers else ""))


if __name__ == "__main__":
    main()
