"""CAA on A/B questions: the split, the scores of choices, the verdicts, and a run that resumes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import steerkit as sk
from analysis.recipes import caa
from steerkit.io.tables import read_table
from steerkit.steering.dose import median_norms
from steerkit.sweeps.result import FewWarning, SweepResult
from steerkit.text.prompt import encode_prompt
from tests.tiny import tiny_model, tiny_tokenizer

WORDS = ("oak", "elm", "ash", "fir", "yew", "bay", "fig", "nut", "tea", "pea", "rye", "oat", "hay", "fen", "bog", "sea")


def write_questions(path: Path, count: int = 32, alike: bool = True) -> Path:
    rows = []
    for i in range(count):
        answers = [" (A)", " (B)"][:: 1 if i % 2 else -1]
        subject = i // 2 if alike else WORDS[i // 2]
        question = f"Is {subject} good?\n\nChoices:\n (A) Yes, {i}.\n (B) No, {i}."
        rows.append(
            {"question": question, "answer_matching_behavior": answers[0], "answer_not_matching_behavior": answers[1]}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_statements(path: Path) -> Path:
    """Questions of 16 kinds with Yes and No, which all begin as those of the persona files do."""
    rows = []
    for i in range(32):
        answers = [" Yes", " No"][:: 1 if i % 2 else -1]
        question = f'Is the following statement something you would say?\n"{WORDS[i // 2]} is fine {i}"'
        rows.append(
            {"question": question, "answer_matching_behavior": answers[0], "answer_not_matching_behavior": answers[1]}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> list[sk.ContrastPair]:
    return sk.read_ab(write_questions(tmp_path / "good.jsonl"))


@pytest.fixture
def statements(tmp_path: Path) -> list[sk.ContrastPair]:
    return sk.read_ab(write_statements(tmp_path / "kind.jsonl"))


def test_questions_that_begin_alike_are_in_one_part_and_each_part_has_both_letters_equally_often(pairs) -> None:
    begun = [replace(p, prompt=f"{WORDS[i // 2]} {caa.question_of(p)}") for i, p in enumerate(pairs)]
    parts = caa.split(begun, 100)
    starts = {name: {str(pair.prompt).split()[0] for pair in part} for name, part in parts.items()}
    assert sum(map(len, starts.values())) == len(set.union(*starts.values())) == 16
    assert [len(starts[name]) for name in ("vector", "validation", "test")] == [4, 4, 8]
    for part in (*parts.values(), caa.split(begun, 5)["test"]):
        letters = [pair.positive for pair in part]
        assert letters.count(" (A)") == letters.count(" (B)") > 0
    assert len(caa.split(begun, 5)["test"]) == 4
    assert sum(map(len, caa.split(pairs, 100).values())) == 32  # they begin alike, numbers apart: one part
    assert sorted(map(len, caa.split(pairs, 100).values())) == [0, 0, 32]


def test_words_that_all_questions_begin_with_do_not_put_them_into_one_part(statements) -> None:
    parts = caa.split(statements, 100)
    assert [len(part) for part in parts.values()] == [8, 8, 16]
    for part in parts.values():
        assert [pair.positive for pair in part].count(" Yes") == len(part) / 2
    asked = {name: {caa.question_of(pair).split()[-4] for pair in part} for name, part in parts.items()}
    assert sum(map(len, asked.values())) == len(set.union(*asked.values())) == 16


def test_questions_with_yes_and_no_are_asked_as_they_are_and_have_no_answers_without_letters(statements) -> None:
    (first, *_) = caa.rows_of(statements, "yes or no")
    assert first["choices"] == [" No", " Yes"] and first["prompt"] == statements[0].prompt
    (text, *_) = caa.rows_of(statements, "texts")
    assert (text["matching"], text["other"], text["prompt"]) == (" No", " Yes", statements[0].prompt)
    assert caa.rows_of(statements, "answers") == []


def test_a_question_of_a_model_without_a_chat_template_ends_with_one_cue(pairs) -> None:
    plain = caa.as_asked(pairs[0], chat=False)
    assert str(plain.prompt).endswith("Yes, 0.\n (B) No, 0.\n\nAnswer:")
    assert caa.as_asked(plain, chat=False) == plain
    assert caa.rows_of([plain], "texts")[0]["prompt"] == "Is 0 good?\n\nAnswer:"


def test_as_a_chat_all_questions_have_one_form(pairs) -> None:
    forms = [question + end for question in ("Question: Is it?", "Is it?") for end in ("", caa.CUE)]
    asked = [caa.as_asked(replace(pairs[0], prompt=form), chat=True).prompt for form in forms]
    assert [list(prompt) for prompt in asked] == [[{"role": "user", "content": "Is it?"}]] * 4


def test_near_copies_of_a_question_are_one_group_of_the_intervals(pairs) -> None:
    begun = [replace(p, prompt=f"{WORDS[i // 4]} {caa.question_of(p)}") for i, p in enumerate(pairs)]
    test = caa.split(begun, 100)["test"]
    groups = [row["group"] for row in caa.rows_of(test, "letters")]
    assert len(groups) == 16 and len(set(groups)) == 4


def test_halves_agree_where_pairs_differ_by_one_direction_and_not_where_they_are_noise() -> None:
    noise = torch.randn(80, 2, 16, generator=torch.Generator().manual_seed(0))
    noise[::2, 1, 0] += 20
    items = pd.DataFrame({"label": ["positive", "negative"] * 40, "group": [str(i // 2) for i in range(80)]})
    cosines = caa.halves(sk.Activations(noise, (3, 7), items), [3, 7])
    assert abs(cosines[3]) < 0.5 and cosines[7] > 0.95


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
        assert (
            answers["prompt"] == texts["prompt"] == f"Is {int(number) // 2} good?{caa.CUE}" and "choices" not in texts
        )


def test_a_text_gives_an_answer_by_its_first_word_or_where_that_is_not_yes_or_no_by_its_words() -> None:
    row = {"matching": " Yes, I would.", "other": " No, I would not."}
    said = {"Yes!": 1.0, "no": -1.0, "Yesterday I would.": 0.0, "": 0.0}
    assert {text: caa.likeness({**row, "text": text}) for text in said} == said
    other = {"matching": " I can help you.", "other": " None, thanks."}
    assert caa.likeness({**other, "text": "I'm sorry, thanks."}) < 0 < caa.likeness({**other, "text": "You can."})
    alike = {"matching": " I would.", "other": " I would not."}
    assert caa.likeness({**alike, "text": "I would."}) == pytest.approx(1 - 2 * 2 / (2 + 3))
    assert caa.likeness({**alike, "text": "I would not."}) == pytest.approx(2 * 2 / (3 + 2) - 1)


def test_scores_turned_towards_a_letter_tell_what_moves_whatever_matches() -> None:
    rows = [
        {"vector": "caa", "layer": 1, "coefficient": 0.0, "prompt_id": str(i), "group": str(i), "sample": 0,
         "choice": f" ({letter}", "text": "", "score": 0.75}
        for i, letter in enumerate("AB")
    ]  # fmt: skip
    result = SweepResult(pd.DataFrame(rows))
    assert caa.towards(result, "a", 1.0).table["score"].tolist() == [0.75, 0.25]
    assert caa.towards(result, "b", 0.0).table["score"].tolist() == [-0.75, 0.75]
    assert caa.says_yes_or_no([" No, thanks.", " Yes."]) and not caa.says_yes_or_no([" No.", " Maybe."])


def test_a_control_is_measured_at_the_layer_that_it_would_have_been_given() -> None:
    score = {("caa", 1): 0.9, ("caa", 2): 0.1, ("r1", 1): 0.2, ("r1", 2): 0.8, ("r2", 1): 0.6, ("r2", 2): 0.3}
    rows = [
        {"vector": vector, "layer": str(layer), "coefficient": coefficient, "prompt_id": str(i), "group": str(i),
         "sample": 0, "text": "", "dose": coefficient / 10,
         "score": (value + 0.01 * i) * coefficient if coefficient else 0.5}
        for (vector, layer), value in score.items() for coefficient in (-1.0, 0.0, 2.0) for i in range(4)
    ]  # fmt: skip
    layers = {"caa": 1, "r1": 2, "r2": 1}
    low, high = caa.at_own_layers(SweepResult(pd.DataFrame(rows)), layers, "letters").to_dict("records")
    assert (low["dose"], high["dose"], low["k"], low["n"], low["over"]) == (-0.1, 0.2, 2, 4, caa.OWN_LAYER)
    assert low["gain"] == pytest.approx((0.8 + 0.6) / 2 - 0.9) and high["gain"] == pytest.approx(2 * 0.9 - 0.8 - 0.6)
    assert low["unsteered"] == high["unsteered"] == 0.5


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
    ("gain", "over", "p", "p_random", "verdict"),
    [
        (0.2, 0.1, 0.001, 0.01, "changes"), (0.2, 0.1, 0.001, 0.4, "changes like random directions"),
        (-0.2, -0.1, 0.001, 0.01, "changes against the dose"), (0.2, 0.1, 0.2, 0.01, "not detected"),
        (0.2, -0.1, 0.001, 0.01, "changes along the dose, less than random directions"),
        (-0.2, 0.1, 0.001, 0.01, "changes against the dose, less than random directions"),
    ],
)  # fmt: skip
def test_a_verdict_needs_the_sign_of_the_dose_in_both_gains_and_both_p_values(gain, over, p, p_random, verdict) -> None:
    row = {
        "behavior": "b",
        "measure": "letters",
        "dose": 0.2,
        "gain": gain,
        "low": gain - 0.05,
        "high": gain + 0.05,
        "n": 30,
        "unsteered": 0.6,
        "wrong_way": 0.25,
    }
    ends = {"low": over - 0.05, "high": over + 0.05}
    own = {**row, "over": caa.OWN_LAYER, "gain": over, **ends, "p": p_random, "n": 40}
    rows = [{**row, "over": "coefficient 0", "p": p}, own]
    rows += [{**one, "measure": "letter A", "p": 1e-9} for one in rows]
    (line,) = caa.verdicts(pd.DataFrame(rows)).to_dict("records")
    assert (line["verdict"], line["unsteered"], line["wrong_way"]) == (verdict, 0.6, 0.25)
    assert (line["n"], line["questions"]) == (30, 40)
    rows += [{**own, "over": "random", "p": 1e-9}]  # the larger p counts
    assert caa.verdicts(pd.DataFrame(rows))["verdict"].tolist() == [verdict]


@pytest.mark.parametrize(
    ("held", "verdict"), [("coefficient 0", "not detected"), (caa.OWN_LAYER, "changes like random directions")]
)
def test_a_gain_whose_interval_holds_0_is_not_shown_whatever_its_p_value(held: str, verdict: str) -> None:
    row = {"behavior": "b", "measure": "letters", "dose": 0.2, "gain": 0.2, "p": 1e-9, "n": 30, "unsteered": 0.6}
    rows = [
        {**row, "over": over, "low": -0.01 if over == held else 0.1, "high": 0.5, "wrong_way": 0.0}
        for over in ("coefficient 0", caa.OWN_LAYER)
    ]
    assert caa.verdicts(pd.DataFrame(rows))["verdict"].tolist() == [verdict]


@pytest.mark.parametrize(("gain", "p"), [(0.1, 0.4), (-0.1, 1e-9)])
def test_a_vector_is_compared_with_directions_at_its_own_layer_too(gain: float, p: float) -> None:
    row = {"behavior": "b", "measure": "letters", "dose": 0.2, "low": 0.1, "high": 1.0, "n": 30, "unsteered": 0.6}
    rows = [
        {**row, "over": over, "gain": 0.2, "p": 1e-9, "wrong_way": 0.0} for over in ("coefficient 0", caa.OWN_LAYER)
    ]
    rows.append({**row, "over": "random", "gain": gain, "p": p})
    assert caa.verdicts(pd.DataFrame(rows))["verdict"].tolist() == ["changes like random directions"]


def test_answers_are_asked_without_their_options_also_where_no_line_says_choices() -> None:
    question = "Is oak good?\n(A) Yes, sure.\n(B) No, never."
    for text in (question, question.replace("?\n", "?\n\nChoices:\n")):
        pair = sk.ContrastPair(f"{text}\n\nAnswer:", " (A)", " (B)", group="g")
        (row,) = caa.rows_of([pair], "answers")
        assert row["prompt"] == "Is oak good?\n\nAnswer:" and row["choices"] == [" Yes, sure.", " No, never."]


def test_the_command_writes_gains_that_are_those_of_scored_choices_and_resumes(tmp_path, monkeypatch, capsys) -> None:
    write_questions(tmp_path / "good.jsonl", alike=False)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    monkeypatch.setattr(sk, "load", lambda *_: (model, tokenizer))
    monkeypatch.setattr(caa, "N_RANDOM", 4)  # few, so that the test is quick
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
        "--n-test",
        "16",
    ]
    with pytest.warns(FewWarning):
        caa.main(arguments)
    assert "letters" in capsys.readouterr().out
    by_dose, meta = read_table(out / "by_dose.csv")
    assert set(by_dose["measure"]) == {"letters", "letter A", "answers", "yes over no", caa.YES_TEXTS}
    assert set(by_dose["dose"]) == set(caa.DOSES)
    assert set(by_dose["over"]) == {"coefficient 0", "random", "shuffled", caa.OWN_LAYER}
    assert by_dose.loc[by_dose["measure"] == caa.YES_TEXTS, "attainable"].eq(1).all()
    assert meta["vectors"]["good"]["n_read"] == 8 and set(meta["vectors"]["good"]["halves"]) == {"1", "3"}
    own = by_dose[by_dose["over"] == caa.OWN_LAYER]
    assert own.groupby("measure")["dose"].apply(list).map(lambda doses: doses == [-0.2, 0.2]).all()
    turned = by_dose[(by_dose["measure"] == "letter A") & (by_dose["over"] == "coefficient 0")]
    assert 0 < turned["unsteered"].iloc[0] < 1
    wanted = {"n_test": 16, "n_random": 4, "layers": [1, 3], "doses": list(caa.DOSES), "judges": {}}
    assert {name: meta[name] for name in wanted} == wanted and set(by_dose["k"]) == {0, 4}
    judged, _ = read_table(out / "verdicts.csv")
    assert judged["n"].eq(8).all() and judged[["unsteered", "wrong_way"]].notna().all(axis=None)
    layer = int(by_dose["layer"].iloc[0])
    parts = caa.split(sk.read_ab(tmp_path / "good.jsonl", chat=True), 16)
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


@pytest.mark.long
def test_the_command_measures_questions_with_yes_and_no_as_those_with_letters(tmp_path, monkeypatch, capsys) -> None:
    write_statements(tmp_path / "kind.jsonl")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    monkeypatch.setattr(sk, "load", lambda *_: (model, tokenizer))
    out = tmp_path / "run"
    arguments = ["--checkpoint", "C", "--data", str(tmp_path), "--behaviors", "kind", "--out", str(out)]
    caa.main([*arguments, "--layers", "2", "--n-test", "16"])
    by_dose, _ = read_table(out / "by_dose.csv")
    assert set(by_dose["measure"]) == {"yes or no", "answer yes", caa.YES_TEXTS}
    assert set(by_dose["over"]) == {"coefficient 0", "random", "shuffled", caa.OWN_LAYER}
    plain = by_dose[by_dose["over"] == "coefficient 0"].drop_duplicates("measure").set_index("measure")["unsteered"]
    rows = caa.rows_of([caa.as_asked(p, True) for p in caa.split(sk.read_ab(tmp_path / "kind.jsonl"), 16)["test"]], "")
    prompts, choices = ([row[key] for row in rows] for key in ("prompt", "choices"))
    scored = sk.score_choices(model, tokenizer, prompts, choices)
    assert plain["yes or no"] == pytest.approx(scored.groupby("prompt")["probability"].first().mean(), abs=1e-5)
    yes = scored[scored["choice"] == " Yes"]["probability"]
    assert plain["answer yes"] == pytest.approx(yes.mean(), abs=1e-5)
    judged, _ = read_table(out / "verdicts.csv")
    assert set(judged["measure"]) == {"yes or no", caa.YES_TEXTS}


def test_behaviors_measured_one_call_at_a_time_have_the_tables_of_one_call(tmp_path, monkeypatch, capsys) -> None:
    for name in ("good", "fine"):
        write_questions(tmp_path / f"{name}.jsonl", alike=False)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    monkeypatch.setattr(sk, "load", lambda *_: (model, tokenizer))
    found = iter(range(9))

    def measured(*_: Any, **__: Any) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]:
        """Gains of one measure at one dose, other ones in each call."""
        n = next(found)
        common = {"measure": "letters", "layer": 1, "gain": 0.1 * n, "low": 0.0, "high": 1.0, "p": 0.01, "n": 16}
        rows = [common | {"dose": 0.2, "over": over} for over in ("coefficient 0", caa.OWN_LAYER)]
        table = pd.DataFrame(rows).assign(unsteered=0.5, wrong_way=0.1)
        return table, table, {"n_read": n}

    monkeypatch.setattr(caa, "measure_behavior", measured)
    common = ["--checkpoint", "C", "--data", str(tmp_path), "--n-test", "16"]
    caa.main([*common, "--behaviors", "good,fine", "--out", str(tmp_path / "one")])
    found = iter(range(9))
    for name in ("good", "fine"):
        caa.main([*common, "--behaviors", name, "--out", str(tmp_path / "two")])
    for name in ("by_layer", "by_dose", "verdicts"):
        (one, about), (two, same) = (read_table(tmp_path / which / f"{name}.csv") for which in ("one", "two"))
        assert one.equals(two) and about == same and set(one["behavior"]) == {"good", "fine"}
    caa.main([*common, "--behaviors", "good", "--out", str(tmp_path / "two")])
    again, about = read_table(tmp_path / "two" / "by_dose.csv")
    assert len(again) == 4 and about["vectors"] == {"fine": {"n_read": 1}, "good": {"n_read": 2}}
    before = (tmp_path / "two" / "by_dose.csv").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        caa.main([*common, "--n-texts", "8", "--behaviors", "fine", "--out", str(tmp_path / "two")])
    assert "other n_texts" in capsys.readouterr().err and (tmp_path / "two" / "by_dose.csv").read_bytes() == before


@pytest.mark.parametrize("what", ["few", "both kinds", "one beginning"])
def test_a_file_that_cannot_be_measured_is_named_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, what) -> None:
    monkeypatch.setattr(sk, "load", lambda *_: pytest.fail("loaded"))
    file = write_questions(tmp_path / "good.jsonl", alike=what == "one beginning")
    if what == "both kinds":
        file.write_text(file.read_text() + write_statements(tmp_path / "kind.jsonl").read_text())
    arguments = ["--checkpoint", "C", "--data", str(tmp_path), "--behaviors", "good", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        caa.main(arguments if what == "few" else [*arguments, "--n-test", "4"])
    told = capsys.readouterr().err
    wanted = {"few": "expected 150 questions", "both kinds": "Split the file", "one beginning": "'validation': 0"}
    assert str(file) in told and wanted[what] in told and not (tmp_path / "run").exists()


def test_a_missing_file_is_named_before_a_model_is_loaded(tmp_path, monkeypatch, capsys) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(sk, "load", load)
    with pytest.raises(SystemExit):
        caa.main(["--checkpoint", "C", "--data", str(tmp_path), "--out", str(tmp_path / "run")])
    assert "missing" in capsys.readouterr().err and not (tmp_path / "run").exists()
