"""Pictures, generated tables and numbers of README and docs follow from the tables in `results/`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from figures import pages, recipes
from figures.numbers import faults
from figures.pages import PICTURES, RESULTS, ROOT
from steerkit.io.tables import read_table, write_table
from tests.screenshots import SHOTS

SCREENSHOTS = {f"docs/{name}" for name in SHOTS}
"""What `make screenshots` writes."""
GENERATED_PAGES = {
    "docs/results.md",
    "docs/results-smollm2.md",
    "docs/calibration.md",
    "docs/calibration-demo.md",
    "docs/architectures.md",
    "docs/llamacpp.md",
    "docs/serving-equality.md",
    "docs/real-checkpoints.md",
    "docs/reliability.md",
}
"""Pages that a command writes as a whole; their numbers are its own."""
PENDING = {"docs/training.md", "docs/training-settings.md", "docs/training-results.md"}
"""Pages whose numbers have no sources yet."""
TABLES_OF = {
    "docs/demo-gains.png": "demo/gains.csv",
    "docs/tutorial-curves.png": "tutorial/curves.csv",
}
THERE = [name for name in TABLES_OF if (RESULTS / TABLES_OF[name]).is_file()]


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


def shown() -> set[str]:
    """All PNG pictures that pages show."""
    return {
        relative((page.parent / target).resolve())
        for page in [*pages.pages(), ROOT / "benchmarks" / "RESULTS.md"]
        for target in re.findall(r"!\[[^]]*\]\(([^)\s]+\.png)\)", page.read_text(encoding="utf-8"))
    }


def test_every_picture_of_a_page_is_drawn_from_results() -> None:
    drawn_by_scripts = recipes.pictures(RESULTS)
    assert shown() - SCREENSHOTS <= set(PICTURES) | set(drawn_by_scripts)
    assert shown() >= SCREENSHOTS
    for name, stored in drawn_by_scripts.items():
        assert (ROOT / name).read_bytes() == stored.read_bytes(), name
    for name in shown():
        assert (ROOT / name).is_file(), name


def test_every_picture_of_docs_is_on_a_page() -> None:
    assert {relative(path) for path in (ROOT / "docs").rglob("*.png")} <= shown()


@pytest.mark.parametrize("name", THERE)
def test_a_picture_is_drawn_again_with_equal_bytes(name, tmp_path) -> None:
    assert pages.draw(name, RESULTS, tmp_path / "first.png") and pages.draw(name, RESULTS, tmp_path / "second.png")
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes() == (ROOT / name).read_bytes()


@pytest.mark.parametrize("name", THERE)
def test_changing_one_cell_changes_the_picture(name, tmp_path) -> None:
    table, meta = read_table(RESULTS / TABLES_OF[name])
    column = "gain" if "gain" in table else "mean"
    row = int(np.flatnonzero(table[column].abs() > 0.05)[0])
    table.loc[row, column] *= 1.5
    write_table(tmp_path / TABLES_OF[name], table, meta)
    assert pages.draw(name, tmp_path, tmp_path / "changed.png")
    before, after = (matplotlib.image.imread(path) for path in (ROOT / name, tmp_path / "changed.png"))
    assert before.shape != after.shape or (before != after).any()


@pytest.mark.parametrize("page", list(pages.pages()), ids=relative)
def test_the_generated_tables_of_a_page_are_those_of_results(page) -> None:
    assert pages.written(page) == page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page", [page for page in pages.pages() if relative(page) not in GENERATED_PAGES | PENDING], ids=relative
)
def test_every_decimal_of_a_page_is_a_value_of_results_or_a_named_setting(page) -> None:
    assert faults(page.read_text(encoding="utf-8"), RESULTS) == []


def test_the_pictures_need_no_torch_scipy_or_scikit_learn() -> None:
    blocked = "import sys\nfor name in ('torch', 'scipy', 'sklearn', 'transformers'): sys.modules[name] = None\n"
    code = blocked + "import figures.pages, figures.__main__"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_the_published_tables_are_small() -> None:
    assert sum(path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()) < 5_000_000
