"""Sweeps of given continuations: each row against its own plain call, resumable, with controls, gains and a report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import steerkit as sk
from steerkit.io.rows import read_rows
from steerkit.show.explorer import explorer_data
from steerkit.show.report import report_run
from steerkit.sweeps.result import FewWarning
from tests.steering.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer

CHOICES = [" (A)", " (B)", "c"]
PROMPTS = [
    {"id": "a", "prompt": "Hello", "matching": " (A)"},
    {"id": "b", "prompt": [{"role": "user", "content": "hi"}], "matching": " (B)"},
]
OPTIONS: dict[str, Any] = {"coefficients": [-0.3, 0.3], "layers": [1, (1, 2)], "choices": CHOICES}


@pytest.fixture(scope="module")
def setting() -> tuple[Any, Any, dict[str, sk.SteeringVector]]:
    model = tiny_model()
    named = {"v": vector(model, 1, 2)}
    return model, tiny_tokenizer(), {**named, **sk.controls.random(named, n=2)}


@pytest.fixture(scope="module")
def swept(setting) -> sk.SweepResult:
    model, tokenizer, named = setting
    return sk.sweep(model, tokenizer, named, PROMPTS, **OPTIONS)


def test_every_row_equals_its_own_call_of_score_choices(setting, swept) -> None:
    model, tokenizer, named = setting
    table = swept.table
    assert len(table) == 3 * 2 * 3 * 2 * 3
    prompts = {row["id"]: row["prompt"] for row in PROMPTS}
    for (name, layer, coefficient, prompt_id), part in table.groupby(["vector", "layer", "coefficient", "prompt_id"]):
        steering = sk.Steering(named[name], coefficient, layer=(1, 2) if layer == "1+2" else layer)
        alone = sk.score_choices(model, tokenizer, [prompts[prompt_id]], CHOICES, steering=steering)
        assert part["choice"].tolist() == part["text"].tolist() == CHOICES
        assert part["n_tokens"].tolist() == alone["n_tokens"].tolist()
        for column in ("log_prob", "probability"):
            np.testing.assert_allclose(part[column], alone[column], rtol=1e-4)
    assert table.groupby(["vector", "layer", "coefficient"])["probability"].sum().sub(2).abs().max() < 1e-12


def test_gains_over_controls_are_of_one_choice_per_prompt(swept) -> None:
    with pytest.raises(ValueError, match="expected one choice per prompt"):
        swept.gains("probability")
    with pytest.raises(ValueError, match="expected one choice per prompt"):
        swept.curve("log_prob")
    matching = swept.where(swept.table["choice"] == swept.table["matching"])
    with pytest.warns(FewWarning):
        gains = matching.gains("log_prob")
    assert set(gains["over"]) == {"coefficient 0", "random"}
    place = {"vector": "v", "layer": 1}
    scores = matching.table[(matching.table["vector"] == "v") & (matching.table["layer"] == 1)]
    mean = scores.groupby("coefficient")["log_prob"].mean()
    row = gains[(gains["over"] == "coefficient 0") & (gains["coefficient"] == 0.3)]
    row = row[(row["vector"] == place["vector"]) & (row["layer"] == place["layer"])]
    assert row["gain"].item() == pytest.approx(mean[0.3] - mean[0.0])


def test_an_interrupted_sweep_of_choices_goes_on_and_grows_by_choices(setting, swept, tmp_path, monkeypatch) -> None:
    from steerkit.sweeps import store

    model, tokenizer, named = setting
    append, calls = store.append_rows, []

    def cut(path, rows):
        calls.append(path.name)
        if calls.count("rows.jsonl") == 2:
            raise KeyboardInterrupt
        append(path, rows)

    options = {**OPTIONS, "batch_rows": 4}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(store, "append_rows", cut)
        sk.sweep(model, tokenizer, named, PROMPTS, out=tmp_path, **{**options, "choices": CHOICES[:2]})
    assert len(read_rows(tmp_path / "rows.jsonl")) == 4
    resumed = sk.sweep(model, tokenizer, named, PROMPTS, out=tmp_path, **options)
    pd.testing.assert_frame_equal(resumed.table, swept.table, rtol=1e-4)
    assert len(read_rows(tmp_path / "rows.jsonl")) == 2 * 13 * 3
    assert resumed.counts() == {"choices_scored": 78, "unsteered_choices": 6, "rows": 108}
    page = report_run(tmp_path).read_text()
    assert "78 scored choices (108 rows)" in page and "3 choices" in page


def test_prompts_may_have_their_own_choices(setting) -> None:
    model, tokenizer, named = setting
    own = [{**PROMPTS[0], "choices": ["x", " yes"]}, PROMPTS[1]]
    table = sk.sweep(model, tokenizer, named["v"], own, **{**OPTIONS, "choices": [" (B)"]}).table
    assert table.groupby("prompt_id")["choice"].unique().map(list).to_dict() == {"a": ["x", " yes"], "b": [" (B)"]}
    assert "choices" not in table and table.loc[table["prompt_id"] == "b", "probability"].eq(1).all()


def test_the_report_draws_a_curve_per_choice(swept) -> None:
    data = explorer_data(swept)
    assert data["names"]["sample"] == CHOICES
    assert [name for name in data["scores"] if name.startswith("probability")] == [
        f"probability of {choice!r}" for choice in CHOICES
    ]
    place = data["scores"].index("probability of ' (A)'")
    points = data["series"][0]["lines"][place]["points"]
    first = swept.table[(swept.table["vector"] == "v") & (swept.table["layer"] == 1) & (swept.table["sample"] == 0)]
    means = first.groupby("coefficient")["probability"].mean()
    assert [point[0] for point in points] == means.index.tolist()
    np.testing.assert_allclose([point[1] for point in points], means, rtol=1e-4, atol=1e-12)


def test_a_choice_whose_logits_overflow_has_no_probability_and_is_named(setting) -> None:
    model, tokenizer, _ = setting
    strong = sk.SteeringVector({1: 10 * vector(model, 1).layers[1]})
    with pytest.warns(UserWarning, match=r"the logits of 3 of 6 rows overflowed.*coefficient 3e\+38"):
        table = sk.sweep(model, tokenizer, strong, ["Hello"], coefficients=3e38, choices=CHOICES).table
    assert table["probability"].isna().tolist() == table["text"].isna().tolist() == [False] * 3 + [True] * 3


def test_missing_values_of_a_table_are_as_if_they_were_left_out(setting) -> None:
    """A missing group is not one group of all prompts, and a missing id is not the id "nan"."""
    table = pd.DataFrame({"prompt": ["ab", "cd", "ef"], "id": [np.nan, "x", np.nan], "group": [np.nan, np.nan, "g"]})
    swept = sk.sweep(
        *setting[:2], sk.SteeringVector({1: torch.ones(32)}), table.to_dict("records"), coefficients=[1],
        choices=pd.Series(["a", "b"]),
    ).table  # fmt: skip
    assert list(dict.fromkeys(swept["prompt_id"])) == ["0", "x", "2"]
    assert list(dict.fromkeys(swept["group"])) == ["0", "x", "g"]
    assert list(dict.fromkeys(swept["choice"])) == ["a", "b"]
