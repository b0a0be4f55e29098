"""CAA on A/B questions: the split, the scores of choices, the verdicts, and a run that resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import steerkit as sk
from analysis.recipes import caa
from steerkit.io.tables import read_table
from steerkit.steering.dose import median_norms
from steerkit.sweeps.result import FewWarning, SweepResult
from steerkit.text.prompt import encode_prompt
from tests.tiny import tiny_model, tiny_tokenizer


def write_questions(path: Path, count: int = 32) -> Path:
    rows = []
    for i in range(count):
        answers = [" (A)", " (B)"][:: 1 if i % 2 else -1]
        question = f"Is {i // 2} good?\n\nChoices:\n (A) Yes, {i}.\n (B) No, {i}."
        rows.append(
            {"question": question, "answer_matching_behavior": answers[0], "answer_not_matching_behavior": answers[1]}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> list[sk.ContrastPair]:
    return sk.read_ab(write_questions(tmp_path / "good.jsonl"))


def test_a_group_is_in_one_part_only_and_the_test_has_half_of_them(pairs) -> None:
    parts = caa.split(pairs, 100)
    groups = {name: {pair.group for pair in part} for name, part in parts.items()}
    assert sum(map(len, groups.values())) == len(set.union(*groups.values())) == 16
    assert [len(groups[name]) for name in ("vector", "validation", "test")] == [4, 4, 8]
    assert len(caa.split(pairs, 5)["test"]) == 5


def test_answers_are_asked_for_without_options_and_the_first_choice_matches(pairs) -> None:
    for pair, letters, answers, texts in zip(
        pairs, *(caa.rows_of(pairs, measure) for measure in ("letters", "answers", "texts")), strict=True
    ):
        number = caa.question_of(pair).rpartition("No, ")[2].rstrip(".")
        assert letters["choices"] == [pair.positive[:-1], pair.negative[:-1]]
        assert letters["prompt"] == pair.prompt
        option = {" (A)": f" Yes, {number}.", " (B)": f" No, {number}."}
        assert answers["choices"] == [option[pair.positive], option[pair.negative]]
        assert [texts["matching"], texts["other"]] == answers["choices"]
        assert answers["prompt"] == texts["prompt"] == str(pair.prompt).partition("\n")[0] and "choices" not in texts


def test_a_text_is_liked_by_its_overlap_with_the_matching_answer() -> None:
    row = {"matching": " Yes, I would.", "other": " No, I would not."}
    assert caa.likeness({**row, "text": "Yes, I would."}) == pytest.approx(1 - 2 * 2 / (3 + 4))
    assert caa.likeness({**row, "text": "No, I would not."}) == pytest.approx(2 * 2 / (4 + 3) - 1)


def test_the_score_of_answers_is_the_difference_of_their_log_probabilities_per_token() -> None:
    rows = [
        {"vector": "caa", "layer": 1, "coefficient": 0.0, "prompt_id": str(i), "group": str(i), "sample": choice,
         "text": "t", "log_prob": -2.0 * (i + 1) - choice, "n_tokens": 2 + choice, "probability": 0.25 + choice / 2}
        for i in range(2) for choice in (0, 1)
    ]  # fmt: skip
    result = SweepResult(pd.DataFrame(rows))
    assert caa.matching(result, "letters").table["score"].tolist() == [0.25, 0.25]
    wanted = [-2 / 2 - -3 / 3, -4 / 2 - -5 / 3]
    assert caa.matching(result, "answers").table["score"].tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("gain", "p", "p_random", "verdict"),
    [
        (0.2, 0.001, 0.01, "changes"), (0.2, 0.001, 0.4, "changes like random directions"),
        (-0.2, 0.001, 0.01, "changes against the dose"), (0.2, 0.2, 0.01, "not detected"),
    ],
)  # fmt: skip
def test_a_verdict_needs_the_sign_of_the_dose_and_both_p_values(gain, p, p_random, verdict) -> None:
    row = {"behavior": "b", "measure": "letters", "dose": 0.2, "gain": gain, "low": 0.0, "high": 1.0, "n": 30}
    rows = [{**row, "over": "coefficient 0", "p": p}, {**row, "over": "random", "p": p_random}]
    assert caa.verdicts(pd.DataFrame(rows))["verdict"].tolist() == [verdict]


def test_the_command_writes_gains_that_are_those_of_scored_choices_and_resumes(tmp_path, monkeypatch, capsys) -> None:
    write_questions(tmp_path / "good.jsonl")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    monkeypatch.setattr(sk, "load", lambda *_: (model, tokenizer))
    out = tmp_path / "run"
    arguments = [
        "--checkpoint",
        "C",
        "--data",
        str(tmp_path),
        "--behaviors",
        "good",
        "--out",
        str(out),
        "--layers",
        "2",
    ]
    with pytest.warns(FewWarning):
        caa.main(arguments)
    assert "letters" in capsys.readouterr().out
    by_dose, meta = read_table(out / "by_dose.csv")
    assert set(by_dose["measure"]) == {"letters", "answers", "texts"} and set(by_dose["dose"]) == set(caa.DOSES)
    assert meta["n_test"] == 150 and set(by_dose["k"]) == {0, 19}
    layer = int(by_dose["layer"].iloc[0])
    parts = caa.split(sk.read_ab(tmp_path / "good.jsonl", chat=True), 150)
    vector = sk.difference_in_means(sk.collect(model, tokenizer, parts["vector"], position="letter")).at(layer)
    asked = [encode_prompt(tokenizer, row["prompt"]) for row in caa.rows_of(parts["validation"], "letters")]
    norms = median_norms(model, [(ids, ()) for ids in asked])
    rows = caa.rows_of(parts["test"], "letters")

    def mean(steering: sk.Steering | None) -> float:
        found = sk.score_choices(
            model, tokenizer, [row["prompt"] for row in rows], [row["choices"] for row in rows], steering=steering
        )
        return float(found.groupby("prompt")["probability"].first().mean())

    gain = by_dose[(by_dose["measure"] == "letters") & (by_dose["dose"] == 0.4) & (by_dose["over"] == "coefficient 0")]
    assert gain["gain"].item() == pytest.approx(
        mean(sk.Steering(vector, dose=0.4).resolved(norms)) - mean(None), abs=1e-5
    )
    files = {path: path.read_bytes() for path in out.rglob("rows.jsonl")}
    with pytest.warns(FewWarning):
        caa.main(arguments)
    assert {path: path.read_bytes() for path in files} == files and len(files) == 4


def test_a_missing_file_is_named_before_a_model_is_loaded(tmp_path, monkeypatch, capsys) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(sk, "load", load)
    with pytest.raises(SystemExit):
        caa.main(["--checkpoint", "C", "--data", str(tmp_path), "--out", str(tmp_path / "run")])
    assert "missing" in capsys.readouterr().err and not (tmp_path / "run").exists()
