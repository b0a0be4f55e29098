from __future__ import annotations

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import steerkit as sk
from steerkit.io.rows import append_rows, read_rows
from steerkit.io.run_folder import ConfigurationChanged
from steerkit.scores.fluency import kl, log_probabilities, perplexity
from steerkit.scores.text import rouge_l
from steerkit.sweeps import store
from steerkit.sweeps.result import FewWarning, SweepResult
from steerkit.sweeps.sweep import sweep
from steerkit.text.prompt import Prompt, encode_prompt
from tests.reference import hidden_states, steered_logits
from tests.steering.test_steering import vector
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [
    {"id": "a", "prompt": "Hello", "reference": "Hello you", "group": "g"},
    {"id": "b", "prompt": "A longer one", "reference": "x = 1", "group": "g"},
    {"id": "c", "prompt": [{"role": "user", "content": "hi"}], "reference": "hi", "topic": "chat"},
]
SETTINGS = {
    "coefficients": [-0.3, 0, 0.3],
    "layers": [1, 2],
    "max_new_tokens": 8,
    "positions": "from_last_prompt_token",
}


@pytest.fixture(scope="module")
def setting():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    vectors = {"v": vector(model, 1, 2), "random": sk.random_like(vector(model, 1, 2), seed=1)}
    return model, tokenizer, vectors


def test_every_row_equals_its_own_generate_call(setting) -> None:
    model, tokenizer, vectors = setting
    table = sweep(model, tokenizer, vectors, ROWS, **SETTINGS).table
    assert len(table) == 2 * 2 * 3 * 3
    prompts = {row["id"]: row["prompt"] for row in ROWS}
    for row in table.itertuples():
        steering = sk.Steering(vectors[row.vector].at(row.layer), row.coefficient, "from_last_prompt_token")
        alone = sk.generate(model, tokenizer, [prompts[row.prompt_id]], max_new_tokens=8, steering=steering)
        assert [row.text] == alone
    assert table["text"].nunique() > 9
    assert table.loc[table.prompt_id == "c", "topic"].eq("chat").all()


def test_coefficient_zero_is_generated_once_and_stands_under_every_vector(setting, monkeypatch) -> None:
    model, tokenizer, vectors = setting
    counted = []
    import steerkit.generation.generator as module

    decode = module.decode
    monkeypatch.setattr(
        module, "decode", lambda m, t, rows, *a, **k: counted.append(len(rows)) or decode(m, t, rows, *a, **k)
    )
    table = sweep(model, tokenizer, vectors, ROWS, **SETTINGS).table
    assert counted == [3 + 2 * 2 * 2 * 3]
    zero = table[table.coefficient == 0]
    assert len(zero) == 4 * 3
    assert zero.groupby("prompt_id")["text"].nunique().eq(1).all()
    assert zero["relative_dose"].eq(0).all()


def test_samples_share_their_random_numbers_over_coefficients_and_vectors(setting) -> None:
    model, tokenizer, vectors = setting
    tiny = {name: v * 1e-6 for name, v in vectors.items()}
    table = sweep(model, tokenizer, tiny, ROWS, samples=3, seed=5, **SETTINGS).table
    assert table["temperature"].eq(0.7).all() and table["top_p"].eq(1.0).all()
    assert table.groupby(["prompt_id", "sample"])["text"].nunique().eq(1).all()
    assert table.groupby("prompt_id")["text"].nunique().eq(3).any()


def test_an_interrupted_sweep_goes_on_and_equals_an_uninterrupted_one(setting, tmp_path, monkeypatch) -> None:
    model, tokenizer, vectors = setting
    options = {**SETTINGS, "samples": 2, "batch_rows": 4}
    whole = sweep(model, tokenizer, vectors, ROWS, **options).table
    append, calls = append_rows, []

    def cut(path, rows):
        calls.append(path.name)
        if calls.count("rows.jsonl") == 4:
            raise KeyboardInterrupt
        append(path, rows)

    monkeypatch.setattr(store, "append_rows", cut)
    with pytest.raises(KeyboardInterrupt):
        sweep(model, tokenizer, vectors, ROWS, out=tmp_path, **options)
    monkeypatch.setattr(store, "append_rows", append)
    done = read_rows(tmp_path / "rows.jsonl")
    assert len(done) == 12
    with (tmp_path / "rows.jsonl").open("ab") as file:
        file.write(json.dumps(done[0]).encode()[:-9])  # a torn last line
    resumed = sweep(model, tokenizer, vectors, ROWS, out=tmp_path, **options)
    assert resumed.table.equals(whole)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert len(rows) == len({tuple(row["key"]) for row in rows}) == 2 * (3 + 2 * 2 * 2 * 3)
    assert SweepResult.load(tmp_path).table.astype(str).equals(whole.astype(str))
    assert SweepResult.load(tmp_path).meta["model_fingerprint"] == resumed.meta["model_fingerprint"]


def test_another_configuration_in_the_same_folder_is_refused_with_the_difference(setting, tmp_path) -> None:
    model, tokenizer, vectors = setting
    sweep(model, tokenizer, vectors, ROWS, out=tmp_path, **SETTINGS)
    with pytest.raises(ConfigurationChanged, match=r"max_new_tokens: 8 -> 9"):
        sweep(model, tokenizer, vectors, ROWS, out=tmp_path, **{**SETTINGS, "max_new_tokens": 9})


@pytest.mark.parametrize("positions", ["from_last_prompt_token", "generated", "all", "prompt:3"])
def test_relative_dose_is_over_the_median_norm_at_the_steered_positions_of_unsteered_texts(setting, positions) -> None:
    model, tokenizer, vectors = setting
    result = sweep(model, tokenizer, vectors["v"], ROWS, **{**SETTINGS, "positions": positions})
    zero = result.table[(result.table.coefficient == 0) & (result.table.layer == 1)]
    norms = []
    for prompt, ids in zip(zero["prompt_ids"], zero["ids"], strict=True):
        n, length = len(prompt), len(prompt) + len(ids)
        steered = {"from_last_prompt_token": (n - 1, length), "generated": (n, length), "all": (0, length)}
        first, stop = steered.get(positions, (0, 3))
        stream = hidden_states(model, [*prompt, *ids])[2]
        norms += [float(stream[at].norm()) for at in range(max(first, 1), stop)]
    norm = np.median(norms)
    assert result.meta["stream_norms"][1] == pytest.approx(norm, rel=1e-5)
    row = result.table[(result.table.layer == 1) & (result.table.coefficient == -0.3)].iloc[0]
    assert row["relative_dose"] == pytest.approx(0.3 * vectors["v"].norms()[1] / norm, rel=1e-5)


def test_several_layers_can_be_steered_together(setting) -> None:
    model, tokenizer, vectors = setting
    table = sweep(model, tokenizer, vectors["v"], ROWS, coefficients=[0.3], layers=[(1, 2)], max_new_tokens=8).table
    assert set(table["layer"]) == {"1+2"}
    both = sk.generate(
        model, tokenizer, ["Hello"], max_new_tokens=8, steering=sk.Steering(vectors["v"], 0.3, layer="all")
    )
    assert table.query("prompt_id == 'a' and coefficient == 0.3")["text"].tolist() == both


@pytest.mark.filterwarnings("ignore:the tokenizer .* sees less than half")
def test_scores_of_a_sweep_equal_their_slow_definitions(setting) -> None:
    model, tokenizer, vectors = setting
    result = sweep(model, tokenizer, vectors, ROWS, **SETTINGS)
    result = result.score("rouge_l").score("rouge_l_symbols").score("distance").score("repeated_4grams")
    result = result.score("perplexity", model=model, tokenizer=tokenizer).score(
        "kl", model=model, tokenizer=tokenizer, vectors=vectors
    )
    result = result.score(lambda row: len(row.text), column="length")
    prompts = {row["id"]: row["prompt"] for row in ROWS}
    zero = result.table[result.table.coefficient == 0].drop_duplicates("prompt_id").set_index("prompt_id")
    zero, zero_ids = zero["text"], zero["ids"]
    for row in result.table.itertuples():
        lead = encode_prompt(tokenizer, prompts[row.prompt_id])
        assert row.length == len(row.text)
        assert row.rouge_l == pytest.approx(rouge_l([row.text], [row.reference])[0], nan_ok=True)
        distance = 1 - rouge_l([row.text], [zero[row.prompt_id]], tokenizer="symbols")[0]
        assert row.distance == pytest.approx(distance, nan_ok=True)
        ids = row.ids
        logits = steered_logits(model, (*lead, *ids), {}, 0, range(0))[len(lead) - 1 : -1]
        nll = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(ids))
        assert row.perplexity == pytest.approx(float(nll.exp()), rel=1e-4)
        plain_ids = zero_ids[row.prompt_id]
        text = (*lead, *plain_ids)
        layers = {row.layer: vectors[row.vector].layers[row.layer]}
        both = [
            steered_logits(model, text, layers, c, range(len(lead) - 1, len(text)))[len(lead) - 1 : -1]
            .double()
            .log_softmax(-1)
            for c in (row.coefficient, 0.0)
        ]
        slow = float((both[0].exp() * (both[0] - both[1])).sum(-1).mean())
        assert row.kl == pytest.approx(slow, rel=1e-3, abs=1e-6)
    assert result.table.query("coefficient == 0")["kl"].abs().max() < 1e-9
    assert result.table.query("coefficient != 0")["kl"].min() > 1e-4


def _result(values: dict[tuple[str, float], list[float]]) -> SweepResult:

    rows = [
        {
            "vector": v,
            "layer": 3,
            "coefficient": c,
            "prompt_id": str(i),
            "sample": 0,
            "group": str(i),
            "text": "t",
            "s": x,
        }
        for (v, c), column in values.items()
        for i, x in enumerate(column)
    ]
    return SweepResult(pd.DataFrame(rows))


def test_curves_areas_and_gains_equal_hand_worked_numbers() -> None:
    zero = [0.0, 0.2, 0.4, 0.2]
    result = _result(
        {
            **{(v, 0.0): zero for v in ("v", "r1", "r2")},
            ("v", 1.0): [0.5, 0.6, 0.9, 0.8],
            ("v", 3.0): [1.0, 1.0, 1.0, 1.0],
            ("r1", 1.0): [0.1, 0.1, 0.1, 0.1],
            ("r2", 1.0): [0.3, 0.3, 0.3, 0.3],
        }
    )
    assert repr(result).startswith("SweepResult(") and ", 3 vectors, 1 layers, 3 coefficients, 4 prompts)" in repr(
        result
    )
    curve = result.curve("s").query("vector == 'v'").set_index("coefficient")
    assert curve["mean"].tolist() == pytest.approx([0.2, 0.7, 1.0])
    assert curve["n"].tolist() == [4, 4, 4]
    assert (curve["low"] <= curve["mean"]).all() and (curve["mean"] <= curve["high"]).all()
    area = result.curve_auc("s", normalize=True).set_index("vector").loc["v"]
    assert area["curve_auc"] == pytest.approx(((0.2 + 0.7) / 2 * 1 + (0.7 + 1.0) / 2 * 2) / 3)
    roles = {"v": ("vector", None), "random-0": ("random", None), "v/random-1": ("random", "v")}
    table = result.table.query("coefficient < 3").replace({"vector": {"r1": "random-0", "r2": "v/random-1"}})
    named = SweepResult(
        table.assign(**{key: [roles[v][i] for v in table["vector"]] for i, key in enumerate(("role", "control_of"))}),
        {},
    )
    both = named.gains("s")
    assert set(both["vector"]) == {"v"} and set(both["over"]) == {"coefficient 0", "random"}
    over = both[(both["over"] == "random") & (both["coefficient"] == 1.0)]["gain"].item()
    assert over == pytest.approx(named.gain("s", over=["random-0", "v/random-1"], vectors=["v"])["gain"].iloc[0])
    gain = result.gain("s", vectors=["v"]).set_index("coefficient")
    assert gain.loc[1.0, "gain"] == pytest.approx(0.5)
    assert gain.loc[1.0, "low"] > 0 and gain.loc[1.0, "p"] == 2 / 2**4  # the least that four prompts allow
    single = _result({k: v for k, v in _cells(result).items() if k[1] != 3.0}).gain("s", over=["r1", "r2"])
    assert single["vector"].tolist() == ["v"]
    assert single["gain"].iloc[0] == pytest.approx(0.7 - 0.2)
    with pytest.raises(ValueError, match=r"missing: \[\('r1', 3, 3.0\)"):
        result.gain("s", over=["r1", "r2"], vectors=["v"])


def _cells(result: SweepResult) -> dict[tuple[str, float], list[float]]:
    return {key: part["s"].tolist() for key, part in result.table.groupby(["vector", "coefficient"])}


def test_the_interval_of_a_gain_over_controls_is_that_of_a_further_control() -> None:
    rng = np.random.default_rng(0)
    base = {("v", 0.0): [0.0] * 30, ("v", 1.0): [0.5] * 30}
    names, xs = [f"r{i}" for i in range(8)], rng.normal(0.2, 0.2, 8)
    alike = _result({**base, **{(n, c): [0.2] * 30 for n in names for c in (0.0, 1.0)}}).gain("s", over=names).iloc[0]
    spread = _result(
        {
            **base,
            **{(n, c): [float(x)] * 30 for n, x in zip(names, xs, strict=True) for c in (0.0, 1.0)},
        }
    )
    wide = spread.gain("s", over=names).iloc[0]
    assert np.isnan(alike["low"]) and np.isnan(alike["high"])  # equal controls do not say where a further one is
    assert wide["k"] == 8 and wide["p_rank"] == pytest.approx((1 + sum(x >= 0.5 for x in xs)) / 9)
    half = stats.t.ppf(0.975, 7) * np.std(xs, ddof=1) * np.sqrt(9 / 8)
    assert (wide["low"], wide["high"]) == pytest.approx((0.5 - np.mean(xs) - half, 0.5 - np.mean(xs) + half))


def test_too_few_prompts_or_controls_are_said() -> None:
    names = [f"r{i}" for i in range(19)]
    few, enough = (_result({(n, c): [0.1] * k for n in ["v", *names] for c in (0.0, 1.0)}) for k in (9, 10))
    with pytest.warns(FewWarning, match="expected 10 prompts or more .* got 9"):
        few.gain("s", vectors=["v"])
    with pytest.warns(FewWarning, match="expected 19 controls with a score or more, .* p = 0.05; got 18"):
        enough.gain("s", over=names[:18], vectors=["v"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough.gain("s", vectors=["v"])
        enough.gain("s", over=names, vectors=["v"])


def test_perplexity_is_of_the_texts_own_tokens_and_missing_for_an_empty_text(llama) -> None:
    model, tokenizer = llama
    values = perplexity(model, tokenizer, ["Hello", "Hello", "Other"], [" you", "", " you there"])
    assert np.isnan(values[1]) and np.isfinite(values[[0, 2]]).all()
    alone = perplexity(model, tokenizer, ["Other"], [" you there"])
    assert values[2] == pytest.approx(alone[0], rel=1e-5)


def test_steered_log_probabilities_favour_what_the_vector_pushes_towards(llama) -> None:
    model, tokenizer = llama
    v = vector(model, 2)
    text = sk.generate(
        model, tokenizer, ["Hello"], max_new_tokens=8, steering=sk.Steering(v, 1.0, "from_last_prompt_token")
    )
    steered, plain = (
        log_probabilities(model, tokenizer, ["Hello"], text, [s])[0].sum()
        for s in (sk.Steering(v, 1.0, "from_last_prompt_token"), None)
    )
    assert steered > plain


def test_joined_sweeps_keep_the_settings_of_each_and_all_vectors() -> None:
    first, second = (_result({(name, 0.0): [1.0, 2.0], (name, 1.0): [2.0, 3.0]}) for name in "ab")
    common = {"model_fingerprint": "m", "adapter_fingerprint": None, "seed": 0}
    joined = SweepResult.merge(
        [
            SweepResult(first.table, {**common, "positions": "all", "vectors": {"a": "1"}}),
            SweepResult(second.table, {**common, "positions": "all:4", "vectors": {"b": "2"}}),
        ]
    )
    assert joined.meta == {**common, "positions": ["all", "all:4"], "vectors": {"a": "1", "b": "2"}}
    assert joined.table["vector"].tolist() == [*first.table["vector"], *second.table["vector"]]
    with pytest.raises(ValueError, match="expected sweeps of one model; got 2 models"):
        SweepResult.merge([first, SweepResult(second.table, {"model_fingerprint": "other"})])
    with pytest.raises(ValueError, match="got 0 models"):
        SweepResult.merge([])


def test_the_curve_of_controls_is_their_mean_with_the_interval_of_a_further_one() -> None:
    values = {("v", c): [c, c + 1.0, c + 2.0] for c in (0.0, 1.0)}
    values |= {(f"v/random-{k}", c): [c * k, c * k + 1.0, 2.0] for k in range(4) for c in (0.0, 1.0)}
    table = _result(values).table
    role = table["vector"].str.contains("random").map({True: "random", False: "vector"})
    result = SweepResult(table.assign(role=role, control_of=table["vector"].where(role == "vector").fillna("v")))
    result.table.loc[role == "vector", "control_of"] = None
    found = result.control_curve("s").set_index("coefficient")
    means = np.array([(k + k + 1 + 2) / 3 for k in range(4)])
    half = stats.t.ppf(0.975, 3) * means.std(ddof=1) * np.sqrt(1 + 1 / 4)
    assert found.loc[1.0, ["mean", "low", "high"]].tolist() == pytest.approx(
        [means.mean(), means.mean() - half, means.mean() + half]
    )
    assert found["vector"].tolist() == ["v/random"] * 2 and found["k"].tolist() == [4, 4]
    assert found.loc[1.0, "n"] == 3 and found.loc[0.0, "low"] == found.loc[0.0, "high"]
    with pytest.raises(ValueError, match="expected controls among the vectors; got none"):
        _result({("v", 0.0): [1.0]}).control_curve("s")


@pytest.mark.parametrize("site", ["resid_pre", "attn_out"])
def test_kl_of_a_sweep_at_another_site_is_of_steering_there(setting, site) -> None:
    model, tokenizer, vectors = setting
    chosen = {"v": next(iter(vectors.values())).at(2)}
    swept = sk.sweep(model, tokenizer, chosen, ROWS[:2], coefficients=[1], max_new_tokens=3, site=site)
    found = swept.score("kl", model=model, tokenizer=tokenizer, vectors=chosen).table
    plain = found[found["coefficient"] == 0].set_index("prompt_id")
    steered = found[found["coefficient"] == 1].set_index("prompt_id")
    for name, row in steered.iterrows():
        at = sk.Steering(chosen["v"], 1.0, site=site)
        wanted = kl(model, tokenizer, [Prompt(row["prompt_ids"], "")], [tuple(plain.loc[name, "ids"])], [at])
        assert row["kl"] == pytest.approx(wanted[0], rel=1e-3) and row["kl"] > 1e-4


def test_prompts_without_a_score_are_counted_and_warned_of_in_gains_and_beside_controls() -> None:
    names = [f"v/random-{i}" for i in range(19)]
    easy, hard = [1.0] * 10, [0.0] * 10
    rng = np.random.default_rng(0)
    values = {(n, c): [*(np.array(easy) + rng.normal(0, 0.02)), *hard] for n in names for c in (0.0, 1.0)}
    values |= {("v", 0.0): [*easy, *hard], ("v", 1.0): [*easy, *[np.nan] * 10]}
    table = _result(values).table
    role = table["vector"].str.contains("random").map({True: "random", False: "vector"})
    result = SweepResult(table.assign(role=role, control_of=table["vector"].where(role == "vector").fillna("v")))
    result.table.loc[role == "vector", "control_of"] = None
    with pytest.warns(FewWarning, match="10 prompts of 'v' at layer 3, coefficient 1 have none and are left out"):
        plain = result.gain("s", vectors=["v"])
    with pytest.warns(FewWarning, match="10 prompts of 'v'"):
        over = result.gain("s", over=names, vectors=["v"])
    assert plain["n_missing"].tolist() == over["n_missing"].tolist() == [10]
    assert over["low"].item() < 0 < over["high"].item()
    with pytest.warns(FewWarning, match="got 'v' on 10 of 20 prompts at layer 3, coefficient 1. Their means"):
        result.control_curve("s")
    thin = SweepResult(result.table.assign(s=result.table["s"].where(~result.table["vector"].isin(names[3:]))))
    with pytest.warns(FewWarning) as warned:
        thin.gain("s", over=names, vectors=["v"])
    assert any("19 controls with a score or more" in str(one.message) and "got 3" in str(one.message) for one in warned)


def test_a_prompt_weighs_the_same_in_curve_and_gain_however_many_of_its_samples_have_a_score() -> None:
    rows = [
        {"vector": "v", "layer": 3, "coefficient": c, "prompt_id": str(i), "sample": s, "group": str(i), "text": "t",
         "s": 0.3 + c * (i == 0) if c == 0 or i or s == 0 else np.nan}
        for c in (0.0, 1.0) for i in range(12) for s in range(8)
    ]  # fmt: skip
    result = SweepResult(pd.DataFrame(rows))
    curve = result.curve("s").set_index("coefficient")["mean"]
    assert curve[1.0] - curve[0.0] == pytest.approx(result.gain("s")["gain"].item()) == pytest.approx(1 / 12)
    assert result.curve("s")["n_missing"].tolist() == [0, 7]


def test_a_curve_depends_neither_on_the_order_of_rows_nor_on_other_vectors() -> None:
    rng = np.random.default_rng(0)
    values = {("v", c): rng.lognormal(size=30).tolist() for c in (0.0, 1.0)}
    result = _result(values)
    shuffled = SweepResult(result.table.sample(frac=1, random_state=0))
    pd.testing.assert_frame_equal(shuffled.curve("s").sort_values("coefficient", ignore_index=True), result.curve("s"))
    zeros = {("v", 0.0): [0.0] * 12, ("v", 1.0): [0.0] * 6 + [1.0] * 6}
    alone, beside = _result(zeros), _result(zeros | {("w", 0.0): [0.0] * 12, ("w", 1.0): [2.0] + [0.0] * 11})
    for table in (lambda one: one.curve("s"), lambda one: one.gain("s")):
        both = table(beside)
        pd.testing.assert_frame_equal(both[both["vector"] == "v"].reset_index(drop=True), table(alone))


def test_prompts_that_do_not_move_are_left_out_of_the_share_that_is_one_half_without_an_effect() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(40):
        result = _result({("v", c): (rng.random(40) < 0.15).astype(float).tolist() for c in (0.0, 1.0)})
        row = result.wrong_way("s").iloc[0]
        assert row["unmoved"] > 0.5 and row["share"] < 0.3
        held += row["moved_low"] <= 0.5 <= row["moved_high"]
    assert held >= 36


def test_a_table_with_a_row_without_a_group_is_refused() -> None:
    table = _result({("v", 0.0): [1.0, 2.0]}).table
    with pytest.raises(ValueError, match="a group for each row; 1 have none"):
        SweepResult(table.assign(group=["a", None]))
