"""Sweeps that grow: what exists is not computed again, what is missing is, and nothing else may change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import steerkit as sk
from steerkit.io.json import read_json, write_json
from steerkit.io.rows import read_rows
from steerkit.io.run_folder import ConfigurationChanged
from steerkit.show.report import report_run
from steerkit.sweeps.result import SweepResult
from steerkit.sweeps.store import swept_vectors
from tests.serving.fake import Fake
from tests.steering.test_steering import vector
from tests.sweep_tables import data_of
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = [{"id": "a", "prompt": "Hello"}, {"id": "b", "prompt": "A longer one"}]
GRID: dict[str, Any] = {"coefficients": [-0.3, 0.3], "layers": [1], "samples": 2}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return tiny_model(), tiny_tokenizer()


def vectors(model: Any, *names: str) -> dict[str, sk.SteeringVector]:
    every = {"v": vector(model, 1, 2), "r": sk.random_like(vector(model, 1, 2), seed=1)}
    return {name: every[name] for name in names}


def run(loaded: tuple[Any, Any], out: Path | None, **changed: Any) -> pd.DataFrame:
    options = {"vectors": vectors(loaded[0], "v"), "prompts": PROMPTS, "max_new_tokens": 4, **GRID, **changed}
    return sk.sweep(*loaded, options.pop("vectors"), options.pop("prompts"), out=out, **options).table


GROWTH: dict[str, tuple[Mapping[str, Any], int]] = {
    "further coefficients": ({"coefficients": [-0.3, 0.1, 0.3, 0.5]}, 2 * 2 * 2),
    "further layers": ({"layers": [1, 2, (1, 2)]}, 2 * 2 * 2 * 2),
    "further prompts": ({"prompts": [{"id": "c", "prompt": "new"}, *PROMPTS]}, 3 * 2),
    "further samples": ({"samples": 3}, 2 * 3),
    "a reference": ({"prompts": [{**row, "reference": "x"} for row in PROMPTS]}, 0),
}


@pytest.mark.parametrize("name", GROWTH)
def test_a_grown_sweep_computes_what_is_missing_and_equals_one_from_the_start(loaded, name: str, tmp_path) -> None:
    changed, count = GROWTH[name]
    run(loaded, tmp_path)
    before = (tmp_path / "rows.jsonl").read_bytes()
    grown = run(loaded, tmp_path, **changed)
    after = (tmp_path / "rows.jsonl").read_bytes()
    assert after.startswith(before) and len(after[len(before) :].splitlines()) == count
    dose = "relative_dose"  # of the norms that were measured first
    pd.testing.assert_frame_equal(grown.drop(columns=dose), run(loaded, None, **changed).drop(columns=dose))
    assert sk.SweepResult.load(tmp_path).table.astype(str).equals(grown.astype(str))


def test_vectors_are_known_by_content_so_a_new_name_costs_nothing_and_a_new_vector_its_rows(loaded, tmp_path) -> None:
    model, _ = loaded
    run(loaded, tmp_path)
    v = vector(model, 1, 2)
    renamed = run(loaded, tmp_path, vectors={"mood": v.at(1)})
    assert len(read_rows(tmp_path / "rows.jsonl")) == 2 * 3 * 2
    assert set(renamed["vector"]) == {"mood"}
    both = run(loaded, tmp_path, vectors={"v": v, **vectors(model, "r"), "twice": v * 2})
    assert len(read_rows(tmp_path / "rows.jsonl")) == 2 * 7 * 2
    assert set(swept_vectors(tmp_path)) == set(both["vector"]) == {"v", "r", "twice"}


def test_a_grown_sweep_keeps_the_norms_that_were_measured_first(loaded, tmp_path) -> None:
    first = run(loaded, tmp_path)
    grown = run(loaded, tmp_path, prompts=[*PROMPTS, {"id": "c", "prompt": "other words"}], coefficients=[0.3])
    doses = [table.query("coefficient == 0.3")["relative_dose"].unique().tolist() for table in (first, grown)]
    assert doses[0] == doses[1] and len(doses[0]) == 1


CHANGES: dict[str, tuple[Mapping[str, Any], str]] = {
    "positions": ({"positions": "all"}, r'positions: "from_last_prompt_token" -> "all"'),
    "length": ({"max_new_tokens": 5}, "max_new_tokens: 4 -> 5"),
    "operation": ({"operation": "ablate"}, 'operation: "add" -> "ablate"'),
    "seed": ({"seed": 1}, "seed: 0 -> 1"),
    "greedy": ({"samples": 1}, r"temperature: 0.7 -> 0.0"),
    "choices": ({"choices": ["a"], "samples": 1}, 'rows: "generated texts" -> "choices"'),
    "a prompt": ({"prompts": [PROMPTS[0], {"id": "b", "prompt": "B"}]}, r"other prompts for 1: \['b'\]"),
    "chat messages": (
        {"prompts": [{"id": "a", "prompt": [{"role": "user", "content": "Hello"}]}]}, r"other prompts for 1: \['a'\]"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_another_setting_or_prompt_is_refused_by_name_and_nothing_is_written(loaded, name: str, tmp_path) -> None:
    changed, message = CHANGES[name]
    run(loaded, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigurationChanged, match=message):
        run(loaded, tmp_path, **changed)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_another_model_or_template_is_refused(loaded, tmp_path) -> None:
    run(loaded, tmp_path)
    with pytest.raises(ConfigurationChanged, match="model_fingerprint"):
        run((tiny_model(seed=1), loaded[1]), tmp_path)
    other = tiny_tokenizer()
    other.chat_template = other.chat_template.replace("<|end|>", "<|end|> ")
    with pytest.raises(ConfigurationChanged, match="template_sha256"):
        run((loaded[0], other), tmp_path)


def test_a_folder_of_an_earlier_version_is_refused_and_so_is_one_where_position_0_was_ablated(loaded, tmp_path) -> None:
    ablate = {"operation": "ablate", "positions": "all"}
    run(loaded, tmp_path, **ablate)
    config = read_json(tmp_path / "config.json")
    assert config["steers_position_0"] is False
    write_json(tmp_path / "config.json", {**config, "steers_position_0": True})
    with pytest.raises(ConfigurationChanged, match="steers_position_0: true -> false"):
        run(loaded, tmp_path, **ablate)
    old = {key: value for key, value in config.items() if key not in ("rows", "steers_position_0")}
    write_json(tmp_path / "config.json", {**old, "vectors": {"v": "x"}, "cells": []})
    with pytest.raises(ConfigurationChanged, match=r"an earlier version.*`ablate` at positions `prompt` and `all`"):
        run(loaded, tmp_path, **ablate)


def test_a_grown_sweep_that_was_interrupted_goes_on(loaded, tmp_path, monkeypatch) -> None:
    from steerkit.sweeps import store

    run(loaded, tmp_path)
    append, calls = store.append_rows, []

    def cut(path: Path, rows: Any) -> None:
        calls.append(path.name)
        if calls.count("rows.jsonl") == 2:
            with path.open("ab") as file:
                file.write(json.dumps(next(iter(rows))).encode()[:-9])  # a torn line
            raise KeyboardInterrupt
        append(path, rows)

    more = {"prompts": [*PROMPTS, {"id": "c", "prompt": "new"}], "coefficients": [-0.3, 0.3, 0.5], "batch_rows": 2}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(store, "append_rows", cut)
        run(loaded, tmp_path, **more)
    with (tmp_path / "prompts.jsonl").open("ab") as file:
        file.write(b'{"id": "d", "te')
    found = run(loaded, tmp_path, **more).drop(columns="relative_dose")
    pd.testing.assert_frame_equal(found, run(loaded, None, **more).drop(columns="relative_dose"))
    keys = [str(row["key"]) for row in read_rows(tmp_path / "rows.jsonl")]
    assert len(keys) == len(set(keys)) == 3 * 4 * 2


def test_merge_joins_different_rows_and_refuses_duplicates(loaded) -> None:
    one, two = (
        sk.sweep(*loaded, vectors(loaded[0], "v"), PROMPTS, layers=layer, coefficients=[1], max_new_tokens=2)
        for layer in (1, 2)
    )
    both = sk.SweepResult.merge([one, two])
    assert len(both.table) == len(one.table) + len(two.table) and both.meta["model_fingerprint"]
    with pytest.raises(ValueError, match=r"got 4 rows twice, e.g. \[\{'vector': 'v', 'layer': 1"):
        sk.SweepResult.merge([one, one])


KINDS: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "texts": ({"coefficients": [0.3]}, {"coefficients": [-0.3, 0.3], "layers": [1, (1, 2)]}),
    "doses": ({"doses": [0.4]}, {"doses": [-0.4, 0.4], "layers": [1, 2]}),
    "choices": (
        {"coefficients": [0.3], "choices": [" (A)", " (B)"]},
        {"coefficients": [0.3, 0.5], "choices": [" (B)", " (C)", " (A)"]},
    ),
}


@pytest.mark.parametrize("through", ["this process", "an engine"])
@pytest.mark.parametrize("kind", KINDS)
def test_report_and_scores_after_growth_have_every_row_and_keep_what_was_scored(
    loaded, kind, through, tmp_path
) -> None:
    model, tokenizer = loaded
    out, scored = tmp_path / "run", tmp_path / "run" / "scored.parquet"
    first, more = KINDS[kind]
    engine = Fake(model, tokenizer, tmp_path / "vectors") if through == "an engine" else None
    prompts = [*PROMPTS, {"id": "c", "prompt": "new"}]

    def swept(prompts: Any, folder: Path | None = out, **options: Any) -> sk.SweepResult:
        given = {"layers": 1, **({} if kind == "choices" else {"max_new_tokens": 4}), **options}
        own = None if engine is not None else model
        return sk.sweep(own, tokenizer, vectors(model, "v"), prompts, out=folder, engine=engine, **given)

    small = swept(PROMPTS, **first).score(lambda row: float(len(row["text"])), column="length")
    small.save(scored)
    page = report_run(out, loaded=loaded)
    assert "have no" not in page.read_text()
    calls = 0 if engine is None else engine.requests
    grown = swept(prompts, **more)
    rows = len(read_rows(out / "rows.jsonl"))
    if engine is not None:  # one request per new row: none for those that were there, nor for norms
        assert engine.requests - calls == rows - len(small.table)
    alone = swept(prompts, folder=None, **more, stream_norms=grown.meta["stream_norms"])
    pd.testing.assert_frame_equal(grown.table, alone.table)

    text, data = report_run(out).read_text(), data_of(page)
    there = SweepResult.load(out).with_scores_of(scored).table
    new = int(there["length"].isna().sum())
    assert len(data["rows"]["text"]) == len(grown.table) and new == len(grown.table) - len(small.table)
    assert f"{new} of {len(there)} rows have no length." in text
    assert f"The tokens of {new} of {len(there)} rows are not shaded." in text
    assert [one is None for one in data["rows"]["projections"]] == there["length"].isna().tolist()
    known = there[there["length"].notna()]
    assert known["length"].tolist() == [float(len(text)) for text in known["text"]] and len(known) == len(small.table)

    there = SweepResult.load(out).with_scores_of(scored).score(lambda row: float(len(row["text"])), column="length")
    there.save(scored)
    page = report_run(out, loaded=loaded)
    assert "have no" not in page.read_text() and "not shaded" not in page.read_text()
    ids = grown.table["ids"].map(len).tolist()
    assert [len(one) for one in data_of(page)["rows"]["projections"]] == ids
