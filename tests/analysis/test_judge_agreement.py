"""Agreement of judges with labelled texts: of one that is right, one that is blind and one that cannot be read."""

from __future__ import annotations

import math

import pytest

import steerkit as sk
from analysis.recipes.judge import TEXTS, agreement, main
from steerkit.io.rows import read_rows
from steerkit.io.tables import read_table
from tests.scripted_server import Call, Scripted, answer

LABEL_OF = {row["text"]: row["label"] for row in read_rows(TEXTS, complete=True)}


def test_the_texts_differ_and_20_of_50_are_cheerful() -> None:
    assert len(LABEL_OF) == 50 and sorted(LABEL_OF.values()) == [0] * 30 + [100] * 20


def test_a_judge_that_gives_the_labels_agrees_and_one_that_gives_their_opposite_does_not() -> None:
    _, right = agreement(sk.judge(rule=lambda text: str(LABEL_OF[text])))
    _, wrong = agreement(sk.judge(rule=lambda text: str(100 - LABEL_OF[text])))
    for column, best, worst in (("roc_auc", 1, 0), ("right_side", 1, 0), ("spearman", 1, -1)):
        assert right[column].item() == pytest.approx(best) and wrong[column].item() == pytest.approx(worst)


def test_a_judge_with_one_answer_for_all_has_an_area_of_a_half_and_no_correlation() -> None:
    texts, found = agreement(sk.judge(rule=lambda text: "70"))
    assert found["roc_auc"].item() == 0.5 and found["n_distinct"].item() == 1
    assert math.isnan(found["spearman"].item()) and found["right_side"].item() == pytest.approx(20 / 50)
    assert texts["score"].tolist() == [70.0] * 50


def test_unread_answers_are_counted_and_wrong() -> None:
    _, found = agreement(sk.judge(rule=lambda text: str(LABEL_OF[text]) if "the" in text else "no idea"))
    unread = sum("the" not in text for text in LABEL_OF)
    assert found["n_unread"].item() == unread > 0 and found["right_side"].item() == pytest.approx(1 - unread / 50)
    assert found["roc_auc"].item() == 1
    _, none = agreement(sk.judge(rule=lambda text: "no idea"))
    assert none["n_unread"].item() == 50 and math.isnan(none["roc_auc"].item())


def test_the_command_asks_a_server_and_writes_both_tables(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def rate(call: Call, _: int) -> None:
        text = call.question.partition("<text>\n")[2].partition("\n</text>")[0]
        call.json(answer(f"Score: {LABEL_OF[text]}/100"))

    with Scripted(rate) as server:
        main(["--url", server.url, "--model", "m", "--out", str(tmp_path)])
    table, meta = read_table(tmp_path / "agreement.csv")
    assert table["n"].item() == 50 and table["roc_auc"].item() == 1 and meta["model"] == "m"
    assert "roc_auc" in capsys.readouterr().out and len(server.calls) == 50
