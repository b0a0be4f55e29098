"""Scores on texts whose agent is known, and the rule for the first speaker against labels given by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from analysis.agents.agreement import GOLD, OTHER_AGENT, OTHER_QUESTION, agreement, known_texts, texts_to_label
from steerkit.io.tables import write_table
from steerkit.text.traces import DebateTrace, Turn

OPENINGS = ("one", "two", "three")


def debates(n: int = 4) -> list[DebateTrace]:
    def turns(i: int) -> list[Turn]:
        return [Turn(agent, 1, f"{name} says {i} now") for agent, name in enumerate(OPENINGS, 1)]

    return [DebateTrace.of(f"q{i}", turns(i), "\\boxed{1}", "1") for i in range(n)]


def test_gold_texts_have_the_highest_scores_and_another_agents_never_speak_first() -> None:
    table = known_texts(debates(), OPENINGS).set_index("text")
    assert table.loc[GOLD, ["rouge_l", "speaks"]].tolist() == [1.0, 1.0]
    assert table.loc[OTHER_QUESTION, "speaks"] == 1.0 and table.loc[OTHER_QUESTION, "rouge_l"] == pytest.approx(0.75)
    assert table.loc[OTHER_AGENT, "speaks"] == 0.0 and table.loc[OTHER_AGENT, "rouge_l"] == pytest.approx(0.75)
    assert set(table["n"]) == {12} and known_texts(debates(), ())["speaks"].isna().all()


def test_agreement_counts_texts_where_rule_and_hand_agree() -> None:
    texts = ["<|Agent 2 Solution|>: x", "one says", "nothing", "three says", "two says"]
    labels = pd.DataFrame({"text": texts, "label": ["2", "1", "0", "3", "1"]})
    (row,) = agreement(labels, OPENINGS).to_dict("records")
    assert row["agree"] == 0.8 and row["low"] < 0.8 < row["high"] and row["n"] == 5
    assert row["by_hand"] == "0:1 1:2 2:1 3:1"
    chance = (1 / 5 * 1 / 5) + (2 / 5 * 1 / 5) + (1 / 5 * 2 / 5) + (1 / 5 * 1 / 5)
    assert row["kappa"] == pytest.approx((0.8 - chance) / (1 - chance))


def test_texts_to_label_are_different_steered_ones_of_every_checkpoint(tmp_path) -> None:
    for stage in ("base", "SFT"):
        rows = [
            {"vector": "1", "layer": 1, "coefficient": c, "prompt_id": f"q{i}", "sample": 0, "text": "t", "group": "q",
             "whole": f"{stage} {c} {i}"}
            for c in (0.0, 1.0)
            for i in range(20)
        ]  # fmt: skip
        write_table(tmp_path / stage / "rouge_l-none-frozen.parquet", pd.DataFrame(rows), {})
    folders = {stage: tmp_path / stage for stage in ("base", "SFT")}
    drawn = texts_to_label(folders, n=11)
    assert len(drawn) == 11 == drawn["text"].nunique() and set(drawn["label"]) == {""}
    assert {text.split()[0] for text in drawn["text"]} == {"base", "SFT"} and not drawn["text"].str.contains(
        " 0.0 "
    ).any()
    pd.testing.assert_frame_equal(drawn, texts_to_label(folders, n=11))
