"""The analyses' parts against what one would do by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import steerkit as sk
from analysis import stored
from analysis.agents import fidelity as fidelity_module
from analysis.agents.activations import turn_activations
from analysis.agents.contexts import by_cast, by_tag, first_texts, other_ids, tag_alone, unnamed
from analysis.agents.fidelity import fidelity
from analysis.agents.reliability import reliability
from analysis.agents.vectors import agent_controls, agent_vectors, within_labels
from analysis.inputs import Inputs, asked_as, inputs_of_files
from analysis.paper.main_table import main, read_runs
from analysis.paper.main_table import main_table as table_of_methods
from steerkit.capture.activations import Activations
from steerkit.io.run_folder import ConfigurationChanged, check_config
from steerkit.io.tables import read_table, write_table
from steerkit.text.tags import agent_tag, round_tag
from steerkit.text.traces import DebateTrace, Turn, write_traces
from steerkit.vectors.controls import shuffle_labels
from tests.tiny import tiny_model, tiny_tokenizer
from training.debates.personas import cast_of

SAID = {1: "first {}", 2: "so second {}", 3: "third {} it is"}


def traces(count: int = 6) -> list[DebateTrace]:
    found = []
    for number in range(count):
        turns = [Turn(a, r, text.format(number)) for r in (1, 2) for a, text in SAID.items()]
        found.append(DebateTrace.of(f"{number}+0", turns, f"All agents agree on \\boxed{{{number}}}", str(number)))
    return found


def test_the_tag_position_reads_what_the_model_knows_right_after_an_agents_tag() -> None:
    model, tokenizer = tiny_model("llama", context=1024), tiny_tokenizer()
    one = traces(1)
    tag = turn_activations(model, tokenizer, one)["tag"]
    text = one[0].prompt + one[0].body
    for row, turn in enumerate(one[0].turns):
        opened = text.index(round_tag(turn.round), len(one[0].prompt))
        stop = text.index(agent_tag(turn.agent, turn.round), opened) + len(agent_tag(turn.agent, turn.round))
        before = sk.collect(model, tokenizer, [text[:stop]]).resid[0]
        torch.testing.assert_close(tag.resid[row], before, rtol=1e-4, atol=1e-5)
    assert list(tag.items["label"]) == ["1", "2", "3"] * 2
    assert "tag" not in turn_activations(model, tokenizer, one, "plain")


def test_controls_have_the_agents_mean_norm_and_labels_are_permuted_within_a_question_only() -> None:
    model, tokenizer = tiny_model("llama", context=1024), tiny_tokenizer()
    acts = turn_activations(model, tokenizer, traces())["mean"]
    own = agent_vectors(acts)
    norm = {layer: np.mean([float(own[a].layers[layer].norm()) for a in own]) for layer in own["1"].layers}
    for name, control in agent_controls(acts, own, 2, 0).items():
        assert name.split()[0] in ("random", "matched", "shuffled")
        assert control.norms() == pytest.approx(norm)
        assert control.meta["role"] == name.split()[0]
    mixed = shuffle_labels(acts, 3)
    for (_, a), (_, b) in zip(acts.items.groupby("group"), mixed.items.groupby("group"), strict=True):
        assert sorted(a["label"]) == sorted(b["label"])
    assert list(mixed.items["label"]) != list(acts.items["label"])


def test_the_agents_controls_are_those_of_the_library_with_a_seed_each() -> None:
    model, tokenizer = tiny_model("llama", context=1024), tiny_tokenizer()
    acts = turn_activations(model, tokenizer, traces())["mean"]
    own = agent_vectors(acts)
    controls = agent_controls(acts, own, 4, 7)
    kinds = ("random", "matched", "shuffled")
    assert list(controls) == [f"{kind} {number}" for number in range(4) for kind in kinds]
    assert list(agent_controls(acts, own, 2, 7)) == list(controls)[:6]  # the curves show the first directions
    norm = {layer: np.mean([float(own[a].layers[layer].norm()) for a in own]) for layer in own["1"].layers}
    for number in range(4):
        agent = str(1 + number % 3)
        permuted = agent_vectors(shuffle_labels(acts, 7 + number, balanced=True))[agent].unit()
        random, matched = (
            sk.random_like(own["1"], 7 + number).unit(),
            sk.controls.matched(own["1"], within_labels(acts), 1, 7 + number),
        )
        expected = {"random": random, "matched": matched["vector/matched-0"].unit(), "shuffled": permuted}
        for kind, vector in expected.items():
            for layer, value in controls[f"{kind} {number}"].layers.items():
                torch.testing.assert_close(value, vector.layers[layer] * norm[layer], rtol=1e-5, atol=1e-6)


def test_within_labels_nothing_of_the_agents_means_is_left() -> None:
    model, tokenizer = tiny_model("llama", context=1024), tiny_tokenizer()
    acts = turn_activations(model, tokenizer, traces())["mean"]
    within = within_labels(acts)
    labels = acts.items["label"].tolist()
    for agent in set(labels):
        members = [i for i, label in enumerate(labels) if label == agent]
        torch.testing.assert_close(within.resid[members].mean(0), acts.resid.mean(0), atol=1e-4, rtol=1e-4)
        spread = acts.resid[members] - acts.resid[members].mean(0)
        torch.testing.assert_close(within.resid[members] - within.resid[members].mean(0), spread, atol=1e-4, rtol=1e-3)
    assert max(float(v.norm()) for one in agent_vectors(within).values() for v in one.layers.values()) < 1e-3


def test_a_matched_direction_points_where_the_stream_varies_and_an_isotropic_one_does_not() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 1, 50))
    rows[:, 0, 0] *= 30
    items = pd.DataFrame({"text": range(200), "label": "1", "group": range(200), "start": 0, "n_tokens": 1})
    acts = Activations(torch.tensor(rows, dtype=torch.float32), (0,), items)
    like = sk.SteeringVector({0: torch.ones(50)})
    along = [abs(float(v.unit().layers[0][0])) for v in sk.controls.matched(like, acts, n=20).values()]
    isotropic = [abs(float(sk.random_like(like, seed).unit().layers[0][0])) for seed in range(20)]
    assert np.mean(along) > 0.7 > 0.3 > np.mean(isotropic)


@pytest.mark.parametrize("before", [unnamed, by_tag], ids=["unnamed", "tag"])
@pytest.mark.parametrize("extent", ["all", "from_last_prompt_token:1", "from_last_prompt_token:4", "generated"])
def test_fidelity_is_the_agents_own_log_probability_less_the_others_mean(before, extent) -> None:
    model, tokenizer = tiny_model("llama", context=1024), tiny_tokenizer()
    held = traces(3)
    own = agent_vectors(turn_activations(model, tokenizer, held)["mean"])
    table = fidelity(model, tokenizer, held, own, [2], [1.0, -2.0], before, extent).table

    def score(trace: DebateTrace, agent: str, text: str, vector: str, coefficient: float) -> float:
        lead = list(before(tokenizer, trace, agent).ids)
        after = tokenizer(before.lead(trace, agent) + text)["input_ids"]
        steering = sk.Steering(own[vector].at(2), coefficient, extent)
        with steering.on(model, prompt_length=len(lead)), torch.no_grad():
            logits = model(torch.tensor([lead + after]), use_cache=False).logits[0]
        found = logits.log_softmax(-1)[range(len(lead) - 1, len(lead) + len(after) - 1), after]
        return float(found.mean())

    for row in table.sample(12, random_state=0).itertuples():
        trace = next(t for t in held if t.question == row.group)
        said = first_texts(trace)
        scores = {a: score(trace, row.agent, said[a], row.vector, row.coefficient) for a in said}
        mine = scores.pop(row.agent)
        assert row.own == pytest.approx(mine, abs=1e-4)
        assert row.fidelity == pytest.approx(mine - np.mean(list(scores.values())), abs=1e-4)
    assert len(table) == 3 * 3 * 3 * 3  # vectors, coefficients with 0, traces, agents
    assert table.groupby("coefficient")["own"].mean().nunique() == 3


def test_fidelity_that_is_on_disk_is_not_scored_again(tmp_path, monkeypatch) -> None:
    loaded, held = (tiny_model("llama", context=1024), tiny_tokenizer()), traces(3)
    own = agent_vectors(turn_activations(*loaded, held)["mean"])
    plain = fidelity(*loaded, held, own, [2], [1.0], by_tag).table
    first = fidelity(*loaded, held, own, [2], [1.0], by_tag, out=tmp_path / "scores.jsonl").table
    monkeypatch.setattr(fidelity_module, "log_probabilities", lambda *_: pytest.fail("scored again"))
    again = fidelity(*loaded, held, own, [2], [1.0], by_tag, out=tmp_path / "scores.jsonl").table
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    pd.testing.assert_frame_equal(first, plain)


def test_scores_are_computed_once_also_if_the_process_ends_between_two_writes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(stored, "AT_ONCE", 2)
    path, seen = tmp_path / "scores.jsonl", list[str]()

    def score(texts: Sequence[str]) -> list[float]:
        if "stop" in texts and not seen.count("stop"):
            seen.append("stop")
            raise KeyboardInterrupt
        seen.extend(texts)
        return [float("nan") if text == "none" else len(text) / 3 for text in texts]

    texts = ["a", "none", "stop", "bb", "a"]
    with pytest.raises(KeyboardInterrupt):
        stored.stored_scores(path, texts, texts, score)
    found = stored.stored_scores(path, texts, texts, score)
    assert seen == ["a", "none", "stop", "stop", "bb"]
    assert found == pytest.approx([1 / 3, float("nan"), 4 / 3, 2 / 3, 1 / 3], nan_ok=True)
    assert stored.stored_scores(None, texts[:2], texts[:2], score) == pytest.approx(found[:2], nan_ok=True)


def test_a_part_is_made_once_for_each_key_and_kept_if_the_process_ends_before_the_next_one(tmp_path) -> None:
    path, made = tmp_path / "parts.jsonl", list[int]()

    def make(index: int) -> list[str]:
        made.append(index)
        if made == [0, 2]:
            raise KeyboardInterrupt
        return [f"part {index}"]

    keys = [{"layers": [1]}, {"layers": [1]}, {"layers": [2]}]
    with pytest.raises(KeyboardInterrupt):
        stored.stored_parts(path, keys, make)
    assert stored.stored_parts(path, keys, make) == [["part 0"], ["part 0"], ["part 2"]]
    assert made == [0, 2, 2]
    assert stored.stored_parts(None, keys[1:], make) == [["part 0"], ["part 1"]]


def test_who_speaks_is_said_by_the_tag_or_by_the_prompt_of_the_debate() -> None:
    trace, tokenizer = traces(1)[0], tiny_tokenizer()
    tagged = by_tag(tokenizer, trace, "2").text
    opened = "Problem: 0+0\n\n<|Round 1 - Initial Solutions|>\n\n"
    assert tagged == f"{opened}<|Agent 1 Solution|>: first 0\n\n<|Agent 2 Solution|>:"
    for agent, text in first_texts(trace).items():
        before = by_tag(tokenizer, trace, agent).text
        assert (trace.prompt + trace.body).startswith(before + by_tag.lead(trace, agent) + text)
    assert unnamed(tokenizer, trace, "2").text == "Problem: 0+0\n\n"
    context = by_cast(cast_of("diverse"), "number")
    asked = context.ask(trace, "3")
    assert context(tokenizer, trace, "3").source == "chat"
    assert asked[0]["content"] == cast_of("diverse").personas[2].system
    assert asked[1]["content"].startswith("Problem: 0+0")


@pytest.mark.parametrize("between", [": ", ":\n", " ", ""])
def test_the_context_ends_where_the_trace_does_before_an_agents_text(between) -> None:
    body = traces(1)[0].body.replace("|>: ", f"|>{between}")
    trace, tokenizer = DebateTrace("0+0", body), tiny_tokenizer()
    for agent, text in first_texts(trace).items():
        before = by_tag(tokenizer, trace, agent).text
        assert before == before.rstrip() and (trace.prompt_text + trace.body).startswith(
            before + by_tag.lead(trace, agent) + text
        )
    alone = f"{trace.prompt_text}{round_tag(1)}\n\n{agent_tag(2, 1)}{between.rstrip()}"
    assert tag_alone(tokenizer, trace, "2").text == alone and other_ids(tokenizer, [trace]) == 0


class Joining:
    """A tokenizer of words, to which a colon and the line end after it are one token."""

    def __call__(self, text: str, **_) -> dict:
        pieces = re.findall(r":\n|\w+|.|\n", text)
        return {"input_ids": [sum(map(ord, piece)) for piece in pieces]}

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return ["" for _ in ids]


def test_contexts_whose_end_is_no_token_of_the_trace_are_counted() -> None:
    usual = traces(2)
    joined = [DebateTrace(trace.question, trace.text.replace("|>: ", "|>:\n")) for trace in usual]
    assert other_ids(Joining(), usual) == 0 and other_ids(Joining(), joined) == 6


def test_another_prompt_precedes_whole_traces_single_turns_and_contexts() -> None:
    model, tokenizer = tiny_model("llama", context=1024), tiny_tokenizer()
    (trace,) = traces(1)
    asked = asked_as(trace, "Q: {question}\n")
    assert unnamed(tokenizer, asked, "1").text == "Q: 0+0\n" and asked.spans().prompt == "Q: 0+0\n"
    assert by_tag(tokenizer, asked_as(trace, "chat"), "1").text.startswith("<|user|>0+0<|end|><|assistant|><|Round 1")
    chat = turn_activations(model, tokenizer, [asked_as(trace, "chat")])["last"]
    assert not torch.allclose(chat.resid, turn_activations(model, tokenizer, [trace])["last"].resid)
    own = DebateTrace("0+0", f"Add these.\n\n{trace.body}")
    assert unnamed(tokenizer, asked_as(own, "text"), "1").text == "Add these.\n\n"
    for prompt, message in (("text", "expected text before the first tag"), ("Q", "expected a prompt with {question}")):
        with pytest.raises(ValueError, match=re.escape(message)):
            asked_as(trace, prompt)


def test_a_vector_of_equal_questions_is_reliable_and_one_of_noise_is_not_until_there_are_many() -> None:
    rng = np.random.default_rng(0)
    n = 64
    items = pd.DataFrame(
        [(q, a, str(q), 0, 1) for q in range(n) for a in ("1", "2")],
        columns=["text", "label", "group", "start", "n_tokens"],
    )
    signal = np.tile(np.stack([np.ones(20), -np.ones(20)]), (n, 1))
    sure = Activations(torch.tensor(signal, dtype=torch.float32)[:, None], (0,), items)
    table = reliability(sure, [0], draws=20)
    assert table["cosine"].min() == pytest.approx(1.0)
    noisy = signal + 6 * rng.normal(size=signal.shape)
    table = reliability(Activations(torch.tensor(noisy, dtype=torch.float32)[:, None], (0,), items), [0], draws=100)
    by_size = table[table["kind"].str.startswith("size")].groupby("n")["cosine"].mean()
    assert list(by_size.index) == [5, 10, 20]
    assert by_size.is_monotonic_increasing and 0.2 < by_size[5] < by_size[20] < 0.95
    none = rng.normal(size=signal.shape)
    halves = reliability(Activations(torch.tensor(none, dtype=torch.float32)[:, None], (0,), items), [0], draws=100)
    assert abs(halves[halves["kind"] == "halves"]["cosine"].mean()) < 0.4


def test_any_traces_file_is_split_by_question(tmp_path) -> None:
    write_traces(tmp_path / "traces.jsonl", traces(60))
    inputs = inputs_of_files({"base": "somewhere"}, tmp_path / "traces.jsonl")
    parts = [{t.question for t in part} for part in (inputs.train, inputs.validation, inputs.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 60
    assert len(parts[0]) > len(parts[2]) > len(parts[1]) > 0
    with pytest.raises(ValueError, match="in one split only"):
        Inputs({"base": "x"}, inputs.train, inputs.train, inputs.test)


def test_a_checkpoint_that_was_moved_is_the_same_and_one_trained_anew_is_another(tmp_path) -> None:
    write_traces(tmp_path / "traces.jsonl", traces(20))

    def folder(name: str, weights: bytes) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        (tmp_path / name / "trainer_state.json").write_text(name)  # says how long a step took, and no weights
        return tmp_path / name

    single = tmp_path / "one.gguf"
    single.write_bytes(b"old")
    stages = {"base": folder("a", b"old"), "moved": folder("b", b"old"), "anew": folder("c", b"new"), "hub": "some/id"}
    inputs = inputs_of_files({**stages, "file": single}, tmp_path / "traces.jsonl")
    about = {name: inputs.about(name) for name in inputs.stages}
    check_config(tmp_path / "run", {"stages": {"base": about["base"]}})
    check_config(tmp_path / "run", {"stages": {"base": about["moved"]}})
    for other in ("anew", "hub", "file"):
        with pytest.raises(ConfigurationChanged, match=r"stages\.base\.files_sha256"):
            check_config(tmp_path / "run", {"stages": {"base": about[other]}})
    assert about["hub"] == {"checkpoint": "some/id", "files_sha256": None}


def rows(seed: int) -> pd.DataFrame:
    right = {"Single": [1, 0, 0, 0], "Debate": [1, 1, 1, 0], "IMAD": [1, 1, 0, 0]}
    cost = {"Single": 10, "Debate": 100, "IMAD": 25}
    return pd.DataFrame(
        [
            (f"q{i}", bool(r), True, cost[m] - 5, 5, 1.0, m, "sampled", seed, "two_sum")
            for m, some in right.items()
            for i, r in enumerate(some)
        ],
        columns=[
            "id",
            "correct",
            "parsed",
            "tokens_in",
            "tokens_out",
            "agents",
            "method",
            "decoding",
            "seed",
            "family",
        ],
    )


def test_where_debate_gains_nothing_there_is_no_share_of_it_to_keep() -> None:
    table = rows(1)
    same = table[table["method"] == "Single"].assign(method="Debate")
    found = table_of_methods(pd.concat([table[table["method"] != "Debate"], same])).set_index("method")
    assert np.isnan(found.loc["IMAD", "gain_kept"]) and found.loc["IMAD", "accuracy"] > 0


def test_the_main_table_pools_seeds_and_says_what_is_kept_of_debates_gain(tmp_path, capsys) -> None:
    for seed in (1, 2):
        write_table(tmp_path / str(seed) / "questions.parquet", rows(seed), {})
    main([str(tmp_path / "1"), str(tmp_path / "2"), "--out", str(tmp_path / "out")])
    table, _ = read_table(tmp_path / "out" / "main_table.csv")
    line = table.set_index("method").loc["IMAD"]
    assert (line["n"], line["seeds"], line["accuracy"], line["tokens"], line["of_debate"]) == (8, 2, 0.5, 25, 0.25)
    assert (line["unit"], line["by_seed"]) == ("training seed", "0.5 0.5")
    assert line["gain_kept"] == line["gain_kept_low"] == line["gain_kept_high"] == pytest.approx(0.5)  # equal seeds
    differences = read_table(tmp_path / "out" / "differences.csv")[0].set_index("minus")
    assert differences.loc["Debate", "difference"] == -0.25 and differences.loc["Debate", "token_ratio"] == 0.25
    assert "| IMAD | sampled | 2 | 8 | 50.0 [" in (tmp_path / "out" / "main_table.md").read_text()
    assert "IMAD" in capsys.readouterr().out
    with pytest.raises(ValueError, match="same family and seed"):
        read_runs([tmp_path / "1", tmp_path / "1"])
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nothing"), "--out", str(tmp_path / "out")])


def test_one_seed_has_intervals_over_its_questions_and_two_over_their_means() -> None:
    one = table_of_methods(rows(1)).set_index("method").loc["IMAD"]
    assert one["unit"] == "question (one seed)" and one["seeds"] == 1 and 0 < one["low"] < 0.5 < one["high"] < 1
    better = rows(2)
    better.loc[better["method"] == "IMAD", "correct"] = True
    two = table_of_methods(pd.concat([rows(1), better])).set_index("method").loc["IMAD"]
    assert two["accuracy"] == 0.75 and two["by_seed"] == "0.5 1" and (two["low"], two["high"]) == (0.0, 1.0)


def test_areas_are_paired_by_question_and_the_mean_over_agents_stands_beside_them() -> None:
    from functools import partial

    from analysis.agents.checkpoint_differences import areas, differences, gained
    from steerkit.sweeps.result import SweepResult

    rng = np.random.default_rng(0)
    rows = [
        (agent, agent, c, f"q{i}/{agent}", f"q{i}", 0, "", i / 10 + rng.normal() / 100)
        for agent in "12"
        for i in range(20)
        for c in (0.0, 1.0, 2.0)
    ]
    columns = ["agent", "vector", "coefficient", "prompt_id", "group", "sample", "text", "rouge_l"]
    first = pd.DataFrame(rows, columns=columns).assign(layer="1")
    second = first.assign(rouge_l=first["rouge_l"] + 0.2 * (first["agent"] == "1") * (first["coefficient"] > 0))
    second["rouge_l"] += np.tile([0, 1e-4, 0, 0, -1e-4, 0], len(second) // 6)  # an interval needs some spread
    pair = (SweepResult(first), SweepResult(second))
    found = differences(*pair, partial(areas, score="rouge_l"), ["1", "2"]).set_index("agent")
    assert found.loc["1", "difference"] == pytest.approx(0.2 * 0.75)  # trapezoid: half of the first interval
    assert found.loc["2", "difference"] == pytest.approx(0)
    assert found.loc["all", "difference"] == pytest.approx(0.1 * 0.75)
    assert found.loc["1", "low"] > 0.14 and found.loc["1", "n"] == 20
    dose = differences(*pair, partial(gained, score="rouge_l", coefficient=1.0), ["1", "2"]).set_index("agent")
    assert dose["difference"].tolist() == pytest.approx([0.2, 0, 0.1])
