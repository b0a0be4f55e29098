"""Scores and areas against rouge-score, scikit-learn, naive algorithms and numbers worked by hand."""

from __future__ import annotations

import itertools
import subprocess
import sys
from math import isnan, nan

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from sklearn.metrics import roc_auc_score

from steerkit.scores.text import _SPLIT, distinct_n, repeated_ngrams, rouge_l, tokenize
from steerkit.stats.areas import curve_auc, macro_roc_auc, roc_auc
from steerkit.sweeps.result import of_words

any_text = st.text(st.characters(), max_size=80)  # lone surrogates included
some_token = st.sampled_from(["a", "b", "ab", "-1", "1", "//", "\u00e9"])
ascii_text = st.text(st.characters(max_codepoint=127), max_size=80)


def naive_lcs(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        previous, row = row, [0]
        for j, y in enumerate(b):
            row.append(previous[j] + 1 if x == y else max(previous[j + 1], row[j]))
    return row[-1]


def test_words_of_a_trait_are_counted_whole_and_in_any_case() -> None:
    score = of_words(["Happy", " joy "])
    assert score(pd.Series({"text": "HAPPY, unhappy; joy-joy"})) == 3.0
    assert score(pd.Series({"text": ""})) == 0.0
    for words in ([""], ["two words"], []):
        with pytest.raises(ValueError, match="expected single words"):
            of_words(words)


def test_importing_scoring_loads_no_torch_pandas_or_scipy() -> None:
    code = (
        "import sys, steerkit.scores.text, steerkit.stats.areas, steerkit.stats.multiple\n"
        "print(sorted({'torch', 'pandas', 'scipy', 'numpy'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "['numpy']"


# Tokens


@settings(max_examples=400, deadline=None)
@given(any_text)
@example("\u0130stanbul, 5 \u212a: \u212bngstr\u00f6m")
@example("a\u00e9b \ud800c\u0000d_e?f\x1cg\u2028h\u00b2\u0663")
def test_rouge_tokens_are_those_of_rouge_score_on_any_text(text: str) -> None:
    assert tokenize(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)


def test_rouge_tokens_are_those_of_rouge_score_on_every_code_point() -> None:
    text = "x".join(map(chr, range(sys.maxunicode + 1)))
    assert tokenize(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("-1110", ["-1110"]),
        ("1110", ["1110"]),
        ("x = -5 // 2", ["x", "=", "-5", "//", "2"]),
        ("7-3", ["7", "-", "3"]),
        ("7 - 3", ["7", "-", "3"]),
        ("f(-3)-1", ["f", "(", "-3", ")", "-", "1"]),
        ("a[0]+2", ["a", "[", "0", "]", "+", "2"]),
        ("2024-01-15", ["2024", "-", "01", "-", "15"]),
        ("--5", ["--", "5"]),
        ("5+-3 \u22127", ["5", "+", "-3", "\u22127"]),
        ("-0.5", ["-0", ".", "5"]),
        ("a != b...", ["a", "!", "=", "b", "..."]),
        ("snake_case", ["snake", "_", "case"]),
        ("Caf\u00e9 \u5317\u4eac\u3002\u3002", ["caf\u00e9", "\u5317\u4eac", "\u3002\u3002"]),
        ("", []),
        (" \n\t", []),
    ],
)
def test_symbols_tokens_keep_signs_operators_and_unicode_words(text: str, tokens: list[str]) -> None:
    assert tokenize(text, "symbols") == tokens


@settings(max_examples=300, deadline=None)
@given(any_text)
def test_symbols_tokens_lose_only_white_space(text: str) -> None:
    assert "".join(tokenize(text, "symbols")) == "".join(text.lower().split())


@settings(max_examples=300, deadline=None)
@given(ascii_text)
def test_symbols_words_are_the_rouge_words_on_ascii(text: str) -> None:
    words = [token.lstrip("+-") for token in tokenize(text, "symbols") if any(map(str.isalnum, token))]
    assert words == tokenize(text, "rouge_score")


def test_tokenize_rejects_what_it_cannot_split() -> None:
    with pytest.raises(
        ValueError, match=r"expected tokenizer to be one of \['rouge_score', 'symbols', 'unicode'\]; got 'words'"
    ):
        tokenize("a", "words")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected text to be a str; got None \(NoneType\)"):
        tokenize(None)  # type: ignore[arg-type]


# ROUGE-L


def random_texts(n: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    vocabulary = ["the", "a", "of", "Cat", "sat,", "-3", "\u00e9t\u00e9", "mat.", *(f"w{i}" for i in range(30))]
    return [" ".join(rng.choice(vocabulary, size=rng.integers(0, 200))) for _ in range(n)]


def test_rouge_l_equals_rouge_score() -> None:
    candidates, references = random_texts(60, 0), random_texts(60, 1)
    candidates[:3], references[:3] = ["", "same text", "!?"], ["", "Same, text", "one"]
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    expected = [scorer.score(r, c)["rougeL"].fmeasure for c, r in zip(candidates, references, strict=True)]
    expected[0] = nan  # two empty texts: the package returns 0
    assert expected[1:3] == [1, 0]
    for implementation in ("steerkit", "rouge-score"):
        scores = rouge_l(candidates, references, implementation=implementation)
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.lists(some_token, max_size=90), st.lists(some_token, max_size=90))
@example(["a"] * 64 + ["//", "b"] * 40, ["b"] * 70 + ["a"] * 63)
def test_rouge_l_has_the_longest_common_subsequence(a: list[str], b: list[str]) -> None:
    expected = 2 * naive_lcs(a, b) / (len(a) + len(b)) if a or b else nan
    assert rouge_l([" ".join(a)], [" ".join(b)], "symbols")[0] == pytest.approx(expected, abs=1e-15, nan_ok=True)


def test_rouge_l_of_a_hand_worked_pair() -> None:
    # Lin (2004), section 3.1: both share three words with the reference, but in order only three and two.
    scores = rouge_l(["police kill the gunman", "the gunman kill police"], ["police killed the gunman"] * 2)
    assert scores.tolist() == [0.75, 0.5]


def test_rouge_l_sees_signs_only_with_symbols() -> None:
    assert rouge_l(["-1110"], ["1110"])[0] == 1
    assert rouge_l(["-1110"], ["1110"], "symbols")[0] == 0


def test_rouge_l_tokenises_each_distinct_text_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    split = _SPLIT["rouge_score"]

    def spy(text: str) -> list[str]:
        seen.append(text)
        return split(text)

    monkeypatch.setitem(_SPLIT, "rouge_score", spy)
    assert rouge_l(["a b", "b c", "a b"], ["a", "a", "b c"]).tolist() == [2 / 3, 0, 0.5]
    assert sorted(seen) == ["a", "a b", "b c"]


def test_rouge_l_of_no_pairs_is_empty() -> None:
    assert rouge_l([], []).shape == (0,)


def test_rouge_l_rejects_what_is_not_two_equally_long_sequences_of_str() -> None:
    with pytest.raises(TypeError, match="expected candidates to be a sequence; got the single str 'a b'"):
        rouge_l("a b", ["a b"])
    with pytest.raises(TypeError, match="expected references to be a sequence; got the single str"):
        rouge_l(["a b"], "a b")
    with pytest.raises(TypeError, match=r"expected references\[1\] to be a str; got nan \(float\)"):
        rouge_l(["a", "b"], ["a", nan])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="expected a reference per candidate; got 1 for 2"):
        rouge_l(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="expected tokenizer to be one of"):
        rouge_l(["a"], ["a"], "words")  # type: ignore[arg-type]


CHINESE, RUSSIAN = (
    "\u6d77\u9762\u5e73\u9759",
    "\u043c\u043e\u0440\u0435 \u0441\u043f\u043e\u043a\u043e\u0439\u043d\u043e",
)
INVISIBLE = (CHINESE, RUSSIAN, "\u0938\u092e\u0941\u0926\u094d\u0930", "\u05d9\u05dd", "\uff11\uff18")
WORDLESS = ("", " \n", "!?", "\U0001f30a", "\u071c\ufffd\ufffd\ufffd")


@pytest.mark.filterwarnings("ignore:expected (candidates|references) in a script")
@pytest.mark.parametrize("implementation", ["steerkit", "rouge-score"])
@pytest.mark.parametrize("invisible", INVISIBLE)
def test_rouge_l_is_nan_where_the_tokenizer_sees_no_letter_of_a_text(invisible: str, implementation) -> None:
    pairs = [(invisible, invisible), (invisible, "sea"), ("sea", invisible), (invisible, ""), ("", invisible)]
    scores = rouge_l(*zip(*pairs, strict=True), implementation=implementation)
    assert np.isnan(scores).all()


@pytest.mark.parametrize("tokenizer", ["rouge_score", "symbols", "unicode"])
def test_a_text_without_words_scores_0_against_words_and_has_no_score_against_another(tokenizer) -> None:
    assert rouge_l(WORDLESS, ["sea"] * 5, tokenizer).tolist() == [0] * 5
    assert rouge_l(["sea"] * 5, WORDLESS, tokenizer).tolist() == [0] * 5
    assert np.isnan(rouge_l(WORDLESS[:2], WORDLESS[1::-1], tokenizer)).all()
    assert np.isnan(rouge_l([None, "sea", None], ["sea", None, None], tokenizer)).all()


@settings(max_examples=200, deadline=None)
@given(any_text, st.sampled_from(["rouge_score", "symbols", "unicode"]))
@pytest.mark.filterwarnings("ignore:expected (candidates|references) in a script")
def test_a_text_scores_1_against_itself_or_has_no_token_and_no_score(text: str, tokenizer) -> None:
    (score,) = rouge_l([text], [text], tokenizer)
    assert score == 1 if tokenize(text, tokenizer) else isnan(score)
    for share in (distinct_n(text, 1), distinct_n(text), repeated_ngrams(text)):
        assert 0 <= share <= 1 or isnan(share)
    assert isnan(distinct_n(text, 1)) == (not text.split())


def test_texts_of_another_script_are_counted_in_one_warning_that_names_a_tokenizer() -> None:
    texts = ["sea", f"sea {CHINESE}", RUSSIAN, "caf\u00e9 au lait"]
    with pytest.warns(UserWarning, match=r"references .*got 2 of 4 texts .*tokenizer='unicode'") as said:
        scores = rouge_l(["sea"] * 4, texts)
    assert len(said) == 1
    np.testing.assert_array_equal(scores, [1, 1, nan, 0])
    with pytest.warns(UserWarning, match="candidates"):
        rouge_l([f"a {CHINESE}"], ["a"])


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The sea, 12!", ["the", "sea", "12"]),
        (RUSSIAN.upper(), RUSSIAN.split()),
        (f"a{CHINESE}b1", ["a", *CHINESE, "b1"]),
        ("\u0938\u092e\u0941\u0926\u094d\u0930", ["\u0938\u092e\u0941\u0926\u094d\u0930"]),  # marks do not end a word
        ("\u0e17\u0e35\u0e48", ["\u0e17\u0e35\u0e48"]),
        ("e\u0301t\u00e9", ["\u00e9t\u00e9"]),
        ("\uff11\uff18 \uff41", ["18", "a"]),
        ("\ud55c\uad6d \ub9d0", ["\ud55c\uad6d", "\ub9d0"]),
        ("x_y -3 \U0001f30a", ["x", "y", "3"]),
        ("", []),
    ],
)
def test_unicode_tokens_are_words_of_any_script_and_letters_of_those_without_spaces(text, tokens) -> None:
    assert tokenize(text, "unicode") == tokens


@settings(max_examples=300, deadline=None)
@given(ascii_text)
def test_unicode_tokens_are_the_rouge_tokens_on_ascii(text: str) -> None:
    assert tokenize(text, "unicode") == tokenize(text, "rouge_score")


def test_rouge_l_by_letters_compares_texts_of_scripts_without_spaces() -> None:
    assert rouge_l([CHINESE], [CHINESE[:2] + CHINESE[3]], "unicode")[0] == pytest.approx(2 * 3 / 7)


# Repetition


def test_distinct_and_repeated_ngrams_of_hand_worked_texts() -> None:
    assert distinct_n("a b a b a") == 2 / 4  # ab ba ab ba
    assert distinct_n("a b a b a", 1) == 2 / 5
    assert distinct_n("a b c") == 1
    assert repeated_ngrams("a b c d a b c d a") == pytest.approx(1 - 4 / 6)
    assert repeated_ngrams("the end. " * 3, 3) == pytest.approx(1 - 3 / 7)
    assert repeated_ngrams("a b c d e") == 0


def test_distinct_n_tells_signs_apart() -> None:
    assert distinct_n("5 -5 5", 1) == 2 / 3


def test_ngram_shares_are_nan_where_the_text_has_fewer_than_n_tokens() -> None:
    assert isnan(distinct_n("one")) and isnan(distinct_n("", 1))
    assert isnan(distinct_n(None)) and isnan(repeated_ngrams(None))
    assert isnan(repeated_ngrams("one two three")) and repeated_ngrams("one two three four") == 0


@pytest.mark.parametrize("n", [0, -1, 1.0])
def test_ngram_shares_reject_a_length_that_is_not_a_positive_int(n: int) -> None:
    with pytest.raises(ValueError, match=f"expected n to be an int of at least 1; got {n}"):
        distinct_n("a b", n)
    with pytest.raises(ValueError, match="expected n to be an int of at least 1"):
        repeated_ngrams("a b", n)


# Area under a steering curve


def test_curve_auc_of_a_hand_worked_curve() -> None:
    # Trapezoids (0 + 1) / 2 * 1 and (1 + 4) / 2 * 2.
    assert curve_auc([0, 1, 3], [0, 1, 4]) == 5.5
    assert curve_auc([0, 1, 3], [0, 1, 4], normalize=True) == pytest.approx(5.5 / 3)


def test_curve_auc_does_not_depend_on_the_order_of_the_points() -> None:
    c, v = np.array([-2.0, -0.5, 0.0, 1.0, 4.0]), np.array([3.0, -1.0, 2.0, 0.5, 7.0])
    (area,) = {curve_auc(c[list(order)], v[list(order)]) for order in itertools.permutations(range(5))}
    assert area == pytest.approx(np.trapezoid(v, c))


def test_normalized_curve_auc_of_a_constant_is_the_constant() -> None:
    assert curve_auc([-3, 8, 1], [0.25] * 3, normalize=True) == 0.25


@pytest.mark.parametrize(
    ("coefficients", "values", "message"),
    [
        ([1], [1], "expected at least two coefficients; got 1"),
        ([0, 1, 1], [1, 2, 3], "expected distinct coefficients; got 1 twice"),
        ([0, nan], [1, 2], "expected finite coefficients; got nan at index 1"),
        ([0, 1], [np.inf, 2], "expected finite values; got inf at index 0"),
        ([0, 1], [1, 2, 3], "expected one value per coefficient; got 3 for 2"),
        ([[0, 1]], [[1, 2]], r"expected coefficients of shape \[n\]; got \[1, 2\]"),
    ],
)
def test_curve_auc_rejects_what_is_no_curve(coefficients: list[float], values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        curve_auc(coefficients, values)


# ROC


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [2, 7, 10**6])
def test_roc_auc_equals_sklearn_with_and_without_ties(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    labels, scores = rng.integers(2, size=200), rng.integers(levels, size=200) / 3
    assert roc_auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_roc_auc_of_hand_worked_scores() -> None:
    assert roc_auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == 0.75  # three of four pairs in order
    assert roc_auc([False, True, True], [1, 1, 2]) == 0.75  # a tie is half a pair
    assert roc_auc([1, 0], [3, 3]) == 0.5
    assert roc_auc([1, 0], [-1, 5]) == 0


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([1, 1], [0, 1], "expected both classes; got 2 positive and 0 negative"),
        ([0], [0], "expected both classes; got 0 positive and 1 negative"),
        ([0, 1], [0, nan], "expected finite scores; got nan at index 1"),
        ([0, 2], [0, 1], r"expected labels of bool or 0/1; got \[0, 2\]"),
        (["a", "b"], [0, 1], r"expected labels of bool or 0/1; got \['a', 'b'\]"),
        ([0, 1, 1], [0, 1], r"expected a label per score; got shapes \[3\] and \[2\]"),
    ],
)
def test_roc_auc_rejects_what_has_no_area(labels: list[int], scores: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roc_auc(labels, scores)


def test_macro_roc_auc_equals_sklearn_one_vs_rest() -> None:
    rng = np.random.default_rng(0)
    classes = ["anger", "fear", "joy"]
    labels = np.array(classes)[rng.integers(3, size=120)]
    scores = rng.dirichlet(np.ones(3), size=120).round(2)
    scores[:, 2] = 1 - scores[:, 0] - scores[:, 1]
    expected = roc_auc_score(labels, scores, labels=classes, multi_class="ovr", average="macro")
    assert macro_roc_auc(labels, scores, classes) == pytest.approx(expected, abs=1e-12)
    order = [2, 0, 1]
    assert macro_roc_auc(labels.tolist(), scores[:, order], [classes[j] for j in order]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("labels", "scores", "classes", "message"),
    [
        (["a", "b"], [[0, 1], [1, 0]], ["a", "a"], r"expected at least two distinct classes; got \['a', 'a'\]"),
        (["a", "a"], [[0], [1]], ["a"], r"expected at least two distinct classes; got \['a'\]"),
        (["a", "b"], [[0, 1]], ["a", "b"], r"got 2 labels, 2 classes and scores \[1, 2\]"),
        (["a", "a"], [[0, 1], [1, 0]], ["a", "b"], "only one has 'b'"),
        (["a", "c"], [[0, 1], [1, 0]], ["a", "b"], "only one has 'b', 'c'"),
        (["a", "b"], [[0, nan], [1, 0]], ["a", "b"], "expected finite scores; got nan at index 0"),
    ],
)
def test_macro_roc_auc_rejects_what_has_no_area(
    labels: list[str], scores: list[list[float]], classes: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        macro_roc_auc(labels, scores, classes)


def test_macro_roc_auc_rejects_a_single_str() -> None:
    with pytest.raises(TypeError, match="expected classes to be a sequence; got the single str 'ab'"):
        macro_roc_auc(["a", "b"], [[0, 1], [1, 0]], "ab")
