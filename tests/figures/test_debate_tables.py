"""Tables of the debate's pages: a row per checkpoint, counts of agents above each control, blanks where nothing is."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from figures import debate_tables
from steerkit.io.tables import write_table


def put(folder: Path, name: str, rows: list[dict]) -> None:
    write_table(folder / "miniature" / f"{name}.csv", pd.DataFrame(rows), {})


def cells(table: str) -> list[dict[str, str]]:
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return [dict(zip(head, line, strict=True)) for line in lines]


def test_agents_above_a_control_are_counted_by_interval_and_holm(tmp_path) -> None:
    rows = [
        {"score": score, "identity": False, "stage": stage, "agent": agent, "over": over, "gain": 0.2, "low": low,
         "high": 0.3, "p_holm": p, "unsteered": 0.4}
        for score in ("rouge_l", "speaks")
        for stage in ("base", "GRPO step 75")
        for agent in (1, 2, 3)
        for over, low, p in (("coefficient 0", 0.1, 0.01), ("random", 0.1, 0.01 * agent**2), ("matched", -0.1, 0.01))
    ]  # fmt: skip
    put(tmp_path, "clues/gains", rows)
    (row,) = cells(debate_tables.unnamed(tmp_path))  # steps between checkpoints are left to the page of results
    assert (row["family"], row["checkpoint"]) == ("clues", "base")
    assert row["agent 2: unsteered, gain"] == "0.40, +0.20 [+0.10, +0.30]"
    assert row["agents above random"] == "2 of 3" and row["agents above matched"] == "0 of 3"
    assert row["agents above shuffled"] == ""


def test_the_protocol_has_planted_directions_in_the_column_of_own_ones(tmp_path) -> None:
    line = {"score": "rouge_l", "grid": "coefficient", "context": "tagged", "low": 0.4, "high": 0.6}
    rows = [
        {**line, "stage": stage, "measure": measure, "value": value}
        for stage, own in (("IMAD", "own"), ("base with planted directions", "planted"))
        for measure, value in {"at strength 0": 0.45, f"area, {own}": 0.5, "area over random": 0.1}.items()
    ]
    put(tmp_path, "malice/protocol", [*rows, {**rows[0], "grid": "dose"}])
    found = cells(debate_tables.protocol(tmp_path))
    assert [row["checkpoint"] for row in found] == ["IMAD", "base with planted directions"]
    assert all(row["own or planted directions"] == "0.500 [0.400, 0.600]" and row["random"] == "" for row in found)


def test_only_the_named_malicious_agent_is_shown(tmp_path) -> None:
    line = {"stage": "IMAD", "shown": 5, "runs": 6, "trait_0": 1.0, "trait": 0.25, "accuracy_0": 0.8, "accuracy": 0.7,
            "other_opening_0": 0.0, "other_opening": 0.7}  # fmt: skip
    for name in ("removed", "over_random", "over_matched", "kept"):
        line |= {name: 0.75, f"{name}_low": 0.5, f"{name}_high": 0.9}
    put(tmp_path, "malice/suppression_kept", [{**line, "context": "plain"}, {**line, "context": "forced"}])
    (row,) = cells(debate_tables.suppression(tmp_path))
    assert row["trait: before -> after"] == "1.00 -> 0.25" and row["seeds with the trait"] == "5 of 6"
    assert row["begins like another agent: before -> after"] == "0.00 -> 0.70"


def test_transplants_and_patches_have_a_row_per_checkpoint(tmp_path) -> None:
    ends = {"low": 0.1, "high": 0.3}
    moved = {"stage": "SFT", "share_with_round_1": 0.9, "changed": 0.5, "changed_again": 0.2, "value": 0.3, **ends,
             "by_seed": "0.3", "follows": 0.2, "follows_low": 0.1, "follows_high": 0.3, "missing": 0.05}  # fmt: skip
    put(tmp_path, "clues/transplant", [moved])
    assert cells(debate_tables.transplant(tmp_path))[0]["answers that follow, minus chance"] == "+0.20 [+0.10, +0.30]"
    place = {"stage": "SFT", "text": "debate", "then": "round 2", "part": "round 1", "quantity": "follows", "n": 40}
    rows = [{**place, "site": "resid_post", "layer": layer, "share": 0.2, **ends} for layer in (0, 1)]
    put(tmp_path, "clues/patched_rounds", [*rows, {**rows[0], "part": "question"}, {**rows[0], "quantity": "chance"}])
    (row,) = cells(debate_tables.patched(tmp_path))
    assert row["resid_post, layer 1"] == "0.20 [0.10, 0.30]" and row["pairs per seed"] == "40"


def test_an_erasure_that_costs_as_much_as_the_identity_adds_has_no_share(tmp_path) -> None:
    gain = {"stage": "SFT", "identity": "tag", "erasure": "none", "quantity": "gain", "mean": 0.2, "low": 0.1,
            "high": 0.3}  # fmt: skip
    costs = [
        {**gain, "quantity": "cost", "erasure": erasure, "mean": mean, "low": mean - 0.1, "high": mean + 0.1}
        for erasure, mean in (("agents", -0.1), ("variance", -0.2))
    ]
    vector = {"identity": "vector"}
    put(tmp_path, "clues/erasure_gains", [gain, *costs, {**gain, **vector, "mean": 0.01}, {**costs[0], **vector}])
    left = {"stage": "SFT", "identity": "tag", "survives": 0.5, "survives_low": 0.4, "survives_high": 0.6}
    put(tmp_path, "clues/erasure_survives", [{**left, "erasure": name} for name in ("agents", "variance")])
    names, variance, vectors = cells(debate_tables.erased(tmp_path))
    assert (names["erased"], names["share left"], names["cost"]) == (
        "names", "0.50 [0.40, 0.60]", "-0.10 [-0.20, +0.00]"
    )  # fmt: skip
    assert (variance["erased"], variance["share left"]) == ("largest variance", "")
    assert variance["cost"] == "-0.20 [-0.30, -0.10]" and names["gain"] == variance["gain"] == "+0.20 [+0.10, +0.30]"
    assert vectors["agent given by"] == "vector" and vectors["erased"] == vectors["share left"] == vectors["cost"] == ""


def test_probes_have_a_column_per_text_and_the_malicious_experiment_a_row_per_checkpoint(tmp_path) -> None:
    line = {"stage": "SFT", "layer": "nested", "position": "last", "features": "resid", "labels": "true",
            "accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 1.0, "seeds": 3}  # fmt: skip
    texts = [("personas", "trace", 0.9), ("same persona", "plain", 0.3)]
    rows = [{**line, "debates": debates, "source": source, "accuracy": value} for debates, source, value in texts]
    put(tmp_path, "clues/separability", [*rows, {**rows[0], "labels": "shuffled"}, {**rows[0], "layer": "1"}])
    (row,) = cells(debate_tables.read(tmp_path))
    assert row["whole trace"] == "0.90 [0.80, 1.00]" and row["one persona: turn alone"] == "0.30 [0.80, 1.00]"
    assert row["turn alone"] == "" and row["seeds"] == "3"
    fall = {
        "stage": "IMAD",
        "context": "forced",
        "value": 0.5,
        "low": 0.4,
        "high": 0.6,
        "by_seed": "0.4 0.6",
        "zero": 1.0,
        "seeds": 2,
        "runs": 3,
    }
    names = ("fall", "fall over random", "fall over the base's")
    put(tmp_path, "malice/malicious_fall", [{**fall, "measure": measure} for measure in names])
    (row,) = cells(debate_tables.malicious(tmp_path))
    assert row["decrease minus that at the base"] == "+0.50 [+0.40, +0.60]" and row["decrease by seed"] == "0.4 0.6"
    assert row["seeds"] == "2 of 3"


def test_a_table_without_results_says_so(tmp_path) -> None:
    (tmp_path / "miniature").mkdir()
    for table in (debate_tables.unnamed, debate_tables.protocol, debate_tables.suppression, debate_tables.erased):
        with pytest.raises(FileNotFoundError):
            table(tmp_path)
