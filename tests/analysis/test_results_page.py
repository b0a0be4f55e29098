"""docs/results.md and results/miniature are what the archived seeds give."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from analysis.paper.claims import rules
from analysis.paper.results import PLAINLY, _interim, _without_pilot, in_plain_cells, main
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


def published(**about: Any) -> Any:
    claims = pd.DataFrame({"name": ["a: b", "a: c"], "verdict": ["holds", "not shown"]})
    return SimpleNamespace(about=about, claims=claims, main=pd.DataFrame({"seeds": [3, 4]}))


@pytest.mark.parametrize(("planned", "left", "said"), [(6, [], 1), (3, [], 0), (None, [], 0), (6, [20], 2)])
def test_the_page_says_that_seeds_are_planned_or_were_not_read(planned: int | None, left: list[int], said: int) -> None:
    lines = _interim(published(planned=planned, left_out=left))
    assert len(lines) == said and all(str(planned) in line for line in lines[:1])
    assert not left or lines[-1] == "- Not read for this page: seed 20."


def test_the_page_lists_the_verdicts_that_are_others_without_the_pilot() -> None:
    without = {"a: b": "not shown", "a: c": "not shown"}
    lines = _without_pilot(published(without_pilot=without), [20])
    assert [line for line in lines if line.startswith("-")] == ["- a: b: `not shown` instead of `holds`"]
    assert "all verdicts are the same" in _without_pilot(published(without_pilot={"a: b": "holds"}), [20])[0]
    assert (
        _without_pilot(published(without_pilot={}), [20]) == _without_pilot(published(without_pilot=without), []) == []
    )


@pytest.mark.long
def test_the_page_and_its_tables_are_those_of_the_archived_seeds(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    out = tmp_path / "miniature"
    title = ["--title", "Claims of the paper: miniature", "--planned", "6"]
    main([str(SEEDS), "--out", str(out), "--page", str(page), *title])
    stored = ROOT / "results" / "miniature"
    assert page.read_text(encoding="utf-8") == (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert [path.name for path in out.rglob("*.meta.json") if '"/' in path.read_text(encoding="utf-8")] == []
    for path in stored.rglob("*.csv"):
        theirs, _ = read_table(out / path.relative_to(stored))
        ours, _ = read_table(path)
        assert ours.equals(theirs), path.name
