"""Token ids in a sweep: what was generated is what is stored, scored, resumed and reported."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.utils.chat_template_utils as chat_templates

import steerkit as sk
from steerkit.generation.sampling import random_stream
from steerkit.io.run_folder import ConfigurationChanged
from steerkit.models.identity import tokenizer_sha256
from steerkit.scores.fluency import kl, perplexity
from steerkit.sweeps import store
from steerkit.sweeps.projections import sweep_projections
from steerkit.sweeps.result import PURE, SweepResult, ids_of
from steerkit.text.tokens import decode
from tests.reference import greedy
from tests.steering.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer

DATED = (
    "<|system|>Today is {{ strftime_now('%d %b %Y') }}<|end|>{% for m in messages %}<|{{ m['role'] }}|>"
    "{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
)


@pytest.fixture
def swept(tmp_path: Path) -> tuple[Any, Any, Any, SweepResult]:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = ["ab", "Two words", [{"role": "user", "content": "Hi"}]]
    model.generation_config.eos_token_id = [256, greedy(model, tokenizer("ab")["input_ids"], 3)[2]]
    push = vector(model, 1)
    result = sk.sweep(
        model, tokenizer, push, prompts, coefficients=[0.5, 2], max_new_tokens=8, out=tmp_path / "run", batch_rows=4
    )
    return model, tokenizer, push, result


def test_every_row_stores_what_the_model_read_and_wrote(swept, tmp_path: Path) -> None:
    model, tokenizer, push, result = swept
    ends = {256, *model.generation_config.eos_token_id}
    for row in result.table.itertuples():
        last = len(row.prompt_ids) - 1
        written = greedy(model, row.prompt_ids, 8, (), dict(push.layers), row.coefficient, first=last)
        assert list(row.ids) == written[: len(row.ids)] and not ends & {*row.ids[:-1]}
        assert len(row.ids) == 8 or row.ids[-1] in ends
        assert row.text == decode(tokenizer, [token for token in row.ids if token not in ends])
        assert row.n_tokens == len(row.ids) and row.finished == (row.ids[-1] in ends)
    assert result.table["finished"].any()
    stored = SweepResult.load(tmp_path / "run")
    assert ids_of(stored.table) == ids_of(result.table)
    lines = store.RowStore(tmp_path / "run").read().values()
    assert {(tuple(line["prompt_ids"]), tuple(line["ids"])) for line in lines} == set(
        zip(*ids_of(result.table), strict=True)
    )


def test_a_saved_table_keeps_the_ids_in_both_formats(swept, tmp_path: Path) -> None:
    *_, result = swept
    for name in ("t.csv", "t.parquet"):
        result.save(tmp_path / name)
        assert ids_of(SweepResult.load(tmp_path / name).table) == ids_of(result.table)


def test_perplexity_is_of_the_generated_ids_with_their_end(swept) -> None:
    model, tokenizer, _, result = swept
    scores = result.score("perplexity", model=model, tokenizer=tokenizer).table["perplexity"]
    for score, row in zip(scores, result.table.itertuples(), strict=True):
        ids = torch.tensor([[*row.prompt_ids, *row.ids]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1].double()
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids))
        assert score == pytest.approx(float(nll.exp()), rel=1e-4)


def test_projections_are_of_the_generated_ids(swept) -> None:
    model, tokenizer, push, result = swept
    tokens = sweep_projections(model, tokenizer, result.table, {"vector": push})
    parts = tokens.groupby(["layer", "coefficient", "prompt_id", "sample"])["token_id"].apply(tuple)
    for row in result.table.itertuples():
        assert parts[row.layer, row.coefficient, row.prompt_id, row.sample] == row.ids


def test_another_tokenizer_reads_the_text_and_says_so(swept) -> None:
    _, tokenizer, push, result = swept
    other = tiny_tokenizer()
    other.add_tokens(["<new>"])
    assert tokenizer_sha256(other) != tokenizer_sha256(tokenizer)
    larger = tiny_model()
    larger.resize_token_embeddings(len(other))
    plain = result.table[result.table["prompt_id"] != "2"].reset_index(drop=True)
    read = SweepResult(plain, result.meta)
    with pytest.warns(UserWarning, match="the tokenizer is not the sweep's: perplexity is of the decoded texts"):
        found = read.score("perplexity", model=larger, tokenizer=other).table["perplexity"]
    np.testing.assert_allclose(found, perplexity(larger, other, plain["prompt"].tolist(), plain["text"].tolist()))
    with pytest.raises(ValueError, match="own model and tokenizer for kl; got another tokenizer"):
        read.score("kl", model=larger, tokenizer=other, vectors=push)


def test_kl_of_another_model_is_refused(swept) -> None:
    _, tokenizer, push, result = swept
    with pytest.raises(ValueError, match="expected the sweep's own model"):
        result.score("kl", model=tiny_model(seed=1), tokenizer=tokenizer, vectors=push)


# Prompts that a template renders otherwise on another day


class Day(datetime.datetime):
    number = 1

    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return datetime.datetime(2026, 3, cls.number)


@pytest.fixture
def dated(monkeypatch) -> Any:
    monkeypatch.setattr(chat_templates, "datetime", Day)
    monkeypatch.setattr(Day, "number", 1)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = DATED
    return tokenizer


class Stopped(Exception):
    pass


def begin(model: Any, tokenizer: Any, prompts: Any, out: Path, monkeypatch) -> None:
    """A sweep that is interrupted after its first batch."""

    def append(self: Any, rows: Any, append: Any = store.RowStore.append) -> None:
        append(self, iter(list(rows)))
        raise Stopped

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(store.RowStore, "append", append)
        sk.sweep(model, tokenizer, vector(model, 1), prompts, coefficients=[1], max_new_tokens=4, out=out, batch_rows=2)


def test_a_sweep_that_goes_on_the_next_day_reads_the_first_days_prompts(dated, tmp_path: Path, monkeypatch) -> None:
    model = tiny_model()
    prompts = [{"id": str(i), "prompt": [{"role": "user", "content": f"q{i}"}]} for i in range(4)]
    options = {"coefficients": [1], "max_new_tokens": 4, "batch_rows": 2}
    whole = sk.sweep(model, dated, vector(model, 1), prompts, **options)
    begin(model, dated, prompts, tmp_path / "run", monkeypatch)
    Day.number = 2
    assert sk.render(dated, prompts[0]["prompt"]).text.startswith("<|system|>Today is 02 Mar 2026")
    with pytest.warns(UserWarning, match="4 prompts are rendered otherwise now"):
        result = sk.sweep(model, dated, vector(model, 1), prompts, **options, out=tmp_path / "run")
    assert result.table["prompt"].str.startswith("<|system|>Today is 01 Mar 2026").all()
    assert ids_of(result.table) == ids_of(whole.table)
    assert result.table["text"].tolist() == whole.table["text"].tolist()


@pytest.mark.parametrize("change", ["message", "template"])
def test_changed_messages_or_a_changed_template_are_refused(change: str, dated, tmp_path: Path, monkeypatch) -> None:
    model = tiny_model()
    prompts = [{"id": str(i), "prompt": [{"role": "user", "content": f"q{i}"}]} for i in range(4)]
    begin(model, dated, prompts, tmp_path / "run", monkeypatch)
    if change == "message":
        prompts[0] = {"id": "0", "prompt": [{"role": "user", "content": "another"}]}
    else:
        dated.chat_template = DATED.replace("Today is", "Today:")
    with pytest.raises(
        ConfigurationChanged, match=r"other prompts for 1: \['0'\]" if change == "message" else "template_sha256"
    ):
        sk.sweep(
            model,
            dated,
            vector(model, 1),
            prompts,
            coefficients=[1],
            max_new_tokens=4,
            out=tmp_path / "run",
            batch_rows=2,
        )


def test_stored_prompts_that_were_changed_are_refused(dated, tmp_path: Path, monkeypatch) -> None:
    model = tiny_model()
    prompts = [{"id": str(i), "prompt": [{"role": "user", "content": f"q{i}"}]} for i in range(4)]
    begin(model, dated, prompts, tmp_path / "run", monkeypatch)
    file = tmp_path / "run" / store.PROMPTS
    file.write_text(file.read_text().replace("[257", "[258", 1).replace("[258", "[65", 1))
    with pytest.raises(ConfigurationChanged, match=r"other prompts for 1: \['0'\]"):
        sk.sweep(
            model,
            dated,
            vector(model, 1),
            prompts,
            coefficients=[1],
            max_new_tokens=4,
            out=tmp_path / "run",
            batch_rows=2,
        )


# Rows that overflow


@pytest.fixture
def overflowing() -> tuple[Any, Any, sk.SteeringVector]:
    model = tiny_model()
    huge = sk.SteeringVector({1: torch.full((32,), 3e38), 2: torch.full((32,), 3e38)})
    return model, tiny_tokenizer(), huge


@pytest.mark.parametrize("samples", [1, 2])
def test_a_row_that_overflows_is_nan_and_named_and_the_others_are_as_without_it(
    overflowing, samples: int, tmp_path: Path
) -> None:
    model, tokenizer, huge = overflowing
    vectors = {"huge": huge, "push": vector(model, 1, 2)}
    options = {"coefficients": [1], "max_new_tokens": 5, "samples": samples, "seed": 3, "layers": "all"}
    with pytest.warns(UserWarning, match="'huge' at layer all, coefficient 1"):
        result = sk.sweep(model, tokenizer, vectors, ["ab", "cd e"], **options)
    lost = result.table[result.table["text"].isna()]
    assert set(lost["vector"]) == {"huge"} and set(lost["coefficient"]) == {1.0} and len(lost) == 2 * samples
    assert lost["n_tokens"].isna().all() and not lost["finished"].any()
    alone = sk.sweep(model, tokenizer, {"push": vectors["push"]}, ["ab", "cd e"], **options).table
    kept = result.table[result.table["vector"] == "push"]
    assert kept["text"].tolist() == alone["text"].tolist()
    scored = result.score("perplexity", model=model, tokenizer=tokenizer)
    scored = scored.score(lambda row: len(row["text"]), column="length")
    assert scored.table.loc[lost.index, ["perplexity", "length"]].isna().all().all()
    assert scored.table.drop(lost.index)[["perplexity", "length"]].notna().all().all()
    gains = scored.gain("perplexity").set_index("vector")
    assert gains["n_missing"].to_dict() == {"huge": 2, "push": 0} and np.isnan(gains.loc["huge", "gain"])
    result.save(tmp_path / "saved.parquet")
    for swept in (result, SweepResult.load(tmp_path / "saved.parquet")):
        referenced = SweepResult(swept.table.assign(reference="ab c"), swept.meta)
        for name in PURE:
            values = referenced.score(name, column="one").table["one"]
            assert values[lost.index].isna().all(), name


def test_a_sweep_with_a_row_that_overflowed_is_resumed_without_generating_it_again(overflowing, tmp_path: Path) -> None:
    model, tokenizer, huge = overflowing
    options = {"coefficients": [1], "max_new_tokens": 5, "out": tmp_path / "run", "layers": "all"}
    with pytest.warns(UserWarning, match="overflowed"):
        first = sk.sweep(model, tokenizer, huge, ["ab"], **options)
        size = (tmp_path / "run" / "rows.jsonl").stat().st_size
        again = sk.sweep(model, tokenizer, huge, ["ab"], **options)
    assert (tmp_path / "run" / "rows.jsonl").stat().st_size == size
    assert again.table.equals(first.table)


def test_generate_names_the_prompts_whose_logits_overflow(overflowing) -> None:
    model, tokenizer, huge = overflowing
    steering = [None, sk.Steering(huge, layer="all")]
    with pytest.raises(ValueError, match=r"NaN or infinity for the prompts \[1\]"):
        sk.generate(model, tokenizer, ["ab", "ab"], max_new_tokens=3, steering=steering)


def test_a_score_of_logits_that_overflow_is_nan_and_said(overflowing) -> None:
    model, tokenizer, huge = overflowing
    steerings = [None, sk.Steering(huge, layer="all")]
    with pytest.warns(UserWarning, match=r"NaN or infinity in 1 of 2 rows, whose scores are NaN: \[1\]"):
        found = kl(model, tokenizer, ["a", "a"], ["bc", "bc"], steerings)
    assert found[0] == 0 and np.isnan(found[1])


# Seeds


def test_a_numpy_seed_draws_the_numbers_of_a_python_one(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    options = {"max_new_tokens": 6, "temperature": 1.0}
    texts = [sk.generate(model, tokenizer, ["ab"], seed=seed, **options) for seed in (3, np.int64(3), np.int32(3))]
    assert texts[0] == texts[1] == texts[2] != sk.generate(model, tokenizer, ["ab"], seed=4, **options)
    assert random_stream((np.int64(3), "a", (np.uint8(1),)), 4).tolist() == random_stream((3, "a", (1,)), 4).tolist()
    run = {"coefficients": [1], "max_new_tokens": 3, "out": tmp_path / "run", "temperature": 1.0}
    first = sk.sweep(model, tokenizer, vector(model, 1), ["ab"], seed=3, samples=2, **run)
    again = sk.sweep(model, tokenizer, vector(model, 1), ["ab"], seed=np.int64(3), samples=np.int64(2), **run)
    assert again.table.equals(first.table)


@pytest.mark.parametrize("seed", [1.0, "1", True, None])
def test_a_seed_that_is_no_integer_is_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match="expected an integer seed"):
        sk.generate(tiny_model(), tiny_tokenizer(), ["ab"], max_new_tokens=2, temperature=1.0, seed=seed)
