"""Benchmarks: a fixed draw, a limit that depends on the replies alone, replies that survive an interruption."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import pytest

import steerkit as sk
from steerkit.io.json import read_json
from steerkit.io.rows import read_rows
from steerkit.io.run_folder import ConfigurationChanged
from steerkit.io.tables import read_table
from steerkit.models import kernels
from steerkit.text.traces import Turn
from tests import scripted_server
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.benchmark_files import write_benchmarks
from training.commands import benchmark as command
from training.debates.answerers import LocalModel, Reply, Request, Sampling
from training.debates.debate import Call, Template
from training.evaluate import benchmark
from training.evaluate.benchmark import LIMITS, METHODS, SAMPLES, copy_finished, evaluate
from training.evaluate.benchmark_tables import EXPORTED, differences, write_tables
from training.evaluate.chunks import Chunks, Spent, TimeUp, prompt_sha256
from training.evaluate.prompts import DEBATERS, WORDS, form_of, plain, read_finished
from training.evaluate.questions import BENCHMARKS, PER, SEED, chance, drawn
from training.problems.benchmarks import BBH_TASKS, load_bbh
from training.problems.problem import Problem
from training.problems.sources import drawn_hashes, question_hash, split_problems
from training.toy.worlds import bare

DATA = Path(__file__).parents[3] / "shared" / "data"
PROBLEMS = [Problem(f"sum/{i}", f"{i}+1", str(i + 1), "number", "own") for i in range(20)]
SAMPLES_ONLY = METHODS[:2]


@dataclass
class Scripted:
    """Right answers of a given length for each request or question; what is longer than the limit is cut.

    Args:
        lengths: beginning of request ids -> length; 10 for others.
        answers: beginning of request ids -> text; a right box for others.
    """

    lengths: dict[str, int] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, int]] = field(default_factory=list)
    prompts: list = field(default_factory=list)

    def __call__(self, requests, sampling):
        for request in requests:
            self.asked.append((request.id, sampling.max_new_tokens))
            self.prompts.append(request.prompt)
            length = next((n for key, n in self.lengths.items() if f"{request.id}/".startswith(f"{key}/")), 10)
            right = rf"\boxed{{{int(request.id.split('/')[1]) + 1}}}"
            text = next((t for key, t in self.answers.items() if f"{request.id}/".startswith(f"{key}/")), right)
            finished = length <= sampling.max_new_tokens
            yield Reply(request.id, text, 5, min(length, sampling.max_new_tokens), finished)

    def about(self):
        return {"answerer": "scripted"}


def run(model, out, methods=METHODS, **options) -> pd.DataFrame:
    evaluate({"sums": PROBLEMS}, model, out, methods, **options)
    return write_tables(out).set_index("method")


def test_the_limit_is_doubled_for_cut_replies_of_all_samples_and_what_is_still_cut_is_wrong(tmp_path) -> None:
    model = Scripted({"sum/0": 700, "sum/1/0": 900, "sum/2/0": 9999}, {"sum/19": "no box"})
    table = run(model, tmp_path, SAMPLES_ONLY)
    assert Counter(limit for _, limit in model.asked) == {512: 100, 1024: 7}  # 7 of 100 cut, then 1
    assert table["limit"].tolist() == [1024, 1024] and table["cut"].tolist() == [1, 1]
    assert table["unread"].tolist() == [5, 5] and table.loc["Self-consistency", "accuracy"] == 19 / 20
    assert table.loc["Single", "accuracy"] == pytest.approx(94 / 100)
    unread = read_rows(tmp_path / "unread.jsonl")
    assert [(row["id"], row["sample"], row["text"]) for row in unread] == [("sum/19", i, "no box") for i in range(5)]
    model.asked.clear()
    assert run(model, tmp_path, SAMPLES_ONLY).equals(table) and model.asked == []


def test_the_tables_do_not_depend_on_where_the_parts_of_a_run_ended(tmp_path) -> None:
    lengths = {f"sum/{i}/{k}": 600 + 300 * k for i in range(4) for k in range(5)} | {"sum/7/round-1/agent-2": 800}
    lengths |= {f"sum/{i}/round-1": 700 for i in range(3)}
    whole = run(Scripted(lengths), tmp_path / "whole")
    files = {file: (tmp_path / "whole" / file).read_text() for file in ("questions.csv", "agents.csv")}
    for seed in range(3):
        out, rng = tmp_path / f"parts-{seed}", random.Random(seed)
        for _ in range(200):
            model = Chunks(Scripted(lengths), rng.choice([7, 16]))
            try:
                evaluate({"sums": PROBLEMS}, Ending(model, rng.randrange(20, 90)), out)
                break
            except TimeUp:
                write_tables(out)
        assert write_tables(out).set_index("method").equals(whole)
        assert {file: (out / file).read_text() for file in files} == files


@dataclass
class Ending:
    """An answerer that is ended after some replies, wherever they are."""

    answerer: Chunks
    left: int

    def __call__(self, requests, sampling):
        for reply in self.answerer(requests, sampling):
            if self.left == 0:
                raise TimeUp
            self.left -= 1
            yield reply

    def about(self):
        return self.answerer.about()


def test_the_last_limit_is_kept_whatever_is_cut(tmp_path) -> None:
    table = run(Scripted({f"sum/{i}": 9999 for i in range(5)}), tmp_path)
    assert set(table["limit"]) == {LIMITS[-1]} and table.loc["Single", "cut"] == 25
    assert table.loc["Debate", "cut"] == 30  # three agents in two rounds: cut calls agree on nothing


def test_single_is_the_mean_over_the_samples_and_self_consistency_their_most_frequent_answer(tmp_path) -> None:
    wrong = {f"sum/{i}/{k}": r"\boxed{-1}" for i in range(10) for k in (0, 1)}
    table = run(Scripted(answers=wrong), tmp_path, ["Single"])
    assert (table.loc["Single", "accuracy"], table.loc["Self-consistency", "accuracy"]) == (0.8, 1.0)
    assert table.loc["Self-consistency", "tokens_out"] == SAMPLES * table.loc["Single", "tokens_out"] == 50
    assert table["calls"].tolist() == [100, 100]


def test_a_cut_call_of_a_debate_abstains_also_for_the_early_stop_and_is_not_asked_again_when_it_ends(tmp_path) -> None:
    model = Scripted({"sum/3/round-1/agent-2": 9999, "sum/4/round-1/agent-1": 512})
    table = run(model, tmp_path, ["Debate"])
    second = {key for key, _ in model.asked if "/round-2/" in key}
    assert second == {f"sum/3/round-2/agent-{agent}" for agent in (1, 2, 3)}  # one right box of three was cut
    assert table.loc["Debate", "cut"] == table.loc["Round-1 majority", "cut"] == 1  # a reply of 512 tokens has ended
    assert table.loc["Debate", "limit"] == 512


def test_finished_calls_of_a_smaller_limit_are_used_again_where_their_prompt_is_the_same(tmp_path) -> None:
    model = Scripted({f"sum/{i}/round-1/agent-1": 700 for i in range(5)})
    run(model, tmp_path, ["Debate"])
    again = sorted(key for key, limit in model.asked if limit == 1024)
    assert again == sorted(f"sum/{i}/round-1/agent-1" for i in range(5))  # their debates end after one round now


def test_copying_finished_calls_twice_adds_them_once(tmp_path) -> None:
    run(Scripted({"sum/3/round-1/agent-2": 9999}), tmp_path, ["Debate"])
    source, target = tmp_path / "sums" / "base" / "debates-512" / "calls.jsonl", tmp_path / "calls.jsonl"
    for _ in range(2):
        copy_finished(source, target)
    assert len(read_rows(target)) == len(read_rows(source)) - 1


def test_debates_are_decided_by_majority_and_plurality_of_both_rounds(tmp_path) -> None:
    split = {f"sum/0/round-1/agent-{k}": rf"\boxed{{{k}}}" for k in (1, 2, 3)}  # agent 1 is right
    split |= {"sum/0/round-2/agent-3": "no box", "sum/0/round-2/agent-2": r"\boxed{2}"}
    run(Scripted(answers=split), tmp_path, ["Debate"])
    rows = read_table(tmp_path / "questions.csv")[0]
    of_first = rows[rows["id"] == "sum/0"].set_index("method")
    assert of_first["correct"].to_dict() == {
        "Debate": 0,
        "Round-1 majority": 0,
        "Debate, plurality": 1,
        "Round 1, plurality": 1,
    }
    assert of_first["calls"].tolist() == [6, 3, 6, 3]
    assert [row["agent"] for row in read_rows(tmp_path / "unread.jsonl")] == [3]


def test_a_whole_chunk_is_stored_before_the_time_is_checked(tmp_path) -> None:
    model = Scripted()
    with pytest.raises(TimeUp):
        evaluate({"sums": PROBLEMS}, Chunks(model, 16, time.monotonic() - 1), tmp_path)
    assert model.asked == [] and len(write_tables(tmp_path)) == 0
    slow = Chunks(model, 16, time.monotonic() + 60, [Spent(1024, 8.0, 16 * 100)])
    assert slow.expected(16, 512) == pytest.approx(16 * 512 * 0.005)  # as many tokens as fit, at that speed
    assert slow.expected(16, 1024) == 8.0
    with pytest.raises(TimeUp):
        evaluate({"sums": PROBLEMS}, Chunks(model, 16, time.monotonic() + 60, [Spent(512, 61.0, 1)]), tmp_path)
    assert model.asked == []


def test_a_chunk_is_counted_with_the_time_in_which_its_replies_were_stored() -> None:
    chunks = Chunks(Scripted(), 4)
    requests = [Request(f"sum/{i}", "x" * i) for i in range(10)]
    given = [reply.id for reply in chunks(requests, Sampling(max_new_tokens=64))]
    assert given == [f"sum/{i}" for i in range(9, -1, -1)]  # long prompts first, of similar length together
    assert [(one.limit, one.tokens) for one in chunks.spent] == [(64, 40), (64, 40), (64, 20)]


def test_a_reply_to_another_prompt_is_not_used_and_other_settings_are_refused(tmp_path, monkeypatch) -> None:
    model = Scripted()
    run(model, tmp_path, ["Single"])
    log = tmp_path / "sums" / "base" / "calls.jsonl"
    rows = read_rows(log)
    assert rows[0]["prompt_sha256"] == prompt_sha256(None, plain(PROBLEMS[0]))
    log.write_text(log.read_text().replace(rows[0]["prompt_sha256"], "0" * 64))
    model.asked.clear()
    run(model, tmp_path, ["Single"])
    assert [key for key, _ in model.asked] == [f"sum/0/{i}" for i in range(5)]
    with monkeypatch.context() as patched:
        patched.setattr(benchmark, "CUT", 0.1)
        with pytest.raises(ConfigurationChanged, match="cut"):
            run(model, tmp_path, ["Single"])
    with monkeypatch.context() as patched:
        patched.setattr(benchmark, "plain", lambda problem: "Another prompt")
        with pytest.raises(ConfigurationChanged, match="prompts"):
            run(model, tmp_path, ["Single"])


def test_a_method_alone_keeps_the_rows_of_the_others(tmp_path) -> None:
    run(Scripted(), tmp_path, SAMPLES_ONLY)
    table = run(Scripted(), tmp_path, ["Debate"])
    assert table.index.tolist()[:3] == ["Single", "Self-consistency", "Debate"] and len(table) == 6


def test_a_trained_model_is_asked_by_the_bare_prompt_and_compared_with_the_untrained_one(tmp_path) -> None:
    run(Scripted(answers={"sum/0": "no box", "sum/1": "no box"}), tmp_path)
    trained = Scripted()
    table = run(trained, tmp_path, trained="IMAD")
    assert set(trained.prompts) == {bare(problem) for problem in PROBLEMS} and len(trained.asked) == 5 * 20
    assert table.loc["IMAD", "accuracy"] == 1 and table.loc["Single", "accuracy"] == 18 / 20
    gaps = read_table(tmp_path / "differences.csv")[0].set_index(["method", "minus"])
    assert gaps.loc[("IMAD", "Single"), "difference"] == pytest.approx(0.1)
    assert gaps.loc[("IMAD", "Debate"), "token_ratio"] < 0.5


def test_differences_are_paired_per_benchmark_and_over_all_of_them() -> None:
    rows = pd.DataFrame(
        [
            {"benchmark": name, "method": method, "id": f"{name}/{i}", "correct": float(i < right)}
            | {"tokens_in": 1.0, "tokens_out": 1.0 if method == "Single" else 5.0 + i % 2}
            for name, several in (("a", (5, 7)), ("b", (5, 4)))
            for method, right in zip(("Single", "Self-consistency"), several, strict=True)
            for i in range(10)
        ]
    )
    found = differences(rows).set_index("benchmark")
    assert found["difference"].round(6).to_dict() == {"a": 0.2, "b": -0.1, "all": 0.05}
    assert found["n"].to_dict() == {"a": 10, "b": 10, "all": 20}
    assert (found["token_ratio_low"] < 3.25).all() and (found["token_ratio_high"] > 3.25).all()


def test_token_counts_that_are_not_reported_are_nan_and_so_are_their_ratios(tmp_path) -> None:
    class Uncounted(Scripted):
        def __call__(self, requests, sampling):
            for reply in super().__call__(requests, sampling):
                yield replace(reply, tokens_in=None, tokens_out=None)

    with pytest.warns(UserWarning, match="expected token counts with each reply"):
        table = run(Uncounted(), tmp_path)
    assert table[["tokens_in", "tokens_out"]].isna().all(axis=None) and (table["accuracy"] == 1).all()
    gaps = read_table(tmp_path / "differences.csv")[0]
    assert len(gaps) == 6 and gaps[["token_ratio", "token_ratio_low", "token_ratio_high"]].isna().all(axis=None)


def test_calls_that_are_on_disk_are_listed_before_their_method_is_complete(tmp_path) -> None:
    with pytest.raises(TimeUp):
        evaluate({"sums": PROBLEMS}, Ending(Chunks(Scripted(), 16), 30), tmp_path)
    assert len(write_tables(tmp_path)) == 0 and not (tmp_path / "results.csv").exists()
    listed = read_table(tmp_path / "calls.csv")[0]
    assert len(listed) == 30 and listed["correct"].all() and "text" not in listed


# Prompts and the form of answers


FORMS = [("number", "own"), ("option", "own"), ("word", "bbh/web_of_lies"), ("word", "bbh/formal_fallacies")]


@pytest.mark.parametrize(("kind", "family"), FORMS)
def test_every_prompt_asks_for_steps_or_an_agents_way_and_names_the_form_of_the_answer_last(kind, family) -> None:
    gold = {"number": "1", "option": "A", "word": WORDS.get(family, ("no",))[0].lower()}[kind]
    problem = Problem("q", "Question: What is it?", gold, kind, family)
    turns = [Turn(agent, 1, "x") for agent in (1, 2, 3)]
    prompts = [DEBATERS.ask(problem, agent, number, turns) for number in (1, 2) for agent in (1, 2, 3)]
    for prompt in (plain(problem), *prompts):
        assert prompt[-1]["content"].endswith(form_of(problem)) and "Question:" not in str(prompt)
    assert "step by step" in plain(problem)[-1]["content"]
    assert "After the code" in DEBATERS.ask(problem, 3, 1, [])[-1]["content"]


def test_a_word_that_the_task_does_not_allow_is_unread_and_a_box_in_a_program_is_passed_over() -> None:
    lies = Problem("q", "Does she?", "yes", "word", "bbh/web_of_lies")

    def read(problem: Problem, text: str | None, finished: bool = True) -> str | None:
        return read_finished(problem, Call(1, 1, text, 5, 5, None, finished), Template())

    assert read(lies, r"\boxed{Yes}") == "yes" and read(lies, r"\boxed{True}") is None
    number = PROBLEMS[0]
    assert read(number, r'It is \boxed{1}. ```print(f"\\boxed{{{total}}}")```') == "1"
    assert read(number, r"\boxed{1}", finished=False) is None and read(number, None) is None


@pytest.mark.skipif(not DATA.is_dir(), reason="the benchmarks' files are not at hand")
def test_the_words_of_a_task_are_its_gold_answers() -> None:
    for task, kind in BBH_TASKS.items():
        if kind == "word":
            golds = {problem.gold for problem in load_bbh(DATA / "bbh", task)}
            assert golds == {word.lower() for word in WORDS[f"bbh/{task}"]}


@pytest.mark.skipif(not DATA.is_dir(), reason="the benchmarks' files are not at hand")
def test_the_drawn_questions_are_never_training_problems_and_their_hashes_are_those_on_file() -> None:
    questions = [problem for name in BENCHMARKS for problem in drawn(DATA, name)]
    assert len(questions) == 298 and {question_hash(problem.question) for problem in questions} == drawn_hashes()
    train, _ = split_problems(f"gsm8k={DATA}/gsm8k/test.jsonl", ["arithmetic"], n_test=1)
    assert len(train) == 1319 - 100 and not {p.question for p in train} & {p.question for p in questions}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("training.problems.sources.drawn_hashes", frozenset)
        assert len(split_problems(f"gsm8k={DATA}/gsm8k/test.jsonl", ["arithmetic"], n_test=1)[0]) == 1319


# The command


@pytest.fixture
def data(tmp_path):
    return write_benchmarks(tmp_path / "data")


def test_the_draw_is_fixed_and_spread_over_categories_and_tasks(data) -> None:
    assert len(drawn(data, "gsm8k")) == 100 and drawn(data, "gsm8k") == drawn(data, "gsm8k")
    assert Counter(one.family for one in drawn(data, "mmlu_pro")) == {f"mmlu_pro/c{i}": 7 for i in range(3)}
    assert set(Counter(one.family for one in drawn(data, "bbh")).values()) == {20}
    assert {chance(one) for one in (*drawn(data, "mmlu_pro"), *drawn(data, "bbh"))} == {0.5}
    with pytest.raises(ValueError, match="expected a benchmark among"):
        drawn(data, "chess")
    with pytest.raises(ValueError, match="expected one question or more"):
        drawn(data, "gsm8k", per=0)


def test_a_draw_of_another_seed_has_other_questions_and_a_smaller_draw_is_a_part_of_a_larger_one(data) -> None:
    for name in BENCHMARKS:
        reported, pilot = drawn(data, name), drawn(data, name, SEED + 1, 3)
        assert not {one.id for one in reported} & {one.id for one in pilot} and pilot
        assert {one.id for one in drawn(data, name, per=2)} < {one.id for one in reported}
    assert len(drawn(data, "gsm8k", 1, 500)) == 120 - PER["gsm8k"]


def test_the_command_evaluates_checkpoints_and_resumes(data, tmp_path, capsys, monkeypatch) -> None:
    tiny_model(context=4096).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(benchmark, "LIMITS", (4, 8))
    out, model = tmp_path / "out", str(tmp_path / "model")
    common = ["--data", str(data), "--out", str(out), "--per", "1", "--results", str(tmp_path / "results")]
    call = ["--checkpoint", model, "--trained", f"IMAD={model}", *common]
    assert command.main([*call, "--minutes", "0"]) == 3
    assert "resume" in capsys.readouterr().out
    assert command.main(call) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("gsm8k", "mmlu_pro", "bbh", "Self-consistency", "Debate, plurality", "IMAD"))
    assert "| gsm8k | Single | 1 |" in (out / "results.md").read_text()
    config = read_json(out / "bbh" / "base" / "config.json")
    assert config["answerer"]["kernels"] in ("torch", "onednn") and config["ends"] == [256]
    assert read_json(out / "bbh" / "base" / "provenance.json")["versions"]["torch"]
    assert read_json(out / "bbh" / "config.json")["limits"] == [4, 8]
    assert {row["system_dropped"] for row in read_rows(out / "bbh" / "base" / "debates-8" / "debates.jsonl")} == {False}
    for name in EXPORTED:
        assert not set(read_table(tmp_path / "results" / name)[0].columns) & {"text", "prompt"}
    first = (out / "questions.csv").read_text()
    assert command.main(["--trained", f"IMAD={model}", *common]) == 0 and (out / "questions.csv").read_text() == first


def test_kernels_are_those_of_the_first_part_also_in_a_benchmark_that_begins_later(data, tmp_path, monkeypatch) -> None:
    if kernels.missing() is not None:
        pytest.skip("no oneDNN here")
    monkeypatch.setattr(benchmark, "LIMITS", (4,))
    tiny_model(context=4096).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name, faster in (("gsm8k", "onednn"), ("bbh", "torch")):
        monkeypatch.setattr(kernels, "_faster", lambda model, faster=faster: faster)
        model = Chunks(LocalModel(*sk.load(tmp_path / "model")), 16)
        evaluate({name: drawn(data, name, per=1)}, model, tmp_path / "out", ["Single"])
        assert read_json(tmp_path / "out" / name / "base" / "config.json")["answerer"]["kernels"] == "onednn"


def test_input_that_cannot_be_evaluated_is_refused_before_anything_is_written(data, tmp_path, capsys) -> None:
    common = ["--data", str(data), "--out", str(tmp_path / "no")]
    cases = {
        "either --checkpoint MODEL or --answerer URL MODEL": ["--checkpoint", "x", "--answerer", "http://h", "M"],
        "got none": [],
        "a name that no method has; got 'Debate=x'": ["--trained", "Debate=x"],
        "a name that no method has; got 'base=x'": ["--trained", "base=x"],
        "trained models with different ids": ["--trained", "a=x", "--trained", "A=y"],
        "argument --rows: expected 1 or more": ["--checkpoint", "x", "--rows", "0"],
        "argument --per: expected 1 or more": ["--checkpoint", "x", "--per", "0"],
    }
    for message, options in cases.items():
        with pytest.raises(SystemExit):
            command.main([*options, *common])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--checkpoint", "x", "--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()


def test_a_server_answers_in_place_of_a_checkpoint(data, tmp_path) -> None:
    common = ["--data", str(data), "--out", str(tmp_path / "out"), "--benchmark", "gsm8k", "--method", "Single"]
    with scripted_server.Scripted(lambda call, number: call.json(scripted_server.answer(r"\boxed{1}"))) as server:
        assert command.main(["--answerer", f"{server.url}/v1", "MODEL", "--per", "3", *common]) == 0
    table, meta = read_table(tmp_path / "out" / "results.csv")
    assert table["n"].tolist() == [3, 3] and "base_url" not in str(meta)
