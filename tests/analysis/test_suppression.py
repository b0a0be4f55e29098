"""Suppression: the trait as a rule sees it, the one number by hand, and a run from traces to tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import steerkit as sk
from analysis.suppression import suppress
from analysis.suppression.kept_accuracy import chosen_layer, kept_accuracy
from analysis.suppression.suppress import Suppression, main, scaled
from analysis.suppression.trait import words_trait
from steerkit.io.tables import read_table
from steerkit.sweeps.result import SweepResult
from steerkit.text.traces import DebateTrace, Turn, write_traces
from tests.tiny import tiny_model, tiny_tokenizer


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


def test_the_mildest_coefficient_that_halves_the_trait_is_taken_and_its_accuracy_is_relative_to_0() -> None:
    trait = {-2.0: [0, 0, 0, 0], -1.0: [1, 1, 0, 0], 0.0: [1, 1, 1, 1], 1.0: [0, 0, 0, 0]}
    right = {-2.0: [0, 0, 0, 0], -1.0: [1, 0, 1, 0], 0.0: [1, 1, 1, 0], 1.0: [1, 1, 1, 1]}
    line = kept_accuracy(sweep_of(trait, right)).iloc[0]
    assert line["coefficient"] == -1.0
    assert line["kept"] == pytest.approx(2 / 3)
    assert line["low"] <= line["kept"] <= line["high"]
    assert line["n"] == 4


def test_ablation_is_told_beside_the_coefficients_and_not_in_place_of_them() -> None:
    trait = {-np.inf: [0, 0], -2.0: [1, 0], -1.0: [1, 1], 0.0: [1, 1]}
    right = {-np.inf: [1, 1], -2.0: [1, 0], -1.0: [1, 1], 0.0: [1, 1]}
    lines = kept_accuracy(sweep_of(trait, right)).set_index("operation")
    assert list(lines.index) == ["add", "ablate"]
    assert list(lines["coefficient"]) == [-2.0, -np.inf] and list(lines["kept"]) == [0.5, 1.0]


@pytest.mark.parametrize(
    "kept, layer", [((0.2, 0.4, 1.0), 5), ((np.nan, np.nan, 0.3), 8), ((np.nan, np.nan, np.nan), 5)]
)
def test_the_layer_is_chosen_by_what_adding_keeps_then_by_what_ablation_keeps(kept, layer) -> None:
    lines = zip((2, 5, 8), ("add", "add", "ablate"), kept, strict=True)
    assert chosen_layer(pd.DataFrame(lines, columns=["layer", "operation", "kept"]), [2, 5, 8]) == layer


def test_where_the_trait_is_never_halved_nothing_is_said_to_be_kept() -> None:
    trait = {-1.0: [1, 1], 0.0: [1, 1]}
    line = kept_accuracy(sweep_of(trait, trait)).iloc[0]
    assert np.isnan(line["coefficient"]) and np.isnan(line["kept"])
    absent = {-1.0: [0, 0], 0.0: [0, 0]}
    assert np.isnan(kept_accuracy(sweep_of(absent, trait)).iloc[0]["coefficient"])


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
    small = Suppression(layers=(1, 2), coefficients=(-1.0, 1.0), validation=2, test=3, max_new_tokens=4)
    monkeypatch.setattr(suppress, "Suppression", lambda agent: small)
    call = [
        "--traces", str(tmp_path / "traces.jsonl"), "--stage", "base=x", "--stage", "IMAD=y", "--agent", "2",
        "--words", "fools,ha", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    main(call)
    curves, _ = read_table(tmp_path / "out" / "suppression_curves.csv")
    assert set(curves["score"]) == {"trait", "accuracy", "perplexity"}
    assert set(curves["context"]) == {"plain", "forced"}
    assert set(curves["stage"]) == {"base", "IMAD"}
    assert set(curves["vector"]) == {"agent", "prompts", "random 0", "random 1", "random 2"}
    assert set(curves["coefficient"]) == {-np.inf, -1.0, 0.0, 1.0}
    assert set(zip(curves["vector"].str.partition(" ")[0], curves["role"], strict=True)) == {
        ("agent", "vector"), ("prompts", "vector"), ("random", "random")
    }  # fmt: skip
    kept, _ = read_table(tmp_path / "out" / "suppression_kept.csv")
    assert set(kept["n"]) == {3}
    assert "kept" in capsys.readouterr().out
    monkeypatch.setattr(suppress, "at_stage", pytest.fail)
    main(call)
