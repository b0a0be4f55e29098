"""One seed, one table: whatever the batch size, the order of the rows, or how often the run was interrupted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import steerkit as sk
from steerkit.generation import batches
from steerkit.io.rows import append_rows
from steerkit.sweeps import store
from steerkit.sweeps.result import KEYS, SweepResult
from steerkit.sweeps.sweep import sweep
from tests.steering.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [
    {"id": "a", "prompt": "Hello", "reference": "Hello you", "group": "g"},
    {"id": "b", "prompt": "A longer one", "reference": "x = 1", "group": "g"},
    {"id": "c", "prompt": [{"role": "user", "content": "hi"}], "reference": "hi"},
    {"id": "d", "prompt": "A longer one", "reference": "x = 2"},  # the same prompt: its samples are its own
]
OPTIONS: dict[str, Any] = {
    "coefficients": [-0.3, 0, 0.3],
    "layers": [2],
    "max_new_tokens": 8,
    "positions": "from_last_prompt_token",
    "samples": 2,
    "seed": 1,
}


class Setting:
    """A model and its vectors; one sweep of them, scored, as a table sorted by its keys."""

    def __init__(self, kind: str) -> None:
        self.model, self.tokenizer = tiny_model(kind), tiny_tokenizer()
        first = vector(self.model, 1, 2)
        self.vectors = {"v": first, "random": sk.random_like(first, seed=1)}
        self.whole = self.table(ROWS)

    def run(self, rows: Sequence[Mapping[str, Any]], **more: Any) -> SweepResult:
        return sweep(self.model, self.tokenizer, self.vectors, rows, **{**OPTIONS, **more})

    def table(self, rows: Sequence[Mapping[str, Any]], **more: Any) -> pd.DataFrame:
        return self.scored(self.run(rows, **more))

    def scored(self, result: SweepResult) -> pd.DataFrame:
        read = {"model": self.model, "tokenizer": self.tokenizer}
        result = result.score("rouge_l").score("distance").score("repeated_4grams")
        result = result.score("perplexity", **read).score("kl", vectors=self.vectors, **read)
        return result.table.sort_values(KEYS, ignore_index=True)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def setting(request: pytest.FixtureRequest) -> Setting:
    return Setting(request.param)


def assert_same(found: pd.DataFrame, whole: pd.DataFrame) -> None:
    """Equal texts and labels, and numbers within 1e-4."""
    assert list(found) == list(whole)
    for column in whole:
        if pd.api.types.is_float_dtype(whole[column]):
            np.testing.assert_allclose(found[column], whole[column], rtol=1e-4, atol=1e-4, err_msg=column)
        else:
            assert found[column].tolist() == whole[column].tolist(), column


@pytest.mark.parametrize("size", [1, 3, 8, 64])
def test_a_table_does_not_depend_on_the_batch_size(setting: Setting, size: int, monkeypatch) -> None:
    row = 4 * 260 * OPTIONS["max_new_tokens"] * 2
    monkeypatch.setitem(batches.LOGIT_BYTES, "cpu", size * row)  # as many rows at a time are scored
    assert_same(setting.table(ROWS, batch_rows=size), setting.whole)


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)])
def test_a_table_does_not_depend_on_the_order_of_the_prompts(setting: Setting, order: tuple[int, ...]) -> None:
    assert_same(setting.table([ROWS[place] for place in order], batch_rows=5), setting.whole)


def test_a_row_does_not_depend_on_which_others_there_are(setting: Setting) -> None:
    for row in ROWS:
        mine = setting.whole[setting.whole["prompt_id"] == row["id"]].reset_index(drop=True)
        norms = {2: 1.0}  # those of the sweep's own texts do depend on which there are
        alone = setting.table([row], stream_norms=norms).drop(columns="relative_dose")
        mine = mine.drop(columns=["relative_dose", *({"messages"} - set(alone))])  # a column of sweeps with a chat
        assert_same(alone[list(mine)], mine)


class Stopped(Exception):
    """The run is over in its midst."""


@pytest.mark.parametrize("appends", [[0], [1], [3, 2], [1, 1, 1, 1]])
def test_a_run_that_was_interrupted_gives_the_table_of_one_that_was_not(
    setting: Setting, appends: list[int], tmp_path: Path, monkeypatch
) -> None:
    append = append_rows
    for number, allowed in enumerate(appends):
        done: list[int] = []

        def cut(path: Path, rows: Any, done: list[int] = done, allowed: int = allowed) -> None:
            if len(done) == allowed:
                raise Stopped
            append(path, rows)
            done.append(1)

        with monkeypatch.context() as patched, pytest.raises(Stopped):
            patched.setattr(store, "append_rows", cut)
            setting.run(ROWS, out=tmp_path / "run", batch_rows=7)
        rows = tmp_path / "run" / "rows.jsonl"
        if rows.exists():
            with rows.open("ab") as file:
                file.write(b'{"key": ["v", "1", 0.3, "a", 0], "text": "tor')
        assert not (tmp_path / "run" / "table.parquet").exists(), number
    finished = setting.run(ROWS, out=tmp_path / "run", batch_rows=3)
    assert_same(setting.scored(finished), setting.whole)
    again = setting.run(ROWS, out=tmp_path / "run")  # all there: nothing is generated
    assert again.table.equals(finished.table)
    assert_same(setting.scored(SweepResult.load(tmp_path / "run")), setting.whole)


def test_another_seed_gives_other_texts_and_greedy_ones_have_none(setting: Setting) -> None:
    other = setting.run(ROWS, seed=2).table.sort_values(KEYS, ignore_index=True)
    assert (other["text"] != setting.whole["text"]).mean() > 0.5
    greedy = [setting.run(ROWS, seed=seed, samples=1).table for seed in (1, 2)]
    assert greedy[0]["text"].equals(greedy[1]["text"])
    twins = setting.whole[setting.whole["prompt_id"].isin(["b", "d"])]
    assert twins.groupby(["vector", "layer", "coefficient", "sample"])["text"].nunique().eq(2).any()
