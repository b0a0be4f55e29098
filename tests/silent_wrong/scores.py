"""Scores where there is no value."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steerkit.scores.judge import read_score
from steerkit.scores.text import distinct_n, rouge_l, tokenize

CHINESE, OTHER = "\u6d77\u9762\u5e73\u9759", "\u6c34\u9762\u5f88\u5e73\u9759"
Score = Callable[[Sequence[str | None], Sequence[str | None]], np.ndarray]


def quiet(score: Score, *texts: Sequence[str | None]) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return score(*texts)


def check_two_empty_texts_have_no_distance(score: Score, _: Path) -> None:
    """At coefficient 0 a text is compared with itself: the distance is 0, or there is none, but never 1."""
    np.testing.assert_array_equal(1 - quiet(score, ["", "a", None], ["", "a", None]), [np.nan, 0, np.nan])


def zero_where_either_is_empty(candidates: Sequence[str | None], references: Sequence[str | None]) -> np.ndarray:
    return np.nan_to_num(rouge_l(candidates, references))


def check_letters_that_the_tokenizer_drops_are_no_difference(score: Score, _: Path) -> None:
    assert np.isnan(quiet(score, [CHINESE, CHINESE, "sea"], [CHINESE, "sea", CHINESE])).all()


def by_visible_tokens(candidates: Sequence[str | None], references: Sequence[str | None]) -> np.ndarray:
    tokens = [(tokenize(a or ""), tokenize(b or "")) for a, b in zip(candidates, references, strict=True)]
    return np.array([float(a == b) for a, b in tokens])


def check_texts_without_spaces_are_compared_by_letters(score: Score, _: Path) -> None:
    assert quiet(score, [CHINESE], [OTHER])[0] == 2 * 3 / 9


def by_letters(candidates: Sequence[str | None], references: Sequence[str | None]) -> np.ndarray:
    return rouge_l(candidates, references, "unicode")


def by_runs(candidates: Sequence[str | None], references: Sequence[str | None]) -> np.ndarray:
    return rouge_l(candidates, references, "symbols")


def check_a_text_that_does_not_exist_has_no_share(share: Callable[[str | None], float], _: Path) -> None:
    assert share("a b a b a") == 0.5
    assert np.isnan([share(text) for text in (None, "", "one")]).all()


def none_as_a_word(text: str | None) -> float:
    return distinct_n(f"{text} {text}") if text is None else distinct_n(text)


def check_a_number_in_a_judges_answer_is_a_score_only_if_it_is_the_only_one_and_rates(
    read: Callable[[str], float], _: Path
) -> None:
    assert read("85") == read("Score: 85/100") == 85
    answers = ("85 or 90", "Article 4 describes duties", "1. The text is glad", "120")
    assert np.isnan([read(answer) for answer in answers]).all()


def first_number(answer: str) -> float:
    found = re.search(r"[0-9]+", answer)
    return float(found[0]) if found else np.nan


SILENT: dict[str, tuple[Callable[[Any, Path], None], Any, Any]] = {
    "two empty texts have no distance": (check_two_empty_texts_have_no_distance, rouge_l, zero_where_either_is_empty),
    "letters that the tokenizer drops are no difference": (
        check_letters_that_the_tokenizer_drops_are_no_difference,
        rouge_l,
        by_visible_tokens,
    ),
    "texts without spaces are compared by letters": (
        check_texts_without_spaces_are_compared_by_letters,
        by_letters,
        by_runs,
    ),
    "a text that does not exist has no share": (
        check_a_text_that_does_not_exist_has_no_share,
        distinct_n,
        none_as_a_word,
    ),
    "a number in a judge's answer is a score only if it is the only one and rates the text": (
        check_a_number_in_a_judges_answer_is_a_score_only_if_it_is_the_only_one_and_rates,
        read_score,
        first_number,
    ),
}
