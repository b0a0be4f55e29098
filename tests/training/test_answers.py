"""Answers: a box with one reading gives that reading, any other gives None, and a majority is of all voters."""

from __future__ import annotations

import subprocess
import sys
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerkit.text.traces import read_traces
from training.problems.answers import _MODIFIERS, KINDS, LONGEST, UNITS, canonical, majority, read_answer, same

ROOT = Path(__file__).parents[2]
PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "published"

WHOLE_TEXTS = [  # text, kind, the answer in its last box
    (r"so the solution is \(\boxed{-1110}\).", "number", "-1110"),
    (r"we find $\boxed{529}$", "number", "529"),
    (r"\[\boxed{-7}\]", "number", "-7"),
    ("\\[\n\\boxed{12}\n\\]", "number", "12"),
    (r"$$\boxed{12}$$", "number", "12"),
    (r"**\boxed{12}**", "number", "12"),
    (r"\boxed{270}", "number", "270"),
    ("x = 3*4 // first\nresult = x + 2 // \\boxed{14}\nprint(result)", "number", "14"),
    ("# the answer: \\boxed{14}", "number", "14"),
    (r"\boxed {14}", "number", "14"),
    (r"\fbox{14}", "number", "14"),
    (r"is\boxed{14}", "number", "14"),
    ("min box{14}", "number", "14"),
    ("min box { 1 4 }", "number", "14"),
    (r"boxed{14}", "number", "14"),
    (r"\boxed{3} no, \boxed{4}", "number", "4"),
    (r"\boxed{14} and so on, a set {1, 2", "number", "14"),
    (r"\boxed{\boxed{14}}", "number", "14"),
    ("the answer is 14", "number", None),
    ("", "number", None),
    (r"\boxed", "number", None),
    (r"\boxed{3} and then \boxed{}", "number", None),
    (r"\boxed{3} and then \boxed{ }", "number", None),
    (r"\boxed{3} and then \boxed{4", "number", None),
    (r"\boxed{3} and then \boxed{4\}", "number", None),
    (r"\boxed{3} and then \boxed{", "number", None),
    (r"\boxed{3} and then \boxed{?}", "number", None),
    (r"\boxed{3}, as in a mailbox{4}", "number", "3"),
    (r"\boxed{3} in an \mbox{4}", "number", "3"),
]

NUMBERS = {  # content of the box -> number
    "18": "18",
    " 18 ": "18",
    "18.": "18",
    "007": "7",
    "-0": "0",
    "+7": "7",
    "-1110": "-1110",
    "- 5": "-5",
    "−5": "-5",
    "–5": "-5",
    "18.0": "18",
    "18.50": "37/2",
    ".5": "1/2",
    "-0.25": "-1/4",
    "1/2": "1/2",
    "12/4": "3",
    "-6/4": "-3/2",
    r"\frac{1}{2}": "1/2",
    r"-\frac{6}{4}": "-3/2",
    r"\dfrac{-3}{4}": "-3/4",
    r"\tfrac{10}{5}": "2",
    r"\mathbf{14}": "14",
    r"\boldsymbol{14}": "14",
    r"\text{14}": "14",
    r"\textbf{14}.": "14",
    r"\text{ $\mathrm{14}$ }": "14",
    "{14}": "14",
    "$14$": "14",
    r"\(14\)": "14",
    "**14**": "14",
    r"\displaystyle 14": "14",
    "1,000": "1000",
    "1,234,567.5": "2469135/2",
    "1{,}000": "1000",
    r"1\,000": "1000",
    r"1,\!000": "1000",
    "1\u202f000": "1000",
    r"1\,000 \text{ km}": "1000",
    "$18": "18",
    r"\$18": "18",
    r"\$1{,}234.50": "2469/2",
    "-$5": "-5",
    r"\$-5": "-5",
    "€18": "18",
    "18€": "18",
    "18%": "18",
    r"18 \%": "18",
    r"90^\circ": "90",
    r"90^{\circ}": "90",
    "90°": "90",
    "18 dollars": "18",
    "18 miles per hour": "18",
    "18 years old": "18",
    r"18\text{ apples}": "18",
    r"18\text{ m}": "18",
    r"18 \, \mathrm{cm}^2": "18",
    r"18~\text{km/h}": "18",
    "18 cm^3": "18",
    r"\$18/hour": "18",
    r"\text{18 apples}": "18",
    r"\text{\$18.00}": "18",
    r"3\text{ times}": "3",
    "x = 18": "18",
    "18.0 = 18": "18",
    "12*3 = 36": "36",
    "a = 12*3 = 36": "36",
    "5! = 120": "120",
    "1,200*2 = 2,400": "2400",
    r"\text{Total} = \$18 \text{ per day}": "18",
    "= 18": "18",
    "1e3": "1000",
    "1.5E-2": "3/200",
    r"1.5 \times 10^{3}": "1500",
    r"2\cdot 10^3": "2000",
    "2 × 10^{-1}": "1/5",
    "1 4": "14",
    "- 1 4": "-14",
    "1 1 1 0": "1110",
}

NO_NUMBERS = [
    *("x", "eighteen", "?", "...", "NaN", "inf", "Infinity", "0x12", "１８", "A", "yes", "-", "$", "%", ".", "()"),
    *("--7", "+-7", r"\pm 5", "-$-5", "5-", "3-5", "3 - 5", "3–5", "3+4", "12*3", "10^2", "2²", "2^{10}", "5!", "3:1"),
    *("1/2/3", "1/0", r"\frac{1}{0}", r"\frac{x}{2}", "1 1/2", r"1\frac{1}{2}", r"\sqrt{2}", r"3\pi", "(18)"),
    *("1,0000", "12,34", "0,123", "1,00,000", "1.000,50", "5.5.5", "14 15", "1  4", "1 . 4", "1 4 dollars", "1 000"),
    *(
        "7, 14",
        "7 and 14",
        "18 or 19",
        "18 and a half",
        "18 or so",
        "18x",
        "18cm",
        "18 m",
        "5 times x",
        "18th",
        "18 th",
    ),
    *(
        "2 million",
        r"2\text{ million}",
        r"2\text{K}",
        r"2\text{万}",
        "3 dozen",
        "3 pi",
        "3 quarters",
        "5 feet 3 inches",
        "18 (or so)",
    ),
    *(
        "18 = x",
        "x >= 5",
        "x <= 5",
        "x += 5",
        "x != 5",
        r"x \approx 5",
        "x = 1, y = 2",
        "x = 1 or x = 2",
        "x = 5 y = 6",
    ),
    *("x = 1\ny = 2", "1e999999", "1e-999999", r"10^{999999}", r"2 \times 10^{999999}", "1" * (LONGEST + 1)),
]

OPTIONS = {
    **dict.fromkeys(["A", "(A)", "A.", "A)", "(A).", " a ", "(a)", r"\text{A}", r"\text{(A)}", r"(\text{A})"], "A"),
    **dict.fromkeys(["(A) some text", r"\textbf{(A)}\ 5", r"\text{(A) The owl}", "A. Paris", "A: 5", "A) x"], "A"),
    **dict.fromkeys(["Option A", "option (A)", "Answer: A", "**A**", "$A$", '"A"', r"\mathrm{A}", "{(A)}"], "A"),
    **dict.fromkeys(["(J) f(x) is P(A)", "(J) (i) and (ii) only", "J", r"\mathbf{J}", r"J\text{. some}"], "J"),
}
NO_OPTIONS = [
    *(
        "AB",
        "A B",
        "A, B",
        "A or B",
        "A and B",
        "(A) or (B)",
        "(A), (B)",
        "(A)(B)",
        "(A) 5 and (B) 6",
        "A. and B.",
        "A/B",
    ),
    *("1", "14", "(1)", "A dog", "A = 5", "the owl", "yes", "(A", "()", "?", "Ä", "\u212a", "\u0131"),
]

WORDS = {
    **dict.fromkeys(["Yes", "yes", "YES.", r"\text{Yes}", r"\textbf{Yes}", "**Yes**", '"Yes"', "Yes, she does"], "yes"),
    **dict.fromkeys(["No", r"\text{No}.", "no; he lies", r"\text{ No }"], "no"),
    **dict.fromkeys(["valid", r"\text{valid}", "Valid.", "deductively valid", "The argument is valid"], "valid"),
    **dict.fromkeys(["invalid", r"\text{The argument is deductively invalid.}", r"\mathrm{invalid}"], "invalid"),
    **dict.fromkeys(["True", r"\texttt{true}"], "true"),
    "False": "false",
}
NO_WORDS = [
    "Yes or No",
    "yes/no",
    "Yes, no",
    "not valid",
    "no one",
    "nope",
    "y",
    "maybe",
    "valid, not invalid",
    "1",
    "-",
]

PAIRS = {
    **dict.fromkeys(["7 14", " 7 14 ", "14 7", "7, 14", "7,14", "7; 14", "7 and 14", "14 and 7", "7, and 14"], "7 14"),
    **dict.fromkeys(["{7, 14}", r"\{14, 7\}", "(7, 14)", "[7, 14]", r"\left(7, 14\right)", r"7,\ 14", "7\n14"], "7 14"),
    **dict.fromkeys(
        [r"7 \text{ and } 14", r"7\text{ and }14", "1 4 , 7", "$7$ and $14$", r"(7,\,14)", "7.0 14"], "7 14"
    ),
    "-7 3": "-7 3",
    "3, −7": "-7 3",
    "1/2 and 1/3": "1/3 1/2",
    "7 7": "7 7",
    "1{,}000 and 2": "2 1000",
}
NO_PAIRS = [
    "7",
    "7 14 21",
    "7, 14, 21",
    "7 + 14",
    "7 - 14",
    "7, 14 = 21",
    "1 4 7",
    "7 apples",
    "7,",
    "a, b",
    "1{,}000",
    "(7",
]

TABLE = [
    *WHOLE_TEXTS,
    *((f"so \\boxed{{{inside}}}.", "number", answer) for inside, answer in NUMBERS.items()),
    *((f"so \\boxed{{{inside}}}.", "option", answer) for inside, answer in OPTIONS.items()),
    *((f"so \\boxed{{{inside}}}.", "word", answer) for inside, answer in WORDS.items()),
    *((f"so \\boxed{{{inside}}}.", "pair", answer) for inside, answer in PAIRS.items()),
    *((f"so \\boxed{{{inside}}}.", "number", None) for inside in NO_NUMBERS),
    *((f"so \\boxed{{{inside}}}.", "option", None) for inside in NO_OPTIONS),
    *((f"so \\boxed{{{inside}}}.", "word", None) for inside in NO_WORDS),
    *((f"so \\boxed{{{inside}}}.", "pair", None) for inside in NO_PAIRS),
]


@pytest.mark.parametrize(("text", "kind", "answer"), TABLE)
def test_a_box_with_one_reading_gives_it_and_any_other_gives_none(text: str, kind: str, answer: str | None) -> None:
    assert read_answer(text, kind) == answer


@pytest.mark.parametrize(("text", "kind", "answer"), [row for row in TABLE if row[2] is not None])
def test_a_canonical_answer_is_its_own_canonical_form(text: str, kind: str, answer: str) -> None:
    assert canonical(answer, kind) == answer
    assert read_answer(f"\\boxed{{{answer}}}", kind) == answer


BOXED_LETTERS = {  # the letter of a box in the ways in which models write it
    "A": [
        r"Thus, \boxed{A) 3.2 \times 10^{-5} \text{ M}}",
        r"\boxed{A. Then B.}",
    ],
    "B": [
        r"Therefore the answer is \boxed{\text{(B)}}.",
        r"the answer is (C) but \boxed{B}",
    ],
    "C": [
        r"The correct option is (C).\n\n\boxed{C}",
        r"\boxed{\text{C. interference}}",
        r"\boxed{\text{(C) interference}}",
        r"\boxed{(C)\ \text{interference}}",
        r"\boxed{C \text{ (interference)}}",
        r"\boxed{C: interference}",
        r"\boxed{C - interference}",
        r"\boxed{\text{Option C}}",
        r"\boxed{\text{The answer is (C)}}",
        r"\boxed{The answer is (C).}",
        r"\boxed{**C**}",
        r"\boxed{\(C\)}",
        r"\boxed{\{C\}}",
        r"\boxed{'C'}",
        r"\boxed{C.}",
        r"\boxed{\text{C}\ }",
        r"\boxed{\text{(c)}}",
    ],
    "D": [
        r"\boxed{d}",
    ],
    "I": [
        r"\boxed{\mathrm{I}}",
        r"\boxed{I}",
    ],
    "J": [
        r"\boxed{\textbf{(J)}}",
    ],
    "K": [
        r"\boxed{K}",
    ],
}
NO_BOXED_LETTER = [  # no option, two options, or a statement about one
    r"\boxed{42}",
    r"\boxed{AB}",
    r"\boxed{A car moves, so B}",
    r"\boxed{A safe choice}",
    r"\boxed{I only}",
    r"\boxed{I and II}",
    r"\boxed{\text{I, II}}",
    r"\boxed{\text{Not (A)}}",
    r"\boxed{(A) or (C)}",
    r"\boxed{(A)\text{ and }(C)}",
    r"\boxed{A) 5, C) 7}",
    r"\boxed{\text{A. 5 or C. 7}}",
    r"\boxed{\text{None of the above}}",
    r"\boxed{N/A}",
    r"\boxed{E = mc^2}",
    r"\boxed{C_6H_{12}}",
    r"\boxed{\text{(A) is wrong; (C)}}",
    r"\boxed{A → C}",
    r"\boxed{(D) 12 (C)}",
    r"\boxed{(A) is wrong}",
    r"\boxed{A. 5 C. 7}",
    r"\boxed{f (2)}",
    r"\boxed{A | B}",
    r"\boxed{A to C}",
    r"\boxed{All but (C)}",
    r"\boxed{(A), then (B)}",
]


@pytest.mark.parametrize(
    ("text", "letter"), [(text, letter) for letter in BOXED_LETTERS for text in BOXED_LETTERS[letter]]
)
def test_a_letter_is_read_in_every_spelling_of_a_box(text: str, letter: str) -> None:
    assert read_answer(text, "option") == letter


@pytest.mark.parametrize("text", NO_BOXED_LETTER)
def test_a_box_without_exactly_one_option_is_no_answer(text: str) -> None:
    assert read_answer(text, "option") is None


QUANTITIES = [
    "million",
    "lakh",
    "crore",
    "gross",
    "grand",
    "k",
    "K",
    "M",
    "bn",
    "mn",
    "mil",
    "Mio",
    "myriad",
    "dozen",
    "pairs",
    "hundred",
    "googol",
    "squared",
    "halves",
    "below zero",
    "wugs",
    "times x",
    "MM",
    "thousand km",
]


@pytest.mark.parametrize("word", QUANTITIES)
@pytest.mark.parametrize(
    "form", [r"5 {}", r"5{}", r"5\text{{ {}}}", r"\$5 {}", r"5~\mathrm{{{}}}", r"5\,\text{{{} dollars}}"]
)
def test_a_number_with_an_unknown_unit_or_multiplier_is_no_answer(form: str, word: str) -> None:
    assert read_answer(rf"\boxed{{{form.format(word)}}}", "number") is None


@given(word=st.text("abcdefghijklmnopqrstuvwxyz", min_size=2, max_size=9))
def test_a_word_after_a_number_is_dropped_only_if_it_is_a_known_unit(word: str) -> None:
    known = bool({word, word.removesuffix("s") if len(word) > 2 else word} & (UNITS - _MODIFIERS))
    assert (read_answer(rf"\boxed{{5 {word}}}", "number") == "5") is known


@pytest.mark.parametrize(
    ("inside", "number"),
    [
        ("5 km", "5"),
        ("5 kms", "5"),
        ("12 Dollars", "12"),
        ("$12", "12"),
        ("50%", "50"),
        ("5e3", "5000"),
        ("2 x 10^5", "200000"),
        (r"\$18/h", "18"),
        ("18 km/h", "18"),
        (r"18\text{ m/s}^2", "18"),
        ("25 °C", "25"),
        (r"25^\circ\text{C}", "25"),
        ("5 kilowatt-hours", "5"),
        ("1/2 of an hour", "1/2"),
        ("12 people", "12"),
        (r"\$5\text{m}", None),
        ("$5 mm", None),
        ("5 square", None),
        ("5 km - 3", None),
        ("5 m", None),
        ("5 of 10", None),
        (r"\boxed{\text{5 km}}", "5"),
    ],
)
def test_a_known_unit_is_dropped_and_an_abbreviation_after_a_currency_is_not_guessed(inside, number) -> None:
    assert read_answer(rf"\boxed{{{inside}}}", "number") == number


@pytest.mark.parametrize(
    ("opens", "closes"), [("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]")]
)
def test_a_box_counts_only_after_the_thought(opens: str, closes: str) -> None:
    cut = rf"{opens}First I get \boxed{{5}}. No wait, let me recompute"
    assert read_answer(cut, "number") is None
    assert read_answer(rf"{opens}maybe \boxed{{5}}{closes} The answer is **12**.", "number") is None
    for box in ("first", "last"):
        assert read_answer(rf"{opens}maybe \boxed{{5}}{closes} \boxed{{12}}", "number", box) == "12"  # type: ignore[arg-type]
    assert read_answer(rf"maybe \boxed{{5}}{closes} \boxed{{12}}", "number") == "12"
    assert read_answer(r"maybe \boxed{5}", "number", opened=True) is None


def test_the_first_box_is_read_where_that_is_asked_for() -> None:
    text = r"\boxed{3} no, \boxed{4}"
    assert (read_answer(text, "number", box="first"), read_answer(text, "number", box="last")) == ("3", "4")
    assert read_answer(r"\boxed{} no, \boxed{4}", "number", box="first") is None
    assert read_answer("nothing", "number", box="first") is None
    with pytest.raises(ValueError, match="'last', 'first' or 'readable'; got 'any'"):
        read_answer(text, "number", box="any")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r'so \boxed{18}. `print(f"\boxed{{{total}}}")`', "18"),
        (r"\boxed{3} no, \boxed{4}, unclosed \boxed{5", "4"),
        (r"\boxed{\boxed{7}} \boxed{}", "7"),
        (r"\boxed{total}", None),
        (r"<think>\boxed{3}</think> \boxed{x}", None),
        ("18", None),
    ],
)
def test_the_last_readable_box_is_read_where_that_is_asked_for(text, answer) -> None:
    assert read_answer(text, "number", box="readable") == answer


@pytest.mark.parametrize("kind", ["open", "", "numbers"])
def test_a_kind_that_cannot_be_read_is_refused_even_without_a_box(kind: str) -> None:
    with pytest.raises(ValueError, match="one of"):
        read_answer("nothing", kind)
    with pytest.raises(ValueError, match="one of"):
        canonical("14", kind)


@pytest.mark.parametrize(
    ("value", "kind"),
    [("", "number"), ("x", "number"), ("9" * 5000, "number"), ("AB", "option"), ("maybe", "word"), ("7", "pair")],
)
def test_a_gold_that_cannot_be_read_is_refused_with_its_kind(value: str, kind: str) -> None:
    with pytest.raises(ValueError, match=f"expected an answer of kind '{kind}'"):
        canonical(value, kind)


@given(number=st.integers(-(10**30), 10**30))
def test_an_integer_is_read_in_every_spelling(number: int) -> None:
    sign, size = "-" * (number < 0), f"{abs(number):,}"
    spellings = [
        str(number),
        sign + size,
        sign + size.replace(",", "{,}"),
        sign + size.replace(",", r"\,"),
        f"{number}.000",
        f"{number} apples",
        f"{sign}\\${size}",
        f"\\text{{{number}}}",
        f"x = {number}",
        " ".join(str(number)),
        f"{3 * number}/3",
        f"\\frac{{{number * 7}}}{{7}}",
        str(number).replace("-", "\u2212"),
    ]
    assert [read_answer(f"\\boxed{{{spelling}}}", "number") for spelling in spellings] == [str(number)] * len(spellings)


@given(number=st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=6))
def test_a_decimal_is_read_exactly(number: Decimal) -> None:
    assert Fraction(canonical(f"{number:f}", "number")) == Fraction(number)


@given(top=st.integers(-(10**9), 10**9), bottom=st.integers(1, 10**9))
def test_a_fraction_is_read_in_lowest_terms(top: int, bottom: int) -> None:
    assert canonical(f"{top}/{bottom}", "number") == str(Fraction(top, bottom))
    assert canonical(rf"\dfrac{{{top}}}{{{bottom}}}", "number") == str(Fraction(top, bottom))


@given(a=st.integers(-99, 99), b=st.integers(-99, 99))
def test_a_pair_has_no_order(a: int, b: int) -> None:
    assert canonical(f"{a} {b}", "pair") == canonical(f"({b}, {a})", "pair") == f"{min(a, b)} {max(a, b)}"


def test_two_numbers_that_a_float_cannot_tell_apart_are_not_the_same() -> None:
    a, b = canonical("0.1", "number"), canonical("0.10000000000000000001", "number")
    assert float(Fraction(a)) == float(Fraction(b))
    assert not same(a, b)
    assert same(canonical("0.1", "number"), canonical("1/10", "number"))


def test_what_could_not_be_read_equals_nothing() -> None:
    assert same("18", "18")
    assert not same("18", "19")
    assert not same(None, "18")
    assert not same("18", None)
    assert not same(None, None)


@pytest.mark.parametrize(
    ("answers", "n", "expected"),
    [
        (["4", "4", "4"], None, "4"),
        (["4", "5", "4"], None, "4"),
        (["5", "4", "4"], None, "4"),
        (["4", "5", "6"], None, None),
        (["4", None, None], None, None),  # one box and two blanks are no majority
        (["4", "4", None], None, "4"),
        ([None, None, None], None, None),
        ([None, None, "4", "4"], None, None),  # half is no majority
        (["4", "4", "5", "5"], None, None),
        (["4", "4", "5", "5", "4"], None, "4"),
        (["4"], None, "4"),
        ([], None, None),
        (["4"], 3, None),
        (["4", "4"], 3, "4"),
        (["4", "4"], 4, None),
        ([], 3, None),
    ],
)
def test_a_majority_is_more_than_half_of_all_voters(
    answers: list[str | None], n: int | None, expected: str | None
) -> None:
    assert majority(answers, n) == expected


def test_fewer_voters_than_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="n=2 for 3 answers"):
        majority(["4", "4", "4"], 2)


HOSTILE = {
    "open boxes": "\\boxed{" * 1_000_000,
    "boxes in boxes": "\\boxed{" * 500_000 + "}" * 500_000,
    "full boxes": "\\boxed{1}" * 500_000,
    "an open box full of braces": "\\boxed{" + "{" * 3_000_000,
    "no box": "a" * 3_000_000,
    "thought after thought": "<think>" * 200_000 + "</think>" * 200_000,
    "an angle and spaces": "<" + " " * 3_000_000,
    "channels": "<|channel|>" * 200_000,
    "box after box, no brace": "box " * 1_000_000,
    "a box and spaces": "box" + " " * 3_000_000,
    "backslashes": "\\boxed{" + "\\" * 3_000_000 + "}",
    "braces in a box": "\\boxed{" + "{" * 499 + "}" * 499 + "}",
    "spaces in a box": "\\boxed{1" + " " * 990 + "x}",
    "thin spaces in a box": "\\boxed{1" + "\u2009" * 990 + "x}",
    "commas in a box": "\\boxed{" + "1,111" * 190 + "}",
    "digits in a box": "\\boxed{" + "1" * 999 + "x}",
    "words in a box": "\\boxed{1" + " a-" * 300 + "1}",
    "ands in a box": "\\boxed{" + ", and " * 160 + "}",
    "fences in a box": "\\boxed{" + "$(" * 490 + "}",
    "fractions in a box": "\\boxed{" + "\\frac{1}{" * 90 + "}" * 90 + "}",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("box", ["first", "last"])
def test_a_hostile_text_is_read_in_less_than_a_second(name: str, box: str) -> None:
    for kind in KINDS:
        start = time.process_time()
        read_answer(HOSTILE[name], kind, box=box)  # type: ignore[arg-type]
        assert time.process_time() - start < 1


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the paper's released records are not beside this checkout")
def test_every_turn_of_the_papers_own_debates_is_read() -> None:
    two_rounds, one_round = read_traces(PUBLISHED / "debates.json")
    answers = [read_answer(turn.text, "number") for turn in two_rounds.turns]
    assert answers == ["-1110", "-1160", "270", "-1110", "-1110", "270"]
    assert majority(answers[3:]) == two_rounds.gold == read_answer(two_rounds.text, "number")
    assert majority(answers[:3]) is None
    assert [read_answer(turn.text, "number") for turn in one_round.turns] == [one_round.gold] * 3


@pytest.mark.parametrize("module", ["training.problems.answers", "training.problems.problem"])
def test_answers_and_problems_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'datasets', 'pandas'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_table_is_large() -> None:
    assert len(TABLE) == len({(text, kind) for text, kind, _ in TABLE})
    assert sum(answer is None for *_, answer in TABLE) > 100 < sum(answer is not None for *_, answer in TABLE)
