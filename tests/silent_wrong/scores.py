"""Scores with a value where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rapidfuzz.distance import LCSseq

from steerkit.scores.text import rouge_l, tokenize
from steerkit.sweeps.result import SweepResult

Score = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


def check_a_script_that_is_not_seen_has_no_score(score: Score) -> None:
    chinese = "\u6d77\u5f88\u5e73\u9759"
    assert np.isnan(score([chinese, chinese], [chinese, "sea"])).all()


def check_empty_texts_have_no_score(score: Score) -> None:
    assert score(["a"], ["a"])[0] == 1 and np.isnan(score([""], [""])[0])


def quiet_rouge(candidates: Sequence[str], references: Sequence[str]) -> Sequence[float]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rouge_l(candidates, references)


def zero_without_tokens(candidates: Sequence[str], references: Sequence[str]) -> Sequence[float]:
    pairs = [(tokenize(a), tokenize(b)) for a, b in zip(candidates, references, strict=True)]
    return np.array([2 * LCSseq.similarity(a, b) / (len(a) + len(b)) if a and b else 0.0 for a, b in pairs])


def zero_for_unseen(candidates: Sequence[str], references: Sequence[str]) -> Sequence[float]:
    return np.nan_to_num(quiet_rouge(candidates, references))


def check_the_distance_of_an_empty_text_is_missing(
    distance: Callable[[SweepResult], Sequence[float]],
) -> None:
    rows = [
        {"vector": "v", "layer": 1, "coefficient": c, "prompt_id": "0", "group": "0", "sample": 0, "text": text}
        for c, text in ((0.0, ""), (1.0, ""), (2.0, "a"))
    ]
    found = distance(SweepResult(pd.DataFrame(rows)))
    assert np.isnan(found[:2]).all() and found[2] == 1


def scored(result: SweepResult) -> Sequence[float]:
    return result.score("distance").table["distance"].to_numpy()


def one_minus_zero(result: SweepResult) -> Sequence[float]:
    texts = result.table["text"].tolist()
    return 1 - np.asarray(zero_without_tokens(texts, [texts[0]] * len(texts)))


def plain(check: Callable[[Any], None]) -> Callable[[Any, Path], None]:
    return lambda implementation, _: check(implementation)


SILENT: dict[str, tuple[Callable[[Any, Path], None], Any, Any]] = {
    "a script that is not seen has no score": (
        plain(check_a_script_that_is_not_seen_has_no_score), quiet_rouge, zero_without_tokens
    ),
    "empty texts have no score": (plain(check_empty_texts_have_no_score), quiet_rouge, zero_for_unseen),
    "the distance of an empty text is missing": (
        plain(check_the_distance_of_an_empty_text_is_missing), scored, one_minus_zero
    ),
}  # fmt: skip
