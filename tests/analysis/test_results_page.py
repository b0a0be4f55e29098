"""docs/results.md and results/miniature are what the archived seeds give."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.paper.results import main
from steerkit.io.tables import read_table

ROOT = Path(__file__).parents[2]
SEEDS = ROOT / "results" / "seeds" / "tiny"


@pytest.mark.long
def test_the_page_and_its_tables_are_those_of_the_archived_seeds(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    out = tmp_path / "miniature"
    main([str(SEEDS), "--out", str(out), "--page", str(page), "--title", "Claims of the paper: miniature"])
    stored = ROOT / "results" / "miniature"
    assert page.read_text(encoding="utf-8") == (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for path in stored.rglob("*.csv"):
        theirs, _ = read_table(out / path.relative_to(stored))
        ours, _ = read_table(path)
        assert ours.equals(theirs), path.name
