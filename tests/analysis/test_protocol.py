"""The paper's protocol: areas by hand, controls as triples, what a planted direction shows, and a run that resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import steerkit as sk
from analysis.agents.activations import turn_activations
from analysis.agents.contexts import by_tag, first_texts, unnamed
from analysis.agents.vectors import agent_vectors
from analysis.inputs import BASE, IMAD, SFT, Inputs
from analysis.paper import plant as planting
from analysis.paper import protocol
from analysis.paper.plant import Plant, plant, planted_directions
from analysis.paper.pooling import pool_protocol
from analysis.paper.protocol import Protocol, areas, compared, random_triples, run_protocol, sft_vectors, steered
from steerkit.scores.text import rouge_l
from tests.analysis.test_analysis import traces
from tests.tiny import tiny_model, tiny_tokenizer

SMALL = Protocol(
    coefficients=(1.0, 2.0), doses=(0.5,), controls=2, layers=(1, 2), train=4, validation=2, test=3, max_new_tokens=5,
    plant=Plant(steps=2, batch=4, debates=3),
)  # fmt: skip


def model() -> tuple:
    return tiny_model("llama", context=1024), tiny_tokenizer()


def written(values: dict[tuple[str, int, float], float]) -> pd.DataFrame:
    rows = [
        (kind, number, "coefficient", strength, f"q{i}", agent, value + i / 100)
        for (kind, number, strength), value in values.items()
        for i in range(12)
        for agent in "12"
    ]
    columns = ["kind", "number", "grid", "strength", "question", "agent", "rouge_l"]
    return pd.DataFrame(rows, columns=columns)


def test_an_area_is_the_mean_of_the_curve_and_above_is_what_the_push_adds() -> None:
    found = areas(written({("own", 0, 0.0): 0.2, ("own", 0, 1.0): 0.6, ("own", 0, 2.0): 0.4}))
    first = found[found["question"] == "q0"].iloc[0]
    assert first["area"] == pytest.approx(((0.2 + 0.6) / 2 + (0.6 + 0.4) / 2) / 2)
    assert first["above"] == pytest.approx(first["area"] - 0.2)
    assert len(found) == 12


def test_the_own_triple_is_one_more_draw_beside_the_control_triples() -> None:
    rng = np.random.default_rng(0)
    values = {("own", 0, 0.0): 0.2, ("own", 0, 1.0): 0.9}
    for k in range(19):
        values |= {("random", k, 0.0): 0.2, ("random", k, 1.0): 0.2 + 0.05 * rng.normal()}
    table = compared(areas(written(values))).set_index("kind")
    assert table.loc["own", "over"] == "random" and table.loc["own", "k"] == 19
    assert table.loc["own", "gain"] == pytest.approx(0.35, abs=0.03) and table.loc["own", "low"] > 0
    assert table.loc["own", "p_rank"] == pytest.approx(0.05) and pd.isna(table.loc["random", "over"])
    inert = compared(areas(written({**values, ("own", 0, 1.0): 0.2}))).set_index("kind")
    assert inert.loc["own", "low"] < 0 < inert.loc["own", "high"]


def test_every_agent_is_steered_by_its_own_direction_of_each_triple() -> None:
    loaded, held = model(), traces(3)
    own = {a: v.unit() for a, v in agent_vectors(turn_activations(*loaded, held)["last"]).items()}
    sets = {"own": [own], "random": random_triples(own, 2, 0)}
    table = steered(*loaded, held, by_tag, sets, 2, SMALL, ("first", "so", "third"))
    assert len(table) == 3 * 3 * (1 + 2) * (2 + 1 + 2)  # questions, agents, triples; strengths with 0 for each grid
    assert set(table["grid"]) == {"coefficient", "dose"} and set(table["speaks"]) <= {0.0, 1.0}
    row = table[(table["kind"] == "own") & (table["agent"] == "2") & (table["strength"] == 2.0)].iloc[1]
    trace = next(one for one in held if one.question == row["question"])
    alone = sk.sweep(
        *loaded,
        {"v": own["2"]},
        [{"prompt": by_tag(loaded[1], trace, "2"), "id": trace.question}],
        coefficients=[2.0],
        layers=[2],
        positions="generated",
        temperature=0.7,
        top_p=0.9,
        max_new_tokens=5,
        foreign=True,
    ).table
    text = alone.loc[alone["coefficient"] == 2.0, "text"].iloc[0]
    (score,) = protocol.rouge_l([protocol.first_turn(text).text], [first_texts(trace)["2"]])
    assert row["rouge_l"] == pytest.approx(score, nan_ok=True)
    zero = table[table["strength"] == 0]
    assert zero.groupby(["grid", "question", "agent"])["rouge_l"].nunique(dropna=False).max() == 1


def test_controls_with_fewer_coefficients_are_compared_with_the_own_directions_at_these() -> None:
    loaded, held = model(), traces(3)
    own = {a: v.unit() for a, v in agent_vectors(turn_activations(*loaded, held)["last"]).items()}
    sets = {"own": [own], "random": random_triples(own, 2, 0)}
    few = replace(SMALL, control_coefficients=(2.0,))
    table, whole = (steered(*loaded, held, by_tag, sets, 2, one) for one in (few, SMALL))
    assert set(table.loc[table["kind"] == "random", "grid"]) == {"controls"}
    assert set(table.loc[table["kind"] == "own", "grid"]) == {"coefficient", "dose", "controls"}
    keys = ["kind", "number", "agent", "question", "strength"]
    there = table[table["grid"] == "controls"].set_index(keys)["rouge_l"]
    same = whole[whole["grid"] == "coefficient"].set_index(keys)["rouge_l"]
    pd.testing.assert_series_equal(there.sort_index(), same.loc[there.index].sort_index())
    found = compared(areas(table.assign(rouge_l=table["rouge_l"].fillna(0)))).set_index(["grid", "kind"])
    assert found.loc[("controls", "own"), "over"] == "random"
    assert pd.isna(found.loc[("coefficient", "own"), "over"])
    with pytest.raises(ValueError, match="control_coefficients"):
        replace(SMALL, control_coefficients=(9.0,))


def inputs(monkeypatch: pytest.MonkeyPatch) -> Inputs:
    monkeypatch.setattr(sk, "load", lambda *_, **__: model())
    held = traces(12)
    return Inputs({BASE: "x", SFT: "y", IMAD: "z"}, tuple(held[:5]), tuple(held[5:8]), tuple(held[8:]), unnamed)


def test_vectors_are_made_once_at_sft_of_unit_length_and_shuffled_ones_have_other_names(monkeypatch) -> None:
    own, shuffled = sft_vectors(inputs(monkeypatch), SMALL)
    assert set(own) == {"1", "2", "3"} and len(shuffled) == 2
    for vectors in (own, *shuffled):
        for vector in vectors.values():
            assert list(vector.norms().values()) == pytest.approx([1.0] * len(vector.layers), abs=1e-5)
    assert not torch.allclose(own["1"].layers[1], shuffled[0]["1"].layers[1])


def test_a_run_compares_every_stage_and_a_second_call_only_reads(tmp_path, monkeypatch) -> None:
    given = inputs(monkeypatch)
    table = run_protocol(given, SMALL, tmp_path / "seed-7" / "protocol")
    assert set(zip(table["stage"], table["context"], strict=True)) == {
        (BASE, "tagged"), (BASE, "cast"), (SFT, "tagged"), (IMAD, "tagged"), (protocol.PLANTED_BASE, "tagged")
    }  # fmt: skip
    assert set(table["kind"]) == {"own", "random", "shuffled", "planted"} and table["layer"].nunique() == 1
    over = table[table["kind"] == "own"]
    assert set(over["over"]) == {"random", "shuffled"} and set(over["k"]) == {2.0}
    monkeypatch.setattr(protocol, "steered", lambda *_, **__: pytest.fail("steered again"))
    again = run_protocol(given, SMALL, tmp_path / "seed-7" / "protocol")
    pd.testing.assert_frame_equal(table, again)
    pooled = pool_protocol({7: tmp_path / "seed-7"})
    measures = set(pooled.loc[pooled["stage"] == IMAD, "measure"])
    assert {"area, own", "area over base", "area over base with its own prompt", "area over random"} <= measures
    line = pooled[(pooled["stage"] == IMAD) & (pooled["measure"] == "area over base")].iloc[0]
    assert line["value"] == pytest.approx(0, abs=1e-9)  # the three checkpoints are one model here


def test_a_reference_whose_letters_the_tokenizer_does_not_see_has_no_score_and_no_area() -> None:
    about = {"vector": "own 0", "prompt_id": ["q", "r"], "relative_dose": 0.0}
    table = pd.DataFrame({**about, "coefficient": 0.0, "text": ["\u0434\u0430", "..."]})
    seen = {("q", "1"): "\u0434\u0430", ("r", "1"): "yes"}
    with pytest.warns(UserWarning, match="Pass tokenizer='unicode'"):
        scored = protocol._scored(table, "1", seen, {("coefficient", 1.0): 1.0}, ())
    assert np.isnan(scored["rouge_l"].iloc[0]) and scored["rouge_l"].iloc[1] == 0.0
    words = protocol._scored(table, "1", seen, {("coefficient", 1.0): 1.0}, (), "unicode")["rouge_l"]
    assert words.tolist() == [1.0, 0.0]
    both = pd.concat([scored, scored.assign(strength=1.0)])
    assert areas(both)["question"].tolist() == ["r"]


def test_a_run_that_is_resumed_adds_the_vectors_that_it_began_with(tmp_path, monkeypatch) -> None:
    given, few = inputs(monkeypatch), replace(SMALL, plant=None, layers=(1,))
    table = run_protocol(given, few, tmp_path)
    for path in (*tmp_path.glob("*.parquet"), tmp_path / "layers.csv"):
        path.unlink()
    monkeypatch.setattr(protocol, "turn_activations", lambda *_, **__: pytest.fail("read again"))
    pd.testing.assert_frame_equal(table, run_protocol(given, few, tmp_path))


def test_a_planted_direction_selects_its_agent_and_a_random_one_does_not() -> None:
    loaded, held = model(), traces(6)
    own = agent_vectors(turn_activations(*loaded, held)["last"])
    directions = planted_directions(own["1"], sorted(own), seed=0)
    setting = Plant(steps=150, batch=16, learning_rate=3e-3, debates=6)
    losses = plant(*loaded, held, directions, 1, setting)
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    prompts = [by_tag(loaded[1], trace, "1") for trace in held]

    def told(agent: str, vector: sk.SteeringVector) -> float:
        """The mean ROUGE-L to an agent's texts of what is written after agent 1's tag, pushed along a direction."""
        push = sk.Steering(vector.at(1), 3.0, "generated", foreign=True)
        written = sk.generate(*loaded, prompts, steering=push, max_new_tokens=24)
        return float(np.mean(rouge_l(written, [first_texts(trace)[agent] for trace in held])))

    for agent in "123":
        others = [told(agent, directions[other]) for other in "123" if other != agent]
        assert told(agent, directions[agent]) > max(others) + 0.1
        assert told(agent, directions[agent]) > told(agent, sk.random_like(own["1"], 5).unit()) + 0.1


class Killed(Exception):
    pass


@pytest.mark.parametrize("behind", [False, True])
def test_a_planting_that_was_killed_ends_with_the_weights_of_one_that_was_not(behind, tmp_path, monkeypatch) -> None:
    held = traces(4)
    own = agent_vectors(turn_activations(*model(), held)["last"])
    directions = planted_directions(own["1"], sorted(own), seed=0)
    setting = Plant(steps=5, batch=4, debates=4, save_every=2, doses=(0.1, 0.5), later_blocks=behind)

    def run(state: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
        planted, tokenizer = model()
        return plant(planted, tokenizer, held, directions, 1, setting, state), planted.state_dict()

    losses, weights = run(tmp_path / "whole.pt")
    plain, seen = planting._loss, []

    def stop(*arguments: object) -> torch.Tensor:
        seen.append(arguments)
        if len(seen) == 4:
            raise Killed
        return plain(*arguments)

    monkeypatch.setattr(planting, "_loss", stop)
    with pytest.raises(Killed):
        run(tmp_path / "cut.pt")
    monkeypatch.undo()
    resumed, again = run(tmp_path / "cut.pt")
    assert resumed == losses and all(torch.equal(again[name], value) for name, value in weights.items())
    monkeypatch.setattr(planting, "_loss", lambda *_: pytest.fail("trained again"))
    finished, kept = run(tmp_path / "cut.pt")
    assert finished == losses and all(torch.equal(kept[name], value) for name, value in weights.items())
    fresh, changed = model()[0].state_dict(), "model.layers.{}.mlp.up_proj.weight".format
    assert torch.equal(weights[changed(1)], fresh[changed(1)]) == behind
    assert not torch.equal(weights[changed(2)], fresh[changed(2)])


class OnMeta(torch.nn.Module):
    """One block and logits, on a device that is not the CPU; it takes inputs of that device alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = torch.nn.Embedding(9, 4, device="meta"), torch.nn.Linear(4, 4, device="meta")

    def forward(self, logits_to_keep: int, **inputs: torch.Tensor) -> Any:
        assert {value.device.type for value in inputs.values()} == {"meta"}
        return SimpleNamespace(logits=self.block(self.embed(inputs["input_ids"]))[:, -logits_to_keep:])


def test_the_loss_of_planting_is_computed_on_the_device_of_the_model() -> None:
    loaded = OnMeta()
    batch = planting.Batch([(1, 2, 3, 4), (1, 2, 3)], [2, 1], [torch.ones(4), torch.zeros(4)])
    loss = planting._loss(loaded, batch, {1: loaded.block})
    loss.backward()
    assert loss.device.type == "meta" and loaded.block.weight.grad is not None


def test_controls_at_doses_are_compared_with_the_own_directions_at_these() -> None:
    loaded, held = model(), traces(3)
    own = {a: v.unit() for a, v in agent_vectors(turn_activations(*loaded, held)["last"]).items()}
    sets = {"own": [own], "random": random_triples(own, 2, 0)}
    few = replace(SMALL, doses=(0.2, 0.5), control_doses=(0.5,))
    table = steered(*loaded, held, by_tag, sets, 2, few)
    controls = table[table["grid"] == "controls"]
    assert set(controls["strength"]) == {0.0, 0.5} and set(controls["kind"]) == {"own", "random"}
    keys = ["kind", "number", "agent", "question", "strength"]
    there = controls[controls["kind"] == "own"].set_index(keys)["rouge_l"]
    same = table[table["grid"] == "dose"].set_index(keys)["rouge_l"]
    pd.testing.assert_series_equal(there.sort_index(), same.loc[there.index].sort_index())
    with pytest.raises(ValueError, match=r"control_doses among \(0.2, 0.5\)"):
        replace(few, control_doses=(0.3,))
    with pytest.raises(ValueError, match="got both"):
        replace(few, control_coefficients=(2.0,))
