"""Agreement of a judge with 50 texts that were written and labelled by hand: 20 cheerful, 30 not.

The 30 are 10 neutral and 20 sad, angry or ironic texts, four of which contain words of joy.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

import steerkit as sk
from steerkit.io.rows import read_rows
from steerkit.io.tables import write_table
from steerkit.scores.judge import Judge, JudgeWarning
from steerkit.stats.areas import roc_auc
from steerkit.stats.mean import accuracy_interval

TEXTS = Path(__file__).with_name("cheerful.jsonl")
RUBRIC = "How cheerful is the text? 0: not at all. 100: as cheerful as a text can be."
RESAMPLES = 2000


def agreement(judge: Judge, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare a judge with the labels.

    Returns:
        The texts with label and score; and one row: n, n_unread (answers that are no score), n_distinct (scores that
        occur), roc_auc of cheerful texts with the 95 % percentile interval of a bootstrap over texts, share of texts
        on the right side of the middle of the scale with Wilson's interval, and Spearman's rank correlation. An unread
        answer counts as wrong in the share and is left out elsewhere.
    """
    texts = pd.DataFrame(read_rows(TEXTS, complete=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JudgeWarning)  # counted in the table
        texts["score"] = judge.scores(texts["text"].tolist())
    read = texts[texts["score"].notna()]
    cheerful, scores = (read["label"] > 50).to_numpy(), read["score"].to_numpy()
    middle = sum(judge.scale) / 2
    right = (texts["score"] - middle) * (texts["label"] - 50) > 0
    share = accuracy_interval(right.to_numpy(float))
    row: dict[str, Any] = {"n": len(texts), "n_unread": len(texts) - len(read), "n_distinct": len(set(scores))}
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(len(read), size=len(read)) for _ in range(RESAMPLES)] if len(read) else []
    areas = [roc_auc(cheerful[i], scores[i]) for i in drawn if 0 < cheerful[i].sum() < len(i)]
    both = 0 < cheerful.sum() < len(read)
    low, high = np.quantile(areas, [0.025, 0.975]) if both else (np.nan, np.nan)
    row |= {"roc_auc": roc_auc(cheerful, scores) if both else np.nan, "roc_auc_low": low, "roc_auc_high": high}
    row |= {"right_side": share.mean, "right_side_low": share.low, "right_side_high": share.high}
    row["spearman"] = float(spearmanr(read["label"], scores).statistic) if row["n_distinct"] > 1 else np.nan
    return texts, pd.DataFrame([row])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis judge", description=__doc__)
    parser.add_argument("--url", required=True, help="OpenAI-compatible server")
    parser.add_argument("--model", required=True, help="name of its model")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables, and for the answers")
    given = parser.parse_args(arguments)
    judge = sk.judge(given.url, given.model, RUBRIC, cache=given.out / "answers.jsonl")
    texts, found = agreement(judge)
    for name, table in (("texts", texts), ("agreement", found)):
        write_table(given.out / f"{name}.csv", table, judge.about())
    print(found.to_string(index=False))
