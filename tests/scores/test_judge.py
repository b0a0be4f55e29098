"""Judges: each distinct text once, concurrent, retried, cached; the failing row named; unread answers counted."""

from __future__ import annotations

import io
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import steerkit as sk
from steerkit.io.rows import read_rows
from steerkit.scores.judge import JudgeError, JudgeWarning, read_score
from tests.scripted_server import KEY, LONG_S, Call, Scripted, answer, drop, half, in_turn, refuse
from tests.sweep_tables import table

pytestmark = pytest.mark.usefixtures("no_key_but_the_tests")
RUBRIC = "How long is the text?"


def rule(text: str) -> str:
    return str(len(text))


def text_in(call: Call) -> str:
    return call.question.partition("<text>\n")[2].partition("\n</text>")[0]


def five(call: Call) -> None:
    call.json(answer("5"))


def by_rule(call: Call, _: int = 0) -> None:
    call.json(answer(rule(text_in(call))))


def judge_of(scripted: Scripted, tmp_path: Path, **options: Any) -> Any:
    options = {"cache": tmp_path / "answers.jsonl", "timeout_s": LONG_S, "wait": lambda *_: None, **options}
    return sk.judge(scripted.url, "some-model", options.pop("rubric", RUBRIC), **options)


def swept(text: Callable[..., str] | None = None) -> sk.SweepResult:
    return sk.SweepResult(table() if text is None else table(text=text))


def test_each_distinct_text_is_sent_once_and_all_its_rows_have_its_score(tmp_path) -> None:
    result = swept(lambda v, c, i, s: f"text {i}")
    with Scripted(by_rule) as scripted:
        judged = result.score(judge_of(scripted, tmp_path), column="length")
    sent = [text_in(call) for call in scripted.calls]
    assert sorted(sent) == sorted(result.table["text"].unique())
    assert judged.table["length"].tolist() == [float(len(text)) for text in result.table["text"]]
    assert judged.meta["judges"]["length"]["n_texts"] == len(sent) < len(result.table)


def test_the_request_is_the_rubric_the_text_and_the_form_of_the_answer_at_temperature_0(tmp_path) -> None:
    with Scripted(in_turn(five)) as scripted:
        judge_of(scripted, tmp_path, scale=(1, 5)).scores(["{x} {prompt}\n"])
    content = "How long is the text?\n\n<text>\n{x} {prompt}\n\n</text>\n\n"
    content += "Answer with one number from 1 to 5 and nothing else."
    assert scripted.calls[0].path == "/v1/chat/completions"
    assert scripted.calls[0].body == {
        "model": "some-model", "messages": [{"role": "user", "content": content}], "temperature": 0, "seed": 0,
        "max_tokens": 16, "stream": False,
    }  # fmt: skip


def test_a_rubric_with_prompt_reads_pairs_of_prompt_and_text(tmp_path) -> None:
    with Scripted(in_turn(five)) as scripted:
        judge = judge_of(scripted, tmp_path, rubric="Does {text} answer {prompt}?")
        assert judge.scores(["a", "a", "a"], ["p", "q", "p"]).tolist() == [5, 5, 5]
        with pytest.raises(ValueError, match="expected 1 prompts"):
            judge.scores(["a"])
    asked = sorted(call.question.partition("?")[0] for call in scripted.calls)
    assert asked == ["Does a answer p", "Does a answer q"]


def test_the_rule_judge_and_the_server_that_follows_its_rule_give_the_same_table(tmp_path) -> None:
    with Scripted(by_rule) as scripted:
        by_server = swept().score(judge_of(scripted, tmp_path))
    pd.testing.assert_frame_equal(by_server.table, swept().score(sk.judge(rule=rule)).table)


def test_requests_under_way_reach_the_concurrency(tmp_path) -> None:
    meeting = threading.Barrier(4, timeout=LONG_S)

    def script(call: Call, _: int) -> None:
        meeting.wait()
        by_rule(call)

    with Scripted(script) as scripted:
        scores = judge_of(scripted, tmp_path, concurrency=4).scores([f"{'x' * n}" for n in range(8)])
    assert scores.tolist() == list(range(8))


@pytest.mark.parametrize("fault", [drop, half, refuse(429), refuse(500)])
def test_a_request_that_fails_is_retried(tmp_path, fault) -> None:
    with Scripted(in_turn(fault, fault, by_rule)) as scripted:
        assert judge_of(scripted, tmp_path).scores(["four"]).tolist() == [4.0]
    assert len(scripted.calls) == 3


def test_all_failing_rows_are_named_and_all_other_texts_are_judged_and_kept(tmp_path) -> None:
    result = swept(lambda v, c, i, s: f"{v} {c} {i} {s}")
    texts = list(result.table["text"].unique())
    bad = texts[:2] + texts[-1:]
    rows = [result.table.index[result.table["text"] == text][0] for text in bad]

    def script(call: Call, _: int) -> None:
        (refuse(400) if text_in(call) in bad else by_rule)(call)

    with Scripted(script) as scripted, pytest.raises(JudgeError, match=f"none for 3 of {len(texts)}") as failed:
        result.score(judge_of(scripted, tmp_path))
    message = str(failed.value)
    for row in rows:
        assert f"row {row} (vector='{result.table['vector'][row]}'" in message
    assert "HTTP 400" in message and message.endswith("only for the others.")
    kept = [row["text"] for row in read_rows(tmp_path / "answers.jsonl")]
    assert sorted(kept) == sorted(set(texts) - set(bad)) and f"{len(kept)} answers were added" in message
    with Scripted(by_rule) as scripted:
        resumed = result.score(judge_of(scripted, tmp_path))
    assert sorted(text_in(call) for call in scripted.calls) == sorted(bad)
    pd.testing.assert_frame_equal(resumed.table, result.score(sk.judge(rule=rule)).table)


def test_a_server_that_answers_nothing_is_given_up_after_16_texts(tmp_path) -> None:
    texts = [f"text {n}" for n in range(60)]
    with (
        Scripted(in_turn(refuse(400))) as scripted,
        pytest.raises(JudgeError, match="none for 16 of 60: text") as failed,
    ):
        judge_of(scripted, tmp_path).scores(texts)
    assert len(scripted.calls) < 40 and "The other 44 were not waited for" in str(failed.value)
    with (
        Scripted(in_turn(five, refuse(400))) as scripted,
        pytest.raises(JudgeError, match=r"9 more.*1 answers were added"),
    ):
        judge_of(scripted, tmp_path, concurrency=1).scores(texts)
    assert len(scripted.calls) == 60


def test_a_text_that_was_judged_is_not_sent_again_unless_the_judge_is_another(tmp_path) -> None:
    texts = ["a", "bc"]
    with Scripted(by_rule) as scripted:
        for _ in range(2):
            judge_of(scripted, tmp_path).scores(texts)
        assert len(scripted.calls) == 2
        for n, other in enumerate([{"rubric": "Other"}, {"scale": (0, 9)}, {"max_tokens": 8}], 2):
            judge_of(scripted, tmp_path, **other).scores(texts)
            assert len(scripted.calls) == 2 * n
        sk.judge(scripted.url, "other-model", RUBRIC, cache=tmp_path / "answers.jsonl").scores(texts)
        assert len(scripted.calls) == 10


def test_the_default_cache_is_a_file_per_judge_below_the_hugging_face_caches(tmp_path, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    caches = [sk.judge("http://127.0.0.1:1", "m", rubric).cache for rubric in ("a", "a", "b")]
    assert caches[0] == caches[1] != caches[2] and caches[0].parent == tmp_path / "steerkit" / "judges"


def test_a_line_that_was_cut_off_is_asked_for_again(tmp_path) -> None:
    cache = tmp_path / "answers.jsonl"
    with Scripted(by_rule) as scripted:
        judge_of(scripted, tmp_path, concurrency=1).scores(["a", "bc", "def"])
        cache.write_bytes(cache.read_bytes()[:-9])
        assert judge_of(scripted, tmp_path).scores(["a", "bc", "def"]).tolist() == [1, 2, 3]
    assert len(scripted.calls) == 4
    assert sorted(row["text"] for row in read_rows(cache)) == ["a", "bc", "def"]


def test_answers_that_are_no_score_are_nan_and_counted(tmp_path) -> None:
    result = swept(lambda v, c, i, s: "good" if i % 2 else "bad")

    def script(call: Call, _: int) -> None:
        call.json(answer("80" if text_in(call) == "good" else "I cannot say."))

    expected = "got 9 of 10 answers without one, e.g. 'I cannot say.'"
    with Scripted(script) as scripted, pytest.warns(JudgeWarning, match=expected):
        judged = result.score(judge_of(scripted, tmp_path))
    assert judged.meta["judges"]["judge"]["n_unread"] == 9
    assert judged.table["judge"].isna().equals(judged.table["text"] != "good")
    assert judged.curve("judge")["n_missing"].sum() > 0


def test_a_row_without_a_text_is_nan_and_not_sent(tmp_path) -> None:
    frame = table()
    frame.loc[3, "text"] = None
    with Scripted(by_rule) as scripted:
        judged = sk.SweepResult(frame).score(judge_of(scripted, tmp_path))
    assert judged.table.index[judged.table["judge"].isna()].tolist() == [3]
    assert judged.meta["judges"]["judge"]["n_unread"] == 0 and len(scripted.calls) == frame["text"].nunique()


def test_the_key_is_in_the_header_and_not_in_cache_or_result(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    with Scripted(lambda call, _: call.json(answer(f"5 {call.headers['Authorization']}"))) as scripted:
        judge = judge_of(scripted, tmp_path, api_key_env="SOME_KEY")
        judged = swept().score(judge)
    assert scripted.calls[0].headers["Authorization"] == f"Bearer {KEY}"
    shown = (tmp_path / "answers.jsonl").read_text() + repr(judge) + json.dumps(judged.meta)
    assert KEY not in shown and "[key]" in shown


READ = {
    "85": 85, " 85.5\n": 85.5, "**85**": 85, "Score: 85/100": 85, "85 out of 100.": 85, "The score is 85.": 85,
    "85. The text is glad": None, "<think>maybe 20</think>\n\n85": 85, "<think>maybe 20": None, "100/100": 100, "0": 0,
    "": None, "none": None, "120": None, "-5": None, "85 or 90": None, "85-90": None, "1,000": None, "7,5": None,
    "Article 4 describes duties": None, "I rate this text 85.": 85, "Rating: *85*": 85, "100: very glad": 100,
    "85 of 3 words": None, "gpt4": None, "85%": 85, "85 85": 85, "85/10": None, "100/1000": None, "\u0668\u0665": None,
    "10/10": None, "Score: 5/5": None, "10 out of 10": None, "Rating: 4 Out of 4 stars": None, "0/0": None,
    "10 of 10": None, "10 points out of 10": None, "a score of 85": 85,
    "85 / 100": 85, "85 OUT OF 100": 85,
}  # fmt: skip


@pytest.mark.parametrize(("text", "score"), READ.items())
def test_a_score_is_the_only_number_of_an_answer_and_on_the_scale(text: str, score: float | None) -> None:
    found = read_score(text)
    assert math.isnan(found) if score is None else found == score


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no judge": ({}, "expected a url or a rule; got none"),
    "two judges": ({"url": "http://127.0.0.1:1", "rule": rule}, "expected a url or a rule; got both"),
    "a rule with a cache": ({"rule": rule, "cache": "c"}, "expected no cache"),
    "no model": ({"url": "http://127.0.0.1:1", "rubric": "r"}, "expected a model and a rubric; got None"),
    "no rubric": ({"url": "http://127.0.0.1:1", "model": "m", "rubric": " "}, "expected a model and a rubric"),
    "a scale without width": ({"rule": rule, "scale": (1, 1)}, "expected a scale"),
    "no tokens": ({"url": "http://127.0.0.1:1", "model": "m", "rubric": "r", "max_tokens": 0}, "expected max_tokens"),
    "no address": ({"url": "127.0.0.1", "model": "m", "rubric": "r"}, "expected a base_url"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_judge_that_cannot_work_is_refused_when_it_is_made(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        sk.judge(**options)


def test_a_text_that_is_missing_in_a_table_is_nan_and_what_is_no_text_is_refused() -> None:
    judge = sk.judge(rule=rule)
    read = pd.read_csv(io.StringIO("text,number\nabc,1\n,2\n"))
    assert judge.scores(read["text"])[0] == 3 and math.isnan(judge.scores(read["text"])[1])
    with pytest.raises(TypeError, match="each text as a string"):
        judge.scores(read["number"])
    with pytest.raises(TypeError, match="expected a text from the rule; got 3"):
        sk.judge(rule=len).scores(["abc"])  # type: ignore[arg-type]


def test_a_cache_that_holds_something_else_is_refused_by_name(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": 1}\n')
    judge = sk.judge("http://127.0.0.1:9", "m", RUBRIC, cache=tmp_path / "rows.jsonl", api_key_env=None)
    with pytest.raises(ValueError, match=r"expected the answers of a judge in .*rows\.jsonl"):
        judge.scores(["a"])
