"""Patched rounds: which positions are patched, with what, and what is counted."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import steerkit as sk
from analysis.paper.transplant import AGREED, REVISION
from analysis.patching import rounds
from analysis.patching.rounds import (
    OWN,
    PART,
    QUESTION,
    ROUND,
    Case,
    Decided,
    case_of,
    continuations,
    patched_pair,
    patched_rounds,
    shares,
)
from steerkit.io.json import write_json
from steerkit.io.tables import read_table
from steerkit.text.prompt import encode_prompt
from steerkit.text.traces import DebateTrace, Turn, write_traces
from tests.patching.test_patching import put_in
from tests.tiny import tiny_model, tiny_tokenizer
from training.debates.answerers import Sampling
from training.presets import get_preset

TAG = "<|Consensus|>"
LAYERS = 4


def debates(count: int, first: int = 0) -> list[DebateTrace]:
    """Debates of one round whose texts have the same length."""
    words = ("seven", "eight", "fifty", "forty", "sixty", "zeros", "third", "tenth", "fifth", "sixth", "ninth", "dozen")
    return [
        DebateTrace.of(f"{words[i]} 9", [Turn(a, 1, f"{a} says {words[i]}") for a in (1, 2)], f"{i}", str(i))
        for i in range(first, first + count)
    ]


def attentive(seed: int = 0) -> Any:
    """A random model with sharp attention, so that its texts depend on single tokens of their context."""
    model = tiny_model("qwen2", seed, context=1024)
    with torch.no_grad():
        for block in model.model.layers:
            for weight, factor in zip(
                (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj), (4, 4, 3), strict=True
            ):
                weight.weight.mul_(factor)
    return model


def write_run(folder: Path, train: list[DebateTrace], test: list[DebateTrace]) -> Path:
    """A run folder with two random checkpoints and these debates, seed 3."""
    for number, stage in enumerate(("sft", "grpo")):
        attentive(number).save_pretrained(folder / stage / "checkpoint")
        tiny_tokenizer().save_pretrained(folder / stage / "checkpoint")
    write_json(folder / "config.json", {**asdict(replace(get_preset("tiny", "clues"), test=4)), "seed": 3})
    for place, traces in (("debates", train), ("evaluation/sampled/debates", test)):
        (folder / place).mkdir(parents=True)
        write_traces(folder / place / "traces.jsonl", traces)
    return folder


@pytest.fixture(scope="module")
def parts() -> Any:
    """A model, its tokenizer, and two cases."""
    model, tokenizer = attentive(), tiny_tokenizer()
    own, other = (case_of(tokenizer, one.question, one.body) for one in debates(2))
    return model, tokenizer, own, other


def plainly(model: Any, tokenizer: Any, ids: list[int], count: int) -> str:
    """Greedy tokens, each from a forward of the whole text."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tokenizer.decode(ids[-count:])


def test_a_case_is_question_round_1_and_the_tag_after_it(parts: Any) -> None:
    _, tokenizer, own, _ = parts
    trace = debates(1)[0]
    first = trace.body.partition(TAG)[0]
    assert tokenizer.decode(own.ids[: own.start]) == trace.prompt
    assert tokenizer.decode(own.ids[own.start : own.stop]) == first
    assert tokenizer.decode(own.ids[own.stop :]) == TAG
    assert own.kind == ((1, 2), len(encode_prompt(tokenizer, first)), TAG) and own.then == AGREED
    two = DebateTrace.of("1+1", [Turn(a, r, "two") for r in (1, 2) for a in (1, 2)], "2")
    revised = case_of(tokenizer, two.question, two.body)
    assert revised is not None and revised.then == REVISION and revised.kind[-1] == "<|Round 2 - Revision|>"
    assert case_of(tokenizer, "1+1", "\\boxed{2}") is None


def test_the_stream_that_enters_block_0_is_the_transplant_of_the_text(parts: Any) -> None:
    model, tokenizer, own, other = parts
    found = patched_pair(model, tokenizer, own, other, [("resid_pre", 0)], 0, 6)
    texts = {part: text for part, _, _, text in found}
    swapped = [*own.ids[: own.start], *other.ids[other.start : other.stop], *own.ids[own.stop :]]
    assert texts[ROUND] == plainly(model, tokenizer, swapped, 6) != texts[""]
    asked = [*other.ids[: other.start], *own.ids[own.start :]]
    assert texts[QUESTION] == plainly(model, tokenizer, asked, 6)
    assert texts[""] == texts[OWN] == plainly(model, tokenizer, own.ids, 6)


def test_own_activations_and_those_after_the_last_block_change_no_text(parts: Any) -> None:
    model, tokenizer, own, other = parts
    places = [("resid_post", layer) for layer in range(LAYERS)]
    found = patched_pair(model, tokenizer, own, other, places, 0, 6)
    unpatched = found[0][-1]
    for part, place, _, text in found[1:]:
        if part == OWN or place == ("resid_post", LAYERS - 1):
            assert text == unpatched, (part, place)
    assert any(text != unpatched for *_, text in found)


def test_a_patched_layer_equals_a_slow_loop_of_plain_hooks_without_a_cache(parts: Any) -> None:
    model, tokenizer, own, other = parts
    found = patched_pair(model, tokenizer, own, other, [("resid_post", 1)], 0, 5)
    texts = {part: text for part, _, _, text in found}
    with torch.no_grad(), sk.capture_resid(model, 1) as read:
        model(input_ids=torch.tensor([other.ids]))
    with put_in(model.model.layers[1], "resid_post", read[1][0], own.start, own.stop, slice(None)):
        assert texts[ROUND] == plainly(model, tokenizer, own.ids, 5)


def test_the_controls_patch_as_many_positions_as_the_question_has(parts: Any) -> None:
    model, tokenizer, own, other = parts
    found = patched_pair(model, tokenizer, own, other, [("resid_post", 0)], 0, 1)
    numbers = {part: count for part, _, count, _ in found}
    assert own.start < own.stop - own.start
    assert numbers == {"": 0, ROUND: own.stop - own.start, PART: own.start, QUESTION: own.start, OWN: numbers[ROUND]}
    short = Case(own.ids[own.start - 3 :], 3, 3 + own.stop - own.start, own.kind, own.then)
    found = patched_pair(model, tokenizer, own, short, [("resid_post", 0)], 0, 1)
    assert {part: count for part, _, count, _ in found}[QUESTION] == 3


def test_own_activations_are_put_in_at_the_middle_place_alone(parts: Any) -> None:
    model, tokenizer, own, other = parts
    places = [("resid_pre", 0), *(("resid_post", layer) for layer in range(LAYERS))]
    found = patched_pair(model, tokenizer, own, other, places, 0, 1)
    assert [place for part, place, *_ in found if part == OWN] == [("resid_post", 1)]
    assert len(found) == 1 + 3 * len(places) + 1


def test_a_text_ends_at_the_first_closed_box_of_its_consensus(parts: Any, monkeypatch: Any) -> None:
    model, tokenizer, own, _ = parts
    texts = [rf"1 has \boxed{{7}} {TAG}: \boxed{{7}}", rf"1 has \boxed{{7}} {TAG}: \boxed{{7", r"1 has \boxed{7}"]
    for text, ended in zip(texts, (True, False, False), strict=True):
        rows = torch.tensor([encode_prompt(tokenizer, text)])
        assert Decided(tokenizer)(rows, None).tolist() == [ended], text

    class Third(Decided):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return torch.tensor([len(row) == len(own.ids) + 3 for row in input_ids])

    monkeypatch.setattr(rounds, "Decided", Third)
    assert continuations(model, tokenizer, own.ids, [[]], 6) == [plainly(model, tokenizer, own.ids, 3)]


def test_pairs_have_rounds_of_one_length_and_unequal_ones_are_left_out(parts: Any, monkeypatch: Any) -> None:
    model, tokenizer, *_ = parts
    monkeypatch.setattr(rounds, "read_answer", lambda text, kind: text[:1] or None)
    texts = [(one.question, one.body) for one in debates(3)]
    longer = DebateTrace.of("1+1", [Turn(1, 1, "1 says it is 2"), Turn(2, 1, "2")], "2")
    table, counts = patched_rounds(
        model, tokenizer, [*texts, ("1+1", longer.body), ("2+2", "4")], "number", layers=[1], max_new_tokens=2
    )
    assert counts == {"texts": 5, "with round 1": 4, "pairs": 3}
    assert set(table["pair"]) == {0, 1, 2} and len(table) == 3 * (2 * 3 + 1)
    answers = table.groupby("pair")["answer"].first()
    for index, one in enumerate(debates(3)):
        case = case_of(tokenizer, one.question, one.body)
        assert case is not None and answers[index] == plainly(model, tokenizer, case.ids, 2)[:1]
    fewer, counts = patched_rounds(model, tokenizer, texts, "number", layers=[1], max_new_tokens=2, most=1)
    first = table[table["pair"] == 0].reset_index(drop=True)
    assert counts["pairs"] == 1 and set(fewer["pair"]) == {0} and set(fewer["donated"]) <= set(answers)
    assert first[["part", "positions", "answer"]].equals(fewer[["part", "positions", "answer"]])


def test_shares_count_pairs_with_two_different_answers() -> None:
    line = {"then": REVISION, "part": ROUND, "site": "resid_post", "layer": 1, "positions": 7}
    rows = [
        ("1", "2", "2"),  # follows
        ("1", "2", "1"),  # stays
        ("1", "2", None),  # changed, to no answer
        ("1", "2", "3"),  # changed, does not follow
        ("1", "1", "2"),  # equal answers: left out
        (None, "2", "2"),  # no own answer: left out
        ("1", None, "2"),
    ]
    table = pd.DataFrame(
        [{**line, "pair": i, "answer": a, "donated": b, "patched": c} for i, (a, b, c) in enumerate(rows)]
    )
    found = shares(table).set_index("quantity")
    assert found["share"].to_dict() == {"follows": 0.25, "changed": 0.75, "chance": 0.25} and set(found["n"]) == {4}
    sure = found.drop(index="chance")
    assert (sure["low"] < sure["share"]).all() and (sure["share"] < sure["high"]).all()
    assert shares(table.iloc[4:]).empty
    later = table.assign(then=AGREED, donated=["2", "3", "4", "5", *table["donated"][4:]])
    apart = shares(pd.concat([table, later])).set_index(["then", "quantity"])["share"]
    assert apart[REVISION, "follows"] == 0.25 and apart[AGREED, "chance"] == pytest.approx(1 / 12)


def test_a_killed_call_patches_the_missing_pairs_alone(parts: Any, monkeypatch: Any, tmp_path: Path) -> None:
    model, tokenizer, *_ = parts
    monkeypatch.setattr(rounds, "read_answer", lambda text, kind: text[:1] or None)
    texts, done = [(one.question, one.body) for one in debates(4)], list[Case]()

    def call(log: Path | None) -> pd.DataFrame:
        return patched_rounds(model, tokenizer, texts, "number", layers=[1], max_new_tokens=2, log=log)[0]

    def once(model: Any, tokenizer: Any, own: Case, *given: Any) -> Any:
        done.append(own)
        if len(done) == 3:
            raise KeyboardInterrupt
        return patched_pair(model, tokenizer, own, *given)

    whole = call(None)
    monkeypatch.setattr(rounds, "patched_pair", once)
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path / "pairs.jsonl")
    assert call(tmp_path / "pairs.jsonl").equals(whole) and len(done) == 3 + 2


def test_own_texts_in_the_log_are_not_written_again(parts: Any, monkeypatch: Any, tmp_path: Path) -> None:
    model, tokenizer, *_ = parts
    call = model, tokenizer, ["1+1", "2+2"], Sampling(max_new_tokens=3), tmp_path / "written.jsonl"
    first = rounds._written(*call)
    monkeypatch.setattr(rounds.LocalModel, "__call__", lambda *_: pytest.fail("written again"))
    assert rounds._written(*call) == first and [question for question, _ in first] == ["1+1", "2+2"]


def test_the_command_writes_the_shares_of_both_checkpoints_and_resumes(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    run = write_run(tmp_path / "run", debates(4, 8), debates(8))
    preset = get_preset("tiny", "clues")
    quick = replace(preset, sampling=replace(preset.sampling, max_new_tokens=4))
    monkeypatch.setattr(rounds, "get_preset", lambda name, family: quick)
    monkeypatch.setattr(rounds, "read_answer", lambda text, kind: text[:1] or None)
    call = [
        str(run),
        "--out",
        str(tmp_path / "out"),
        "--results",
        str(tmp_path / "results"),
        "--n",
        "4",
        "--layers",
        "1,3",
    ]
    rounds.main(call)
    table, meta = read_table(tmp_path / "results" / "patched_rounds.csv")
    counts, _ = read_table(tmp_path / "results" / "patched_rounds_counts.csv")
    assert meta["seed"] == 3 and meta["family"] == "clues" and str(tmp_path) not in str(meta)
    assert counts["stage"].tolist() == ["SFT", "SFT", "IMAD", "IMAD"]
    assert counts[counts["text"] == "debate"]["pairs"].tolist() == [4, 4]
    own = table[(table["part"] == OWN) & (table["quantity"] == "changed")]
    assert len(own) == 2 and set(own["share"]) == {0.0} and set(own["layer"]) == {1}
    assert set(zip(table["site"], table["layer"], strict=True)) == {
        ("resid_pre", 0),
        ("resid_post", 1),
        ("resid_post", 3),
    }
    (tmp_path / "out" / "IMAD-debate.csv").unlink()
    monkeypatch.setattr(rounds, "_written", None)  # the texts of the finished table are not needed
    monkeypatch.setattr(rounds, "patched_pair", None)  # the pairs are in the log
    rounds.main(call)
    monkeypatch.setattr(rounds, "patched_rounds", None)
    rounds.main(call)
    assert read_table(tmp_path / "out" / "patched_rounds.csv")[0].equals(table)
    with pytest.raises(SystemExit):
        rounds.main([*call[:-1], "one"])
    assert "got 'one'" in capsys.readouterr().err
