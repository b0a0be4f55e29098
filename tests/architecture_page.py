"""`python -m tests.architecture_page` (`make architecture`): update docs/architecture.md and docs/imports.svg."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.import_graph import PACKAGES, ROOT, graph, package_graph

PAGE, PICTURE = ROOT / "docs" / "architecture.md", ROOT / "docs" / "imports.svg"
ROW = re.compile(r"^\| `(\w+)` \| (.*?) \|.*\|$", re.MULTILINE)
CELL, LEFT, TOP, RIGHT = 24, 96, 80, 52
"""Size of a cell, and room for the names: of rows at the left, of columns above, the last of which leans out."""
TEXT, GRID, SQUARE = "#808080", "#80808055", "#2b8cc4"
"""Colours that can be read on white and on the dark theme; the picture has no background."""


def with_imports(page: str, edges: dict[str, set[str]]) -> str:
    """Return the page with the imports of each package in the last column of its table."""

    def row(match: re.Match[str]) -> str:
        name, holds = match.groups()
        shown = ", ".join(f"`{other}`" for other in PACKAGES if other in edges.get(name, ())) or "none"
        return f"| `{name}` | {holds} | {shown} |"

    return ROW.sub(row, page)


def with_stops(page: str, stops: dict[str, list[list[str]]]) -> str:
    """Return the page with each list of stops between its marks."""
    for name, flow in stops.items():
        lines = "".join(
            f"{number}. `{function}` of `steerkit.{module}`\n" for number, (module, function) in enumerate(flow, 1)
        )
        begin, end = f"<!-- stops: {name} -->\n", "<!-- end -->"
        page = re.sub(f"{re.escape(begin)}.*?{end}", lambda _, text=begin + lines + end: text, page, flags=re.DOTALL)
    return page


def picture(edges: dict[str, set[str]]) -> str:
    """Return an SVG: a matrix with a square where the package of the row imports the package of the column."""
    side = CELL * len(PACKAGES)
    width, height = LEFT + side + RIGHT, TOP + side + 2
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="14" fill="{TEXT}">',
        f'<path d="M {LEFT} {TOP} l {side} {side}" stroke="{GRID}"/>',
    ]
    for row, name in enumerate(PACKAGES):
        middle = TOP + CELL * row + CELL // 2
        lines.append(f'<path d="M {LEFT} {TOP + CELL * (row + 1)} h {side} M {LEFT + CELL * row} {TOP} v {side}" '
                     f'stroke="{GRID}"/>')  # fmt: skip
        lines.append(f'<text x="{LEFT - 8}" y="{middle + 5}" text-anchor="end">{name}</text>')
        lines.append(f'<text transform="translate({LEFT + CELL * row + 13} {TOP - 6}) rotate(-55)">{name}</text>')
        for column, other in enumerate(PACKAGES):
            if other in edges.get(name, ()):
                lines.append(
                    f'<rect x="{LEFT + CELL * column + 4}" y="{TOP + CELL * row + 4}" width="16" height="16" rx="3" '
                    f'fill="{SQUARE}"><title>{name} imports {other}</title></rect>'
                )
    return "\n".join([*lines, "</svg>"]) + "\n"


def stops() -> dict[str, list[list[str]]]:
    """Return the stops of each flow, from a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.stops"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"expected the traced calls to succeed; got {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def main(page: Path = PAGE) -> None:
    edges = package_graph(graph())
    text = page.read_text(encoding="utf-8")
    page.write_text(with_stops(with_imports(text, edges), stops()), encoding="utf-8")
    PICTURE.write_text(picture(edges), encoding="utf-8")


if __name__ == "__main__":
    main()
