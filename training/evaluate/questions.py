"""Questions of the benchmarks, drawn with a fixed seed, and the share that a random guess gets right."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from steerkit.io.rows import read_rows
from training.evaluate.prompts import WORDS
from training.problems.benchmarks import BBH_TASKS, load_bbh, load_gsm8k, load_mmlu_pro
from training.problems.problem import Problem

BENCHMARKS = ("gsm8k", "mmlu_pro", "bbh")
SEED = 28
"""Seed of the draw whose results are reported. Its questions are never training problems."""
PER = {"gsm8k": 100, "mmlu_pro": 7, "bbh": 20}
"""Number of questions of GSM8K, of each category of MMLU-Pro, and of each task of BBH."""


def drawn(folder: str | Path, benchmark: str, seed: int = SEED, per: int | None = None) -> list[Problem]:
    """Return the questions of a benchmark: 100 of GSM8K, 7 of each category of MMLU-Pro, 20 of each task of BBH.

    A question that occurs twice counts once. Another seed draws from the questions that the default draw leaves, for a
    pilot.

    Args:
        folder: has `gsm8k/test.jsonl`, `mmlu_pro/test_sample.jsonl` (or another `.jsonl`) and `bbh/TASK.json`.
        benchmark: one of `BENCHMARKS`.
        seed: seed of the draw.
        per: number of questions of each category or task; default: `PER`.

    Returns:
        The questions; the family of one of MMLU-Pro is `mmlu_pro/CATEGORY`.

    Raises:
        ValueError: an unknown benchmark, or a number below 1. See also `training.problems.benchmarks`.

    Example:
        >>> len(drawn("data", "mmlu_pro"))
        98
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"expected a benchmark among {BENCHMARKS}; got {benchmark!r}. Pass one of these.")
    if per is not None and per < 1:
        raise ValueError(f"expected one question or more of each category; got {per}. Pass a larger number.")
    pool = list({problem.question: problem for problem in _loaded(Path(folder), benchmark)[::-1]}.values())[::-1]
    reported = _draw(pool, PER[benchmark], SEED)
    if seed != SEED:
        texts = {problem.question for problem in reported}
        return _draw([problem for problem in pool if problem.question not in texts], per or PER[benchmark], seed)
    return reported if per is None else _draw(pool, per, SEED)


def _draw(pool: Sequence[Problem], per: int, seed: int) -> list[Problem]:
    """Draw from each family with random numbers of its own; a smaller draw is the beginning of a larger one."""
    found: list[Problem] = []
    for family in dict.fromkeys(problem.family for problem in pool):
        problems = [problem for problem in pool if problem.family == family]
        random.Random(f"{family} {seed}").shuffle(problems)
        found += problems[:per]
    return found


def _loaded(data: Path, benchmark: str) -> list[Problem]:
    if benchmark == "gsm8k":
        return load_gsm8k(data / "gsm8k" / "test.jsonl")
    if benchmark == "bbh":
        return [problem for task in BBH_TASKS for problem in load_bbh(data / "bbh", task)]
    file = next(iter(sorted((data / "mmlu_pro").glob("*.jsonl"))), data / "mmlu_pro" / "test.jsonl")
    problems = load_mmlu_pro(file)
    categories = {f"mmlu_pro/{row['question_id']}": str(row["category"]) for row in read_rows(file)}
    return sorted(
        (replace(problem, family=f"mmlu_pro/{categories[problem.id]}") for problem in problems),
        key=lambda problem: problem.family,
    )


def chance(problem: Problem) -> float:
    """Return the share of random guesses that are right: 1 / number of options or words, 0 for a number.

    Example:
        >>> chance(Problem("q", "Which?\\nOptions:\\n(A) x\\n(B) y", "A", "option", "own"))
        0.5
    """
    if problem.kind == "option":
        return 1 / max(1, len(re.findall(r"^\([A-Z]\) ", problem.question, re.M)))
    words = WORDS.get(problem.family)
    return 1 / len(words) if words else 0.0
