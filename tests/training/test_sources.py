"""Problems come from families, benchmarks and files, in parts that share no question."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from training.problems import benchmarks
from training.problems.benchmarks import load_problems
from training.problems.families import FAMILIES, questions_of_seed
from training.problems.problem import Problem, write_problems
from training.problems.sources import load_source, part_of, question_hash, split_problems

DATA = Path(__file__).parents[3] / "shared" / "data"


def own(path: Path, n: int = 60) -> Path:
    write_problems(path, [Problem(f"p/{i}", f"What is {i} + {i}?", str(2 * i), "number", "doubles") for i in range(n)])
    return path


def test_one_source_gives_two_parts_that_share_no_question_and_together_are_all_of_it(tmp_path) -> None:
    source = str(own(tmp_path / "my.jsonl"))
    train, test = split_problems(source)
    assert not {p.question for p in train} & {p.question for p in test}
    assert sorted(p.id for p in (*train, *test)) == sorted(p.id for p in load_source(source))
    assert 0.3 < len(train) / 60 < 0.7
    lines = (tmp_path / "my.jsonl").read_text().splitlines()
    random.Random(0).shuffle(lines)
    (tmp_path / "other.jsonl").write_text("\n".join(lines[:40]) + "\n")
    assert {p.question for p in split_problems(str(tmp_path / "other.jsonl"))[0]} <= {p.question for p in train}


def test_a_source_for_training_alone_is_used_whole_and_a_smaller_draw_is_a_prefix(tmp_path) -> None:
    source = str(own(tmp_path / "my.jsonl"))
    train, test = split_problems(source, ["arithmetic"], n_test=5)
    assert len(train) == 60 and test == questions_of_seed("arithmetic", 5, 0)
    few, more = (split_problems(source, ["arithmetic"], n, 5)[0] for n in (5, 9))
    assert more[:5] == few and few != train[:5]
    assert split_problems("addition", [source], 7)[0] == FAMILIES["addition"](7, 0, "train")


def test_a_question_in_both_parts_and_repeated_ids_are_refused(tmp_path) -> None:
    source = str(own(tmp_path / "my.jsonl"))
    copy = str(own(tmp_path / "copy.jsonl", 3))
    with pytest.raises(ValueError, match="without overlap; got 3 in both"):
        split_problems(source, [copy])
    with pytest.raises(ValueError, match="different ids; got 3 repeated"):
        split_problems("arithmetic", [copy, copy], 5)
    with pytest.raises(ValueError, match="expected a number of problems of the family"):
        split_problems("arithmetic")
    for wrong in ("chess", "gsm9k=x", "my.json"):
        with pytest.raises(ValueError, match="expected a family among"):
            split_problems(wrong)


def test_a_benchmark_is_read_from_a_local_file_and_split_by_its_questions(tmp_path) -> None:
    rows = [{"question": f"How many is {n}?", "answer": f"so\n#### {n}"} for n in range(40)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, test = split_problems(f"gsm8k={tmp_path / 'gsm8k.jsonl'}")
    assert {p.family for p in train} == {"gsm8k"} and len(train) + len(test) == 40
    assert all(part_of(p.question) == "train" for p in train)


def test_a_question_of_the_benchmark_is_left_out_of_the_training_problems_alone(tmp_path, monkeypatch) -> None:
    source = str(own(tmp_path / "my.jsonl"))
    drawn = {question_hash(f"What is {i} + {i}?") for i in range(10)}
    monkeypatch.setattr("training.problems.sources.drawn_hashes", lambda: drawn)
    train, _ = split_problems(source, ["arithmetic"], n_test=1)
    assert sorted(problem.id for problem in train) == sorted(f"p/{i}" for i in range(10, 60))
    assert len(split_problems("arithmetic", [source], 1)[1]) == 60


@pytest.mark.skipif(not DATA.is_dir(), reason="the benchmarks' files are not at hand")
def test_the_benchmarks_files_give_disjoint_parts_of_every_task() -> None:
    for source in (f"gsm8k={DATA}/gsm8k/test.jsonl", f"mmlu_pro={DATA}/mmlu_pro/test_sample.jsonl", f"bbh={DATA}/bbh"):
        train, test = split_problems(source)
        assert {p.family for p in train} == {p.family for p in test}
        assert not {p.question for p in train} & {p.question for p in test}


def test_training_problems_of_a_hub_s_benchmark_come_from_its_train_split_and_a_local_file_is_halved(
    tmp_path, monkeypatch
) -> None:
    def rows(split: str) -> list[dict[str, str]]:
        return [{"question": f"{split} {n}?", "answer": f"so\n#### {n}"} for n in range(30)]

    asked = []
    monkeypatch.setattr(benchmarks, "_hub_rows", lambda source, config, split: asked.append(split) or rows(split))
    train, test = split_problems("gsm8k=openai/gsm8k")
    assert {p.question.split()[0] for p in train} == {"train"} and {p.question.split()[0] for p in test} == {"test"}
    assert len(train) == len(test) == 30 and not {p.id for p in train} & {p.id for p in test}
    assert split_problems("gsm8k=openai/gsm8k", ["arithmetic"], n_test=5)[0] == train
    assert split_problems("arithmetic", ["gsm8k=openai/gsm8k"], 5)[1] == test
    assert "train" not in asked[-1:]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows("test")))
    train, test = split_problems(f"gsm8k={tmp_path / 'gsm8k.jsonl'}")
    assert len(train) + len(test) == 30 and train and test
    with pytest.raises(ValueError, match=r"expected a split among \('test',\) of mmlu_pro"):
        load_problems("mmlu_pro", "TIGER-Lab/MMLU-Pro", split="train")


@pytest.mark.parametrize("numbers", [{"n_train": 0}, {"n_train": -3}, {"n_train": 5, "n_test": 0}])
def test_a_part_without_problems_is_refused(numbers) -> None:
    with pytest.raises(ValueError, match="expected 1 problem or more in each part"):
        split_problems("arithmetic", **numbers)
