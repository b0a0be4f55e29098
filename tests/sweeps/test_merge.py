"""Merged sweeps: only rows that belong into one mean, and the scores of a sweep that has grown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import steerkit as sk
from steerkit.show.report import write_report
from steerkit.sweeps.result import FewWarning
from steerkit.vectors.controls import with_role
from tests.steering.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = [{"id": "a", "prompt": "Hello"}, {"id": "b", "prompt": "A longer one"}]
MODEL, TOKENIZER = tiny_model(), tiny_tokenizer()
V, W = vector(MODEL, 1, 2), vector(MODEL, 1, 2, seed=9)


def swept(**changed: Any) -> sk.SweepResult:
    given = {"vectors": {"v": V}, "prompts": PROMPTS, "layers": 1, "max_new_tokens": 3, **changed}
    if not {"coefficients", "doses"} & set(given):
        given["coefficients"] = [1]
    return sk.sweep(MODEL, TOKENIZER, given.pop("vectors"), given.pop("prompts"), **given)


def steered(result: sk.SweepResult) -> sk.SweepResult:
    return result.where(result.table["coefficient"] != 0)


def choice(result: sk.SweepResult, text: str) -> sk.SweepResult:
    return result.where(result.table["choice"] == text)


REFUSED: dict[str, tuple[Mapping[str, Any], str]] = {
    "another vector of the same name": ({"vectors": {"v": W}}, "expected one vector under each name; got two"),
    "the same vector at one of its layers": ({"vectors": {"v": V.at(1)}}, "expected one vector under each name"),
    "another reference of the same prompt": (
        {"prompts": [{**PROMPTS[1], "reference": "x"}]},
        r"expected one reference per prompt id; got several for \['b'\]",
    ),
    "a control of another vector": (
        {"vectors": {"v": V, "w": W, "x": with_role(W, "random", of="w")}, "layers": 2},
        r"expected one role of a vector, and one vector of a control; got several for \['x'\]",
    ),
    "another prompt of the same id": (
        {"prompts": [{"id": "b", "prompt": "B"}]}, r"expected one prompt per prompt id; got several for \['b'\]"
    ),
    "a prompt in another group": (
        {"prompts": [{**PROMPTS[1], "group": "x"}]}, r"expected one group per prompt id; got several for \['b'\]"
    ),
    "other positions": ({"positions": "all"}, r"expected one value of positions .* got several for \['v'\]"),
    "another operation": ({"operation": "ablate"}, r"expected one value of operation .* got several for \['v'\]"),
    "another site": ({"site": "resid_pre"}, r"expected one value of site .* got several for \['v'\]"),
    "other positions of a control": (
        {"vectors": sk.controls.random({"v": V}, n=1), "positions": "all"}, "expected one value of positions"
    ),
    "another length": ({"max_new_tokens": 4}, r'equal settings; got {"max_new_tokens":\[3,4\]}'),
    "another seed": ({"seed": 1}, r'equal settings; got {"seed":\[0,1\]}'),
    "another temperature": ({"temperature": 1.0}, "equal settings; got .*temperature"),
    "arguments of the template": ({"chat_template_kwargs": {"x": 1}}, "equal settings; got .*chat_template_kwargs"),
    "doses": ({"coefficients": None, "doses": [0.4]}, "expected sweeps that all have doses or all have none"),
    "choices": ({"choices": ["a", "b"]}, "expected sweeps that all have doses or all have none, and the same of"),
}  # fmt: skip
FIRST: dict[str, Mapping[str, Any]] = {
    "another reference of the same prompt": {"prompts": [{**PROMPTS[1], "reference": "y"}]},
    "a control of another vector": {"vectors": {"v": V, "x": with_role(W, "random", of="v")}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_belong_to_other_means_are_refused(name: str) -> None:
    changed, message = REFUSED[name]
    other = steered(swept(**{"coefficients": [2], "layers": 1 if name.startswith("the same") else [1, 2], **changed}))
    first = swept(**FIRST.get(name, {}))
    with pytest.raises(ValueError, match=message):
        sk.SweepResult.merge([first, other])


def test_another_template_is_refused() -> None:
    other = tiny_tokenizer()
    other.chat_template = other.chat_template.replace("<|end|>", "<|end|> ")
    two = sk.sweep(MODEL, other, {"w": W}, PROMPTS, layers=1, coefficients=[1], max_new_tokens=3)
    with pytest.raises(ValueError, match=r"equal settings; got .*template_sha256"):
        sk.SweepResult.merge([swept(), two])


def test_vectors_of_other_positions_and_sites_are_merged_and_scored_by_kl() -> None:
    parts = [swept(), swept(vectors={"w": W}, positions="all"), swept(vectors={"x": W}, site="resid_pre")]
    merged = sk.SweepResult.merge(parts)
    named = {"v": V, "w": W, "x": W}
    options = {"model": MODEL, "tokenizer": TOKENIZER, "vectors": named}
    wanted = np.concatenate([one.score("kl", **options).table["kl"] for one in parts])
    np.testing.assert_allclose(merged.score("kl", **options).table["kl"], wanted, rtol=1e-5, atol=1e-9)
    with pytest.raises(ValueError, match=r"expected the vectors that the sweep was run with; got others as \['v'\]"):
        merged.score("kl", **{**options, "vectors": {**named, "v": W}})


def test_a_choice_is_known_by_its_text_not_by_its_index() -> None:
    forth, back = swept(choices=["A", "B"]), swept(choices=["B", "A"])
    for text in "AB":
        with pytest.raises(ValueError, match="got 4 rows twice, .*'choice': '" + text):
            sk.SweepResult.merge([choice(forth, text), choice(back, text)])
    other = swept(vectors={"w": W}, choices=["B", "A"])
    merged = sk.SweepResult.merge([forth, other]).table
    assert merged.groupby("choice")["sample"].unique().map(list).to_dict() == {"A": [0], "B": [1]}
    assert merged["probability"].tolist() == [*forth.table["probability"], *other.table["probability"]]


def test_probabilities_of_merged_choices_are_among_all_choices_of_a_prompt() -> None:
    parts = [swept(choices=["A", "B"]), swept(choices=["C", "D"])]
    merged, whole = sk.SweepResult.merge(parts), swept(choices=["A", "B", "C", "D"])
    keys = ["coefficient", "prompt_id", "choice"]
    found, wanted = (one.table.set_index(keys).sort_index() for one in (merged, whole))
    np.testing.assert_allclose(found["probability"], wanted["probability"], rtol=1e-4)
    assert found["sample"].equals(wanted["sample"])
    assert merged.counts() == whole.counts()
    with pytest.raises(ValueError, match=r"Merge the sweeps first, then select with where\(\)"):
        sk.SweepResult.merge([choice(parts[0], "A"), parts[1]])
    with pytest.raises(ValueError, match=r"expected the same choices of a prompt .* got others for \['a', 'b'\]"):
        sk.SweepResult.merge([parts[0], steered(parts[1])])


def test_doses_are_merged_where_they_are_of_the_same_norms_and_a_dose_is_known_by_itself() -> None:
    norms = {1: 5.0, 2: 6.0}
    one = swept(coefficients=None, doses=[0.4], stream_norms=norms)
    two = swept(coefficients=None, doses=[0.2], stream_norms=norms)
    merged = sk.SweepResult.merge([one, steered(two)])
    assert merged.meta["stream_norms"] == norms
    with pytest.warns(FewWarning):
        gain = merged.score("distinct_2").gain("distinct_2")
    assert gain["dose"].tolist() == [0.4, 0.2]
    other = swept(coefficients=None, doses=[0.2, 0.4], stream_norms={1: 5.5, 2: 6.0})
    with pytest.raises(ValueError, match="expected sweeps whose doses are of the same stream_norms"):
        sk.SweepResult.merge([one, steered(other)])
    with pytest.raises(ValueError, match=r"got 2 rows twice, .*'dose': 0.4"):
        sk.SweepResult.merge([one, steered(one)])


def test_loaded_and_new_sweeps_are_merged_and_have_norms_by_layer(tmp_path) -> None:
    swept(out=tmp_path / "one")
    loaded = sk.SweepResult.load(tmp_path / "one")
    merged = sk.SweepResult.merge([loaded, steered(swept(coefficients=[2]))])
    assert set(merged.meta["stream_norms"]) == {0, 1, 2, 3} and merged.meta["vectors"] == {"v": V.content()}
    elsewhere = swept(vectors={"w": W}, positions="all")
    sk.SweepResult.merge([merged, elsewhere]).save(tmp_path / "merged.parquet")
    norms = sk.SweepResult.load(tmp_path / "merged.parquet").meta["stream_norms"]
    assert norms == [merged.meta["stream_norms"], elsewhere.meta["stream_norms"]]
    with sk.Steering(V, dose=0.1, layer=1).on(MODEL, norms=loaded.meta["stream_norms"]):
        assert sk.generate(MODEL, TOKENIZER, ["Hello"], max_new_tokens=2)


def test_judges_of_merged_sweeps_are_added_and_two_judges_of_one_column_are_refused() -> None:
    glad, none = sk.judge(rule=lambda text: "85"), sk.judge(rule=lambda text: "none")
    one = swept().score(glad)
    two = steered(swept(coefficients=[3]))
    merged = sk.SweepResult.merge([one, two.score(glad)])
    counts = [one.meta["judges"]["judge"]["n_texts"], two.score(glad).meta["judges"]["judge"]["n_texts"]]
    assert merged.meta["judges"]["judge"] == {**one.meta["judges"]["judge"], "n_texts": sum(counts)}
    with pytest.warns(UserWarning, match="answers without one"):
        judged = merged.score(none, column="second")
    assert judged.meta["judges"]["second"]["n_unread"] == sum(counts)
    assert judged.meta["judges"]["judge"]["n_unread"] == 0
    stricter = sk.judge(rule=lambda text: "1", scale=(0, 5))
    with pytest.raises(ValueError, match="expected one judge per column; got two for 'judge'"):
        sk.SweepResult.merge([one, two.score(stricter)])


def test_scores_of_rows_that_were_there_are_kept_and_new_rows_have_none(tmp_path) -> None:
    scored = tmp_path / "scored.parquet"
    first = swept(out=tmp_path)
    assert first.with_scores_of(scored) is first
    judge = sk.judge(rule=lambda text: str(len(text)))
    once = first.score(judge, column="length").score("distinct_2")
    once.save(scored)
    assert first.with_scores_of(scored).table["length"].equals(once.table["length"])
    grown = swept(coefficients=[1, 2], layers=[1, (1, 2)], out=tmp_path)
    kept = grown.with_scores_of(scored)
    known = once.table.set_index(["layer", "coefficient", "prompt_id"])["length"]
    for row in kept.table.itertuples():
        wanted = known.get((row.layer, row.coefficient, row.prompt_id), np.nan)
        assert np.array_equal(row.length, wanted, equal_nan=True)
    assert kept.table[list(grown.table)].equals(grown.table) and kept.meta["judges"] == once.meta["judges"]
    again = kept.score(judge, column="length").table["length"]
    assert again.notna().all() and kept.table["length"].notna().sum() == 4


@pytest.mark.parametrize("column", ["text", "reference", "topic"])
def test_a_row_whose_text_or_reference_has_changed_has_no_score(column: str, tmp_path: Path) -> None:
    rows = [{**row, "reference": "x", "topic": "sea"} for row in PROMPTS]
    result = swept(prompts=rows)
    changed = result.table[column].where(result.table["prompt_id"] == "a", "other")
    sk.SweepResult(result.table.assign(s=1.0, **{column: changed}), result.meta).save(tmp_path / "scored.parquet")
    found = result.with_scores_of(tmp_path / "scored.parquet").table
    assert found["s"].notna().equals(found["prompt_id"] == "a")


def test_scores_of_choices_are_kept_when_the_choices_are_ordered_otherwise(tmp_path) -> None:
    swept(choices=["A", "B"]).score(lambda row: float(row["text"] == "A"), column="is_a").save(tmp_path / "s.parquet")
    grown = swept(choices=["B", "C", "A"])
    found = grown.with_scores_of(tmp_path / "s.parquet").table.groupby("choice")["is_a"].unique()
    assert pd.Series(found.map(list)).to_dict()["A"] == [1.0] and found["B"] == [0.0] and np.isnan(found["C"])


def test_controls_that_were_swept_apart_are_those_of_their_own_vector() -> None:
    vectors = {"calm": V, "sad": 5 * W}
    controls = {**sk.controls.random({"calm": V}, n=2), **sk.controls.random({"sad": 5 * W}, n=3, seed=7)}
    whole = swept(vectors={**vectors, **controls})
    apart = sk.SweepResult.merge([swept(vectors=vectors), swept(vectors=controls)])
    for result in (whole, apart):
        assert [len(result.controls_of(name, "random")) for name in vectors] == [2, 3]
    assert apart.gains("n_tokens")["k"].tolist() == whole.gains("n_tokens")["k"].tolist()


def test_a_merged_sweep_merges_again_counts_its_prompts_and_has_a_report(tmp_path) -> None:
    chat = [{"id": "c", "prompt": [{"role": "user", "content": "Hi"}]}]
    one, two = swept(prompts=PROMPTS[:1], positions="all"), swept(vectors={"w": W}, prompts=PROMPTS[1:])
    three = swept(vectors={"x": V}, prompts=chat, layers=2)
    three = sk.SweepResult(three.table, {**three.meta, "checkpoint": "b", "device": "cuda", "versions": {"torch": "9"}})
    merged = sk.SweepResult.merge([sk.SweepResult.merge([one, two]), three])
    assert merged.meta["n_prompts"] == 3
    norms = [one.meta["stream_norms"], two.meta["stream_norms"]]
    assert norms[0] != norms[1] and merged.meta["stream_norms"] == [*norms, three.meta["stream_norms"]]
    write_report(tmp_path / "merged.html", title="t", sweep=merged)
    page = (tmp_path / "merged.html").read_text()
    assert "torch 9" in page and "on cpu and cuda" in page and "['" not in page.partition("<script")[0]


def test_a_vector_that_replaced_another_of_its_name_has_no_score_of_it(tmp_path) -> None:
    swept().score("kl", model=MODEL, tokenizer=TOKENIZER, vectors={"v": V}).save(tmp_path / "scored.parquet")
    same, other = swept(), swept(vectors={"v": 1.001 * V})
    assert same.table["text"].equals(other.table["text"])
    assert same.with_scores_of(tmp_path / "scored.parquet").table["kl"].notna().all()
    assert "kl" not in other.with_scores_of(tmp_path / "scored.parquet").table
    assert other.added_since(tmp_path / "scored.parquet").all()


@pytest.mark.parametrize("column", ["role", "dose", "n_tokens", "log_prob", "group", "text"])
def test_a_score_takes_the_name_of_no_column_of_a_sweep(column: str) -> None:
    with pytest.raises(ValueError, match="expected a name for the score that no column of a sweep has"):
        swept().score(lambda row: 1.0, column=column)
