"""Sweeps, capture and clients of served models, with our own engine in the place of vLLM."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pandas as pd
import pytest
import torch

import steerkit as sk
from steerkit.serving.client import Server, ServerError
from steerkit.vectors.vector import SteeringVector
from tests.serving.fake import Fake, over_http
from tests.steering.test_steering import vector

PROMPTS = ["Hello", "A rather longer prompt than that", [{"role": "user", "content": "x = 1"}], "?"]
SAME = ["vector", "role", "layer", "coefficient", "prompt_id", "sample", "text", "n_tokens", "finished"]
OPTIONS: list[dict[str, Any]] = [
    {"coefficients": [-1, 0.5], "layers": [1, (1, 2)]},
    {"coefficients": [1], "layers": 2, "samples": 3, "temperature": 0.9, "top_p": 0.8, "seed": 4},
    {"coefficients": [1, 0.3], "layers": 1, "operation": "ablate", "positions": "all:4"},
]
KEY = "the-key-of-this-test"


def same(first: sk.SweepResult, second: sk.SweepResult) -> None:
    pd.testing.assert_frame_equal(first.table[SAME], second.table[SAME])
    assert [list(ids) for ids in first.table["ids"]] == [list(ids) for ids in second.table["ids"]]
    pd.testing.assert_series_equal(first.table["relative_dose"], second.table["relative_dose"], rtol=1e-5)


@pytest.fixture
def fake(llama, tmp_path) -> Fake:
    return Fake(*llama, tmp_path / "vectors")


@pytest.mark.parametrize("options", OPTIONS)
def test_a_sweep_has_the_same_table_through_an_engine_and_over_http(llama, fake, options) -> None:
    named = {"one": vector(llama[0], 1, 2), "two": vector(llama[0], 1, 2, seed=1)}
    more = {**options, "max_new_tokens": 8}
    own = sk.sweep(*llama, named, PROMPTS, **more)
    same(own, sk.sweep(None, llama[1], named, PROMPTS, **more, engine=fake))
    same(own, sk.sweep(*llama, named, PROMPTS, **more, engine=fake))
    with over_http(fake) as url:
        same(own, sk.sweep(None, llama[1], named, PROMPTS, **more, engine=url))


CHOICES = [" (A)", " (B)", "c"]


@pytest.mark.parametrize("options", [
    {"coefficients": [-1, 0.5], "layers": [1, (1, 2)]},
    {"coefficients": [1], "layers": 2, "operation": "ablate", "positions": "all"},
    {"doses": [-0.4, 0.2], "layers": [1, 2], "positions": "generated"},
])  # fmt: skip
def test_choices_have_the_same_table_through_an_engine_and_over_http(llama, fake, options) -> None:
    named = {"one": vector(llama[0], 1, 2), "two": vector(llama[0], 1, 2, seed=1)}
    more = {**options, "choices": CHOICES}
    own = sk.sweep(*llama, named, PROMPTS, **more).table
    with over_http(fake) as url:
        for engine in (fake, url):
            found = sk.sweep(None, llama[1], named, PROMPTS, **more, engine=engine).table
            pd.testing.assert_frame_equal(found, own, rtol=1e-4)


@pytest.mark.parametrize("steering", [
    {"coefficient": 0.5, "layer": (1, 2)}, {"operation": "ablate", "positions": "all", "layer": 2},
    {"dose": -0.4, "layer": 1, "positions": "generated"}, None,
])  # fmt: skip
def test_score_choices_has_the_same_table_through_an_engine_and_over_http(llama, fake, steering) -> None:
    model, tokenizer = llama
    one = None if steering is None else sk.Steering(vector(model, 1, 2), **steering)
    each = [CHOICES, [" yes"], CHOICES[:2], ["a longer choice", "b"]]
    for choices, given in ((CHOICES, one), (each, [one, None, one, one])):
        own = sk.score_choices(model, tokenizer, PROMPTS, choices, steering=given)
        with over_http(fake) as url:
            for served, engine in ((None, fake), (None, url), (model, fake)):
                found = sk.score_choices(served, tokenizer, PROMPTS, choices, steering=given, engine=engine)
                pd.testing.assert_frame_equal(found, own, rtol=1e-4)


def test_score_choices_through_an_engine_takes_given_norms_active_steering_and_its_own_checks(llama, fake) -> None:
    model, tokenizer = llama
    dosed = sk.Steering(vector(model, 1), dose=0.4)
    norms = {1: 3.0}
    own = sk.score_choices(model, tokenizer, PROMPTS, CHOICES, steering=dosed, norms=norms)
    options = {"engine": fake, "norms": norms}
    pd.testing.assert_frame_equal(
        sk.score_choices(None, tokenizer, PROMPTS, CHOICES, steering=dosed, **options), own, rtol=1e-4
    )
    with dosed.on(model, norms=norms):
        found = sk.score_choices(model, tokenizer, PROMPTS, CHOICES, engine=fake)
    pd.testing.assert_frame_equal(found, own, rtol=1e-4)
    with pytest.raises(ValueError, match="served context"):
        sk.score_choices(None, tokenizer, ["x" * 120], ["y" * 8], engine=fake)
    with pytest.raises(ValueError, match="expected a steering without a condition through vLLM"):
        condition = sk.Condition(vector(model, 1), above=0.0)
        steering = sk.Steering(vector(model, 2), when=condition, positions="generated")
        sk.score_choices(None, tokenizer, PROMPTS, CHOICES, steering=steering, engine=fake)
    fake.n_sums = 0
    with pytest.raises(ValueError, match=r"norms of the stream .* got none for \[1\]. Pass norms="):
        sk.score_choices(None, tokenizer, PROMPTS, CHOICES, steering=dosed, engine=fake)


def test_a_choice_beyond_the_served_context_is_refused(llama, fake) -> None:
    with pytest.raises(ValueError, match="served context"):
        sk.sweep(None, llama[1], vector(llama[0], 1), ["x" * 120], coefficients=[1], choices=["y" * 8], engine=fake)


@pytest.mark.parametrize("positions", ["from_last_prompt_token", "all", "prompt:3"])
def test_doses_have_the_same_coefficients_through_an_engine(llama, fake, positions) -> None:
    more = {"doses": [-0.4, 0.2], "layers": [1, 2], "max_new_tokens": 6, "positions": positions}
    named = {"one": vector(llama[0], 1, 2)}
    own, found = (sk.sweep(None if engine else llama[0], llama[1], named, PROMPTS, **more, engine=engine) for engine in
                  (None, fake))  # fmt: skip
    same_doses = own.table["coefficient"], found.table["coefficient"]
    pd.testing.assert_series_equal(*same_doses, rtol=1e-5)
    assert own.table["text"].tolist() == found.table["text"].tolist()


def test_doses_of_an_engine_without_sums_are_refused_and_the_folder_takes_given_norms(llama, tmp_path) -> None:
    engine = Fake(*llama, tmp_path / "vectors", sums=0)
    options = {"doses": [0.4], "layers": 1, "max_new_tokens": 3, "engine": engine, "out": tmp_path / "run"}
    with pytest.raises(ValueError, match=r"Pass stream_norms=, .* an engine of vLLM needs sums"):
        sk.sweep(None, llama[1], vector(llama[0], 1), PROMPTS, **options)
    found = sk.sweep(None, llama[1], vector(llama[0], 1), PROMPTS, **options, stream_norms={1: 5.0})
    assert found.table["relative_dose"].unique() == pytest.approx([0, 0.4])


def test_norms_are_read_in_parts_where_there_are_many(llama, fake, monkeypatch) -> None:
    from steerkit.serving import remote
    from steerkit.steering.dose import median_norms

    texts = [(range(3, 3 + n), range(40, 40 + n)) for n in (2, 9, 4, 7)]
    monkeypatch.setattr(remote, "NORMS", 8)
    for positions in ("from_last_prompt_token", "all", "prompt"):
        found = fake.norms(texts, positions, "add")
        assert found == pytest.approx(median_norms(llama[0], texts, None, positions), rel=1e-5)
    fake.call = lambda name, argument: [{}]
    with pytest.raises(RuntimeError, match="read fewer"):
        fake.norms(texts, "all", "add")


def test_a_sweep_resumes_through_an_engine_and_not_with_another(llama, fake, tmp_path) -> None:
    model, tokenizer = llama
    options = {"coefficients": [-1, 1, 2], "layers": [1, 2], "max_new_tokens": 6}
    whole = sk.sweep(model, tokenizer, vector(model, 1, 2), PROMPTS * 1, **options)
    original = fake.complete

    def failing(requests: Any) -> Any:
        for count, found in enumerate(original(requests)):
            if count == 66:
                raise KeyboardInterrupt
            yield found

    many = [{"prompt": prompt, "id": f"{i}-{k}"} for k in range(3) for i, prompt in enumerate(PROMPTS)]
    whole = sk.sweep(model, tokenizer, vector(model, 1, 2), many, **options)
    fake.complete = failing
    with pytest.raises(KeyboardInterrupt):
        sk.sweep(None, tokenizer, vector(model, 1, 2), many, **options, engine=fake, out=tmp_path / "run")
    fake.complete, before = original, fake.requests
    assert (tmp_path / "run" / "rows.jsonl").read_text().count("\n") == 64
    same(whole, sk.sweep(None, tokenizer, vector(model, 1, 2), many, **options, engine=fake, out=tmp_path / "run"))
    assert fake.requests - before == 84 - 64 + 12  # the rest, and the unsteered texts for the norms
    with pytest.raises(ValueError, match="attention"):
        sk.sweep(model, tokenizer, vector(model, 1, 2), many, **options, out=tmp_path / "run")


def test_two_servers_share_the_rows_of_a_sweep(llama, tmp_path) -> None:
    fakes = [Fake(*llama, tmp_path / name) for name in ("a", "b")]
    own = sk.sweep(*llama, vector(llama[0], 1), PROMPTS, coefficients=[1, 2, 3], max_new_tokens=6)
    with over_http(fakes[0]) as first, over_http(fakes[1]) as second:
        same(own, sk.sweep(None, llama[1], vector(llama[0], 1), PROMPTS, coefficients=[1, 2, 3], max_new_tokens=6,
                           engine=Server([first, second], concurrency=1)))  # fmt: skip
        assert min(one.requests for one in fakes) > 2
        means = Server([first, second], concurrency=1).collect_means(llama[1], PROMPTS * 4, position="last")
    torch.testing.assert_close(means.mean, sk.collect_means(*llama, PROMPTS * 4).mean, rtol=1e-5, atol=1e-6)


def test_a_lost_connection_and_a_busy_server_lose_no_row(llama, fake) -> None:
    own = sk.sweep(*llama, vector(llama[0], 1), PROMPTS, coefficients=[1, 2], max_new_tokens=6)
    kinds = iter(["drop", "busy", None, "drop"] * 4)
    with over_http(fake, before=lambda path: next(kinds, None) if path == "/v1/completions" else None) as url:
        engine = Server(url, patience_s=20, concurrency=3)
        same(own, sk.sweep(None, llama[1], vector(llama[0], 1), PROMPTS, coefficients=[1, 2], max_new_tokens=6,
                           engine=engine))  # fmt: skip
    with pytest.raises(ServerError, match="Connection"):
        Server(url, patience_s=0)


@pytest.mark.parametrize("position", ["mean", "last", "first", 1, -2])
def test_means_are_those_of_collect_means(llama, fake, position) -> None:
    pairs = [sk.ContrastPair(text, " yes it is", " not at all", str(i)) for i, text in enumerate(["ab", "c d", "ef"])]
    spanned = [sk.SpannedText("one two three", ((0, 3), (4, 13)), ("positive", "negative"))]
    for texts in (pairs, spanned):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = sk.collect_means(*llama, texts, layers=[3, 0], position=position)
        found = fake.collect_means(llama[1], texts, layers=[3, 0], position=position)
        assert (found.labels, found.counts, found.layers) == (own.labels, own.counts, own.layers)
        torch.testing.assert_close(found.mean, own.mean, rtol=1e-5, atol=1e-6)
    assert sk.difference_in_means(found).layers.keys() == {0, 3}


def test_too_many_labels_or_a_lost_sum_are_refused(llama, fake) -> None:
    three = {label: ["some text"] for label in "abc"}
    with pytest.raises(ValueError, match="sum for each of 3 labels; got 2"):
        fake.collect_means(llama[1], three)
    original = fake.call
    fake.call = lambda name, argument: original(name, argument) if name != "sums" else [{}]
    with pytest.raises((RuntimeError, ValueError)):
        fake.collect_means(llama[1], {"a": ["some text"]})


def test_an_engine_without_sums_gives_no_dose(llama, tmp_path) -> None:
    fake = Fake(*llama, tmp_path / "vectors", sums=0)
    result = sk.sweep(None, llama[1], vector(llama[0], 1), PROMPTS, coefficients=[1], max_new_tokens=4, engine=fake)
    assert result.table.loc[result.table["coefficient"] == 1, "relative_dose"].isna().all()


def test_a_row_that_overflows_has_no_text(llama, fake) -> None:
    with pytest.warns(UserWarning, match="overflowed"):
        result = sk.sweep(None, llama[1], vector(llama[0], 1), PROMPTS, coefficients=[1, 1e38], max_new_tokens=4,
                          engine=fake)  # fmt: skip
    assert set(result.table.loc[result.table["text"].isna(), "coefficient"]) == {1e38}


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (SteeringVector({1: torch.ones(5)}), {}, "width 5"),
    (SteeringVector({9: torch.ones(32)}), {}, "layer 9"),
    (SteeringVector({1: torch.ones(32)}, {"model_fingerprint": "0" * 16}), {}, "other weights"),
    (SteeringVector({1: torch.ones(32)}), {"max_new_tokens": 200}, "context of 128"),
    (SteeringVector({1: torch.ones(32)}), {"temperature": -1.0}, "temperature"),
    (SteeringVector({1: torch.ones(32)}), {"top_p": 0.0}, "top_p"),
]


@pytest.mark.parametrize(("bad", "more", "message"), BAD)
def test_what_does_not_fit_is_refused_before_a_row_is_generated(llama, fake, tmp_path, bad, more, message) -> None:
    options = {"coefficients": [1], "max_new_tokens": 4, "engine": fake, "out": tmp_path / "run", **more}
    with pytest.raises(ValueError, match=message):
        sk.sweep(None, llama[1], bad, PROMPTS, **options)
    assert fake.requests == 0
    assert not (tmp_path / "run").exists()


def test_a_model_of_other_weights_and_no_engine_at_all_are_refused(llama, fake) -> None:
    from tests.tiny import tiny_model

    options = {"coefficients": [1], "max_new_tokens": 4}
    with pytest.raises(ValueError, match="weights that the engine serves"):
        sk.sweep(tiny_model(seed=1), llama[1], vector(llama[0], 1), PROMPTS, **options, engine=fake)
    with pytest.raises(TypeError, match="expected an address"):
        sk.sweep(None, llama[1], vector(llama[0], 1), PROMPTS, **options, engine=3)
    with pytest.raises(TypeError, match="expected a model"):
        sk.sweep(None, llama[1], vector(llama[0], 1), PROMPTS, **options)


def test_the_key_is_sent_and_stands_in_no_error(fake, monkeypatch) -> None:
    with over_http(fake, key=KEY) as url:
        monkeypatch.setenv("STEERKIT_API_KEY", KEY)
        server = Server(url)
        assert server.listing()["vectors"] == []
        assert KEY not in repr(server)
        monkeypatch.setenv("STEERKIT_API_KEY", KEY[::-1])
        with pytest.raises(ServerError, match="401") as caught:
            Server(url, patience_s=0)
        assert KEY[::-1] not in str(caught.value)
    with pytest.raises(ValueError, match="expected https"):
        Server("http://192.0.2.1:8000")


def test_a_job_without_room_leaves_the_served_vectors_as_they_are(llama, fake, monkeypatch) -> None:
    monkeypatch.setattr(fake, "capacity", 2)
    named = {name: vector(llama[0], 1, 2, seed=seed) for seed, name in enumerate("abc")}
    with over_http(fake) as url:
        for engine in (fake, url):
            with pytest.raises(ValueError, match=r"at most 2 pairs .*got 3 pairs.*--capacity"):
                sk.sweep(None, llama[1], named, ["Hi"], coefficients=[1], layers=[1], max_new_tokens=2, engine=engine)
    assert not list(fake.folder.path.glob("*.safetensors"))


def test_many_jobs_of_one_client_fit_one_after_another_and_vectors_of_others_stay(llama, fake, monkeypatch) -> None:
    monkeypatch.setattr(fake, "capacity", 6)
    fake.put("mine", vector(llama[0], 1, seed=9))
    with over_http(fake) as url:
        engine = Server(url)
        for seed in range(4):
            named = {"a": vector(llama[0], 1, 2, seed=seed), "b": vector(llama[0], 1, 2, seed=10 + seed)}
            swept = sk.sweep(
                None, llama[1], named, ["Hi"], coefficients=[1], layers=[1], max_new_tokens=2, engine=engine
            )
            assert len(swept.table) == 4 and "mine" in fake.folder.served()
        engine.clear()
    assert list(fake.folder.served()) == ["mine"]


def test_servers_of_different_models_are_not_one_engine(llama, fake, tmp_path) -> None:
    from tests.tiny import tiny_model, tiny_tokenizer

    other = Fake(tiny_model(seed=1), tiny_tokenizer(), tmp_path / "other")
    with over_http(fake) as first, over_http(other) as second, pytest.raises(ValueError, match="servers of one model"):
        Server([first, second])


def test_a_server_that_does_not_steer_is_named(fake) -> None:
    with over_http(fake) as url, pytest.raises(ServerError, match="steerkit serve"):
        Server(url + "/v2")


def test_the_listing_is_json(fake, llama) -> None:
    fake.put("one", vector(llama[0], 1))
    assert json.loads(json.dumps(fake.listing())) == fake.listing() | {
        "vectors": json.loads(json.dumps(fake.listing()["vectors"]))
    }


def test_what_vllm_asks_of_the_first_replica_alone_is_refused_with_several(llama, fake) -> None:
    _, tokenizer = llama
    fake.replicas = 2
    vector = SteeringVector({1: torch.ones(32)})
    options = {"max_new_tokens": 3, "engine": fake}
    assert len(sk.sweep(None, tokenizer, vector, ["Hi"], coefficients=[1], **options).table) == 2
    with pytest.raises(ValueError, match="data-parallel replicas, to read an overflow"):
        sk.sweep(None, tokenizer, vector, ["Hi"], coefficients=[1e6], **options)
    with pytest.raises(ValueError, match="data-parallel replicas, to read sums"):
        fake.collect_means(tokenizer, ["Hi there"], labels=["a"])
    assert fake.norms([((65, 66), (67,))], "all", "add") == {}
