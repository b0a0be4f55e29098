"""Answers: the content of a text's `\boxed{...}` in one canonical form, and the majority of several answers.

A canonical answer is a string. Two answers are the same if their strings are equal:

- `number`: an exact rational in lowest terms, `18`, `-1110`, `1/2`;
- `option`: one capital letter, `A`;
- `word`: `yes`, `no`, `valid`, `invalid`, `true` or `false`; `true` and `yes` are different answers;
- `pair`: two numbers, the smaller one first, `7 14`.

Content with more than one possible reading gives no answer. Nothing is calculated, rounded or guessed.

A unit is dropped only if all its words are in `UNITS`: the benchmarks' gold answers have no unit, and their questions
name it. Any other text after a number may change it (`2 million`, `3 gross`, `5 lakh`), so it gives no answer. A
percent sign is dropped too: gold answers of GSM8K are `25`, not `1/4`.

A box in the thought of a reasoning model is no answer (`steerkit.text.thinking`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal

from steerkit.text.thinking import reply_of

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


def read_answer(
    text: str, kind: str, box: Literal["last", "first", "readable"] = "last", opened: bool = False
) -> str | None:
    r"""Return the canonical answer in a reply's last box: `\boxed{...}`, `\fbox{...}`, `boxed{...}` or `box{...}`.

    A number may have thousands separators, a currency, a percent sign (dropped: `18%` is 18) or a unit of `UNITS`. It
    may follow `=`. Digits separated by single spaces are one number, because some tokenizers write one token per digit.

    Args:
        text: e.g. a model's output. The run time is linear in its length.
        kind: kind of answer, one of `KINDS`.
        box: which box counts, in the order in which the reply opens them; `readable` is the last one that has an answer
            of this kind.
        opened: whether the prompt opened a thought, see `steerkit.text.thinking.reply_of`.

    Returns:
        The canonical answer. None without a box, and where the box has no single reading as an answer of this kind.
        An unclosed, empty or unparsable last box gives None; an earlier box replaces it only with `box="readable"`.
        None too if the text ends within a thought: boxes in a thought do not count.

    Raises:
        ValueError: an unknown kind or box. Open questions have no answer to parse, so `open` is not a kind here.

    Source: Yi, Mueller and Lee 2026, arXiv 2604.24881. Its evaluation reads the last box, its released collector the
    first.

    Example:
        >>> read_answer(r"First \boxed{12}. Corrected: \boxed{1,110.0}", "number")
        '1110'
    """
    read = _reader(kind)
    if box not in (*_BOXES, "readable"):
        raise ValueError(f"expected the box 'last', 'first' or 'readable'; got {box!r}. Pass one of these.")
    reply = reply_of(text, opened)
    if reply is None:
        return None
    if box == "readable":
        starts = [start.end() for start in re.finditer(_BOX, reply)][::-1]
        return next((answer for start in starts if (answer := _boxed(reply, start, read)) is not None), None)
    first = _BOXES[box].match(reply)
    return None if first is None else _boxed(reply, first.end(), read)


def _boxed(reply: str, start: int, read: Callable[[str], str | None]) -> str | None:
    """The answer in the box whose content begins at `start`; None where it is unclosed or cannot be read."""
    inside = reply[start : start + LONGEST + 1]
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
    rf"|\s*(?:\\times|\\cdot|[\u00d7*]|(?<=\s)x(?=\s))\s*10\^(?:\{{(?P<power>[+-]?[0-9]{{1,2}})\}}|(?P<digit>[0-9])(?![0-9])))?)"
)
_DIGITS = re.compile(r"[+-]? ?[0-9](?: [0-9])+")
_CURRENCY = re.compile(r"(?P<sign>[+-]?)\s*(?:\\?\$|[€£])\s*")
# Text to the left of `=` whose right side is not the answer: a list of equations, an inequality, or `+=`.
_NO_EQUATION = re.compile(r"[;,](?![0-9]{3})|(?<![A-Za-z])(?:and|or)(?![A-Za-z])|[<>≠≈\n]|[-+*/!]\Z")
_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")
_POWER = r"(?:\^\{?[23]\}?|[²³])?"
_UNIT = re.compile(
    rf"\s*(?:\\?[%$]|[€£¢]|(?:°|\^\{{?\\circ\}}?)\s*(?:[CF]|{_STYLE}\{{[CF]\}})?"
    rf"|(?:{_STYLE}\{{(?P<set>[^{{}}]*)\}}|(?P<bare>[ {_THIN}/]+[A-Za-z][A-Za-z ./-]*)){_POWER})?"
)
_UNIT_WORD = re.compile(r"(?P<per>/\s*)?(?P<word>[^\s./-]+)(?:[\s.]+|(?<=\w)-(?=\w)|(?=/)|\Z)")

# Words that name what a number counts or measures, and never change its value. A regular plural is not listed.
_UNIT_WORDS = """
km cm mm dm ft yd mi kg mg lb oz ml mL cl dl hr min sec ms mph kph kmh kW kWh MW Hz kHz MHz Pa kPa MB GB TB kB USD EUR
GBP in m g s h L l V W A N J dollar cent euro pound peso yen buck coin penny pennies percent percentage point degree
Celsius Fahrenheit radian millimeter millimetre centimeter centimetre meter metre kilometer kilometre inch inches foot
feet yard mile milligram gram kilogram ounce ton tonne liter litre milliliter millilitre gallon quart pint cup
teaspoon tablespoon hectare acre square cubic unit second minute hour day night week month year calorie watt kilowatt
newton joule volt byte time step lap trip turn round way old long tall high wide deep total altogether left remaining
each per a an of people person man men woman women child children boy girl kid baby babies student pupil teacher
friend guest family families employee worker customer member player passenger patient adult team class classes group
animal dog cat bird fish cow horse sheep chicken hen egg bee ant pig duck rabbit apple orange banana lemon peach
peaches pear berry berries cherry cherries strawberry strawberries grape fruit potato potatoes tomato tomatoes carrot
vegetable cookie cupcake cake pie pizza sandwich sandwiches bagel candy candies slice piece serving meal snack loaf
loaves bread book page letter word sentence question problem card photo picture story stories message email test game
match matches goal movie song episode ticket lesson flower tree plant leaf leaves rose petal seed bag box boxes bottle
glass glasses jar can crate basket container pack packet package plate row column seat chair table room house home
floor building shelf shelves shirt shoe sock hat dress dresses toy ball balloon marble sticker pencil pen crayon
eraser notebook car bus buses truck bike train wheel tire item object thing block brick stone star shell bead leg bar
pet insect puppy puppies kitten goat hole spoon lollipop seashell meatball button stamp gift present vote order sale
stick tile window door
"""
UNITS = frozenset(_UNIT_WORDS.split())
_MODIFIERS = frozenset(["square", "cubic", "of", "per", "an"])  # no unit without a word after them


def _value(decimal: str) -> Fraction:
    return Fraction(re.sub(rf"[,{_THIN}\s]", "", decimal))


def _plain_number(text: str) -> Fraction | None:
    """Parse a number, with or without currency and unit, as an exact fraction."""
    if _DIGITS.fullmatch(text):
        return Fraction(text.replace(" ", ""))
    currency = _CURRENCY.match(text)
    text = currency["sign"] + text[currency.end() :] if currency else text
    match = _NUMBER.match(text)
    if match is None or not _is_unit(text[match.end() :], currency is not None):
        return None
    number = _value(match["top"] or match["value"])
    if divisor := match["bottom"] or match["divisor"]:
        if not _value(divisor):
            return None
        number /= _value(divisor)
    number *= Fraction(10) ** int(match["power"] or match["digit"] or 0)
    return -number if match["sign"] == "-" else number


def _is_unit(text: str, currency: bool) -> bool:
    """Whether the text after a number is empty or a unit of known words; after a currency, `m` may mean million."""
    unit = _UNIT.fullmatch(text)
    if unit is None:
        return False
    phrase = (unit["set"] or unit["bare"] or "").strip(f" {_THIN}")
    words = list(_UNIT_WORD.finditer(phrase))
    if "".join(word.group() for word in words) != phrase or (words and words[-1]["word"] in _MODIFIERS):
        return False
    shortest = 3 if currency else 1 if unit["set"] else 2  # a bare letter may be a variable
    return all(_is_known(word["word"]) and (word["per"] or len(word["word"]) >= shortest) for word in words)


def _is_known(word: str) -> bool:
    """Whether a word or its plural is one of `UNITS`; abbreviations keep their case, as `mm` is not `MM`."""
    forms = (word, word.removesuffix("s") if len(word) > 2 else word)
    return any(form in UNITS or (len(word) > 3 and form.lower() in UNITS) for form in forms)


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


_MARKUP = re.compile(rf"{_STYLE}(?=\{{)|\\?[{{}}]|[$*\"“”'\u2018\u2019]")
_OPTION = re.compile(
    r"(?:(?i:(?:the )?(?:correct |right |final )?(?:option|answer|choice)(?: is)?)\s*:?\s*)?"
    r"(?:\(\s*([A-Za-z])\s*\)(?=[\s.:]|\Z)|([A-Za-z])(?=[.):](?:\s|\Z)|\s+(?:-\s+|\()[A-Za-z]{3}|\Z))(.*)",
    re.S,
)
# After a letter: a list of letters, or a statement about the option in place of its text.
_NO_TEXT = re.compile(r"[\s.):]*(?:[,/&]|(?:and|or)\b)|\s+(?:is|are|isn't|aren't)\b", re.I)
_ANOTHER = re.compile(r"(?<!\w)\(\s*([A-Za-z])\s*\)(?=[\s,.;:]|\Z)|(?<![^\s,;])([A-Za-z])[.)](?=\s|\Z)")
_WORD = re.compile(
    r"(?:(?:the )?(?:answer|argument) is )?(?:deductively )?(yes|no|valid|invalid|true|false)(?:[,.;:]\s.*)?", re.S
)
_VOCABULARY = re.compile(r"\b(?:yes|no|valid|invalid|true|false)\b")


def _option(text: str) -> str | None:
    match = _OPTION.fullmatch(_bare(_MARKUP.sub("", _bare(text))))
    if match is None:
        return None
    letter: str = match[1] or match[2]
    others = [other[1] or other[2] for other in _ANOTHER.finditer(match[3])]
    if _NO_TEXT.match(match[3]) or any(other.isupper() == letter.isupper() for other in others):
        return None
    return letter.upper()


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
