"""Benchmarks as problems: GSM8K, MMLU-Pro, BBH and open questions."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerkit.io.json import read_json
from steerkit.io.rows import read_rows
from training.problems.answers import canonical
from training.problems.problem import LETTERS, Problem, problems_from_rows

SPLITS = {"gsm8k": ("train", "test")}
"""Benchmarks with more splits on the hub than the one of the evaluation, `test`."""


def load_gsm8k(source: str | Path, split: str = "test") -> list[Problem]:
    """Load GSM8K from a file of `{"question", "answer"}` rows, or from the hub.

    The file is `.jsonl`, `.json` (a list) or `.parquet`. The gold answer is the text after the last `####`. Errors are
    those of `load_problems`.

    Args:
        source: path of the file, or the hub id `openai/gsm8k`.
        split: of the hub, `train` or `test`; a file has no splits.

    Source: Cobbe et al. 2021, arXiv 2110.14168.

    Example:
        >>> problems = load_gsm8k("gsm8k/test.jsonl")
    """

    def problem(number: int, row: Mapping[str, Any]) -> Problem:
        _, mark, gold = row["answer"].rpartition("####")
        if not mark:
            raise ValueError(f"expected a gold answer after '#### '; got {row['answer'][-80:]!r}. Correct the row.")
        gold = canonical(gold.strip(), "number")
        name = f"gsm8k/{number}" if split == "test" else f"gsm8k/{split}/{number}"
        return Problem(name, row["question"].strip(), gold, "number", "gsm8k")

    return problems_from_rows(source, _rows(source, "main", split), {"question": str, "answer": str}, problem)


def load_mmlu_pro(source: str | Path) -> list[Problem]:
    """Load MMLU-Pro from a `.jsonl`, `.json` (a list) or `.parquet` file of its rows, or from the hub (test split).

    The options follow the question, one line `(A) ...` per option. White space around an option is removed, because in
    some subjects only the right option has it. Options `N/A` and repeated options are left out, and the letters follow
    the options that are left. Errors are those of `load_problems`.

    Args:
        source: path of the file, or the hub id `TIGER-Lab/MMLU-Pro`.

    Source: Wang et al. 2024, arXiv 2406.01574.

    Example:
        >>> problems = load_mmlu_pro("mmlu_pro/test.parquet")
    """
    columns = {"question_id": int, "question": str, "options": list, "answer": str, "answer_index": int}

    def problem(number: int, row: Mapping[str, Any]) -> Problem:
        options, gold, index = row["options"], row["answer"].strip(), row["answer_index"]
        if not 0 <= index < len(options) <= len(LETTERS) or LETTERS[index] != gold:
            raise ValueError(
                f"expected the letter and index of one of {len(options)} options; got {gold!r}, {index}. "
                "Correct the row."
            )
        if not all(isinstance(option, str) for option in options):
            raise ValueError(f"expected options as text; got {options!r:.200}. Put each option in quotes.")
        right = options[index].strip()
        kept = [option for option in dict.fromkeys(option.strip() for option in options) if option not in ("", "N/A")]
        if right not in kept or len(kept) < 2:
            raise ValueError(
                f"expected two or more options besides 'N/A', one of them right; got {kept!r:.200} and {right!r:.80}. "
                "Correct the row."
            )
        lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, kept, strict=False)]
        question = "\n".join([row["question"].strip(), "Options:", *lines])
        return Problem(f"mmlu_pro/{row['question_id']}", question, LETTERS[kept.index(right)], "option", "mmlu_pro")

    return problems_from_rows(source, _rows(source, None), columns, problem)


BBH_TASKS = {  # the paper's five tasks, each with its kind of answer
    "formal_fallacies": "word",
    "logical_deduction_five_objects": "option",
    "tracking_shuffled_objects_five_objects": "option",
    "causal_judgement": "word",
    "web_of_lies": "word",
}


def load_bbh(source: str | Path, task: str) -> list[Problem]:
    """Load a task of BIG-Bench Hard from the released `{task}.json` in a folder, or from the hub (test split).

    The released questions already contain their options. Errors are those of `load_problems`.

    Args:
        source: folder of the files, or the hub id `lukaemon/bbh`.
        task: one of `BBH_TASKS`.

    Source: Suzgun et al. 2022, arXiv 2210.09261.

    Example:
        >>> problems = load_bbh("bbh", "web_of_lies")
    """
    if task not in BBH_TASKS:
        raise ValueError(f"expected a task of {tuple(BBH_TASKS)}; got {task!r}. Pass one of these.")
    kind, family = BBH_TASKS[task], f"bbh/{task}"

    def problem(number: int, row: Mapping[str, Any]) -> Problem:
        gold = canonical(row["target"], kind)
        if kind == "option" and f"\n({gold}) " not in row["input"]:
            raise ValueError(
                f"expected as target one of the question's options; got {row['target']!r}. Correct the row."
            )
        return Problem(f"{family}/{number}", row["input"].strip(), gold, kind, family)

    columns = {"input": str, "target": str}
    if not Path(source).exists():
        return problems_from_rows(f"{source}, {task}", _rows(source, task), columns, problem)
    file = Path(source) / f"{task}.json"
    content = read_json(file)
    rows = content.get("examples") if isinstance(content, dict) else None
    return problems_from_rows(file, rows, columns, problem)


def load_open(source: str | Path) -> list[Problem]:
    """Load open questions, which have no gold answer, from a JSON list of strings.

    This is the format of the malicious sets released with arXiv 2604.24881. Errors are those of `load_problems`.

    Example:
        >>> problems = load_open("evil_questions.json")
    """

    def problem(number: int, row: Mapping[str, Any]) -> Problem:
        return Problem(f"open/{number}", row["question"].strip(), None, "open", "open")

    listed = read_json(source)
    rows = [{"question": question} for question in listed] if isinstance(listed, list) else None
    return problems_from_rows(source, rows, {"question": str}, problem)


_LOADERS = {"mmlu_pro": load_mmlu_pro, "open": load_open}


def load_problems(
    name: str, source: str | Path, limit: int | None = None, seed: int = 0, split: str = "test"
) -> list[Problem]:
    """Load a benchmark by name.

    Args:
        name: `gsm8k`, `mmlu_pro`, `bbh/{task}`, `bbh` (the five tasks in order), or `open`.
        source: a local file (a folder for BBH), or a hub id.
        limit: maximum number of problems, drawn at random; a smaller draw is a prefix of a larger one. None returns
            all problems in the source's order.
        seed: seed of the draw.
        split: of the hub, one of `SPLITS` of this benchmark; the others have `test` alone.

    Raises:
        ValueError: an unknown name or split, a negative limit, an empty source, a row that does not match the data
            set's schema, or an unparsable gold answer; the message names source and row.
        OSError: the file does not exist, or the hub cannot be read.
        ImportError: a hub id, and the package `datasets` is not installed.

    Example:
        >>> problems = load_problems("gsm8k", "openai/gsm8k", limit=100)
    """
    if limit is not None and limit < 0:
        raise ValueError(f"expected a limit of 0 or more, or None; got {limit}. Pass None for all problems.")
    if split not in SPLITS.get(name, ("test",)):
        raise ValueError(f"expected a split among {SPLITS.get(name, ('test',))} of {name}; got {split!r}. Pass one.")
    if name == "gsm8k":
        problems = load_gsm8k(source, split)
    elif name == "bbh":
        problems = [problem for task in BBH_TASKS for problem in load_bbh(source, task)]
    elif name.startswith("bbh/"):
        problems = load_bbh(source, name.removeprefix("bbh/"))
    elif name in _LOADERS:
        problems = _LOADERS[name](source)
    else:
        raise ValueError(
            f"expected a benchmark, one of {('gsm8k', *_LOADERS, 'bbh', 'bbh/TASK')}; got {name!r}. Pass one."
        )
    if limit is not None:
        random.Random(f"{name} {seed}").shuffle(problems)
    return problems[:limit]


def _rows(source: str | Path, config: str | None, split: str = "test") -> list[Any]:
    """Return the rows of a local file, or of a split of a hub's data set if the file does not exist."""
    path = Path(source)
    if not path.exists():
        return _hub_rows(str(source), config, split)
    if path.suffix == ".parquet":
        from pyarrow.parquet import read_table

        return read_table(path).to_pylist()
    if path.suffix == ".json":
        rows = read_json(path)
        return rows if isinstance(rows, list) else []
    rows = read_rows(path)
    if len(rows) < sum(1 for line in path.read_bytes().split(b"\n") if line.strip()):
        raise ValueError(f"expected whole lines in {path}; its last one is cut off. Download the file again.")
    return rows


def _hub_rows(source: str, config: str | None, split: str) -> list[Any]:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.jsonl)(?<!\.json)(?<!\.parquet)", source):
        raise FileNotFoundError(
            f"expected a local file or folder, or a hub id like owner/name; there is no {source}. Check the path."
        )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"expected a local file, or the package `datasets` to read {source} from the hub; it is not installed. "
            "Install it (`pip install datasets`), or pass a file."
        ) from error
    try:
        return [dict(row) for row in load_dataset(source, config, split=split)]
    except Exception as error:  # datasets, huggingface_hub and the HTTP client each raise types of their own
        raise OSError(
            f"expected to read {source} from the hub; got {error!r}. If offline, pass a local file."
        ) from error
