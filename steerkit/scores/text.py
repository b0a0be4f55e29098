"""Scores of texts: ROUGE-L, distinct and repeated n-grams. Imports numpy and rapidfuzz only."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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

# Han, kana, Thai, Lao, Myanmar and Khmer are written without spaces: each letter is a token, with its marks.
_SPACELESS = re.compile(
    "[\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"
)


def _unicode_words(text: str) -> list[str]:
    """Words of letters, marks and digits of any script; a letter of `_SPACELESS` is a word."""
    words = [""]
    open_word = False
    for character in unicodedata.normalize("NFKC", text).lower():
        category = unicodedata.category(character)[0]
        if category == "M" and words[-1]:
            words[-1] += character
        elif category not in "LMN":
            words.append("")
            open_word = False
        elif open_word and not _SPACELESS.match(character):
            words[-1] += character
        else:
            words.append(character)
            open_word = not _SPACELESS.match(character)
    return [word for word in words if word]


_SPLIT: dict[str, Callable[[str], list[str]]] = {
    "rouge_score": lambda text: text.lower().encode("ascii", "replace").translate(_ALNUM_OR_SPACE).decode().split(),
    "symbols": lambda text: [match[0] for match in _SYMBOLS.finditer(text.lower())],
    "unicode": _unicode_words,
}


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

    `"unicode"`: words of any script, after Unicode normalisation (NFKC): maximal runs of letters, marks and digits, all
    else being a separator. A letter of a script without spaces (Han, kana, Thai, Lao, Myanmar, Khmer) is a token.

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

    The score is NaN where it has no value: a text is None, neither text has a token, or a text consists mostly of
    letters and digits and the tokenizer sees none of them (`"rouge_score"` sees no Chinese or Cyrillic letter). It is 0
    where only one text has tokens and the other consists of other characters, e.g. an empty candidate. A UserWarning
    follows if the tokenizer drops more than half of the letters and digits of all candidates, or of all references.

    Args:
        candidates: n texts, or None for a text that does not exist.
        references: n texts, or None.
        tokenizer: `"rouge_score"`, `"symbols"`, `"unicode"`, or an object of rouge-score's tokenizer interface.
        implementation: `"steerkit"`, or the package rouge-score as reference; they agree to rounding, and the package
            is slower.

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
    distinct = {text for text in (*candidates, *references) if text is not None}
    tokens = {text: tokenize(text, tokenizer) for text in distinct}
    for name, texts in (("candidates", candidates), ("references", references)):
        _warn_of_dropped_letters(name, {text: tokens[text] for text in texts if text is not None})
    scores = np.full(len(candidates), np.nan)
    pairs = {
        i: (tokens[candidate], tokens[reference])
        for i, (candidate, reference) in enumerate(zip(candidates, references, strict=True))
        if candidate is not None and reference is not None and _is_comparable(candidate, reference, tokens)
    }
    compute = _rouge_l_of_package if implementation == "rouge-score" else _rouge_l
    scores[list(pairs)] = compute(list(pairs.values()))
    return scores


def _is_comparable(candidate: str, reference: str, tokens: Mapping[str, Sequence[str]]) -> bool:
    """Whether one of two texts has tokens, and the tokens represent both: a text without tokens has no letters."""
    texts = (candidate, reference)
    return any(tokens[text] for text in texts) and all(tokens[text] or not _letters(text) for text in texts)


def _letters(text: str) -> int:
    """The number of letters, marks and digits of a text; 0 if they are not most of it, as in undecodable bytes."""
    characters = [unicodedata.category(character)[0] for character in text if not character.isspace()]
    letters = sum(category in "LMN" for category in characters)
    return letters if 2 * letters > len(characters) else 0


def _warn_of_dropped_letters(name: str, tokens: Mapping[str, Sequence[str]]) -> None:
    """Warn if less than half of the letters and digits of some texts are in their tokens."""
    seen = {text: sum(map(len, found)) for text, found in tokens.items()}
    letters = {text: seen[text] if text.isascii() else _letters(text) for text in tokens}
    if 2 * sum(seen.values()) < sum(letters.values()):
        blind = [text for text in tokens if 2 * seen[text] < letters[text]]
        warnings.warn(
            f"expected {name} in a script that the tokenizer sees; got {len(blind)} of {len(tokens)} texts of which it "
            f"drops more than half of the letters, e.g. {min(blind)!r:.80}: ROUGE-L ignores these letters, and is NaN "
            "for a text without any token. Pass tokenizer='unicode'.",
            stacklevel=3,
        )


def _rouge_l(pairs: Sequence[tuple[list[str], list[str]]]) -> list[float]:
    """ROUGE-L of pairs of tokenised texts, at least one of each with a token."""
    # rapidfuzz compares hashes, and the hash of a small int is the int: with a number per token the LCS is exact.
    number = defaultdict[str, int](count().__next__).__getitem__
    numbers = (([*map(number, a)], [*map(number, b)]) for a, b in pairs)
    return [2 * LCSseq.similarity(a, b) / (len(a) + len(b)) for a, b in numbers]


def _rouge_l_of_package(pairs: Sequence[tuple[list[str], list[str]]]) -> list[float]:
    """`_rouge_l` computed by the package rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer

    class Tokenised:
        def tokenize(self, text: list[str]) -> list[str]:
            return text

    scorer = RougeScorer(["rougeL"], tokenizer=Tokenised())
    return [float(scorer.score(reference, candidate)["rougeL"].fmeasure) for candidate, reference in pairs]


def distinct_n(text: str | None, n: int = 2) -> float:
    """Distinct n-grams / n-grams over the `"symbols"` tokens of `text`: in (0, 1].

    It is NaN with fewer than n tokens, and for None.

    Raises:
        TypeError: `text` is neither a str nor None.
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
