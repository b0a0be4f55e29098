"""docs/architecture.md describes the code: packages, imports, and the stops of a coefficient and of a trace."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from tests.architecture_page import PAGE, PICTURE, ROW, picture, stops, with_imports
from tests.browser import Tab
from tests.import_graph import PACKAGES, graph, package_graph


@pytest.fixture(scope="module")
def traced() -> dict[str, list[list[str]]]:
    return stops()


def listed(name: str) -> list[list[str]]:
    """The stops of a flow that the page lists."""
    block = re.search(f"<!-- stops: {name} -->(.*?)<!-- end -->", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [[module, function] for function, module in re.findall(r"`(\w+)` of `steerkit\.([\w.]+)`", block[1])]


def test_the_page_lists_every_package_in_the_order_of_imports() -> None:
    assert tuple(name for name, _ in ROW.findall(PAGE.read_text(encoding="utf-8"))) == PACKAGES


def test_the_page_names_the_imports_of_each_package() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_imports(page, package_graph(graph())) == page, "run: make architecture"


def test_the_picture_shows_every_import_left_of_the_diagonal() -> None:
    drawn = PICTURE.read_text(encoding="utf-8")
    edges = package_graph(graph())
    assert drawn == picture(edges), "run: make architecture"
    arrows = re.findall(r"<title>(\w+) imports (\w+)</title>", drawn)
    assert set(arrows) == {(name, other) for name in PACKAGES for other in edges[name] if other in PACKAGES}
    assert all(PACKAGES.index(other) < PACKAGES.index(name) for name, other in arrows)


def test_nothing_of_the_picture_is_cut_or_overlaps_and_it_has_no_background(tab: Tab) -> None:
    tab.open(PICTURE)
    whole, boxes = tab.js(
        "(() => { const box = (e) => (({ left, top, right, bottom }) => [left, top, right, bottom])"
        "(e.getBoundingClientRect());"
        " return [box(document.documentElement), [...document.querySelectorAll('rect, text')].map(box)] })()"
    )
    assert len(boxes) == len(PICTURE.read_text().split("<title>")) - 1 + 2 * len(PACKAGES)
    assert all(left >= whole[0] and top >= whole[1] and right <= whole[2] and bottom <= whole[3]
               for left, top, right, bottom in boxes)  # fmt: skip
    squares = tab.js(
        "[...document.querySelectorAll('rect')].map((e) => ['x', 'y', 'width', 'fill'].map((a) => e.getAttribute(a)))"
    )
    assert len({(x, y) for x, y, _, _ in squares}) == len(squares)
    assert {width for _, _, width, _ in squares} == {"16"} and "white" not in {fill for *_, fill in squares}


@pytest.mark.parametrize("flow", ["coefficient", "trace"])
def test_the_page_lists_the_stops_of_a_real_call(flow, traced) -> None:
    assert listed(flow) == traced[flow], "run: make architecture"


def test_a_coefficient_passes_fewer_than_14_stops_from_the_command_line_to_the_hook(traced) -> None:
    flow = traced["coefficient"]
    assert ["cli.sweeps", "sweep"] in flow[:2] and flow[-1][0].startswith("steering.")
    assert len(flow) < 14


def test_a_trace_passes_its_packages_in_the_order_of_imports(traced) -> None:
    visited = [PACKAGES.index(module.split(".")[0]) for module, _ in traced["trace"]]
    assert all(before <= after for before, after in pairwise(visited))
    assert traced["trace"][-1] == ["vectors.extract", "one_against_others"]
