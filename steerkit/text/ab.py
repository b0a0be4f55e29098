"""A/B questions: model-written evaluations as contrast pairs."""

from __future__ import annotations

import codecs
import random
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from steerkit.io.files import read_bytes
from steerkit.io.json import read_json
from steerkit.io.rows import read_rows
from steerkit.text.pairs import OF_AB, ContrastPair

LETTERS, WORDS = frozenset({"(A)", "(B)"}), frozenset({"Yes", "No"})
OPTION = re.compile(r"^\s*\(([A-Z])\)", re.MULTILINE)


def read_ab(path: str | Path, *, chat: bool = False) -> list[ContrastPair]:
    """Read questions with two answers, such as Anthropic's model-written evaluations, as contrast pairs for CAA.

    The answer that matches the behavior is the positive continuation. Rows without exactly two options, `(A)` and `(B)`
    or Yes and No, are dropped. Of the others as many are kept with A as with B as the matching answer (Yes as with No),
    so that the mean difference does not hold the letter itself; which ones is a draw with a fixed seed.

    Pass `position="letter"` to `collect`: the last token of ` (A)` is the bracket, which both answers share.

    Args:
        path: a JSON list or JSON lines of objects with `question`, `answer_matching_behavior` and
            `answer_not_matching_behavior`; other keys are ignored.
        chat: make each question a user message, for models with a chat template. Default: the question verbatim.

    Returns:
        The pairs in the order of the file. `group` is the file's name with the number of the row, the same for rows
        that differ in their options only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row without these keys, no row with two options, or an answer that never matches.

    Warns:
        UserWarning: rows were dropped: how many of how many, and why.

    Source: Perez et al. 2022, "Discovering Language Model Behaviors with Model-Written Evaluations", arXiv 2212.09251;
    Rimsky et al. 2024, arXiv 2312.06681.

    Example:
        >>> pairs = sk.read_ab("corrigible-neutral-HHH.jsonl", chat=True)
        >>> vector = sk.difference_in_means(sk.collect(model, tokenizer, pairs, position="letter"))
    """
    is_list = read_bytes(path).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
    rows: list[Any] = read_json(path) if is_list else read_rows(path, complete=True)
    first_of: dict[str, int] = {}
    pairs: dict[int, ContrastPair] = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not set(OF_AB) <= set(row) or not isinstance(row["question"], str):
            got = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"expected an object with {OF_AB} in {path}, row {number}; got {got}. Rename or add keys.")
        question, positive, negative = (row[key] for key in OF_AB)
        if not _has_two_options(question, positive, negative):
            continue
        first = first_of.setdefault(question.partition("Choices:")[0].strip(), number)
        prompt = [{"role": "user", "content": question}] if chat else question
        pairs[number] = ContrastPair(prompt, positive, negative, f"{Path(path).stem}-{first}")
    kept = _balanced(pairs, path)
    if len(kept) < len(rows):
        counts = Counter(pair.positive.strip() for pair in kept)
        warnings.warn(
            f"{path}: dropped {len(rows) - len(pairs)} of {len(rows)} rows without exactly two options, and "
            f"{len(pairs) - len(kept)} to balance the answers; {len(kept)} pairs are left, with the matching answers "
            f"{dict(sorted(counts.items()))}.",
            UserWarning,
            stacklevel=2,
        )
    return kept


def _has_two_options(question: str, positive: Any, negative: Any) -> bool:
    if not isinstance(positive, str) or not isinstance(negative, str):
        return False
    answers, options = {positive.strip(), negative.strip()}, set(OPTION.findall(question))
    return answers == WORDS if not options else answers == LETTERS and options == {"A", "B"}


def _balanced(pairs: dict[int, ContrastPair], path: str | Path) -> list[ContrastPair]:
    """As many pairs with each answer as the positive one, drawn with a fixed seed, in order."""
    kept: list[int] = []
    for answers in (LETTERS, WORDS):
        of_answer = {one: [n for n, pair in pairs.items() if pair.positive.strip() == one] for one in sorted(answers)}
        fewest = min(map(len, of_answer.values()))
        for numbers in of_answer.values():
            kept += random.Random(0).sample(numbers, fewest)
    if not kept:
        counts = dict(Counter(pair.positive.strip() for pair in pairs.values()))
        raise ValueError(
            f"expected rows with two options in {path}, in which each of the two answers matches sometimes; got "
            f"{counts or 'none'} as matching answers. Exchange the options of half of the rows, or pass another file."
        )
    return [pairs[number] for number in sorted(kept)]
