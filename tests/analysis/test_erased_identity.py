"""Erased identity: what is erased where, which gain survives, and what the command writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import steerkit as sk
from analysis.agents.activations import turn_activations
from analysis.agents.choose import Choice
from analysis.probes import erased as erasing
from analysis.probes.erased import TAG, VECTOR, erased, first_round, joined, survival
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


def test_only_turns_of_round_1_are_read_and_all_positions_are_joined() -> None:
    model, tokenizer = attentive(), tiny_tokenizer()
    acts = first_round(turn_activations(model, tokenizer, debates(4), "trace"))
    assert {position: len(one) for position, one in acts.items()} == dict.fromkeys(("last", "mean", "first", "tag"), 12)
    names = joined(acts)
    assert len(names) == 48 and names.items["label"].value_counts().to_dict() == {"1": 16, "2": 16, "3": 16}
    torch.testing.assert_close(names.resid[:12], next(iter(acts.values())).resid)


def test_inside_the_with_the_agents_have_equal_means_after_an_erased_block_and_outside_they_do_not() -> None:
    model, tokenizer = attentive(), tiny_tokenizer()

    def read() -> sk.Activations:
        return first_round(turn_activations(model, tokenizer, debates(12), "trace"))["tag"]

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


def test_what_survives_is_the_ratio_of_paired_gains_over_nobody_named_with_the_same_erasure() -> None:
    scores = {  # (identity, given, erasure) -> ROUGE-L of three questions
        (TAG, False, "none"): [0.1, 0.2, 0.3], (TAG, False, "agents"): [0.1, 0.1, 0.1],
        (TAG, True, "none"): [0.9, 0.8, 1.0], (TAG, True, "agents"): [0.2, 0.1, 0.2],
        (VECTOR, False, "none"): [0.1, 0.2, 0.3], (VECTOR, False, "agents"): [0.1, 0.1, 0.2],
        (VECTOR, True, "none"): [0.5, 0.4, 0.6], (VECTOR, True, "agents"): [0.3, 0.3, 0.3],
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
    found = survival(rows).set_index(["identity", "quantity"])
    assert found.loc[(TAG, "gain"), "mean"] == pytest.approx((0.8 + 0.6 + 0.7) / 3)
    assert found.loc[(TAG, "gain, agents erased"), "mean"] == pytest.approx((0.1 + 0 + 0.1) / 3)
    assert found.loc[(VECTOR, "gain, shuffled erased"), "mean"] == pytest.approx(0.3)
    assert found.loc[(VECTOR, "gain, shuffled erased"), "k"] == 2
    survives = ratio([0.2, 0.2, 0.1], [0.4, 0.2, 0.3])
    row = found.loc[(VECTOR, "survives")]
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((survives.value, survives.low, survives.high))
    assert found.loc[(TAG, "cost"), "mean"] == pytest.approx(-0.1)
    assert found.loc[(TAG, "cost shuffled"), "mean"] == pytest.approx(0.05 - 0.2)
    assert set(found["n"]) == {3}


def test_the_command_writes_the_tables_of_both_checkpoints_and_resumes(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    run = write_run(tmp_path / "run", debates(15), debates(10, 40))
    monkeypatch.setattr(erasing, "choose", lambda *_: (Choice("trace", "mean", 1, "all", 2.0), None))
    call = [str(run), "--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    for one in ("validation=2", "test=3", "coefficients=[1.0]", "shuffles=2", "max_new_tokens=5"):
        call += ["--set", one]
    erasing.main(call)
    tables = {
        name: read_table(tmp_path / "results" / f"erasure_{name}.csv")
        for name in ("separability", "choice", "survival")
    }
    separable, meta = tables["separability"]
    assert meta["seed"] == 3 and str(tmp_path) not in str(meta)
    assert set(separable["stage"]) == {"SFT", "IMAD"} and set(separable["position"]) == {"tag", "first", "mean", "last"}
    assert set(separable["features"]) == {"resid", "erased", "erased_shuffled"} and set(separable["n_groups"]) == {15}
    accuracy = separable.groupby("features")["accuracy"].mean()
    assert accuracy["erased"] < accuracy["erased_shuffled"] <= accuracy["resid"]
    assert tables["choice"][0]["layer"].tolist() == [1, 1]
    survived = tables["survival"][0]
    assert len(survived) == 2 * 2 * 7 and set(survived["n"]) == {3}
    monkeypatch.setattr(erasing, "at_stage", None)
    erasing.main(call)
    assert read_table(tmp_path / "out" / "erasure_survival.csv")[0].equals(survived)
    with pytest.raises(SystemExit):
        erasing.main([*call, "--set", "tests=3"])
    assert "tests" in capsys.readouterr().err
