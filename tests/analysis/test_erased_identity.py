"""Erased identity: what is erased where, which gain survives, and what the command writes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

import steerkit as sk
from analysis.agents.activations import activations_of, turn_activations
from analysis.agents.choose import Choice
from analysis.agents.contexts import by_tag, tag_alone
from analysis.agents.vectors import agent_vectors
from analysis.probes import erased as erasing
from analysis.probes.erased import (
    AGENTS,
    INJECTED,
    POSITIONS,
    TAG,
    TRACE,
    VARIANCE,
    VECTOR,
    Setting,
    changes,
    erased,
    erasers_of,
    first_round,
    injected,
    joined,
    separability,
    survival,
    texts,
)
from steerkit.io.rows import read_rows
from steerkit.io.tables import read_table
from steerkit.stats.paired import ratio
from steerkit.text.traces import DebateTrace, Turn
from tests.analysis.test_patched_rounds import attentive, write_run
from tests.tiny import tiny_tokenizer

WORDS = ("tides", "hills", "birds", "rocks", "winds", "lamps")


def debates(count: int, start: int = 0) -> list[DebateTrace]:
    """Debates of two rounds in which each of three agents has a phrase of its own."""
    said = {1: "calmly {}", 2: "{} it is!", 3: "why {}?"}
    names = [f"{WORDS[i % 6]} {i}" for i in range(start, start + count)]
    return [
        DebateTrace.of(name, [Turn(a, r, text.format(name)) for r in (1, 2) for a, text in said.items()], name, name)
        for name in names
    ]


@pytest.fixture(scope="module")
def read() -> tuple[Any, Any, dict[str, sk.Activations]]:
    """A model, its tokenizer, and the activations at the read positions of 100 debates."""
    model, tokenizer, traces = attentive(), tiny_tokenizer(), debates(100)
    turns = first_round(turn_activations(model, tokenizer, traces, "trace"))
    asked = activations_of(model, tokenizer, traces, ["asked"], by_tag)["asked", "last"]
    return model, tokenizer, {name: asked if name == "asked" else turns[name] for name in POSITIONS}


def test_only_turns_of_round_1_are_read_and_positions_are_joined_with_one_mean(read: Any) -> None:
    model, tokenizer, acts = read
    turns = first_round(turn_activations(model, tokenizer, debates(4), "trace"))
    assert {position: len(one) for position, one in turns.items()} == dict.fromkeys(
        ("last", "mean", "first", "tag"), 12
    )
    names = joined(acts)
    counts = names.items["class"].value_counts().to_dict()
    assert counts == {f"{position} {agent}": 100 for position in POSITIONS for agent in "123"}
    for start in range(0, len(names), 300):
        torch.testing.assert_close(names.resid[start : start + 300].mean(0), names.resid.mean(0), atol=1e-4, rtol=1e-4)


def test_a_prompt_with_the_tag_alone_holds_no_turn_and_ends_with_the_agents_tag() -> None:
    (trace,) = debates(1)
    begun = tag_alone.begun(trace, "3") if tag_alone.begun else ""
    assert begun == "<|Round 1 - Initial Solutions|>\n\n<|Agent 3 Solution|>:"
    assert trace.body.startswith(tag_alone.begun(trace, "1"))  # type: ignore[misc]


def test_the_erasure_of_all_positions_makes_the_agents_means_equal_at_each_of_them(read: Any) -> None:
    *_, acts = read
    erasers = erasers_of(acts, Setting(shuffles=1))
    for position, one in acts.items():
        for layer in one.layers:
            gone, kept = (
                torch.stack([x[(one.items["label"] == agent).tolist()].mean(0) for agent in "123"])
                for x in (erasers[AGENTS].at(layer)(one.at(layer)), erasers["shuffled 0"].at(layer)(one.at(layer)))
            )
            before = torch.stack([one.where(one.items["label"] == agent).at(layer).mean(0) for agent in "123"])
            size = (before - before.mean(0)).norm()
            assert (gone - gone.mean(0)).norm() < 1e-4 * size + 1e-6, (position, layer)
            assert (kept - kept.mean(0)).norm() > 0.1 * size, (position, layer)


def test_controls_have_the_rank_of_the_erasure_and_the_injected_map_removes_the_vectors_alone(read: Any) -> None:
    *_, acts = read
    erasers = erasers_of(acts, Setting(shuffles=1))
    ranks = {name: eraser.at(2).left.shape[0] for name, eraser in erasers.items()}
    assert ranks[AGENTS] == ranks[VARIANCE] == ranks["shuffled 0"] == 2 * len(POSITIONS)
    vectors = agent_vectors(acts["last"])
    removing = injected(vectors, 1, erasers[AGENTS])
    assert removing.at(3).left.shape[0] == 2
    table = changes(acts, {**erasers, INJECTED: removing}, vectors, 1)
    left = table[table["of"].str.startswith(VECTOR)].groupby("erasure")["share"].max()
    assert left[INJECTED] < 1e-6 < 0.05 < left["shuffled 0"]
    at = table[(table["erasure"] == AGENTS) & (table["layer"] == 2) & (table["of"] == "first")]["share"].item()
    x = acts["first"].at(2).double()
    slow = [float((row - erasers[AGENTS].at(2)(row[None])[0]).norm() / row.norm()) for row in x]
    assert at == pytest.approx(sum(slow) / len(slow), rel=1e-6)


def test_a_probe_finds_less_under_the_joint_erasure_of_other_questions_than_under_shuffled_names(read: Any) -> None:
    *_, acts = read
    some = {name: one for name, one in acts.items() if name != "first"}
    table = separability(some, Setting(shuffles=1))
    assert set(table["position"]) == set(some) and not table.duplicated(["position", "layer", "features"]).any()
    mean = table.groupby("features")["accuracy"].mean()
    assert mean["erased together"] < mean["erased_shuffled together"] <= mean["resid"] + 0.02
    assert set(table.loc[table["features"] == "erased together", "n_groups"]) == {50}


def test_inside_the_with_the_agents_have_equal_means_where_an_answer_begins_and_outside_they_do_not() -> None:
    model, tokenizer = attentive(), tiny_tokenizer()

    def read() -> sk.Activations:
        return activations_of(model, tokenizer, debates(12), ["asked"], by_tag)["asked", "last"]

    def spread(acts: sk.Activations) -> float:
        means = torch.stack([acts.where(acts.items["label"] == agent).at(2).mean(0) for agent in "123"])
        return float((means - means.mean(0)).norm())

    before = read()
    eraser = sk.leace(before)
    with erased(model, eraser, [2]):
        inside = spread(read())
    with erased(model, None, [2]):
        unchanged = read()
    assert inside < 1e-3 * spread(before) and torch.equal(unchanged.resid, before.resid)


def test_equal_texts_are_written_once_and_a_killed_call_writes_the_missing_ones(
    read: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    model, tokenizer, acts = read
    vectors = agent_vectors(acts["last"])
    own = sk.leace(joined(acts), "class")
    erasers = {AGENTS: own, INJECTED: injected(vectors, 1, own)}
    inputs: Any = SimpleNamespace(test=debates(1, 40), openings=())
    choice = Choice("trace", "last", 1, erasing.EXTENT, 2.0)
    generate, written = sk.generate, list[Any]()

    def counted(*given: Any, **how: Any) -> Any:
        written.append(how)
        if len(written) == 7:
            raise KeyboardInterrupt
        return generate(*given, **how)

    def call(log: Path | None) -> pd.DataFrame:
        return texts(model, tokenizer, inputs, erasers, vectors, choice, Setting(max_new_tokens=2), log)

    monkeypatch.setattr(sk, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path / "texts.jsonl")
    found = call(tmp_path / "texts.jsonl")
    # unerased: trace, tag, vector, no agent; names erased: the same, the last one at two sets of layers; injected: two
    assert len(written) == 7 + 5 == (4 + 5 + 2) + 1
    plain = found[~found["given"]].groupby(["erasure", "identity"])["text"].agg(list)
    assert plain["none", TRACE] == plain["none", TAG] == plain["none", VECTOR]
    assert plain[AGENTS, TRACE] == plain[AGENTS, TAG]
    assert len(found) == 3 * (6 + 6 + 2) and found.equals(call(None))


def test_what_survives_is_the_ratio_of_paired_gains_over_nobody_named_with_the_same_erasure() -> None:
    scores = {  # (identity, given, erasure) -> ROUGE-L of three questions
        (TAG, False, "none"): [0.1, 0.2, 0.3], (TAG, False, "agents"): [0.1, 0.1, 0.1],
        (TAG, True, "none"): [0.9, 0.8, 1.0], (TAG, True, "agents"): [0.2, 0.1, 0.2],
        (VECTOR, False, "none"): [0.1, 0.2, 0.3], (VECTOR, False, "agents"): [0.1, 0.1, 0.2],
        (VECTOR, True, "none"): [0.5, 0.4, 0.6], (VECTOR, True, "agents"): [0.3, 0.3, 0.3],
        (VECTOR, False, "injected"): [0.1, 0.2, 0.3], (VECTOR, True, "injected"): [0.2, 0.3, 0.4],
    } | {
        (identity, given, f"shuffled {k}"): [given * 0.3 + 0.1 * k] * 3
        for identity in (TAG, VECTOR) for given in (False, True) for k in range(2)
    }  # fmt: skip
    rows = pd.DataFrame(
        [
            {"question": f"q{i}", "agent": agent, "identity": identity, "given": given, "erasure": name,
             "rouge_l": value + shift}
            for (identity, given, name), values in scores.items()
            for i, value in enumerate(values)
            for agent, shift in (("1", 0.05), ("2", -0.05))
        ]
    )  # fmt: skip
    found = survival(rows).set_index(["identity", "erasure", "quantity"])
    assert found.loc[(TAG, "none", "gain"), "mean"] == pytest.approx((0.8 + 0.6 + 0.7) / 3)
    assert found.loc[(TAG, "agents", "gain"), "mean"] == pytest.approx((0.1 + 0 + 0.1) / 3)
    assert found.loc[(VECTOR, "shuffled", "gain"), "mean"] == pytest.approx(0.3)
    assert found.loc[(VECTOR, "shuffled", "gain"), "k"] == 2
    survives = ratio([0.2, 0.2, 0.1], [0.4, 0.2, 0.3])
    row = found.loc[(VECTOR, "agents", "survives")]
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((survives.value, survives.low, survives.high))
    assert found.loc[(VECTOR, "injected", "survives"), "mean"] == pytest.approx(0.3 / 0.9)
    assert found.loc[(TAG, "agents", "cost"), "mean"] == pytest.approx(-0.1)
    assert found.loc[(TAG, "shuffled", "cost"), "mean"] == pytest.approx(0.05 - 0.2)
    assert set(found["n"]) == {3} and (TAG, "injected", "gain") not in found.index
    weak = rows.assign(rouge_l=rows["rouge_l"].where(rows["given"].eq(False), 0.2))  # a gain of 0
    none = survival(weak).set_index("quantity")
    assert none.loc["survives", "mean"].isna().all() and none.loc["gain", "mean"].notna().all()


@pytest.mark.filterwarnings("ignore:expected convergence")  # probes of 15 questions
def test_the_command_writes_the_tables_of_both_checkpoints_and_resumes(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    run = write_run(tmp_path / "run", debates(15), debates(10, 40))
    monkeypatch.setattr(erasing, "choose", lambda *_: (Choice("trace", "mean", 1, erasing.EXTENT, 2.0), None))
    call = [str(run), "--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    for one in ("validation=2", "test=3", "coefficients=[1.0]", "shuffles=2", "max_new_tokens=5"):
        call += ["--set", one]
    erasing.main(call)
    tables = {
        name: read_table(tmp_path / "results" / f"erasure_{name}.csv")
        for name in ("separability", "choice", "changes", "survival")
    }
    separable, meta = tables["separability"]
    assert meta["seed"] == 3 and str(tmp_path) not in str(meta)
    assert set(separable["stage"]) == {"SFT", "IMAD"} and set(separable["position"]) == set(POSITIONS)
    assert set(separable["features"]) >= {"resid", "erased", "erased together"}
    accuracy = separable.groupby("features")["accuracy"].mean()
    assert accuracy["erased"] < accuracy["erased_shuffled"] <= accuracy["resid"]
    assert tables["choice"][0]["layer"].tolist() == [1, 1]
    survived = tables["survival"][0]
    gains = survived[survived["quantity"] == "gain"]
    assert gains.groupby("stage").size().to_dict() == {"SFT": 13, "IMAD": 13} and set(survived["n"]) == {3}
    changed = tables["changes"][0]
    assert set(changed["erasure"]) == {AGENTS, "shuffled 0", "shuffled 1", VARIANCE, INJECTED}
    assert read_rows(tmp_path / "out" / "SFT" / "texts.jsonl")
    monkeypatch.setattr(erasing, "at_stage", None)
    erasing.main(call)
    assert read_table(tmp_path / "out" / "erasure_survival.csv")[0].equals(survived)
    with pytest.raises(SystemExit):
        erasing.main([*call, "--set", "tests=3"])
    assert "tests" in capsys.readouterr().err
