"""Scores of texts and curves, and how certain they are: floats and strings in, floats out.

Nothing here loads a model, a table or a file: numpy and rapidfuzz are all that is imported when it runs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from string import ascii_lowercase, digits
from typing import TYPE_CHECKING, Literal

import numpy as np
from rapidfuzz.distance import LCSseq

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy.typing import ArrayLike

Tokenizer = Literal["rouge_score", "symbols"]

_ALNUM_OR_SPACE = bytes(code if chr(code) in ascii_lowercase + digits else 32 for code in range(256))

# A word; or a signed number, whose sign follows neither a word nor a closing bracket (there it would be an operator);
# or one symbol, as often as it is repeated.
_SYMBOLS = re.compile(r"[^\W_]+|(?<![\w)\]}])[+\-\u2212]\d[^\W_]*|([^\w\s]|_)\1*")

# Weights held at once by the bootstrap (8 MiB of float64). It bounds memory and does not change the draws.
_BLOCK = 2**20

_SPLIT: dict[str, Callable[[str], list[str]]] = {
    "rouge_score": lambda text: text.lower().encode("ascii", "replace").translate(_ALNUM_OR_SPACE).decode().split(),
    "symbols": lambda text: [match[0] for match in _SYMBOLS.finditer(text.lower())],
}


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"expected {name} to be a str; got {text!r} ({type(text).__name__}). Drop or convert it.")


def _check_sequence(name: str, values: object) -> None:
    if isinstance(values, str):
        raise TypeError(f"expected {name} to be a sequence; got the single str {values[:40]!r}. Wrap it in a list.")


def _finite_vector(name: str, values: ArrayLike) -> Float[np.ndarray, " n"]:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1:
        raise ValueError(f"expected {name} of shape [n]; got {list(array.shape)}. Pass one dimension.")
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"expected finite {name}; got {array[at]} at index {at}. Drop what was not measured.")
    return array


def tokenize(text: str, tokenizer: Tokenizer = "rouge_score") -> list[str]:
    """Lower-cased tokens of `text`, in order.

    `"rouge_score"`: the maximal runs of `[a-z0-9]` after lower-casing, all else being a separator; on every string
    what `rouge_score.tokenizers.DefaultTokenizer(use_stemmer=False)` gives (so U+0130 gives `["i"]`).

    `"symbols"`: only white space is lost. Words are runs of Unicode letters and digits; a run of one symbol is a token
    (`//`, `=`; `_` and combining marks are symbols); `+`, `-` or U+2212 directly before a digit belongs to the number
    (`-1110`) unless a word or a closing bracket stands directly before it (`7-3` is `7`, `-`, `3`).

    Raises:
        TypeError: `text` is not a str.
        ValueError: unknown `tokenizer`.

    Source: `rouge_score/tokenize.py`, rouge-score 0.1.2.
    """
    _check_text("text", text)
    if tokenizer not in _SPLIT:
        raise ValueError(f"expected tokenizer to be one of {list(_SPLIT)}; got {tokenizer!r}. Choose one of those.")
    return _SPLIT[tokenizer](text)


def rouge_l(
    candidates: Sequence[str], references: Sequence[str], tokenizer: Tokenizer = "rouge_score"
) -> Float[np.ndarray, " n"]:
    """ROUGE-L F1 in [0, 1] of each of n candidates against the reference at the same index.

    With `LCS` the length of the longest common subsequence of tokens, `P = LCS / |candidate|` and
    `R = LCS / |reference|`: `F = 2PR / (P + R) = 2 LCS / (|candidate| + |reference|)`, and 0 where either is empty.
    Each distinct text is tokenised once per call, by `tokenize(text, tokenizer)`.

    Raises:
        TypeError: a single str in place of a sequence, or an entry that is not a str.
        ValueError: the lengths differ, or unknown `tokenizer`.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3 with beta = 1.
    """
    for name, texts in (("candidates", candidates), ("references", references)):
        _check_sequence(name, texts)
        for i, text in enumerate(texts):
            _check_text(f"{name}[{i}]", text)
    if len(candidates) != len(references):
        raise ValueError(f"expected a reference per candidate; got {len(references)} for {len(candidates)}. Pair them.")

    # rapidfuzz compares hashes, and the hash of a small int is the int: with a number per token the LCS is exact.
    number = defaultdict[str, int](count().__next__).__getitem__
    numbers = cache(lambda text: list(map(number, tokenize(text, tokenizer))))
    scores = np.zeros(len(candidates))
    for i, (a, b) in enumerate(zip(map(numbers, candidates), map(numbers, references), strict=True)):
        if a and b:
            scores[i] = 2 * LCSseq.similarity(a, b) / (len(a) + len(b))
    return scores


def distinct_n(text: str, n: int = 2) -> float:
    """Distinct n-grams / n-grams over the `"symbols"` tokens of `text`: in (0, 1], NaN with fewer than n tokens.

    Raises:
        TypeError: `text` is not a str.
        ValueError: `n` is not an int of at least 1.

    Source: Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", 2016.
    """
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"expected n to be an int of at least 1; got {n!r}. Pass the length of the n-grams in tokens.")
    tokens = tokenize(text, "symbols")
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else float("nan")


def repeated_ngrams(text: str, n: int = 4) -> float:
    """Share of n-grams that had already occurred earlier in `text`: `1 - distinct_n(text, n)`, in [0, 1) or NaN.

    Raises:
        TypeError, ValueError: as `distinct_n`.

    Source: Welleck et al., "Neural Text Generation with Unlikelihood Training", 2020 (seq-rep-n).
    """
    return 1.0 - distinct_n(text, n)


def curve_auc(coefficients: ArrayLike, values: ArrayLike, normalize: bool = False) -> float:
    """Area under a curve of values over steering coefficients, by the trapezoid rule.

    `sum_i (c[i+1] - c[i]) (v[i] + v[i+1]) / 2` with the points sorted by `c`; in units of coefficient x value.

    Args:
        coefficients: `[n]`, distinct, in any order.
        values: `[n]`, the value at each coefficient.
        normalize: divide by the width `max(c) - min(c)` of the grid: the mean height of the curve, in units of value.

    Raises:
        ValueError: shapes differ, fewer than two points, a coefficient given twice, NaN or infinity.
    """
    c, v = _finite_vector("coefficients", coefficients), _finite_vector("values", values)
    if len(c) != len(v):
        raise ValueError(f"expected one value per coefficient; got {len(v)} for {len(c)} coefficients. Pair them up.")
    if len(c) < 2:
        raise ValueError(f"expected at least two coefficients; got {len(c)}. Measure the curve at more points.")
    c, v = np.stack([c, v])[:, np.argsort(c)]
    steps = np.diff(c)
    if not steps.all():
        raise ValueError(f"expected distinct coefficients; got {c[np.argmin(steps)]:g} twice. Average its values.")
    area = steps @ (v[:-1] + v[1:]) / 2
    return float(area / (c[-1] - c[0]) if normalize else area)


def roc_auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, a tie counting one half.

    `(R - n1 (n1 + 1) / 2) / (n1 n0)`, with `R` the sum of the positives' ranks, tied scores sharing their mean rank
    (the Mann-Whitney U over the number of pairs). In [0, 1]; 0.5 is chance.

    Args:
        labels: `[n]`, bool or 0/1; 1 is positive.
        scores: `[n]`, in any unit; only their order counts.

    Raises:
        ValueError: shapes differ, a label other than 0 and 1, a class absent, or a score NaN or infinite.

    Source: Hanley and McNeil, "The Meaning and Use of the Area under a ... (ROC) Curve", 1982.
    """
    y, s = np.asarray(labels), _finite_vector("scores", scores)
    if y.shape != s.shape:
        raise ValueError(f"expected a label per score; got shapes {list(y.shape)} and {list(s.shape)}. Pair them up.")
    if y.dtype.kind not in "biuf" or not ((y == 0) | (y == 1)).all():
        got = list(dict.fromkeys(y.tolist()))[:5]
        raise ValueError(f"expected labels of bool or 0/1; got {got}. For more classes use macro_roc_auc.")
    n1, n0 = int((y == 1).sum()), int((y == 0).sum())
    if not (n1 and n0):
        raise ValueError(f"expected both classes; got {n1} positive and {n0} negative. Add items of the other class.")
    _, rung, size = np.unique(s, return_inverse=True, return_counts=True)
    ranks = np.cumsum(size) - (size - 1) / 2
    return float((ranks[rung[y == 1]].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def macro_roc_auc(labels: Collection[Hashable], scores: ArrayLike, classes: Sequence[Hashable]) -> float:
    """Mean over the classes of the one-vs-rest `roc_auc` of their column, each class weighing the same.

    Args:
        labels: n labels, each one of `classes`.
        scores: `[n, k]`; column j scores membership in `classes[j]`, in any unit.
        classes: the k distinct classes, in the order of the columns.

    Raises:
        TypeError: a single str in place of `labels` or `classes`.
        ValueError: shapes differ, a class twice or absent from `labels`, a label not among them, a score not finite.
    """
    _check_sequence("labels", labels)
    _check_sequence("classes", classes)
    table = np.asarray(scores, dtype=float)
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise ValueError(f"expected at least two distinct classes; got {list(classes)}. Name each column once.")
    if table.shape != (len(labels), len(classes)):
        got = f"{len(labels)} labels, {len(classes)} classes and scores {list(table.shape)}"
        raise ValueError(f"expected scores of shape [labels, classes]; got {got}. Give a row per label.")
    if stray := sorted(map(repr, set(labels) ^ set(classes))):
        raise ValueError(f"expected labels and classes to name the same; only one has {', '.join(stray)}. Drop those.")
    return float(np.mean([roc_auc([label == c for label in labels], table[:, j]) for j, c in enumerate(classes)]))


@dataclass(frozen=True)
class Interval:
    """A mean from `low` to `high`, in the unit of the values; see `bootstrap_ci`.

    `n` counts the resampled units (groups, else rows) with a value, `n_missing` the NaN entries left out; `p` is the
    two-sided bootstrap p-value of the mean against 0.
    """

    mean: float
    low: float
    high: float
    n: int
    n_missing: int
    p: float


def _draw_counts(rng: np.random.Generator, n_boot: int, n: int) -> Float[np.ndarray, "n_boot n"]:
    """How often each of n units is drawn in n draws with replacement: multinomial, one row per resample."""
    draws = rng.integers(n, size=(n_boot, n)) + n * np.arange(n_boot)[:, None]
    return np.bincount(draws.ravel(), minlength=n_boot * n).reshape(n_boot, n).astype(float)


def _unit_codes(groups: Collection[Hashable] | None, n_rows: int) -> Int[np.ndarray, " n_rows"]:
    """The resampled unit of each row, numbered in order of first appearance."""
    if groups is None:
        return np.arange(n_rows)
    _check_sequence("groups", groups)
    if len(groups) != n_rows:
        raise ValueError(f"expected a group for each of {n_rows} rows; got {len(groups)} groups. Label every row.")
    for i, group in enumerate(groups):
        if group is None or (isinstance(group, float) and np.isnan(group)):
            raise ValueError(f"expected a group for each row; got {group} in row {i}. Label it.")
    code = defaultdict[Hashable, int](count().__next__)
    return np.array([code[group] for group in groups])


def bootstrap_ci(
    values: ArrayLike,
    groups: Collection[Hashable] | None = None,
    resample_columns: bool = False,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of the mean of `values`, missing entries left out.

    The mean of a resample is `sum_ij w[i] v[j] x[i, j] / sum_ij w[i] v[j]` over the entries that are not NaN, with `w`
    multinomial counts of the units (whole groups, else rows) and `v` those of the columns, or 1. The interval runs
    between the `(1 - level) / 2` and `(1 + level) / 2` quantiles of B such means b, and
    `p = min(1, 2 min(1 + #{b <= 0}, 1 + #{b >= 0}) / (B + 1))`, b within rounding error of 0 counting as 0. `low`,
    `high` and `p` are NaN where fewer than two units, or columns to be resampled, have a value (their spread is
    unknown, not 0); `mean` too where none has.

    Args:
        values: `[n]`, or `[n, k]` with prompts as rows and e.g. random directions as columns. NaN is missing, never 0.
        groups: n labels; rows that share one are drawn together. Rows, not groups, weigh the same in the mean.
        resample_columns: draw columns as well as rows (crossed), so that the spread between them is in the interval.
        n_boot: number of resamples B. Those in which every entry is missing do not count.
        level: coverage of the interval, in (0, 1).
        seed: the result is a function of the arguments and this seed; global random state is not touched.

    Raises:
        TypeError: `groups` is a single str.
        ValueError: `values` empty, infinite or not `[n]` or `[n, k]`, or `[n]` with `resample_columns`; `groups` of
            another length or with a missing label; `n_boot` below 1; `level` outside (0, 1).

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993; Owen, "The Pigeonhole Bootstrap", 2007.
    """
    table = np.asarray(values, dtype=float)
    if table.ndim not in (1, 2) or table.size == 0:
        raise ValueError(f"expected values [n] or [n, k], not empty; got {list(table.shape)}. Give one value per row.")
    if np.isinf(table).any():
        raise ValueError(f"expected finite values, or NaN; got {np.isinf(table).sum()} infinite. Use NaN for missing.")
    if resample_columns and table.ndim == 1:
        raise ValueError(f"expected values [n, k] to resample columns; got shape {list(table.shape)}. Pass a matrix.")
    if n_boot < 1 or not 0 < level < 1:
        raise ValueError(f"expected n_boot >= 1 and 0 < level < 1; got n_boot={n_boot}, level={level}. Try 2000, 0.95.")
    table = table.reshape(len(table), -1)
    codes = _unit_codes(groups, len(table))
    missing = np.isnan(table)
    n_missing = int(missing.sum())
    totals, counts = np.zeros((2, codes.max() + 1, table.shape[1] if resample_columns else 1))
    for sums, entries in ((totals, np.where(missing, 0.0, table)), (counts, 1.0 - missing)):
        np.add.at(sums, codes, entries if resample_columns else entries.sum(axis=1, keepdims=True))
    filled = np.ix_(counts.any(axis=1), counts.any(axis=0))
    totals, counts = totals[filled], counts[filled]

    (n, k), nan = totals.shape, float("nan")
    mean = float(totals.sum() / counts.sum()) if n else nan
    means = np.full(n_boot, np.nan)
    if n > 1 and (k > 1 or not resample_columns):
        row_rng, column_rng = np.random.default_rng(seed).spawn(2)
        block = max(1, _BLOCK // max(n, k))
        for start in range(0, n_boot, block):
            part = means[start : start + block]
            w = _draw_counts(row_rng, len(part), n)
            v = _draw_counts(column_rng, len(part), k) if resample_columns else 1.0
            weight = (w @ counts * v).sum(axis=1)
            np.divide((w @ totals * v).sum(axis=1), weight, out=part, where=weight > 0)
    means = means[~np.isnan(means)]
    if not means.size:
        return Interval(mean, nan, nan, n, n_missing, nan)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    zero = 1e-12 * np.nanmean(np.abs(table))
    tail = 1 + min((means <= zero).sum(), (means >= -zero).sum())
    return Interval(mean, float(low), float(high), n, n_missing, min(1.0, float(2 * tail / (len(means) + 1))))


def holm(p_values: ArrayLike) -> Float[np.ndarray, " n"]:
    """Holm's step-down adjusted p-values, which control the family-wise error rate under any dependence.

    With the p-values sorted, the i-th smallest (i from 0) becomes `min(1, max_{j <= i} (n - j) p[j])`; the order
    given is kept. Reject where the result is at most the error rate wanted.

    Args:
        p_values: `[n]`, in [0, 1]; the whole family of tests.

    Raises:
        ValueError: not one dimension, or an entry NaN or outside [0, 1].

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.
    """
    p = _finite_vector("p_values", p_values)
    if ((p < 0) | (p > 1)).any():
        raise ValueError(f"expected p_values in [0, 1]; got {p.min():g} to {p.max():g}. Pass probabilities.")
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted
