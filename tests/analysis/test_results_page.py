"""docs/results.md and results/miniature are what the archived seeds give."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.paper.claims import rules
from analysis.paper.results import PLAINLY, in_plain_cells, main
from steerkit.io.tables import read_table
from training.evaluate.results import PAPER

ROOT = Path(__file__).parents[2]
SEEDS = ROOT / "results" / "seeds" / "tiny"


def test_every_claim_in_plain_words_is_a_rule() -> None:
    assert PLAINLY.keys() <= {rule.text for rule in rules().values()}


def test_the_papers_differences_of_imad_and_debate_are_those_of_its_table() -> None:
    scores = (
        PAPER.set_index(["model", "method"])[["GSM8K", "MMLU-Pro", "BBH"]].unstack("method").stack(0, future_stack=True)
    )
    gaps = scores["IMAD"] - scores["Debate"]
    told = f"{gaps.min():+.1f} to {gaps.max():+.1f} points, better in {(gaps > 0).sum()} of {len(gaps)} comparisons"
    assert in_plain_cells(rules()["accuracy"].published) == told


@pytest.mark.long
def test_the_page_and_its_tables_are_those_of_the_archived_seeds(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    out = tmp_path / "miniature"
    main([str(SEEDS), "--out", str(out), "--page", str(page), "--title", "Claims of the paper: miniature"])
    stored = ROOT / "results" / "miniature"
    assert page.read_text(encoding="utf-8") == (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert [path.name for path in out.rglob("*.meta.json") if '"/' in path.read_text(encoding="utf-8")] == []
    for path in stored.rglob("*.csv"):
        theirs, _ = read_table(out / path.relative_to(stored))
        ours, _ = read_table(path)
        assert ours.equals(theirs), path.name
