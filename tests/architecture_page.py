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
ROW_HEIGHT, LEFT, WIDTH, TOP = 26, 330, 470, 24
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#666666")


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
    """Return an SVG of the packages in order, with an arc from each package up to each one that it imports."""
    height = TOP + ROW_HEIGHT * len(PACKAGES)
    y = {name: TOP + ROW_HEIGHT * number for number, name in enumerate(PACKAGES)}
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for number, name in enumerate(PACKAGES):
        colour = COLOURS[number % len(COLOURS)]
        for other in PACKAGES:
            if other in edges.get(name, ()):
                bulge = LEFT - 14 - 1.35 * abs(y[name] - y[other]) * 0.72
                lines.append(
                    f'<path d="M {LEFT} {y[name]} C {bulge:.0f} {y[name]} {bulge:.0f} {y[other]} {LEFT} {y[other]}" '
                    f'fill="none" stroke="{colour}" stroke-opacity="0.75"><title>{name} imports {other}</title></path>'
                )
    for number, name in enumerate(PACKAGES):
        colour = COLOURS[number % len(COLOURS)]
        lines.append(f'<circle cx="{LEFT}" cy="{y[name]}" r="4" fill="{colour}"/>')
        lines.append(f'<text x="{LEFT + 12}" y="{y[name] + 5}" font-size="15" fill="black">{name}</text>')
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
