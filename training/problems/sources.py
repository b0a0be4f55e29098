"""Sources of problems: a generated family, a benchmark, or a file of your own, each in two disjoint parts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from steerkit.io.files import sha256
from training.problems.benchmarks import BBH_TASKS, SPLITS, load_problems
from training.problems.families import FAMILIES, questions_of_seed
from training.problems.problem import Problem, read_problems

BENCHMARKS = ("gsm8k", "mmlu_pro", "bbh", *(f"bbh/{task}" for task in BBH_TASKS), "open")
PARTS = ("train", "test")
DRAWN = Path(__file__).with_name("drawn.txt")
"""Hashes of the questions that `python -m training benchmark` draws, one a line."""


def part_of(question: str) -> str:
    """Return the part of a question that no family generates: `train` or `test`, about half each.

    It depends on the SHA-256 of the question alone, so a part stays fixed when the file grows or is reordered.

    Example:
        >>> part_of("What is 2 + 2?") in PARTS
        True
    """
    return PARTS[int(sha256(question), 16) % 2]


def question_hash(question: str) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a question."""
    return sha256(question)[:16]


@cache
def drawn_hashes() -> frozenset[str]:
    """Return the hashes (`question_hash`) of the benchmark's questions, which are never training problems."""
    return frozenset(DRAWN.read_text(encoding="utf-8").split())


def load_source(source: str, split: str = "test") -> list[Problem]:
    """Load a benchmark or a file of your own: all of its problems, in its order.

    Args:
        source: `BENCHMARK=PLACE` with one of `BENCHMARKS` and a local path or a hub id, e.g. `gsm8k=openai/gsm8k`,
            `bbh=data/bbh`; or the path of a `.jsonl` file of problems (`training.problems.problem.read_problems`).
        split: of a hub id, see `load_problems`.

    Raises:
        ValueError, OSError, ImportError: as `load_problems` and `read_problems`; another text as source.

    Example:
        >>> problems = load_source("mmlu_pro=data/mmlu_pro/test_sample.jsonl")
    """
    name, equals, place = source.partition("=")
    if equals and name in BENCHMARKS:
        return load_problems(name, place, split=split)
    if Path(source).suffix == ".jsonl":
        return read_problems(source)
    raise ValueError(
        f"expected a family among {sorted(FAMILIES)}, BENCHMARK=PLACE with a benchmark among {BENCHMARKS}, or the path "
        f"of a .jsonl file; got {source!r}. Pass one of these."
    )


def split_problems(
    train: str, tests: Sequence[str] = (), n_train: int | None = None, n_test: int | None = None, seed: int = 0
) -> tuple[list[Problem], list[Problem]]:
    """Return training problems of one source, and test problems of the same source or of others.

    A source that is both is split: a family by its own rule (`training.problems.families.split_of`), a hub's data set
    with a train split (`training.problems.benchmarks.SPLITS`) by the hub's, another source by `part_of`. A source that
    is only one of the two is used whole; of a hub's data set with a train split, only that part. Questions that
    `python -m training benchmark` draws are left out of the training problems.

    Args:
        train: a family, or a source of `load_source`.
        tests: sources of the test problems; default: the training source.
        n_train: largest number of training problems, drawn at random; None for all. A family needs a number.
        n_test: largest number of test problems of each source, in the same way.
        seed: of the draws.

    Raises:
        ValueError: a family without a number, no problem in a part, two problems with the same id, or a question in
            both parts.

    Example:
        >>> train, test = split_problems("arithmetic", ["gsm8k=openai/gsm8k"], n_train=1000, n_test=1000)
    """
    if min(n for n in (n_train, n_test, 1) if n is not None) < 1:
        raise ValueError(f"expected 1 problem or more in each part; got {n_train} and {n_test}. Pass larger numbers.")
    tests = tuple(tests) or (train,)
    trained = _part(train, "train", train in tests, n_train, seed)
    tested = [problem for source in tests for problem in _part(source, "test", source == train, n_test, seed)]
    both = {problem.question for problem in trained} & {problem.question for problem in tested}
    if both:
        raise ValueError(
            f"expected training and test questions without overlap; got {len(both)} in both, e.g. {min(both)!r:.80}. "
            "Remove them from one file, or pass one source for both."
        )
    ids = [problem.id for problem in tested]
    if repeated := len(ids) - len(set(ids)):
        raise ValueError(f"expected test problems with different ids; got {repeated} repeated. Pass each source once.")
    return trained, tested


def _part(source: str, part: str, shared: bool, n: int | None, seed: int) -> list[Problem]:
    """Return the problems of a part; all problems of a source that is no family and not shared by both parts."""
    if source in FAMILIES:
        if n is None:
            raise ValueError(f"expected a number of problems of the family {source}; got none. Pass --n and --n-test.")
        return FAMILIES[source](n, seed, "train") if part == "train" else questions_of_seed(source, n, seed)
    name, _, place = source.partition("=")
    if name in SPLITS and not Path(place).exists():
        problems = load_source(source, part)
    else:
        problems = [problem for problem in load_source(source) if not shared or part_of(problem.question) == part]
    if part == "train":
        problems = [problem for problem in problems if question_hash(problem.question) not in drawn_hashes()]
    if not problems:
        raise ValueError(f"expected problems in the {part} part of {source}; got none. Pass a larger file.")
    if n is not None and n < len(problems):
        random.Random(f"{name} {seed}").shuffle(problems)
    return problems[:n]
