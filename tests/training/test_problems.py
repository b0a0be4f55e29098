"""Problems: what a file holds is read or refused by name, the benchmarks' files in their own schemas."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from steerkit.io.rows import read_rows
from training.problems.answers import read_answer
from training.problems.benchmarks import BBH_TASKS, load_bbh, load_gsm8k, load_mmlu_pro, load_open, load_problems
from training.problems.families import (
    DRAWN_BEFORE,
    FAMILIES,
    REPORTED_SEEDS,
    TooFewProblems,
    addition,
    questions_of_seed,
    split_of,
)
from training.problems.problem import Problem, read_problems, write_problems

DATA = Path(__file__).parents[3] / "shared" / "data"
real_data = pytest.mark.skipif(
    not (DATA / "gsm8k").exists(), reason="the benchmarks' files are not beside this checkout"
)
ONE = Problem("arithmetic/1", "1+1", "2", "number", "arithmetic")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "a question in words"),
        ({"question": None}, "a question in words"),
        ({"kind": "essay"}, "expected a kind of"),
        ({"gold": None}, "open question only"),
        ({"kind": "open"}, "open question only"),
        ({"gold": "2.0"}, "canonical form, '2'"),
        ({"gold": "two"}, "expected an answer of kind 'number'"),
        ({"gold": "(A)", "kind": "option"}, "canonical form, 'A'"),
    ],
)
def test_a_problem_that_no_answer_could_be_held_against_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(ONE, **change)


def test_problems_written_as_lines_are_read_back(tmp_path: Path) -> None:
    problems = [one for draw in FAMILIES.values() for one in draw(5, 0, "test")]
    problems += [Problem("open/1", "Who – and why?\nSay.", None, "open", "open"), replace(ONE, gold="yes", kind="word")]
    write_problems(tmp_path / "problems.jsonl", problems)
    assert read_problems(tmp_path / "problems.jsonl") == problems


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "1", "gold": "2", "kind": "number"}, "row 2: expected an object with question: str"),
        ({**ONE.__dict__, "extra": 1}, "row 2: expected keys among"),
        ({**ONE.__dict__, "id": "2", "gold": "two"}, "row 2: expected an answer of kind 'number'"),
        ({**ONE.__dict__, "id": "2", "kind": "open"}, "row 2: expected None as gold answer"),
        ({**ONE.__dict__, "question": 2}, "row 2: expected an object with"),
        ({**ONE.__dict__}, "row 2: expected an id of its own"),
        ({**ONE.__dict__, "id": 2}, "row 2: expected id and family as text"),
    ],
)
def test_a_line_that_is_no_problem_is_refused_with_file_and_row(tmp_path: Path, row: Any, message: str) -> None:
    rows = [ONE.__dict__, row]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    with pytest.raises(ValueError, match=message) as caught:
        read_problems(tmp_path / "bad.jsonl")
    assert "bad.jsonl" in str(caught.value)
    (tmp_path / "bad.jsonl").write_text("")
    with pytest.raises(ValueError, match="at least one problem"):
        read_problems(tmp_path / "bad.jsonl")


def test_a_question_with_an_answer_is_enough_and_without_one_it_is_open(tmp_path: Path) -> None:
    rows = [{"question": "a?", "gold": 1000}, {"question": "b?", "gold": "1,000"}, {"question": "Why?"}]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert read_problems(tmp_path / "my.jsonl") == [
        Problem("my/1", "a?", "1000", "number", "my"),
        Problem("my/2", "b?", "1000", "number", "my"),
        Problem("my/3", "Why?", None, "open", "my"),
    ]


GSM8K = {"question": "How many?", "answer": "10*100 = <<10*100=1000>>1,000\n#### 1,000"}
MMLU_PRO = {
    "question_id": 70,
    "question": "Which?",
    "options": ["this", "that", "none"],
    "answer": "B",
    "answer_index": 1,
    "category": "law",
}
BBH = {
    "formal_fallacies": {"input": "valid or invalid?", "target": "invalid"},
    "logical_deduction_five_objects": {"input": "Which?\nOptions:\n(A) this\n(B) that", "target": "(B)"},
    "tracking_shuffled_objects_five_objects": {"input": "Who?\nOptions:\n(A) he\n(E) she", "target": "(E)"},
    "causal_judgement": {"input": "Did he?\nOptions:\n- Yes\n- No", "target": "Yes"},
    "web_of_lies": {"input": "Question: Does he lie?", "target": "No"},
}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bbh_folder(folder: Path, **changed: Any) -> Path:
    for task, example in BBH.items():
        (folder / f"{task}.json").write_text(json.dumps(changed.get(task, {"canary": "", "examples": [example]})))
    return folder


def parquet(path: Path, *rows: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


@pytest.mark.parametrize(("write", "name"), [(lines, "test.jsonl"), (parquet, "test.parquet")])
def test_gsm8k_and_mmlu_pro_are_read_in_their_own_schemas(tmp_path: Path, write: Any, name: str) -> None:
    (one,) = load_gsm8k(write(tmp_path / name, GSM8K))
    assert one == Problem("gsm8k/1", "How many?", "1000", "number", "gsm8k")
    (one,) = load_gsm8k(write(tmp_path / name, {**GSM8K, "answer": "#### 3 is what I thought\n#### 4"}))
    assert one.gold == "4"
    (one,) = load_mmlu_pro(write(tmp_path / name, MMLU_PRO))
    question = "Which?\nOptions:\n(A) this\n(B) that\n(C) none"
    assert one == Problem("mmlu_pro/70", question, "B", "option", "mmlu_pro")


def test_white_space_does_not_show_the_right_option_of_mmlu_pro(tmp_path: Path) -> None:
    row = {**MMLU_PRO, "question": "What is 2 + 3?\n", "options": ["4", " 5", "6\n"]}
    (one,) = load_mmlu_pro(lines(tmp_path / "test.jsonl", row))
    assert (one.question, one.gold) == ("What is 2 + 3?\nOptions:\n(A) 4\n(B) 5\n(C) 6", "B")
    (tmp_path / "test.json").write_text(json.dumps([row]))
    assert load_mmlu_pro(tmp_path / "test.json") == [one]


@pytest.mark.parametrize(
    ("options", "index", "kept", "gold"),
    [
        (["4", "5", "N/A", "N/A"], 1, ["4", "5"], "B"),
        (["N/A", "4", " N/A", "5"], 3, ["4", "5"], "B"),
        (["4", "4 ", "5", ""], 2, ["4", "5"], "B"),
        (["4", "5", " 5"], 2, ["4", "5"], "B"),
    ],
)
def test_the_letter_of_the_right_option_follows_the_options_that_are_left(
    tmp_path: Path, options: list[str], index: int, kept: list[str], gold: str
) -> None:
    row = {**MMLU_PRO, "options": options, "answer": "ABCD"[index], "answer_index": index}
    (one,) = load_mmlu_pro(lines(tmp_path / "test.jsonl", row))
    assert one.question.splitlines()[2:] == [f"({letter}) {option}" for letter, option in zip("AB", kept, strict=True)]
    assert (one.gold, kept["AB".index(one.gold)]) == (gold, options[index].strip())


def test_gold_and_question_are_read_without_stray_white_space_and_with_a_unit(tmp_path: Path) -> None:
    (one,) = load_gsm8k(
        lines(tmp_path / "test.jsonl", {"question": " How many? \n", "answer": "so\n####  18 apples \n"})
    )
    assert (one.question, one.gold) == ("How many?", "18")
    (tmp_path / "test.json").write_text(json.dumps([GSM8K]))
    assert load_gsm8k(tmp_path / "test.json")[0].gold == "1000"
    with pytest.raises(ValueError, match="'18 lakh'"):
        load_gsm8k(lines(tmp_path / "test.jsonl", {**GSM8K, "answer": "#### 18 lakh"}))


def test_bbh_is_read_task_by_task_or_as_a_whole(tmp_path: Path) -> None:
    folder = bbh_folder(tmp_path)
    loaded = {task: load_problems(f"bbh/{task}", folder) for task in BBH}
    assert [(one.kind, one.gold) for (one,) in loaded.values()] == [
        ("word", "invalid"),
        ("option", "B"),
        ("option", "E"),
        ("word", "yes"),
        ("word", "no"),
    ]
    assert [one.question for (one,) in loaded.values()] == [example["input"] for example in BBH.values()]
    assert load_problems("bbh", folder) == [one for problems in loaded.values() for one in problems]
    assert loaded["web_of_lies"][0].id == "bbh/web_of_lies/1" and loaded["web_of_lies"][0].family == "bbh/web_of_lies"


def test_open_questions_have_no_gold(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text('["Who led it?", "Why?"]')
    assert load_open(tmp_path / "q.json") == [
        Problem("open/1", "Who led it?", None, "open", "open"),
        Problem("open/2", "Why?", None, "open", "open"),
    ]


def test_a_smaller_draw_is_the_beginning_of_a_larger_one(tmp_path: Path) -> None:
    file = lines(tmp_path / "test.jsonl", *({**GSM8K, "question": f"q{i}"} for i in range(40)))
    everyone = load_problems("gsm8k", file)
    assert [one.question for one in everyone] == [f"q{i}" for i in range(40)]
    drawn = load_problems("gsm8k", file, limit=20, seed=1)
    assert drawn != everyone[:20] and set(drawn) < set(everyone) and len(set(drawn)) == 20
    assert load_problems("gsm8k", file, limit=5, seed=1) == drawn[:5]
    assert load_problems("gsm8k", file, limit=5, seed=2) != drawn[:5]
    assert set(load_problems("gsm8k", file, limit=1000)) == set(everyone)
    assert load_problems("gsm8k", file, limit=0) == []
    with pytest.raises(ValueError, match="got -1"):
        load_problems("gsm8k", file, limit=-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "it is 5"}, "expected a gold answer after '#### '; got 'it is 5'"),
        ({"answer": "#### five"}, "expected an answer of kind 'number'; got 'five'"),
        ({"answer": "#### "}, "expected an answer of kind 'number'; got ''"),
        ({"answer": None}, "expected an object with question: str, answer: str"),
        ({"question": ""}, "expected a question in words"),
    ],
)
def test_a_malformed_gsm8k_row_is_refused_with_file_and_row(tmp_path: Path, change: Any, message: str) -> None:
    file = lines(tmp_path / "test.jsonl", GSM8K, {**GSM8K, **change})
    with pytest.raises(ValueError, match=re.escape(f"{file}, row 2: {message}")):
        load_gsm8k(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "D", "answer_index": 3}, "one of 3 options; got 'D', 3"),
        ({"answer": "A"}, "one of 3 options; got 'A', 1"),
        ({"answer": "that"}, "one of 3 options; got 'that', 1"),
        ({"answer": "Z", "answer_index": -1}, "one of 3 options; got 'Z', -1"),
        ({"options": "this"}, "options: list"),
        ({"options": ["this", "N/A", "none"]}, "one of them right"),
        ({"options": [" that", "that"]}, "two or more options"),
        ({"options": ["this", 2]}, "options as text"),
        ({"options": []}, "one of 0 options"),
        ({"question_id": None}, "question_id: int"),
    ],
)
def test_a_malformed_mmlu_pro_row_is_refused_with_file_and_row(tmp_path: Path, change: Any, message: str) -> None:
    file = lines(tmp_path / "test.jsonl", MMLU_PRO, {**MMLU_PRO, **change})
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_mmlu_pro(file)
    assert f"{file}, row 2: " in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"examples": [BBH["logical_deduction_five_objects"], {"input": "q\n(A) this"}]}, "row 2: expected an object"),
        ({"examples": [{"input": "q\n(A) this", "target": "(B)"}]}, "row 1: expected as target one of"),
        ({"examples": [{"input": "q\n(A) this", "target": "this"}]}, "row 1: expected an answer of kind 'option'"),
        ({"examples": ["q"]}, "row 1: expected an object"),
        ({"examples": []}, "at least one problem"),
        ({"rows": []}, "at least one problem"),
        ([], "at least one problem"),
    ],
)
def test_a_malformed_bbh_file_is_refused_with_file_and_row(tmp_path: Path, content: Any, message: str) -> None:
    bbh_folder(tmp_path, logical_deduction_five_objects=content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_bbh(tmp_path, "logical_deduction_five_objects")
    assert "logical_deduction_five_objects.json" in str(caught.value)


@pytest.mark.parametrize("text", ["{}", "[]", '["q", 1]', '["q", ""]', "["])
def test_a_file_without_a_list_of_questions_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(ValueError, match=r"q\.json"):
        load_open(tmp_path / "q.json")


def test_a_file_that_was_cut_off_is_refused_and_not_read_short(tmp_path: Path) -> None:
    file = lines(tmp_path / "test.jsonl", GSM8K, GSM8K)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="its last one is cut off"):
        load_gsm8k(file)
    file.write_bytes(lines(file, GSM8K, GSM8K).read_bytes()[:-1])  # only the last newline is missing
    assert len(load_gsm8k(file)) == 2


def test_unknown_names_and_missing_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 'gsm'"):
        load_problems("gsm", tmp_path)
    with pytest.raises(ValueError, match=r"expected a task of .*; got 'snarks'"):
        load_problems("bbh/snarks", tmp_path)
    for missing in (tmp_path / "test.jsonl", "data/test.jsonl", "gsm8k"):
        with pytest.raises(FileNotFoundError, match=f"there is no {re.escape(str(missing))}"):
            load_gsm8k(missing)
    with pytest.raises(FileNotFoundError, match="web_of_lies"):
        load_bbh(tmp_path, "web_of_lies")


def test_a_hub_id_is_read_as_the_test_split_of_its_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: Any, **named: Any) -> list[Any]:
        asked.append((*arguments, named))
        return [{"openai/gsm8k": GSM8K, "TIGER-Lab/MMLU-Pro": MMLU_PRO}.get(arguments[0], BBH.get(arguments[1]))]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    loaded = [
        load_problems("gsm8k", "openai/gsm8k"),
        load_problems("mmlu_pro", "TIGER-Lab/MMLU-Pro"),
        load_problems("bbh/web_of_lies", "lukaemon/bbh"),
    ]
    assert [one.gold for (one,) in loaded] == ["1000", "B", "no"]
    test = {"split": "test"}
    assert asked == [
        ("openai/gsm8k", "main", test),
        ("TIGER-Lab/MMLU-Pro", None, test),
        ("lukaemon/bbh", "web_of_lies", test),
    ]


def test_without_the_package_or_the_network_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"read openai/gsm8k from the hub; it is not installed.*pass a file"):
        load_gsm8k("openai/gsm8k")

    def offline(*_: Any, **__: Any) -> None:
        raise RuntimeError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    with pytest.raises(OSError, match=r"openai/gsm8k from the hub; got RuntimeError\('no route'\).*pass a local file"):
        load_gsm8k("openai/gsm8k")


@real_data
def test_every_gold_of_the_real_gsm8k_is_a_number() -> None:
    problems = load_problems("gsm8k", DATA / "gsm8k" / "test.jsonl")
    assert len(problems) == len({one.id for one in problems}) == 1319
    assert [one.gold for one in problems[:3]] == ["18", "3", "70000"]
    raw = [row["answer"].split("#### ")[1] for row in read_rows(DATA / "gsm8k" / "test.jsonl")]
    assert [one.gold for one in problems] == [text.replace(",", "") for text in raw]
    assert sum("," in text for text in raw) > 10
    assert [read_answer(f"\\boxed{{{text}}}", "number") for text in raw] == [one.gold for one in problems]


@real_data
def test_every_gold_of_the_real_mmlu_pro_names_the_option_of_its_index() -> None:
    rows = read_rows(DATA / "mmlu_pro" / "test_sample.jsonl")
    problems = load_problems("mmlu_pro", DATA / "mmlu_pro" / "test_sample.jsonl")
    assert len(problems) == len({one.id for one in problems}) == len(rows) == 420
    for one, row in zip(problems, rows, strict=True):
        assert f"\n({one.gold}) {row['options'][row['answer_index']].strip()}\n" in one.question + "\n"


@real_data
def test_a_box_with_a_real_option_and_its_text_is_read_as_its_letter() -> None:
    read, asked = Counter(), 0
    for one in load_problems("mmlu_pro", DATA / "mmlu_pro" / "test_sample.jsonl"):
        for letter, text in re.findall(r"^\(([A-J])\) (.*)$", one.question, re.M):
            for box in (f"({letter}) {text}", f"{letter}. {text}", rf"\textbf{{({letter})}}\ \text{{{text}}}"):
                asked += 1
                answer = read_answer(rf"\boxed{{{box}}}", "option")
                assert answer in (letter, None)
                read[answer == letter] += 1
    assert asked > 10_000 and read[False] < asked / 200  # None where a text has brackets like those of an option


@real_data
def test_every_gold_of_the_real_bbh_is_read_under_its_tasks_kind() -> None:
    problems = load_problems("bbh", DATA / "bbh")
    assert len({one.id for one in problems}) == len(problems)
    assert Counter(one.family.removeprefix("bbh/") for one in problems) == {
        task: 187 if task == "causal_judgement" else 250 for task in BBH_TASKS
    }
    golds = {
        family: {one.gold for one in problems if one.family == family} for family in {one.family for one in problems}
    }
    assert golds["bbh/formal_fallacies"] == {"valid", "invalid"}
    assert golds["bbh/causal_judgement"] == golds["bbh/web_of_lies"] == {"yes", "no"}
    assert golds["bbh/logical_deduction_five_objects"] == set("ABCDE")
    assert golds["bbh/tracking_shuffled_objects_five_objects"] == set("ABCDE")


@real_data
def test_the_papers_open_questions_are_read() -> None:
    problems = load_problems("open", DATA / "published" / "hallucination_questions.json")
    assert len(problems) == 4 and {one.gold for one in problems} == {None}
    assert problems[0].question.startswith("Who led the Aramathian Expedition")


def test_the_options_of_mmlu_pro_are_written_alike(tmp_path) -> None:
    row = {"question_id": 70, "question": "What is 2 + 3? ", "answer": "B", "answer_index": 1}
    file = tmp_path / "m.json"
    file.write_text(json.dumps([{**row, "options": ["4", " 5", "6 ", "N/A", "N/A"]}]))
    (problem,) = load_problems("mmlu_pro", file)
    assert problem.question == "What is 2 + 3?\nOptions:\n(A) 4\n(B) 5\n(C) 6" and problem.gold == "B"
    lines = tmp_path / "m.jsonl"
    lines.write_text(json.dumps({**row, "options": ["4", "N/A"]}) + "\n")
    with pytest.raises(ValueError, match="one of them right"):
        load_problems("mmlu_pro", lines)
    file.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="expected a list of at least one problem"):
        load_problems("mmlu_pro", file)


@pytest.mark.parametrize(
    ("family", "n"), [("small_arithmetic", 500), ("clues", 60), ("two_sum", 60), ("addition", 300)]
)
def test_reported_seeds_have_test_questions_of_their_own_that_nothing_was_chosen_on(family, n, monkeypatch) -> None:
    if family in ("clues", "two_sum"):  # drawn one by one from very many: fewer show as much
        monkeypatch.setitem(DRAWN_BEFORE, family, dict.fromkeys(DRAWN_BEFORE[family], 60))
    blocks = [{p.question for p in questions_of_seed(family, n, seed)} for seed in REPORTED_SEEDS]
    assert all(len(block) == n for block in blocks) and len(set.union(*blocks)) == n * len(blocks)
    for seed, count in DRAWN_BEFORE[family].items():
        earlier = {p.question for p in FAMILIES[family](count, seed, "test")}
        assert not earlier & set.union(*blocks)
        assert {p.question for p in questions_of_seed(family, 5, seed)} <= earlier  # other seeds draw as before
    assert all(split_of(question) == "test" for question in set.union(*blocks))


def test_too_many_questions_for_each_seed_are_refused() -> None:
    with pytest.raises(TooFewProblems, match="small_arithmetic"):
        questions_of_seed("small_arithmetic", 600, REPORTED_SEEDS[-1])


def test_questions_of_a_seed_are_drawn_once_and_each_caller_has_a_list_of_its_own() -> None:
    calls = []

    def draw(n: int, seed: int, split: str) -> list[Problem]:
        calls.append((n, seed, split))
        return addition(n, seed, split)

    for seed in (3, REPORTED_SEEDS[0]):
        first = questions_of_seed("addition", 5, seed, draw)
        known = len(calls)
        first.append(first.pop(0))
        assert questions_of_seed("addition", 5, seed, draw)[0] == first[-1] and len(calls) == known
