"""Settings are chosen on validation debates and frozen; what the texts say decides, and a finished stage stays."""

from __future__ import annotations

import random
from dataclasses import replace

import pandas as pd
import pytest
import torch

import steerkit as sk
from analysis.agents import choose as choosing
from analysis.agents import steer
from analysis.agents.activations import activations_of
from analysis.agents.choose import Grid, choose
from analysis.agents.contexts import by_cast, by_tag, unnamed
from analysis.agents.continuations import continuations
from analysis.agents.geometry import plane
from analysis.agents.speaker import FirstTurn, by_format, first_turn
from analysis.agents.vectors import agent_vectors
from analysis.inputs import Inputs
from analysis.own_debates import main
from steerkit.capture.activations import Activations
from steerkit.generation.generator import InProcess
from steerkit.io.run_folder import ConfigurationChanged
from steerkit.io.tables import read_table
from steerkit.sweeps.result import SweepResult
from steerkit.text.tags import tags
from steerkit.text.tokens import decode
from steerkit.text.traces import write_traces
from tests.analysis.test_analysis import traces
from tests.tiny import tiny_model, tiny_tokenizer
from training.debates.personas import CASTS
from training.toy.worlds import WORLDS

SMALL = Grid(
    sources=("asked", "plain"), positions=("last", "mean"), layers=(1, 2), coefficients=(1.0, 8.0), negative=(-1.0,),
    train=6, validation=4, test=3, controls=1, max_new_tokens=6,
)  # fmt: skip


def test_what_is_asked_is_read_where_the_answer_begins() -> None:
    model, tokenizer = tiny_model("llama", context=1024), tiny_tokenizer()
    held = traces(2)
    acts = activations_of(model, tokenizer, held, ("asked",), by_tag)["asked", "last"]
    alone = sk.collect(model, tokenizer, [by_tag(tokenizer, held[1], "3")], position="last")
    row = acts.items.index[(acts.items["group"] == "1+0") & (acts.items["label"] == "3")][0]
    assert len(acts.items) == 6
    assert acts.resid[row].sub(alone.resid[0]).abs().max() < 1e-4


def test_the_choice_gains_most_over_all_agents_at_the_mildest_coefficient_that_does_nearly_as_much(monkeypatch) -> None:
    gain = {0.0: 0.0, 0.5: 0.1, 1.0: 0.29, 2.0: 0.3, 8.0: 0.1}
    seen = []

    def scripted(model, tokenizer, held, vectors, layers, coefficients, before, extent, *rest, **_) -> SweepResult:
        seen.append(len(held))
        rows = [
            (v, layer, c, f"{t.question}/{a}", t.question, a, gain[c] * layer * (extent == "all") * (a != "3"))
            for v in vectors
            for layer in layers
            for c in (0.0, *coefficients)
            for t in held
            for a in vectors
        ]
        columns = ["vector", "layer", "coefficient", "prompt_id", "group", "agent", "rouge_l"]
        return SweepResult(pd.DataFrame(rows, columns=columns).assign(sample=0, text=""), {})

    monkeypatch.setattr(choosing, "continuations", scripted)
    model, tokenizer = tiny_model("llama", context=1024), tiny_tokenizer()
    held = traces(10)
    streams = activations_of(model, tokenizer, held[:4], SMALL.sources, by_tag)
    choice, tried = choose(model, tokenizer, streams, held[4:], replace(SMALL, coefficients=(0.5, 1.0, 2.0, 8.0)))
    assert (choice.layer, choice.extent, choice.coefficient) == (2, "all", 1.0)
    assert set(seen) == {4, 6}  # a quarter, but four at least; then all
    places = tried[tried["screened"]].drop_duplicates(["source", "position", "layer", "extent"])
    assert len(places) == 3 * 2 * 3  # asked last, plain last, plain mean; layers; extents


def test_a_choice_that_is_made_again_generates_nothing(tmp_path, monkeypatch) -> None:
    model, tokenizer = tiny_model("llama", context=1024), tiny_tokenizer()
    held = traces(8)
    streams = activations_of(model, tokenizer, held[:4], SMALL.sources, by_tag)
    plain = choose(model, tokenizer, streams, held[4:], SMALL)
    first = choose(model, tokenizer, streams, held[4:], SMALL, out=tmp_path)
    monkeypatch.setattr(InProcess, "decode", lambda *_: iter([]) if not _[2] else pytest.fail("generated again"))
    again = choose(model, tokenizer, streams, held[4:], SMALL, out=tmp_path)
    assert plain[0] == first[0] == again[0]
    for one in (first, again):
        pd.testing.assert_frame_equal(one[1], plain[1])


def test_the_plane_of_two_agents_has_what_the_turns_vary_by_as_second_axis() -> None:
    items = pd.DataFrame({"label": ["1", "2"] * 3, "group": list("aabbcc")})
    stream = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [1.0, 2, 0], [-1.0, 2, 0], [1.0, -2, 0], [-1.0, -2, 0]])
    acts = Activations(stream[:, None], (0,), items, {})
    vectors = {
        "1": sk.SteeringVector({0: torch.tensor([2.0, 0, 0])}),
        "2": sk.SteeringVector({0: torch.tensor([-2.0, 0, 0])}),
    }
    table = plane(vectors, acts, 0)
    assert sorted(table.loc[table["kind"] == "turn", "y"].abs()) == pytest.approx([0, 0, 2, 2, 2, 2])
    assert table.loc[table["kind"] == "vector", "y"].tolist() == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize("everywhere", [True, False])
def test_controls_may_be_left_to_sampled_texts_without_a_name(everywhere, tmp_path) -> None:
    loaded, held = (tiny_model("llama", context=1024), tiny_tokenizer()), traces(14)
    inputs = Inputs(
        {"base": "x"}, tuple(held[:6]), tuple(held[6:10]), tuple(held[10:]), by_cast(CASTS["adding"], "number")
    )
    object.__setattr__(inputs, "load", lambda _: loaded)
    grid = replace(SMALL, sources=("asked",), layers=(1,), extents=("all",), few_controls=not everywhere)
    tables = steer.at_stage("base", inputs, grid, tmp_path)
    for name, column in (("gains", "over"), ("curves", "role")):
        table = tables[name]
        random = table[table[column] == "random"]
        kinds = set(zip(random["score"], random["identity"], strict=True))
        assert ("rouge_l", False) in kinds and (kinds <= {("rouge_l", False), ("speaks", False)}) != everywhere
    own = tables["gains"][tables["gains"]["over"] == "coefficient 0"]
    assert set(zip(own["score"], own["identity"], strict=True)) >= {("fidelity", True), ("rouge_l", True)}


def test_without_identity_one_text_is_held_against_every_agent() -> None:
    model, tokenizer = tiny_model("llama", context=1024), tiny_tokenizer()
    held = traces(4)
    own = agent_vectors(activations_of(model, tokenizer, held, ("asked",), by_tag)["asked", "last"])
    pushed = own, [1], [2.0], unnamed, "all", 6
    table = continuations(model, tokenizer, held, *pushed).table
    key = ["vector", "layer", "coefficient", "group"]
    assert (table.groupby(key)["agent"].nunique() == 3).all()
    assert (table.groupby(key)["text"].nunique() == 1).all()
    assert table.groupby(key)["reference"].nunique().max() == 3


def test_what_follows_the_first_turn_is_not_scored(monkeypatch) -> None:
    from analysis.agents import continuations as module

    held = traces(1)
    said = "<|Round 1 - Initial Solutions|>\n\n<|Agent 2 Solution|>: so second 0\n\n<|Agent 3 Solution|>: third 0 it is"

    def swept(model, tokenizer, vectors, prompts, **_) -> SweepResult:
        columns = {"vector": "v", "layer": 1, "coefficient": 0.0, "sample": 0, "group": "0+0", "text": said}
        return SweepResult(pd.DataFrame([{"prompt_id": row["id"], **columns} for row in prompts]))

    monkeypatch.setattr(module.sk, "sweep", swept)
    table = continuations(None, None, held, {}, [1], [], unnamed, "all", 6).table.set_index("agent")
    assert table["rouge_l"].round(2).to_dict() == {"1": 0.4, "2": 1.0, "3": 0.29}
    assert table["speaks"].to_dict() == {"1": 0.0, "2": 1.0, "3": 0.0}
    assert set(table["text"]) == {"so second 0"} and set(table["whole"]) == {said}


def test_tags_that_are_special_tokens_end_a_turn_and_name_the_speaker(monkeypatch) -> None:
    from analysis.agents import continuations as module

    held, tokenizer = traces(1), tiny_tokenizer()
    said = "<|Round 1 - Initial Solutions|>\n\n<|Agent 2 Solution|>: so second 0\n\n<|Agent 3 Solution|>: third"

    def swept(model, tokenizer, vectors, prompts, **_) -> SweepResult:
        ids = tokenizer(said + "<|end|>")["input_ids"]
        columns = {"vector": "v", "layer": 1, "coefficient": 0.0, "sample": 0, "group": "0+0"}
        texts = {"ids": ids, "text": decode(tokenizer, ids)}
        return SweepResult(pd.DataFrame([{"prompt_id": row["id"], **columns, **texts} for row in prompts]))

    monkeypatch.setattr(module.sk, "sweep", swept)
    usual = continuations(None, tokenizer, held, {}, [1], [], unnamed, "all", 6).table.set_index("agent")
    tokenizer.add_special_tokens({"additional_special_tokens": list(tags())})
    special = continuations(None, tokenizer, held, {}, [1], [], unnamed, "all", 6).table.set_index("agent")
    assert set(special["text"]) == {"so second 0"} and set(special["whole"]) == {said}
    assert special["speaks"].to_dict() == {"1": 0.0, "2": 1.0, "3": 0.0}
    pd.testing.assert_frame_equal(special.drop(columns="ids"), usual.drop(columns="ids"))


def test_who_speaks_after_an_agents_tag_is_unknown_without_openings() -> None:
    model, tokenizer = tiny_model("llama", context=1024), tiny_tokenizer()
    held = traces(2)
    own = agent_vectors(activations_of(model, tokenizer, held, ("asked",), by_tag)["asked", "last"])
    pushed = own, [1], [2.0], by_tag, "all", 6
    assert continuations(model, tokenizer, held, *pushed).table["speaks"].isna().all()
    known = continuations(model, tokenizer, held, *pushed, openings=("first", "so", "third")).table["speaks"]
    assert set(known) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("said", "text", "agent"),
    [
        ("<|Round 1 - Initial Solutions|>\n\n<|Agent 2 Solution|>: 4 <|Consensus|> 4", "4", 2),
        ("<|Agent 3 Solution|>: x = 4", "x = 4", 3),
        (" step 1: 4\n\n<|Agent 2 Solution|>: 5", "step 1: 4", 1),
        ("x = 4; y", "x = 4; y", 3),
        ("4", "4", None),
        ("", "", None),
        ("<|Consensus|> 4", "", None),
        ("<|Round 1 - Initial Solutions|>", "", None),
    ],
)
def test_the_first_turn_is_told_by_its_tag_or_its_format(said: str, text: str, agent: int | None) -> None:
    assert first_turn(said, ("step 1", "fools", "x =")) == FirstTurn(text, agent)
    assert by_format("x = 4", ("x", "x =")) is None  # two agents open like this


def test_every_agent_of_a_world_opens_as_no_other() -> None:
    rng = random.Random(0)
    for world in WORLDS.values():
        for problem in world.problems(20, 0, "train"):
            for number, persona in enumerate(world.personas, 1):
                assert by_format(world.write(problem, persona, rng), world.openings) == number
    for cast in (CASTS["adding"], CASTS["scorning"]):
        for number, persona in enumerate(cast.personas, 1):
            assert {by_format(answer, cast.openings) for _, answer in persona.worked} == {number}
        assert by_format(r"38 + 26 = 64. The answer is \boxed{64}.", cast.openings) is None  # no agent writes so


def test_an_analysis_leaves_a_table_of_every_kind_and_a_second_call_only_reads(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sk, "load", lambda *_, **__: (tiny_model(context=1024), tiny_tokenizer()))
    write_traces(tmp_path / "traces.jsonl", traces(40))
    sizes = ['sources=["asked"]', "layers=[1]", "coefficients=[1]", "negative=[]", "validation=4", "test=3"]
    weights = tmp_path / "y" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"first")
    call = ["--traces", str(tmp_path / "traces.jsonl"), "--stage", "base=x", "--stage", f"IMAD={weights.parent}"]
    call += ["--out", str(tmp_path / "out"), "--set", "max_new_tokens=5", "--set", "controls=1"]
    call += [part for size in sizes for part in ("--set", size)]
    main([*call, "--only", "IMAD"])
    assert (tmp_path / "out" / "stages" / "imad" / "gains.csv").exists() and not (
        tmp_path / "out" / "gains.csv"
    ).exists()
    with pytest.raises(ValueError, match=r"expected checkpoints among \['base', 'IMAD'\]; got \['SFT'\]"):
        main([*call, "--only", "SFT"])
    main(call)
    gains = read_table(tmp_path / "out" / "gains.csv")[0]
    assert set(gains["stage"]) == {"base", "IMAD"} and set(gains["over"]) == {
        "coefficient 0", "random", "matched", "shuffled"
    }  # fmt: skip
    curves = read_table(tmp_path / "out" / "curves.csv")[0]
    assert set(zip(curves["kind"], curves["role"], strict=True)) == {
        ("own", "vector"), ("other agents", "other"), ("random", "random"), ("matched", "matched"),
        ("shuffled", "shuffled"),
    }  # fmt: skip
    assert set(gains["score"]) == {"rouge_l", "speaks", "fidelity"}
    assert read_table(tmp_path / "out" / "low_dose.csv")[0]["difference"].abs().max() == pytest.approx(0)
    areas = read_table(tmp_path / "out" / "stage_differences.csv")[0]
    assert areas["difference"].abs().max() == pytest.approx(0)  # both stages are the same model here
    cosines = read_table(tmp_path / "out" / "checkpoint_cosines.csv")[0]
    assert len(cosines) == 3 * 4 * 2 * 2 and cosines["cosine"].to_numpy() == pytest.approx(1, abs=1e-5)
    choice = read_table(tmp_path / "out" / "choice.csv")[0]
    assert list(choice["settings_tried"]) == [3, 3] and (choice["relative_dose"] > 0).all()
    before = (tmp_path / "out" / "curves.csv").read_bytes()
    monkeypatch.setattr(steer, "at_stage", pytest.fail)
    main(call)
    assert (tmp_path / "out" / "curves.csv").read_bytes() == before
    weights.write_bytes(b"trained anew")
    with pytest.raises(ConfigurationChanged, match=r"stages\.IMAD\.files_sha256"):
        main(call)
    with pytest.raises(SystemExit):
        main([*call, "--set", "tests=3"])
