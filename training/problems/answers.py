"""Answers: the content of a text's `\boxed{...}` in one canonical form, and the majority of several answers.

A canonical answer is a string. Two answers are the same if their strings are equal:

- `number`: an exact rational in lowest terms, `18`, `-1110`, `1/2`;
- `option`: one capital letter, `A`;
- `word`: `yes`, `no`, `valid`, `invalid`, `true` or `false`; `true` and `yes` are different answers;
- `pair`: two numbers, the smaller one first, `7 14`.

Content with more than one possible reading gives no answer. Nothing is calculated, rounded or guessed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal

from steerkit.text.thinking import reply_of
from training.problems.units import is_unit_word

LONGEST = 1000  # characters; a longer box is no answer, which bounds the cost of parsing any content

_BOX = r"(?:\\fbox|(?<![A-Za-z])box(?:ed)?)\s*\{"
_BOXES = {"last": re.compile(f"(?s).*{_BOX}"), "first": re.compile(f"(?s).*?{_BOX}")}
_BRACES = re.compile(r"\\.|[{}]", re.S)
_STYLE = r"\\(?:text\w*|math(?!bb)\w+|operatorname|boldsymbol|bm|mbox|fbox|boxed)\s*"
_WRAPPER = re.compile(rf"(?:{_STYLE})?\{{")
_FENCES = (("$", "$"), ("**", "**"), (r"\(", r"\)"), (r"\[", r"\]"))

_THIN = "\u2009"  # replaces `\,` and `{,}`: a thousands separator must not read as the comma of a list
_SPELLINGS = (
    (re.compile("[\u2212\u2012\u2013\ufe63\uff0d]"), "-"),
    (re.compile("\\{,\\}|\\\\,|[\u00a0\u202f]"), _THIN),
    (re.compile(r"\\!|\\displaystyle\b|\\(?:left|right)(?![a-z])"), ""),
    (re.compile(r"\\[;: ]|\\q?quad\b|~"), " "),
)


def read_answer(text: str, kind: str, box: Literal["last", "first"] = "last") -> str | None:
    r"""Return the canonical answer in a text's last box: `\boxed{...}`, `\fbox{...}`, `boxed{...}` or `box{...}`.

    A number may have thousands separators, a currency, a percent sign (dropped: `18%` is 18) or a known unit
    (`training.problems.units`). It may follow `=`. Digits separated by single spaces are one number, because some
    tokenizers write one token per digit. Of a text with a thought (`<think>...</think>`) only the reply after it is
    read; a thought without an end has no reply, hence no answer.

    Args:
        text: e.g. a model's output. The run time is linear in its length.
        kind: kind of answer, one of `KINDS`.
        box: which box counts, in the order in which the text opens them.

    Returns:
        The canonical answer. None without a box, and where the box has no single reading as an answer of this kind.
        An unclosed, empty or unparsable last box gives None; an earlier box does not replace it.

    Raises:
        ValueError: an unknown kind or box. Open questions have no answer to parse, so `open` is not a kind here.

    Source: Yi, Mueller and Lee 2026, arXiv 2604.24881. Its evaluation reads the last box, its released collector the
    first.

    Example:
        >>> read_answer(r"First \boxed{12}. Corrected: \boxed{1,110.0}", "number")
        '1110'
    """
    read = _reader(kind)
    if box not in _BOXES:
        raise ValueError(f"expected the box 'last' or 'first'; got {box!r}. Pass one of these.")
    reply = reply_of(text)
    opened = None if reply is None else _BOXES[box].match(reply)
    if reply is None or opened is None:
        return None
    inside = reply[opened.end() : opened.end() + LONGEST + 1]
    end = _closing(inside, 0)
    return read(inside[:end]) if end >= 0 else None


def canonical(value: str, kind: str) -> str:
    """Return the canonical form of an answer without a box, e.g. a gold answer; a canonical answer is unchanged.

    Raises:
        ValueError: the value has no single reading as an answer of this kind, or the kind is unknown.

    Example:
        >>> canonical("2.50", "number")
        '5/2'
    """
    read = _reader(kind)
    answer = read(value) if len(value) <= LONGEST else None
    if answer is None:
        raise ValueError(
            f"expected an answer of kind {kind!r}; got {value!r:.80}. Correct the answer, or pass another kind."
        )
    return answer


def same(a: str | None, b: str | None) -> bool:
    """Return whether two canonical answers are equal. None, an unparsed answer, equals nothing, not even None."""
    return a is not None and a == b


def majority(answers: Sequence[str | None], n: int | None = None) -> str | None:
    """Return the strict majority: the canonical answer of more than half of all voters, else None.

    An unparsed answer (None) counts as an abstention: its voter is counted, its vote is not.

    Args:
        answers: canonical answers, one per voter.
        n: number of voters, if some are missing from `answers`; default: the number of answers.

    Raises:
        ValueError: fewer voters than answers.

    Example:
        >>> majority(["14", "20", "14"])
        '14'
        >>> majority(["14", None, None]) is None
        True
    """
    voters = len(answers) if n is None else n
    if voters < len(answers):
        raise ValueError(
            f"expected at least as many voters as answers; got n={voters} for {len(answers)} answers. Pass a larger n."
        )
    for answer, votes in Counter(answers).items():
        if answer is not None and 2 * votes > voters:
            return answer
    return None


def _closing(text: str, start: int) -> int:
    r"""Index of the brace that closes the one opened just before `start`, or -1; `\{` and `\}` are not braces."""
    depth = 1
    for brace in _BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if not depth:
            return brace.start()
    return -1


def _bare(text: str) -> str:
    r"""Return a box's content in plain spelling, without an enclosing `{..}`, `\text{..}` or `$..$`."""
    for spelling, plain in _SPELLINGS:
        text = spelling.sub(plain, text)
    while True:
        text = text.strip().rstrip(". ")
        wrapper = _WRAPPER.match(text)
        if wrapper and _closing(text, wrapper.end()) == len(text) - 1:
            text = text[wrapper.end() : -1]
            continue
        for opens, closes in _FENCES:
            inside = text[len(opens) : -len(closes)]
            if inside and text == opens + inside + closes:
                text = inside
                break
        else:
            return text


_WHOLE = rf"(?:[1-9][0-9]{{0,2}}(?:[,{_THIN}][0-9]{{3}})+|[0-9]+)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,2}}(?![0-9]))?"  # 1e999999 has a million digits
_SIGNED = rf"\s*[+-]?{_DECIMAL}\s*"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:\\[dt]?frac\s*\{{(?P<top>{_SIGNED})\}}\s*\{{(?P<bottom>{_SIGNED})\}}"
    rf"|(?P<value>{_DECIMAL})(?:\s*/\s*(?P<divisor>{_DECIMAL})"
    rf"|\s*(?:\\times|\\cdot|[\u00d7*])\s*10\^(?:\{{(?P<power>[+-]?[0-9]{{1,2}})\}}|(?P<digit>[0-9])(?![0-9])))?)"
)
_DIGITS = re.compile(r"[+-]? ?[0-9](?: [0-9])+")
_CURRENCY = re.compile(r"(?P<sign>[+-]?)\s*(?:\\?\$|[€£])\s*")
# Text to the left of `=` whose right side is not the answer: a list of equations, an inequality, or `+=`.
_NO_EQUATION = re.compile(r"[;,](?![0-9]{3})|(?<![A-Za-z])(?:and|or)(?![A-Za-z])|[<>≠≈\n]|[-+*/!]\Z")
_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")
_UNIT = re.compile(
    rf"\s*(?:\\?[%$]|[€£¢°]|\^\\circ|\^\{{\\circ\}}|(?:{_STYLE}\{{(?P<set>[^{{}}]*)\}}"
    rf"|[ {_THIN}/]+(?P<bare>[A-Za-z][A-Za-z ./-]*))(?:\^\{{?[23]\}}?|[²³])?)?"
)


def _value(decimal: str) -> Fraction:
    return Fraction(re.sub(rf"[,{_THIN}\s]", "", decimal))


def _plain_number(text: str) -> Fraction | None:
    """Parse a number, with or without currency and unit, as an exact fraction."""
    if _DIGITS.fullmatch(text):
        return Fraction(text.replace(" ", ""))
    text = _CURRENCY.sub(r"\g<sign>", text, count=1) if _CURRENCY.match(text) else text
    match = _NUMBER.match(text)
    if match is None or not _is_unit(text[match.end() :]):
        return None
    number = _value(match["top"] or match["value"])
    if divisor := match["bottom"] or match["divisor"]:
        if not _value(divisor):
            return None
        number /= _value(divisor)
    number *= Fraction(10) ** int(match["power"] or match["digit"] or 0)
    return -number if match["sign"] == "-" else number


def _is_unit(text: str) -> bool:
    unit = _UNIT.fullmatch(text)
    if unit is None:
        return False
    words = re.findall(r"[^\s./-]+", unit["set"] or unit["bare"] or "")
    shortest = 1 if unit["set"] else 2  # a bare letter may be a variable
    return all(len(word) >= shortest and is_unit_word(word) for word in words)


def _number(text: str) -> str | None:
    *left, right = _bare(text).split("=")
    if any(_NO_EQUATION.search(side) for side in left) or any(_WORDS.search(side) for side in left[1:]):
        return None
    number = _plain_number(_bare(right))
    return None if number is None else str(number)


_BETWEEN = re.compile(rf"(?:[,;&]\s*)?(?:{_STYLE}\{{\s*and\s*\}}|(?<![A-Za-z])and(?![A-Za-z]))|[,;&]")
_SPACE = re.compile(r"\s*[ \n]\s*")
_BRACKETS = re.compile(r"\\\{(.*)\\\}|\((.*)\)|\[(.*)\]", re.S)


def _pair(text: str) -> str | None:
    text = _bare(text)
    if brackets := _BRACKETS.fullmatch(text):
        text = _bare(next(group for group in brackets.groups() if group is not None))
    parts = (_BETWEEN if _BETWEEN.search(text) else _SPACE).split(text)
    numbers = [_plain_number(_bare(part)) for part in parts]
    known = [number for number in numbers if number is not None]
    return " ".join(str(number) for number in sorted(known)) if len(numbers) == len(known) == 2 else None


_MARKUP = re.compile(rf"{_STYLE}(?=\{{)|[{{}}$*\"“”]")
_OPTION = re.compile(
    r"(?:(?i:option|answer|choice)\s*:?\s*)?"
    r"(?:\(\s*([A-Za-z])\s*\)(?=[\s.:]|\Z)|([A-Za-z])(?=[.):](?:\s|\Z)|\Z))(.*)",
    re.S,
)
_LISTED = re.compile(r"[\s.):]*(?:[,/&]|(?:and|or)\b)", re.I)
_NEXT = re.compile(r"(?:[,;/&]|(?<![A-Za-z])(?:and|or)(?![A-Za-z]))\s*\(?\s*([A-Za-z])\s*[.):](?=\s|\Z)", re.I)
_BRACKETED = re.compile(r"(?<!\w)\(\s*([A-Za-z])\s*\)(?=[\s,.;:]|\Z)")
_WORD = re.compile(
    r"(?:(?:the )?(?:answer|argument) is )?(?:deductively )?(yes|no|valid|invalid|true|false)(?:[,.;:]\s.*)?", re.S
)
_VOCABULARY = re.compile(r"\b(?:yes|no|valid|invalid|true|false)\b")


def _option(text: str) -> str | None:
    match = _OPTION.fullmatch(_bare(_MARKUP.sub("", _bare(text))))
    if match is None:
        return None
    letter: str = match[1] or match[2]
    named = [*_BRACKETED.findall(match[3]), *_NEXT.findall(match[3])]
    others = [other for other in named if other.isupper() == letter.isupper()]
    return None if others or _LISTED.match(match[3]) else letter.upper()


def _word(text: str) -> str | None:
    text = _bare(_MARKUP.sub("", _bare(text))).lower()
    match = _WORD.fullmatch(text)
    return match[1] if match and set(_VOCABULARY.findall(text)) == {match[1]} else None


_READERS = {"number": _number, "option": _option, "word": _word, "pair": _pair}
KINDS = tuple(_READERS)


def _reader(kind: str) -> Callable[[str], str | None]:
    if kind not in _READERS:
        raise ValueError(f"expected a kind of answer that can be parsed, one of {KINDS}; got {kind!r}. Pass one.")
    return _READERS[kind]
