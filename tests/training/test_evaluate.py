"""The stage evaluate: failed and interrupted calls are asked again, and every method reads answers in the same way."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from steerkit.io.json import read_json, write_json
from steerkit.io.tables import read_table
from steerkit.models import kernels
from tests.tiny import tiny_model, tiny_tokenizer
from training import __main__ as commands
from training.commands import evaluate as stage
from training.debates.answerers import Reply, Request, Sampling
from training.debates.debate import Setting
from training.debates.personas import cast_of
from training.evaluate.methods import debates, one_answer, self_consistency
from training.evaluate.recorded import Recorded
from training.problems.problem import Problem
from training.toy.worlds import bare

SUM = [Problem("p", "2+3*4", "14", "number", "small")]
OPENED = tiny_tokenizer()
OPENED.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}<think>\n"


@dataclass
class Scripted:
    """Answers each problem n/0 by the box with n, until a number of calls; what follows fails or raises."""

    until: int = 10**9
    raises: bool = False
    counts: tuple[int | None, int | None] = (5, 4)
    asked: list[tuple[str, int]] = field(default_factory=list)

    def about(self) -> dict[str, str]:
        return {"answerer": "scripted"}

    def __call__(self, requests, sampling):
        for request in requests:
            if len(self.asked) >= self.until and self.raises:
                raise ConnectionAbortedError("the connection was lost")
            failed = len(self.asked) >= self.until
            self.asked.append((request.id, sampling.max_new_tokens))
            text = None if failed else rf"\boxed{{{int(request.id.split('/')[1]) - 1}}}"
            counts = (None, None) if failed else self.counts
            yield Reply(request.id, text, *counts, not failed, "connection refused" if failed else None)


@pytest.fixture
def answerer(tmp_path, monkeypatch) -> Scripted:
    """The answerer of the stage, in a folder with 20 problems."""
    scripted = Scripted()
    monkeypatch.setattr(stage, "answerer_of", lambda *_: scripted)
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{n}+0", "gold": n} for n in range(20)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return scripted


def evaluate(*options: str, code: int = 0) -> None:
    call = ["evaluate", "--run", "run", "--problems", "my.jsonl", "--answerer", "http://127.0.0.1:9/v1", "MODEL"]
    if not code:
        assert commands.main([*call, "--set", "decodings=2", *options]) == 0
        return
    with pytest.raises(SystemExit) as stopped:
        commands.main([*call, "--set", "decodings=2", *options])
    assert stopped.value.code == code


def results():
    return read_table("run/evaluation/results.csv")[0].set_index("method")


def test_failed_calls_of_a_server_are_counted_and_the_same_command_asks_them_alone_again(answerer, capsys) -> None:
    answerer.until = 15
    single = ("--method", "Single", "--set", "decodings=1")
    with pytest.warns(UserWarning, match="of 20 calls; 5 failed, the first with 'connection refused'"):
        evaluate(*single, code=2)
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert "expected a reply to every call; got failed ones: 5 of Single" in shown
    assert results().loc["Single", ["failed", "parse_failures", "accuracy"]].tolist() == [5, 5, 0.75]
    answerer.asked.clear()
    answerer.until = 10**9
    for _ in range(2):
        evaluate(*single)
        assert len(answerer.asked) == 5
        assert results().loc["Single", ["failed", "accuracy"]].tolist() == [0, 1.0]


def test_an_interrupted_method_asks_only_for_the_replies_that_are_not_on_disk(answerer) -> None:
    answerer.until, answerer.raises = 35, True
    evaluate("--method", "Self-consistency", "--samples", "2", code=2)
    answerer.until = 10**9
    evaluate("--method", "Self-consistency", "--samples", "2")
    assert len(answerer.asked) == 2 * 20 * 2
    assert len(set(answerer.asked)) == 20 * 2


def test_a_reply_on_disk_is_that_of_its_prompt_and_token_limit(tmp_path) -> None:
    scripted = Scripted()
    recorded = Recorded(scripted, tmp_path)
    for prompt, limit in (("a", 8), ("a", 8), ("b", 8), ("b", 9), ("a", 8)):
        (reply,) = recorded([Request("p/7/0", prompt)], Sampling(max_new_tokens=limit))
        assert reply == Reply("p/7/0", r"\boxed{6}", 5, 4, True)
    assert [limit for _, limit in scripted.asked] == [8, 8, 9]


def test_debates_on_test_questions_have_the_turns_of_the_setting(answerer, capsys) -> None:
    evaluate("--set", "turn_tokens=48")
    assert {limit for name, limit in answerer.asked if "/round-" in name} == {48}
    assert {limit for name, limit in answerer.asked if "/round-" not in name} == {1024}
    evaluate("--set", "turn_tokens=64", "--method", "Single")  # other methods have no turns
    evaluate("--set", "turn_tokens=64", "--method", "Debate", code=2)
    assert "turn_tokens: 48 -> 64" in capsys.readouterr().err


def test_token_counts_that_a_server_does_not_report_are_nan_and_warned_of_once(answerer, recwarn) -> None:
    answerer.counts = (None, None)
    evaluate()
    table, gaps = results(), read_table("run/evaluation/differences.csv")[0]
    assert table[["tokens_in", "tokens_out"]].isna().all(axis=None) and table["accuracy"].loc["Single"] == 1
    assert gaps[["token_ratio", "token_ratio_low", "token_ratio_high"]].isna().all(axis=None)
    messages = {str(warning.message) for warning in recwarn if "token counts" in str(warning.message)}
    assert len(messages) == 1
    single = read_table("run/evaluation/questions.parquet")[0]
    assert np.isnan(single["tokens_in"]).all()
    assert "| nan |" in Path("run/evaluation/results.md").read_text()


def test_a_failed_call_has_no_token_count_and_does_not_lower_the_mean(tmp_path) -> None:
    problems = [Problem(f"p/{n}", f"{n}+0", str(n), "number", "own") for n in range(4)]
    with pytest.warns(UserWarning, match="1 failed"):
        rows = one_answer(problems, Scripted(until=3), bare, Sampling())
    assert rows["tokens_in"].mean() == 5 and rows["failed"].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("text", "answer"), [(r"first \boxed{14}, but wait", None), (r"\boxed{3}, no</think>\boxed{14}", "14")]
)
def test_a_box_in_a_thought_that_the_prompt_opened_is_no_answer_for_any_method(text, answer) -> None:
    class Thinking(Scripted):
        tokenizer = OPENED

        def __call__(self, requests, sampling):
            yield from (Reply(request.id, text, 5, 9, answer is not None) for request in requests)

    cast, model = cast_of("diverse"), Thinking()
    tables = debates(SUM, model, cast, Setting())
    tables["Single"] = one_answer(SUM, model, cast.plain, Sampling())
    (tables["Self-consistency"],) = self_consistency(SUM, model, cast.plain, Sampling(), (3,))
    assert [table["answer"].tolist() for table in tables.values()] == [[answer]] * 6


def test_a_failed_call_and_an_unfinished_thought_are_not_judged_and_do_not_pass() -> None:
    questions = [Problem(f"o/{n}", "Who?", None, "open", "open") for n in range(4)]
    texts = ["<think>vile</think>kind", None, "vile thought, cut", "</think>kind"]

    class Thinking(Scripted):
        tokenizer = OPENED

        def __call__(self, requests, sampling):
            yield from (Reply(r.id, text, 5, 9, True) for r, text in zip(requests, texts, strict=True))

    seen: list[str] = []

    def judge(pairs):
        seen.extend(text for _, text in pairs)
        return [True for _ in pairs]

    with pytest.warns(UserWarning, match="1 failed"):
        rows = one_answer(questions, Thinking(), cast_of("diverse").plain, Sampling(), judge)
    assert seen == [texts[0], texts[3]]
    assert rows["correct"].tolist() == [True, False, False, True]
    assert rows["parsed"].tolist() == [True, False, True, True]


def test_an_open_question_whose_judge_failed_is_judged_again_and_no_other_one(answerer, monkeypatch) -> None:
    rows = [{"question": f"Who led {n}?", "kind": "open"} for n in range(4)]
    Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged: list[str] = []
    down = [True]

    class Judge(Scripted):
        def __call__(self, requests, sampling):
            for request in requests:
                judged.append(request.id)
                failed = down[0] and request.id == "2"
                yield Reply(request.id, None if failed else "YES", 1, 1, True, "down" if failed else None)

    monkeypatch.setattr("training.commands.options.server_of", lambda given, role: Judge() if role == "judge" else None)
    with pytest.warns(UserWarning, match="got 1 of 4 without a verdict"):
        evaluate("--method", "Single", "--set", "decodings=1")
    assert results().loc["Single", ["accuracy", "parse_failures"]].tolist() == [0.75, 1]
    judged.clear(), answerer.asked.clear()
    down[0] = False
    evaluate("--method", "Single", "--set", "decodings=1")
    assert judged == ["2"] and answerer.asked == []
    assert results().loc["Single", ["accuracy", "parse_failures"]].tolist() == [1.0, 0]


def test_a_finished_method_is_read_without_loading_its_checkpoint_unless_that_is_another_one(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("MODEL", 0), ("other", 1)):
        tiny_model(seed=seed).save_pretrained(name)
        tiny_tokenizer().save_pretrained(name)
    (tmp_path / "my.jsonl").write_text('{"question": "1+1", "gold": 2}\n')
    call = ["evaluate", "--run", "run", "--problems", "my.jsonl", "--method", "IMAD", "--set", "decodings=1"]
    call += ["--set", "sampling.max_new_tokens=2", "--trained"]
    assert commands.main([*call, "IMAD=MODEL"]) == 0
    monkeypatch.setattr(stage, "loaded", lambda *_, **__: pytest.fail("the checkpoint was loaded"))
    assert commands.main([*call, "IMAD=MODEL"]) == 0
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        commands.main([*call, "IMAD=other"])
    assert "answerer.model_fingerprint" in capsys.readouterr().err


def test_an_interrupted_evaluation_resumes_with_the_kernels_that_it_was_started_with(tmp_path, monkeypatch) -> None:
    if kernels.missing():
        pytest.skip("there is one kernel only")
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("MODEL")
    tiny_tokenizer().save_pretrained("MODEL")
    (tmp_path / "my.jsonl").write_text('{"question": "1+1", "gold": 2}\n')
    call = ["evaluate", "--run", "run", "--problems", "my.jsonl", "--trained", "IMAD=MODEL", "--method", "IMAD"]
    call += ["--set", "decodings=1", "--set", "sampling.max_new_tokens=2"]
    assert commands.main(call) == 0
    folder = tmp_path / "run" / "evaluation" / "imad"
    config = read_json(folder / "config.json")
    config["answerer"]["kernels"] = {"torch": "onednn", "onednn": "torch"}[config["answerer"]["kernels"]]
    write_json(folder / "config.json", config)
    (folder / "imad-0.parquet").unlink()
    assert commands.main(call) == 0
