"""Doses: the same norm of the push at every vector and layer, converted by norms that are measured once and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import steerkit as sk
from steerkit.io.rows import read_rows
from steerkit.io.run_folder import ConfigurationChanged
from steerkit.show import plots
from steerkit.show.explorer import explorer_data
from steerkit.show.pivot import pivots
from steerkit.show.report import report_run
from steerkit.steering.dose import median_norms
from steerkit.sweeps.result import FewWarning
from steerkit.text.prompt import encode_prompt
from tests.steering.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["Hello", "A longer one", [{"role": "user", "content": "hi"}]]
DOSES = [-0.4, 0, 0.2, 0.4]
OPTIONS: dict[str, Any] = {"layers": [1, 2, (1, 2)], "max_new_tokens": 6}


@pytest.fixture(scope="module")
def setting() -> tuple[Any, Any, dict[str, sk.SteeringVector]]:
    model = tiny_model()
    named = {"v": vector(model, 1, 2), "long": vector(model, 1, 2, seed=3) * 7}
    return model, tiny_tokenizer(), {**named, **sk.controls.random(named, n=1)}


@pytest.fixture(scope="module")
def swept(setting, tmp_path_factory) -> tuple[sk.SweepResult, Path]:
    model, tokenizer, named = setting
    out = tmp_path_factory.mktemp("run")
    return sk.sweep(model, tokenizer, named, PROMPTS, doses=DOSES, out=out, **OPTIONS), out


def test_each_dose_is_the_relative_dose_whatever_the_vector_and_layer(setting, swept) -> None:
    _, _, named = setting
    result, _ = swept
    table, norms = result.table, result.meta["stream_norms"]
    assert sorted(table["dose"].unique()) == DOSES[:1] + DOSES[1:]
    np.testing.assert_allclose(table["relative_dose"], table["dose"].abs(), rtol=1e-12)
    for row in table[table["layer"] == 2].itertuples():
        wanted = row.dose * norms[2] / named[row.vector].norms()[2]
        assert row.coefficient == pytest.approx(wanted, rel=1e-12)
    at = {row.vector: row.coefficient for row in table[(table["layer"] == 1) & (table["dose"] == 0.4)].itertuples()}
    assert len(set(at.values())) > 2


def test_every_text_is_that_of_its_coefficient_and_of_generate_with_the_dose(setting, swept) -> None:
    model, tokenizer, named = setting
    result, _ = swept
    norms = result.meta["stream_norms"]
    for (name, layer, dose), part in result.table.groupby(["vector", "layer", "dose"]):
        layers = (1, 2) if layer == "1+2" else layer
        steering = sk.Steering(named[name], dose=dose, layer=layers)
        given = sk.generate(model, tokenizer, PROMPTS, max_new_tokens=6, steering=steering, norms=norms)
        assert given == part["text"].tolist()
        if (name, layer) == ("v", 1):
            assert sk.generate(model, tokenizer, PROMPTS, max_new_tokens=6, steering=steering) == given


def test_a_steering_with_a_dose_is_resolved_by_on_and_unusable_without_norms(setting) -> None:
    model, tokenizer, named = setting
    ids = encode_prompt(tokenizer, "Hello")
    norms = median_norms(model, [(ids, ())], positions="all")
    steering = sk.Steering(named["v"], dose=-0.4, layer=1, positions="all")
    assert np.isnan(steering.coefficient) and steering == sk.Steering(named["v"], dose=-0.4, layer=1, positions="all")
    plain = sk.Steering(named["v"], -0.4 * norms[1] / named["v"].norms()[1], layer=1, positions="all")
    choices = ["a", "b"]
    wanted = sk.score_choices(model, tokenizer, ["Hello"], choices, steering=plain)
    with steering.on(model, norms=norms):
        found = sk.score_choices(model, tokenizer, ["Hello"], choices)
    assert found.equals(wanted)
    pd.testing.assert_frame_equal(
        sk.score_choices(model, tokenizer, ["Hello"], choices, steering=steering, norms=norms), wanted
    )
    for use in (
        lambda: steering.on(model).__enter__(),
        lambda: sk.project(model, tokenizer, ["Hello"], named["v"], steering=steering),
    ):
        with pytest.raises(ValueError, match=r"expected a coefficient; got dose=-0.4"):
            use()


def test_a_grown_sweep_keeps_its_scale_and_computes_only_new_doses(setting, swept, tmp_path) -> None:
    model, tokenizer, named = setting
    first = sk.sweep(model, tokenizer, named["v"], PROMPTS, doses=[0.4], out=tmp_path, **OPTIONS)
    count = len(read_rows(tmp_path / "rows.jsonl"))
    more = [*PROMPTS, "other words that have another norm"]
    grown = sk.sweep(model, tokenizer, named["v"], more, doses=[0.2, 0.4], out=tmp_path, **OPTIONS)
    assert count == 3 * 4 and len(read_rows(tmp_path / "rows.jsonl")) == 4 * 7
    assert grown.meta["stream_norms"] == first.meta["stream_norms"]
    at = [table.query("dose == 0.4").groupby("layer")["coefficient"].unique().map(list) for table in
          (first.table, grown.table)]  # fmt: skip
    assert at[0].to_dict() == at[1].to_dict()
    with pytest.raises(ConfigurationChanged, match="expected the stream_norms"):
        sk.sweep(model, tokenizer, named["v"], PROMPTS, doses=[0.4], out=tmp_path, stream_norms={1: 1.0, 2: 1.0},
                 **OPTIONS)  # fmt: skip


def test_norms_that_could_not_be_measured_are_not_stored_and_the_folder_goes_on_with_other_prompts(
    setting, tmp_path
) -> None:
    model, tokenizer, named = setting
    short = ["H", "x"]  # one token each, at position 0
    how: dict[str, Any] = {"layers": 1, "positions": "prompt", "max_new_tokens": 3}
    for out in (None, tmp_path):
        with pytest.raises(
            ValueError, match=r"norms of the stream at the layers \[1\] for doses; .* Pass stream_norms=,"
        ):
            sk.sweep(model, tokenizer, named["v"], short, doses=[0.4], out=out, **how)
    plain = sk.sweep(model, tokenizer, named["v"], short, coefficients=[1], out=tmp_path, **how)
    assert plain.table.query("coefficient == 1")["relative_dose"].isna().all()
    assert not (tmp_path / "stream_norms.json").exists()
    (tmp_path / "stream_norms.json").write_text("{}")  # as earlier versions stored them
    dosed = sk.sweep(model, tokenizer, named["v"], [*short, "Hello"], doses=[0.4], out=tmp_path, **how)
    ids = encode_prompt(tokenizer, "Hello")
    assert dosed.meta["stream_norms"] == pytest.approx(median_norms(model, [(ids, ())], None, "prompt"))


def test_given_norms_of_some_layers_are_extended_by_further_given_or_measured_ones(setting, tmp_path) -> None:
    model, tokenizer, named = setting

    def run(layers: list[int], norms: dict[int, float] | None) -> dict[int, float]:
        options: dict[str, Any] = {"layers": layers, "max_new_tokens": 3, "out": tmp_path, "stream_norms": norms}
        return sk.sweep(model, tokenizer, named["v"], PROMPTS, doses=[0.4], **options).meta["stream_norms"]

    assert run([1], {1: 5.0}) == run([1], None) == {1: 5.0}
    measured = run([1, 2], None)
    assert measured[1] == 5.0 and set(measured) == {0, 1, 2, 3}
    assert run([1, 2], {2: measured[2]}) == measured
    with pytest.raises(ConfigurationChanged, match=r'started with, .*"1":5.0.*got {"1":5.5}'):
        run([1], {1: 5.5})
    (tmp_path / "stream_norms.json").write_text('{"1": 5.0}')
    assert run([1, 2], {1: 5.0, 2: 6.0}) == run([1, 2], {2: 6.0}) == run([1, 2], None) == {1: 5.0, 2: 6.0}


def test_scores_curves_gains_and_the_report_are_over_the_dose(setting, swept) -> None:
    model, tokenizer, named = setting
    result, out = swept
    assert result.axis == "dose"
    scored = result.score(lambda row: len(row.text) + row.dose, column="s")
    scored = scored.score("kl", model=model, tokenizer=tokenizer, vectors=named)
    assert scored.table.query("dose == 0")["kl"].abs().max() < 1e-9 < scored.table.query("dose == 0.4")["kl"].min()
    curve = scored.curve("s")
    assert sorted(curve["dose"].unique()) == DOSES and (curve.groupby(["vector", "layer"]).size() == 4).all()
    with pytest.warns(FewWarning):
        gains = scored.gains("s")
    over = gains[(gains["over"] == "random") & (gains["vector"] == "v") & (gains["layer"] == 1)]
    assert over["dose"].tolist() == [-0.4, 0.2, 0.4]
    means = scored.table.groupby(["vector", "layer", "dose"])["s"].mean()
    assert over["gain"].iloc[1] == pytest.approx(means["v", 1, 0.2] - means["v/random-0", 1, 0.2])
    assert set(scored.control_curve("s")["dose"]) == set(DOSES)
    area = scored.curve_auc("s", normalize=True).set_index(["vector", "layer"]).loc[("v", 1), "curve_auc"]
    ys = means["v", 1].to_numpy()
    assert area == pytest.approx(np.trapezoid(ys, DOSES) / 0.8)
    slope = scored.per_item("s").query("vector == 'v' and layer == 1")
    assert len(slope) == 3 and slope["n"].eq(4).all()
    with pytest.warns(FewWarning):
        tables = pivots(scored, ["s"])
    assert {"-0.4", "0", "0.2", "0.4"} <= set(next(iter(tables.values())))
    data = explorer_data(scored)
    assert data["axis"] == "dose" and sorted(set(data["rows"]["coefficient"])) == DOSES
    assert "Scores over the dose" in report_run(out).read_text()
    one = curve[(curve["layer"] == 1) & curve["vector"].isin(["v", "long"])]
    axes = plots.curves(one, "dose", "s").axes[0]
    assert axes.lines[0].get_xdata().tolist() == DOSES
    plots.effect_by_layer(scored, "s", at=0.4)


def test_doses_of_choices(setting) -> None:
    model, tokenizer, named = setting
    options = {"layers": 1, "choices": [" (A)", " (B)"]}
    result = sk.sweep(model, tokenizer, named, PROMPTS, doses=[0.3], **options)
    norms = result.meta["stream_norms"]
    alone = sk.score_choices(
        model, tokenizer, PROMPTS, [" (A)", " (B)"], steering=sk.Steering(named["v"], dose=0.3, layer=1)
    )
    part = result.table[(result.table["vector"] == "v") & (result.table["dose"] == 0.3)]
    np.testing.assert_allclose(part["log_prob"], alone["log_prob"], rtol=1e-4)
    texts = [(encode_prompt(tokenizer, prompt), tokenizer(choice)["input_ids"]) for prompt in PROMPTS for choice in
             (" (A)", " (B)")]  # fmt: skip
    assert norms == pytest.approx(median_norms(model, texts), rel=1e-5)


@pytest.mark.parametrize("operation", ["ablate", "clamp", "rotate"])
def test_a_dose_of_an_operation_that_adds_nothing_is_refused(setting, operation: str) -> None:
    model, tokenizer, named = setting
    message = f"expected a coefficient for '{operation}', whose change has no fixed norm; got dose=0.4"
    with pytest.raises(ValueError, match=message):
        sk.Steering(named["v"], dose=0.4, operation=operation, layer=1)
    with pytest.raises(ValueError, match=message):
        sk.sweep(model, tokenizer, named["v"], PROMPTS, doses=[0.4], operation=operation, **OPTIONS)
