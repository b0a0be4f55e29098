"""Scores of texts: ROUGE-L, distinct and repeated n-grams. Imports numpy and rapidfuzz only."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from string import ascii_lowercase, digits
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from rapidfuzz.distance import LCSseq

from steerkit.stats.checks import check_sequence

if TYPE_CHECKING:
    from jaxtyping import Float


class TextTokenizer(Protocol):
    """The interface of rouge-score's tokenizers, e.g. `rouge_score.tokenizers.DefaultTokenizer(use_stemmer=True)`."""

    def tokenize(self, text: str) -> list[str]: ...


Tokenizer = Literal["rouge_score", "symbols", "unicode"] | TextTokenizer

_ALNUM_OR_SPACE = bytes(code if chr(code) in ascii_lowercase + digits else 32 for code in range(256))

# A word; or a signed number, whose sign follows neither a word nor a closing bracket (there it would be an operator);
# or one symbol, as often as it is repeated.
_SYMBOLS = re.compile(r"[^\W_]+|(?<![\w)\]}])[+\-\u2212]\d[^\W_]*|([^\w\s]|_)\1*")

_SPLIT: dict[str, Callable[[str], list[str]]] = {
    "rouge_score": lambda text: text.lower().encode("ascii", "replace").translate(_ALNUM_OR_SPACE).decode().split(),
    "symbols": lambda text: [match[0] for match in _SYMBOLS.finditer(text.lower())],
    "unicode": lambda text: _unicode_words(text.lower()),
}
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
"""Characters of scripts that are written without spaces: Thai, Lao, Burmese, Khmer, kana and Chinese characters."""


def _unicode_words(text: str) -> list[str]:
    """Runs of letters, digits and marks of any script; of scripts without spaces each character, with its marks."""
    words: list[str] = []
    previous = ""  # what the last character was: "" for a separator, "word", or "single"
    for character in text:
        kind = unicodedata.category(character)[0]
        if kind == "M" and previous:
            words[-1] += character
        elif kind not in "LN":
            previous = ""
        elif _UNSPACED.match(character):
            words.append(character)
            previous = "single"
        elif previous == "word":
            words[-1] += character
        else:
            words.append(character)
            previous = "word"
    return words


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"expected {name} to be a str; got {text!r} ({type(text).__name__}). Drop or convert it.")


def tokenize(text: str, tokenizer: Tokenizer = "rouge_score") -> list[str]:
    """Lower-cased tokens of `text`, in order.

    `"rouge_score"`: the maximal runs of `[a-z0-9]` after lower-casing, all else being a separator; on every string
    what `rouge_score.tokenizers.DefaultTokenizer(use_stemmer=False)` gives (so U+0130 gives `["i"]`).

    `"symbols"`: only white space is lost. Words are runs of Unicode letters and digits; a run of one symbol is a token
    (`//`, `=`; `_` and combining marks are symbols); `+`, `-` or U+2212 directly before a digit belongs to the number
    (`-1110`) unless a word or a closing bracket is directly before it (`7-3` is `7`, `-`, `3`).

    `"unicode"`: runs of letters, digits and marks of any script; of scripts that are written without spaces (Chinese,
    Japanese, Thai) each character is a token.

    A tokenizer object is called: `tokenizer.tokenize(text)`.

    Raises:
        TypeError: `text` is not a str.
        ValueError: unknown `tokenizer`.

    Source: `rouge_score/tokenize.py`, rouge-score 0.1.2.
    """
    _check_text("text", text)
    if isinstance(tokenizer, str) and tokenizer in _SPLIT:
        return _SPLIT[tokenizer](text)
    if isinstance(tokenizer, str) or not hasattr(tokenizer, "tokenize"):
        raise ValueError(
            f"expected tokenizer to be one of {list(_SPLIT)}; got {tokenizer!r}. Choose one of those, or pass an "
            "object with a method `tokenize`."
        )
    return list(tokenizer.tokenize(text))


def rouge_l(
    candidates: Sequence[str | None],
    references: Sequence[str | None],
    tokenizer: Tokenizer = "rouge_score",
    implementation: Literal["steerkit", "rouge-score"] = "steerkit",
) -> Float[np.ndarray, " n"]:
    """ROUGE-L F1 in [0, 1] of each of n candidates against the reference at the same index.

    With `LCS` the length of the longest common subsequence of tokens, `P = LCS / |candidate|` and
    `R = LCS / |reference|`: `F = 2PR / (P + R) = 2 LCS / (|candidate| + |reference|)`. Each distinct text is tokenised
    once per call, by `tokenize(text, tokenizer)`.

    NaN where there is no value: neither text has a token, one of them is None (there is no text), or one has letters or
    digits and the tokenizer sees none of them. A blank text against one with tokens is 0.

    Args:
        tokenizer: `"rouge_score"` (sees `[a-z0-9]` only), `"symbols"`, `"unicode"`, or an object of rouge-score's
            tokenizer interface.
        implementation: `"steerkit"`, or the package rouge-score as reference; they agree to rounding, and the package
            is slower.

    Warns:
        UserWarning: texts of which the tokenizer sees less than half of the letters and digits.

    Raises:
        TypeError: a single str in place of a sequence, or an entry that is neither a str nor None.
        ValueError: the lengths differ, or unknown `tokenizer` or `implementation`.

    Example:
        >>> rouge_l(["the sea is calm"], ["the sea was calm"])
        array([0.75])

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3 with beta = 1.
    """
    for name, texts in (("candidates", candidates), ("references", references)):
        check_sequence(name, texts)
        for i, text in enumerate(texts):
            if text is not None:
                _check_text(f"{name}[{i}]", text)
    if len(candidates) != len(references):
        raise ValueError(f"expected a reference per candidate; got {len(references)} for {len(candidates)}. Pair them.")
    if implementation not in ("steerkit", "rouge-score"):
        raise ValueError(
            f"expected implementation 'steerkit' or 'rouge-score'; got {implementation!r}. Choose one of those."
        )
    split = cache(lambda text: tokenize(text, tokenizer))
    unseen = _unseen({text for text in (*candidates, *references) if text is not None}, split, tokenizer)
    # rapidfuzz compares hashes, and the hash of a small int is the int: with a number per token the LCS is exact.
    number = defaultdict[str, int](count().__next__).__getitem__
    numbers = cache(lambda text: list(map(number, split(text))))
    scores = np.full(len(candidates), np.nan)
    for i, (candidate, reference) in enumerate(zip(candidates, references, strict=True)):
        if candidate is None or reference is None or candidate in unseen or reference in unseen:
            continue
        a, b = numbers(candidate), numbers(reference)
        if a or b:
            scores[i] = 2 * LCSseq.similarity(a, b) / (len(a) + len(b))
    if implementation == "rouge-score":
        valued = np.flatnonzero(~np.isnan(scores)).tolist()
        pairs = [(str(candidates[i]), str(references[i])) for i in valued]
        scores[valued] = _rouge_l_of_package([a for a, _ in pairs], [b for _, b in pairs], tokenizer)
    return scores


def _unseen(texts: set[str], split: Callable[[str], list[str]], tokenizer: Tokenizer) -> set[str]:
    """The texts with letters or digits of which the tokenizer sees none; warns where it sees less than half."""
    blind, partly = set(), []
    for text in texts:
        written = sum(map(str.isalnum, text))
        seen = sum(map(str.isalnum, "".join(split(text))))
        if written and not seen:
            blind.add(text)
        if 2 * seen < written:
            partly.append(text)
    if partly:
        warnings.warn(
            f"the tokenizer {tokenizer!r} sees less than half of the letters and digits of {len(partly)} of "
            f"{len(texts)} texts, e.g. {min(partly)!r:.60}. A score of what it does not see is NaN. Pass "
            "tokenizer='unicode'.",
            UserWarning,
            stacklevel=3,
        )
    return blind


def _rouge_l_of_package(
    candidates: Sequence[str], references: Sequence[str], tokenizer: Tokenizer
) -> Float[np.ndarray, " n"]:
    """`rouge_l` computed by the package rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer

    class Splitter:
        def tokenize(self, text: str) -> list[str]:
            return tokenize(text, tokenizer)

    scorer = RougeScorer(["rougeL"], tokenizer=Splitter())
    pairs = zip(references, candidates, strict=True)
    return np.array([scorer.score(reference, candidate)["rougeL"].fmeasure for reference, candidate in pairs])


def distinct_n(text: str | None, n: int = 2) -> float:
    """Distinct n-grams / n-grams over the `"symbols"` tokens of `text`: in (0, 1].

    NaN with fewer than n tokens, or without a text (None).

    Raises:
        TypeError: `text` is not a str.
        ValueError: `n` is not an int of at least 1.

    Source: Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", 2016.
    """
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"expected n to be an int of at least 1; got {n!r}. Pass the length of the n-grams in tokens.")
    tokens = [] if text is None else tokenize(text, "symbols")
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else float("nan")


def repeated_ngrams(text: str | None, n: int = 4) -> float:
    """Share of n-grams that occurred earlier in `text`: `1 - distinct_n(text, n)`, in [0, 1) or NaN.

    Raises:
        TypeError, ValueError: as `distinct_n`.

    Source: Welleck et al., "Neural Text Generation with Unlikelihood Training", 2020 (seq-rep-n).
    """
    return 1.0 - distinct_n(text, n)
