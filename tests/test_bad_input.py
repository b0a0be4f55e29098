"""Bad input: each case is refused with what was expected, what came and what to do, and leaves every file as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import steerkit as sk
from steerkit.sweeps.result import SweepResult
from steerkit.text.pairs import ContrastPair, read_pairs, write_pairs
from steerkit.text.traces import DebateTrace, Turn, read_traces
from tests.bad_input.cases import PAIR, Case, lay, model, push, row, tokenizer, tree
from tests.bad_input.files import checkpoint_cases, file_cases
from tests.bad_input.reading import reading_cases
from tests.bad_input.steering import steering_cases
from tests.bad_input.sweeps import sweep_cases
from tests.bad_input.texts import pairs_cases, record, trace_cases
from tests.bad_input.vectors import vector_cases
from tests.bad_input.weights import weights_cases

CASES = [
    *pairs_cases(),
    *trace_cases(),
    *vector_cases(),
    *weights_cases(),
    *steering_cases(),
    *reading_cases(),
    *sweep_cases(),
    *file_cases(),
    *checkpoint_cases(),
]


@pytest.mark.usefixtures("only_our_own_checks")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused_with_three_parts_and_nothing_is_written(case: Case, tmp_path: Path) -> None:
    lay(tmp_path, case.files)
    before = tree(tmp_path)
    with pytest.raises(case.error) as caught:
        case.act(tmp_path)
    message = str(caught.value)
    for part in (case.expected, case.got, case.do):
        assert part in message, message
    assert len(message) < 2000
    assert tree(tmp_path) == before


def test_the_catalogue_is_large_and_names_each_case_once() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 100


# What looks odd and is no mistake


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + PAIR + PAIR.replace(b"\n", b"\r\n"))
    assert read_pairs(tmp_path / "p.jsonl") == [ContrastPair("p", "yes", "no")] * 2
    (tmp_path / "t.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([record()]).encode())
    assert len(read_traces(tmp_path / "t.json")) == 1


def test_a_line_of_a_megabyte_and_a_last_line_without_its_newline_are_read(tmp_path: Path) -> None:
    long = row(positive="yes " * 2**18)
    (tmp_path / "p.jsonl").write_bytes(long + PAIR.rstrip(b"\n"))
    first, last = read_pairs(tmp_path / "p.jsonl")
    assert len(first.positive) == 2**20
    assert last == ContrastPair("p", "yes", "no")


ODD = {
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u202eabc\u202c \u0645\u0631\u062d\u0628\u0627",
    "control characters": "a\x00b\x07\x1b[31m\x7f\x9b",
    "joined emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \ufe0f",
    "combining marks": "e\u0301\u0323" * 5,
    "what looks like a tag": "<|agent|> |> <| <|im_end|> |Agent 1 Solution| <round>",
    "line and paragraph separators": "a\u2028b\u2029c\x85d\x0be",
    "markup": "</script>{{ 7*7 }}{% raw %}<!--",
    "nothing": "",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_texts_go_through_files_traces_and_the_model_as_they_are(name: str, tmp_path: Path) -> None:
    text = ODD[name]
    turns = [Turn(1, 1, text.strip()), Turn(2, 1, "b")]
    trace = DebateTrace.of(text, turns, text)
    assert list(trace.turns) == turns
    for file in ("t.json", "t.jsonl"):
        sk.write_traces(tmp_path / file, [trace])
        assert read_traces(tmp_path / file) == [trace]
    if text:
        pairs = [ContrastPair(text, text, "no"), ContrastPair([{"role": "user", "content": text}], "a", text)]
        write_pairs(tmp_path / "p.jsonl", pairs)
        assert read_pairs(tmp_path / "p.jsonl") == pairs
        found = sk.collect(model(), tokenizer(), pairs, layers=[1], position="mean")
        assert found.items["n_tokens"].tolist()[0] == len(text.encode())


def test_prompts_that_are_odd_are_told_apart_in_a_sweep(tmp_path: Path) -> None:
    rows = [{"id": name, "prompt": text} for name, text in ODD.items() if text]
    made = sk.sweep(model(), tokenizer(), push(), rows, coefficients=[1], max_new_tokens=2, out=tmp_path / "run")
    back = SweepResult.load(tmp_path / "run").table
    assert back["prompt"].tolist() == made.table["prompt"].tolist()
    assert set(back["prompt"]) == {row["prompt"] for row in rows}
