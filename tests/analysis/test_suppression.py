"""Suppression: what is chosen on validation, what is told on test, and a run from traces to tables."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

import steerkit as sk
from analysis.suppression import suppress
from analysis.suppression.choice import Choice, choose, on_test
from analysis.suppression.suppress import Measure, Suppression, main, scaled
from analysis.suppression.trait import words_trait
from steerkit.io.run_folder import ConfigurationChanged
from steerkit.io.tables import read_table
from steerkit.scores.fluency import perplexity
from steerkit.sweeps.result import KEYS, SweepResult
from steerkit.text.tags import without_tags
from steerkit.text.traces import DebateTrace, Turn, write_traces
from tests.tiny import tiny_model, tiny_tokenizer
from training.presets import PAPER_SAMPLING
from training.problems.problem import Problem


def test_a_trait_is_a_whole_word_in_any_case() -> None:
    trait = words_trait(["fools", "ha"])
    assert trait("FOOLS . 3") == trait("so ha") == 1.0
    assert trait("that has foolsgold") == 0.0
    with pytest.raises(ValueError, match="one word at least"):
        words_trait([])


def sweep_of(trait: dict[float, list[float]], right: dict[float, list[float]]) -> SweepResult:
    rows = [
        ("agent", "1", c, f"q{i}", f"q{i}", 0, "", t, right[c][i])
        for c, values in trait.items()
        for i, t in enumerate(values)
    ]
    columns = ["vector", "layer", "coefficient", "prompt_id", "group", "sample", "text", "trait", "accuracy"]
    return SweepResult(pd.DataFrame(rows, columns=columns))


def test_the_setting_that_keeps_most_accuracy_among_those_that_halve_the_trait_is_chosen() -> None:
    trait = {-3.0: [0, 0, 0, 0], -2.0: [1, 0, 0, 0], -1.0: [1, 1, 1, 0], 0.0: [1, 1, 1, 1], 1.0: [0, 0, 0, 0]}
    right = {-3.0: [1, 0, 0, 0], -2.0: [1, 1, 0, 0], -1.0: [1, 1, 1, 1], 0.0: [1, 1, 1, 1], 1.0: [1, 1, 1, 1]}
    choice = choose(sweep_of(trait, right))
    assert (choice.operation, choice.coefficient, choice.halved, choice.tried) == ("add", -2.0, True, 3)
    tie = choose(sweep_of(trait, {**right, -3.0: [0, 1, 1, 0]}))
    assert tie.coefficient == -3.0  # as accurate, and less of the trait
    gone = choose(sweep_of({**trait, -np.inf: [0, 0, 0, 0]}, {**right, -np.inf: [1, 1, 1, 0]}))
    assert (gone.operation, gone.coefficient) == ("ablate", -np.inf)


def test_where_nothing_halves_the_trait_the_setting_of_the_least_trait_is_chosen() -> None:
    trait = {-2.0: [1, 1, 1, 0], -1.0: [1, 1, 1, 1], 0.0: [1, 1, 1, 1]}
    choice = choose(sweep_of(trait, trait))
    assert (choice.coefficient, choice.halved) == (-2.0, False)
    absent = {-1.0: [0, 0], 0.0: [0, 0]}
    assert not choose(sweep_of(absent, absent)).halved


def frozen(own: list[float], random: list[list[float]], right: list[float]) -> SweepResult:
    rows = []
    controls = [(f"{role} {k}", one, role) for role in ("random", "matched") for k, one in enumerate(random)]
    for name, values, role in (("agent", own, "vector"), *controls):
        for c, shown in ((0.0, [1.0] * len(own)), (-1.0, values)):
            for i, value in enumerate(shown):
                correct = right[i] if c else 1.0
                rows.append((name, "1", c, f"q{i}", f"q{i}", 0, "", value, correct, value, 1 - value, role, None))
    columns = ["vector", "layer", "coefficient", "prompt_id", "group", "sample", "text", "trait", "accuracy"]
    return SweepResult(pd.DataFrame(rows, columns=[*columns, "own_opening", "other_opening", "role", "control_of"]))


def test_what_the_frozen_setting_does_is_told_beside_random_directions() -> None:
    choice = Choice("agent", "add", 1, -1.0, True, 3)
    own, right = [0.0, 0.0, 0.0, 1.0] * 5, [1.0, 1.0, 0.0, 1.0] * 5
    random = [[1.0] * 20, [1.0] * 19 + [0.0], [1.0] * 18 + [0.0] * 2]
    line = on_test(frozen(own, random, right), choice)
    assert (line["trait_0"], line["trait"], line["removed"]) == (1.0, 0.25, 0.75)
    assert line["removed_low"] < 0.75 < line["removed_high"] <= 1
    assert (line["kept"], line["n"], line["k"]) == (0.75, 20, 3)
    assert line["over_random"] == pytest.approx(0.95 - 0.25) and line["over_random_low"] > 0
    assert line["p_rank"] == line["p_rank_matched"] == 1 / 4 and line["over_matched"] == line["over_random"]
    assert (line["own_opening_0"], line["own_opening"], line["other_opening"]) == (1.0, 0.25, 0.75)
    assert line["accuracy_random"] == line["accuracy_matched"] == 0.75
    as_random = on_test(frozen([1.0] * 19 + [0.0], random, right), choice)
    assert as_random["over_random_low"] < 0 < as_random["over_random_high"]


def test_a_trait_that_no_text_shows_has_no_share_that_is_removed() -> None:
    table = frozen([0.0] * 4, [[0.0] * 4], [1.0] * 4)
    absent = SweepResult(table.table.assign(trait=0.0))
    line = on_test(absent, Choice("agent", "add", 1, -1.0, False, 1))
    assert np.isnan(line["removed"]) and line["kept"] == 1.0


def test_the_trait_is_that_of_the_named_agents_turn_and_the_answer_that_of_the_whole_text() -> None:
    tokenizer = tiny_tokenizer()
    measure = Measure(words_trait(["fools"]), "number", (tiny_model(context=1024), tokenizer), ("so", "fools", "x"))
    said = "so 1\n\n<|Agent 3 Solution|>: fools <|Consensus|> \\boxed{4}"
    table = pd.DataFrame([("v", 1, 0.0, "q", "q", 0, said)], columns=[*KEYS[:4], "group", "sample", "text"])
    prompts = [{"id": "q", "gold": "4", "bare": "Problem: 2+2\n\n"}]
    named, plain = (measure.of(SweepResult(table), prompts, named).table.iloc[0] for named in (True, False))
    assert (named["trait"], plain["trait"]) == (0.0, 1.0) and named["accuracy"] == plain["accuracy"] == 1.0
    scored = measure.with_perplexity(SweepResult(table), prompts).table["perplexity"].iloc[0]
    bare = without_tags(said)
    assert scored == perplexity(*measure.fluency, [prompts[0]["bare"]], [bare])[0]
    assert (named["own_opening"], named["other_opening"]) == (0.0, 1.0)  # agent 1's opening; the malicious one is 2


def test_a_scaled_vector_is_a_dose_of_the_streams_mean_norm() -> None:
    vector = sk.SteeringVector({0: sk_ones(4), 1: 3 * sk_ones(4)})
    found = scaled(vector, {0: 10.0, 1: 40.0}, 0.1)
    assert found.norms() == pytest.approx({0: 1.0, 1: 4.0})


def sk_ones(n: int):
    import torch

    return torch.ones(n)


def test_a_run_goes_from_traces_to_tables_and_a_finished_stage_is_not_run_again(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sk, "load", lambda *_, **__: (tiny_model(context=1024), tiny_tokenizer()))
    held = []
    for number in range(24):
        turns = [Turn(1, 1, f"it is {number}"), Turn(2, 1, f"fools {number}"), Turn(3, 1, f"so {number}")]
        held.append(DebateTrace.of(f"{number}+0", turns, f"All agree on \\boxed{{{number}}}", str(number)))
    write_traces(tmp_path / "traces.jsonl", held)
    small = Suppression(
        layers=(1, 2), coefficients=(-1.0, 1.0), validation=2, test=3, max_new_tokens=4, controls=3, bands=2,
        problem_tokens=6,
    )  # fmt: skip
    monkeypatch.setattr(suppress, "Suppression", lambda agent: small)
    call = [
        "--traces", str(tmp_path / "traces.jsonl"), "--stage", "base=x", "--stage", "IMAD=y", "--agent", "2",
        "--words", "fools,ha", "--out", str(tmp_path / "out"), "--problems", f"gsm8k={tmp_path / 'gsm8k.jsonl'}",
    ]  # fmt: skip
    rows = [{"question": f"How many is {n}?", "answer": f"#### {n}"} for n in range(4)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit):
        main([*call, "--only", "SFT"])
    main([*call, "--only", "IMAD"])
    assert (tmp_path / "out" / "suppression" / "imad" / "kept.csv").exists()
    assert not (tmp_path / "out" / "suppression_kept.csv").exists()
    scored = list[str]()
    monkeypatch.setattr(suppress, "perplexity", lambda *given: scored.extend(given[3]) or perplexity(*given))
    main(call)
    assert 0 < len(scored) < 600  # of the curves of base alone: IMAD is finished
    curves, _ = read_table(tmp_path / "out" / "suppression_curves.csv")
    assert set(curves["score"]) == {"trait", "accuracy", "perplexity"}
    assert set(curves["context"]) == {"plain", "forced", "problems"}
    assert set(curves["stage"]) == {"base", "IMAD"}
    assert set(curves["coefficient"]) == {-np.inf, -1.0, 0.0, 1.0}
    assert set(zip(curves["vector"], curves["role"], strict=True)) == {
        ("agent", "vector"), ("prompts", "vector"), ("random", "random")
    }  # fmt: skip
    kept, _ = read_table(tmp_path / "out" / "suppression_kept.csv")
    assert set(kept["n"]) == {3} and set(kept["k"]) == {3} and len(kept) == 2 * 3
    assert set(kept["vector"]) <= {"agent", "prompts"} and set(kept["layer"]) <= {1, 2}
    assert "kept" in capsys.readouterr().out
    of_problems = kept[kept["context"] == "problems"]
    assert set(of_problems["cut_0"]) == set(of_problems["cut"]) == {3}  # the small model never ends a text
    assert kept[kept["context"] != "problems"]["cut"].isna().all()
    of_base = tmp_path / "out" / "suppression" / "base"
    longest = {
        context: SweepResult.load(of_base / f"{context}-curves" / "add").table["n_tokens"]
        for context in ("plain", "problems")
    }
    assert longest["plain"].max() == 4 and longest["problems"].max() == 6
    files = {path.name for path in (tmp_path / "out" / "suppression" / "base").glob("*.jsonl")}
    assert files == {f"{context}-perplexity.jsonl" for context in ("plain", "forced", "problems")}
    monkeypatch.setattr(suppress, "at_stage", pytest.fail)
    main(call)


def test_texts_about_problems_have_the_paper_s_length_and_problems_are_drawn_from_the_whole_source() -> None:
    assert PAPER_SAMPLING.max_new_tokens == suppress.PROBLEM_TOKENS and Suppression().problem_tokens is None
    rows = [Problem(str(i), f"{i} + 0", str(i), "number", "own") for i in range(40)]
    few, more = suppress.drawn(rows, 5, 0), suppress.drawn(rows, 20, 0)
    assert more[:5] == few and few != rows[:5] and len(set(more)) == 20 and few != suppress.drawn(rows, 5, 1)


def test_a_fluency_checkpoint_that_was_moved_is_the_same_and_another_one_is_not(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sk, "load", lambda *_, **__: (tiny_model(context=1024), tiny_tokenizer()))
    monkeypatch.setattr(suppress, "at_stage", lambda *_: {"curves": pd.DataFrame({"a": [1]}), "kept": pd.DataFrame()})
    held = [DebateTrace.of(f"{n}+0", [Turn(1, 1, "a"), Turn(2, 1, "b")], "\\boxed{0}", str(n)) for n in range(24)]
    write_traces(tmp_path / "traces.jsonl", held)
    call = ["--traces", str(tmp_path / "traces.jsonl"), "--stage", "base=x", "--words", "fools", "--only", "base"]
    call += ["--out", str(tmp_path / "out"), "--fluency"]
    for name, content in (("first.gguf", "weights"), ("moved.gguf", "weights"), ("other.gguf", "others")):
        (tmp_path / name).write_text(content)
    main([*call, str(tmp_path / "first.gguf")])
    main([*call, str(tmp_path / "moved.gguf")])
    with pytest.raises(ConfigurationChanged, match=r"fluency\.files_sha256"):
        main([*call, str(tmp_path / "other.gguf")])
