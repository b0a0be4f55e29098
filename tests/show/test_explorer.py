"""The explorer's data against the sweep's own curves, texts and streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import steerkit as sk
from steerkit.io.tables import read_table
from steerkit.show.explorer import explorer_data
from steerkit.show.report import report_run, write_report
from steerkit.stats.controls import control_band
from steerkit.sweeps.projections import sweep_projections
from steerkit.sweeps.result import KEYS, SweepResult
from steerkit.sweeps.store import swept_vectors
from steerkit.sweeps.sweep import sweep
from tests.sweep_tables import ARABIC, EMOJI, data_of, table, tokens
from tests.tiny import tiny_model, tiny_tokenizer

# The data


def test_lines_and_areas_are_those_of_the_sweep() -> None:
    result = SweepResult(table())
    data = explorer_data(result)
    score = data["scores"].index("trait")
    curves, areas = (f("trait").set_index(["vector", "layer"]) for f in (result.curve, result.curve_auc))
    for v, vector in enumerate(data["names"]["vector"]):
        for at, layer in enumerate(data["names"]["layer"]):
            line = data["series"][data["conditions"][f"{v},{at}"]["series"][0]]["lines"][score]
            wanted = curves.loc[(vector, int(layer)), ["coefficient", "mean", "low", "high", "n"]].to_numpy()
            np.testing.assert_allclose(line["points"], wanted, rtol=1e-4)
            area = areas.loc[(vector, int(layer)), ["curve_auc", "low", "high"]].to_numpy(float)
            np.testing.assert_allclose(line["area"], area, rtol=1e-4)


@pytest.mark.parametrize(("name", "cut"), [("trait", True), ("rouge_l", True), ("mood", False)])
def test_intervals_of_shares_are_cut_to_0_and_1_and_those_of_other_scores_are_not(name: str, cut: bool) -> None:
    frame = table(vectors=("v",), layers=(8,), samples=1)
    share = np.tile([0.0, 0.25, 1.0], len(frame))[: len(frame)]
    result = SweepResult(frame.drop(columns="trait").assign(**{name: share}))
    data = explorer_data(result)
    ends = np.array([p[2:4] for p in data["series"][0]["lines"][data["scores"].index(name)]["points"]], dtype=float)
    own = result.curve(name)[["low", "high"]].to_numpy()
    assert (own < 0).any() or (own > 1).any()
    np.testing.assert_allclose(ends, own.clip(0, 1) if cut else own, rtol=1e-3, atol=1e-6)


def test_controls_of_a_kind_share_a_line_with_the_interval_of_a_further_one() -> None:
    frame = table()
    data = explorer_data(SweepResult(frame))
    score = data["scores"].index("trait")
    formal, terse = (data["conditions"][f"{data['names']['vector'].index(v)},0"]["series"] for v in ("formal", "terse"))
    assert [data["series"][k]["name"] for k in formal] == ["formal", "random", "shuffled"]
    assert [data["series"][k]["name"] for k in terse] == ["terse", "random"]
    line = data["series"][formal[1]]["lines"][score]
    assert line["of"] == 3
    mine = frame[frame["vector"].str.startswith("random") & (frame["layer"] == 8)]
    by = ["group", "prompt_id"]
    for point in line["points"]:
        wide = mine[mine["coefficient"] == point[0]].pivot_table("trait", by, "vector")
        interval = control_band(wide.to_numpy())
        np.testing.assert_allclose(point[1:4], [interval.mean, interval.low, interval.high], rtol=1e-4)
    wide = mine.pivot_table("trait", [*by, "vector"], "coefficient")
    each = pd.Series([np.trapezoid(row, wide.columns) for row in wide.to_numpy()], index=wide.index).unstack()
    interval = control_band(each.to_numpy())
    np.testing.assert_allclose(line["area"], [interval.mean, interval.low, interval.high], rtol=1e-4)


def test_scores_that_are_missing_or_infinite_are_gaps_and_not_zeros() -> None:
    frame = table(vectors=("v", "random-0", "random-1"), layers=(8,), samples=1)
    frame.loc[frame["coefficient"] == 2, "trait"] = np.nan
    frame.loc[(frame["coefficient"] == -2) & (frame["prompt_id"] == "q0"), "trait"] = np.inf
    frame.loc[frame["vector"] == "random-1", "trait"] = np.nan
    with pytest.warns(UserWarning, match=r"leaves out the infinite ones: \{'trait': 2\}"):
        data = explorer_data(SweepResult(frame.assign(never=np.nan)))
    assert data["scores"] == ["trait", "never", "n_tokens"]
    own, random = (data["series"][k] for k in data["conditions"]["0,0"]["series"])
    assert own["lines"][0]["points"][-1] == [2.0, None, None, None, 0]
    assert own["lines"][0]["points"][0][4] == 3
    assert own["lines"][0]["area"] == [None, None, None]
    assert own["lines"][1] is None and random["lines"][1] is None
    assert random["lines"][0]["of"] == 1
    assert None in data["rows"]["scores"][0]


def test_projections_are_cut_into_the_texts_and_scaled_about_the_unsteered_mean() -> None:
    frame = table(vectors=("v",), layers=(8,), samples=1, text=lambda *_: f"{EMOJI} {ARABIC}")
    along = tokens(frame, width=3)
    data = explorer_data(SweepResult(frame), along)
    rows = data["rows"]
    for row, text in enumerate(frame["text"]):
        lengths = data["pieces"][rows["text"][row]]
        assert sum(lengths) == len(text.encode("utf-16-le")) // 2
        key = [frame[name][row] for name in KEYS]
        mine = along[(along[KEYS] == key).all(axis=1)]
        np.testing.assert_allclose(rows["projections"][row], mine["projection"], rtol=1e-3)
    assert max(data["pieces"][rows["text"][0]]) > 3  # the emoji are two units each
    centre, extent = data["conditions"]["0,0"]["shade"]
    assert centre == pytest.approx(along.loc[along["coefficient"] == 0, "projection"].mean(), rel=1e-3)
    assert (np.abs(along["projection"] - centre) <= extent).mean() == pytest.approx(0.98, abs=0.02)
    assert data["scores"] == ["trait", "projection", "n_tokens"]
    means = along.groupby(KEYS, sort=False)["projection"].mean().to_numpy()
    np.testing.assert_allclose(data["rows"]["scores"][1], means, rtol=1e-4)
    with pytest.raises(ValueError, match="projections of this sweep's texts"):
        explorer_data(SweepResult(frame.assign(text="other")), along)


def test_rows_without_projections_are_plain() -> None:
    frame = table(vectors=("v", "random-0"), layers=(8,), samples=1)
    data = explorer_data(SweepResult(frame), tokens(frame[frame["vector"] == "v"]))
    for vector, values in zip(data["rows"]["vector"], data["rows"]["projections"], strict=True):
        assert (values is None) == (vector == 1)
    assert data["conditions"]["1,0"]["shade"] is None
    assert explorer_data(SweepResult(frame))["rows"]["projections"] is None


# A run folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    torch.manual_seed(0)
    vector = sk.SteeringVector({layer: torch.randn(32) for layer in (1, 2)})
    prompts = ["Hello", [{"role": "user", "content": "caf\u00e9?"}]]
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    settings = {"coefficients": [0, 1], "layers": [1, (1, 2)], "max_new_tokens": 6, "out": folder}
    sweep(model, tokenizer, {"v": vector, "a/b": vector * 2}, prompts, **settings)
    return model, tokenizer, folder


def test_a_run_folder_keeps_its_vectors(run: Any) -> None:
    kept = swept_vectors(run[2])
    assert list(kept) == ["v", "a/b"]
    torch.testing.assert_close(kept["a/b"].layers[2], 2 * kept["v"].layers[2])


def test_projections_of_a_sweep_are_the_unsteered_streams_along_each_rows_vector(run: Any) -> None:
    model, tokenizer, folder = run
    result, vectors = SweepResult.load(folder), swept_vectors(folder)
    with sk.Steering(vectors["v"].at(1), 5.0, "all").on(model):  # sleeps meanwhile
        found = sweep_projections(model, tokenizer, result.table, vectors)
    assert result.table["text"].nunique() > 2
    for row in result.table.itertuples():
        mine = found[(found[KEYS] == [getattr(row, key) for key in KEYS]).all(axis=1)]
        before = tokenizer(row.prompt, add_special_tokens=False)["input_ids"]
        ids = list(row.ids)
        layer = int(str(row.layer)[-1])
        with torch.no_grad():
            states = model(torch.tensor([before + ids]), output_hidden_states=True).hidden_states
        direction = vectors[row.vector].layers[layer] / vectors[row.vector].layers[layer].norm()
        along = states[layer + 1][0, len(before) :] @ direction
        np.testing.assert_allclose(mine["projection"], along, rtol=1e-4, atol=1e-5)
        assert list(mine["token_id"]) == ids and list(mine["position"]) == list(range(len(ids)))
    with pytest.raises(ValueError, match="a vector for each name"):
        sweep_projections(model, tokenizer, result.table, {"v": vectors["v"]})


def test_tokens_are_cut_where_they_end_in_the_text(run: Any) -> None:
    model, tokenizer, folder = run
    rows = SweepResult.load(folder).table.iloc[:1]
    rows = rows.assign(text=EMOJI, ids=[tuple(tokenizer(EMOJI, add_special_tokens=False)["input_ids"])])
    found = sweep_projections(model, tokenizer, rows, swept_vectors(folder))
    assert len(found) == len(EMOJI.encode())  # a token per byte
    cut = [EMOJI[a:b] for a, b in zip(found["start"], found["stop"], strict=True)]
    assert "".join(cut) == EMOJI and max(map(len, cut)) == 1
    ends = [len(EMOJI[: k + 1].encode()) - 1 for k in range(len(EMOJI))]
    assert [k for k, part in enumerate(cut) if part] == ends  # a character belongs to the last of its bytes


def test_the_page_of_a_run_has_the_scores_and_keeps_the_projections(run: Any, tmp_path: Path) -> None:
    model, tokenizer, folder = run
    page = report_run(folder)
    assert page == folder / "report.html" and data_of(page)["scores"] == ["n_tokens"]
    assert data_of(page)["rows"]["projections"] is None and "steerkit report RUN --checkpoint" in page.read_text()
    SweepResult.load(folder).score("distance").save(folder / "scored.parquet")
    page = report_run(folder, tmp_path / "with.html", (model, tokenizer))
    shaded = data_of(page)
    assert shaded["scores"] == ["distance", "projection", "n_tokens"]
    assert all(values is not None for values in shaded["rows"]["projections"])
    assert data_of(report_run(folder)) == shaded
    assert read_table(folder / "projections.parquet")[1]["kind"] == "projections"
    with pytest.raises(ValueError, match="the sweep's own model"):
        report_run(folder, None, (tiny_model(seed=1), tokenizer))
    with pytest.raises(FileNotFoundError, match="expected a finished sweep"):
        report_run(tmp_path)
    for file in (folder / "vectors").iterdir():
        file.rename(tmp_path / file.name)
    with pytest.raises(FileNotFoundError, match="Repeat the same sweep"):
        report_run(folder, None, (model, tokenizer))
    for file in tmp_path.glob("*.safetensors"):
        file.rename(folder / "vectors" / file.name)


@pytest.mark.parametrize("shaded", [False, True])
def test_two_thousand_rows_of_eighty_tokens_stay_under_five_megabytes(tmp_path: Path, shaded: bool) -> None:
    generator = np.random.default_rng(0)
    words = ["word", "longer", "a", "sentence", "of", "tokens", "caf\u00e9"]

    def text(*_: Any) -> str:
        return " ".join(generator.choice(words, 80))

    frame = table(
        vectors=("a", "b"), layers=(1, 2, 3), coefficients=tuple(range(-4, 5)), prompts=38, samples=1, text=text
    )
    assert len(frame) > 2000 and frame["text"].nunique() > 1800
    along = tokens(frame, width=4) if shaded else None
    assert along is None or len(along) > 80 * len(frame)
    write_report(tmp_path / "page.html", title="Large", sweep=SweepResult(frame), projections=along)
    assert (tmp_path / "page.html").stat().st_size < 5e6


def test_a_single_control_has_a_line_without_a_band_and_all_zeros_are_numbers() -> None:
    frame = table(vectors=("v", "random-0"), layers=(8,), samples=1)
    role = frame["vector"].map({"v": "vector", "random-0": "random"})
    data = explorer_data(SweepResult(frame.assign(role=role, control_of=None, zeros=0.0)))
    (lines,) = [one["lines"] for one in data["series"] if one["name"] == "random"]
    assert all(low is None and high is None for line in lines if line for _, _, low, high, _ in line["points"])
    assert data["scores"].index("zeros") not in data["yes_no"]
