"""Numbers in the documents: each decimal of a page is one of a table in `results/`, or is named as a setting.

A comment after a paragraph, which no reader of the rendered page sees, says where its decimals come from:

    The gain is 0.72 [0.57, 0.85] at a dose of 0.5.
    <!-- 0.72, 0.57, 0.85 = demo/gains.csv mean, low, high vector=steps over=zero
         0.5 = setting -->

`TEXTS = FILE COLUMNS WHERE...` names a table of `results/`, one column per text, and the row by the values of other
columns. `*100` at the end is for percentages, `abs` for a printed size of a negative value. `TEXTS = setting` is a
number that was chosen, `TEXTS = source` one that was published elsewhere. Code, formulas, links, version numbers and
the contents of generated tables are not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from steerkit.io.tables import read_table

NUMBER = re.compile(r"(?<![\w.])[+\-\u2212]?\d[\d ]*\.\d+(?![\w.]*\.\d|\w)")
ENTRY = re.compile(r"^\s*(?P<texts>[^=]+?) = (?P<source>\S+)(?P<rest>.*)$")
GENERATED = re.compile(r"<!-- generated: (?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)
IGNORED = (
    re.compile(r"```.*?```", re.DOTALL),
    re.compile(r"\$\$.*?\$\$", re.DOTALL),
    re.compile(r"`[^`\n]*`"),
    re.compile(r"\$[^$\n]+\$"),
    re.compile(r"(?<=\])\([^)\s]*\)"),
    re.compile(r"https?://\S+"),
    re.compile(r"\b\d{4}\.\d{5}\b"),
    re.compile(r"\b(?:Python|torch|transformers|version|[a-z]+(?:-[a-z]+)*) v?\d+(?:\.\d+){2,}\b"),
    re.compile(r"\bPython \d\.\d+\b"),
)
FREE = ("setting", "source")


@dataclass(frozen=True)
class Entry:
    """Where some numbers of a paragraph come from.

    Args:
        texts: as printed, without a sign.
        file: a table below `results/`, or one of `FREE`.
        columns: one per text.
        where: column -> value of the row.
        scale: the value is multiplied by it before it is compared.
        size: compare without the sign.
    """

    texts: tuple[str, ...]
    file: str
    columns: tuple[str, ...] = ()
    where: tuple[tuple[str, str], ...] = ()
    scale: float = 1.0
    size: bool = False


def entry_of(line: str) -> Entry:
    """Parse one line of a comment.

    Raises:
        ValueError: not of the form that the module describes.

    Example:
        >>> entry_of("0.72, 0.57 = demo/gains.csv mean, low vector=steps").columns
        ('mean', 'low')
    """
    found = ENTRY.match(line)
    if found is None:
        raise ValueError(f"expected TEXTS = FILE COLUMNS WHERE...; got {line.strip()!r}. Write it so.")
    texts = tuple(text.strip() for text in found["texts"].split(","))
    if found["source"] in FREE:
        return Entry(texts, found["source"])
    words = found["rest"].replace(", ", ",").split()
    scale, size = 1.0, False
    where: list[tuple[str, str]] = []
    columns: list[str] = []
    for word in words:
        if word.startswith("*"):
            scale = float(word[1:])
        elif word == "abs":
            size = True
        elif "=" in word:
            name, _, value = word.partition("=")
            where.append((name, value.replace("_", " ")))
        else:
            columns += word.split(",")
    if len(columns) != len(texts):
        raise ValueError(f"expected a column for each of {texts}; got {columns}. Name one per number.")
    return Entry(texts, found["source"], tuple(columns), tuple(where), scale, size)


@lru_cache(maxsize=64)
def _table(path: Path) -> Any:
    return read_table(path)[0]


def values_of(entry: Entry, results: Path) -> list[float]:
    """The values of an entry's columns in its row.

    Raises:
        ValueError: no such file or column, or not exactly one row.
    """
    path = results / entry.file
    if not path.is_file():
        raise ValueError(f"expected a table {entry.file} in {results}; got none. Write it, or name another.")
    table = _table(path)
    names = [*entry.columns, *(name for name, _ in entry.where)]
    if unknown := [name for name in names if name not in table]:
        raise ValueError(f"expected columns among {list(table)} of {entry.file}; got {unknown}. Name one of these.")
    for name, value in entry.where:
        table = table[table[name].map(_text) == value]
    if len(table) != 1:
        raise ValueError(f"expected one row of {entry.file} with {dict(entry.where)}; got {len(table)}. Name it.")
    return [float(table.iloc[0][name]) * entry.scale for name in entry.columns]


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).replace("_", " ")


def differs(text: str, value: float, size: bool = False) -> bool:
    """Whether a printed number is not the value, rounded to as many digits as are printed.

    Example:
        >>> differs("0.72", 0.7188), differs("0.72", 0.73)
        (False, True)
    """
    plain = text.replace("\u2212", "-").replace(" ", "").lstrip("+")
    digits = len(plain.partition(".")[2])
    printed = abs(float(plain)) if size else float(plain)
    return not abs(printed - (abs(value) if size else value)) <= 0.5000001 * 10**-digits  # NaN differs


def paragraphs(text: str) -> Iterator[tuple[str, str]]:
    """The blocks of a page and the comments that belong to them; generated tables and code are taken out."""
    text = GENERATED.sub("", text)
    for pattern in IGNORED[:2]:
        text = pattern.sub("", text)
    for block in re.split(r"\n\s*\n", text):
        comments = "\n".join(re.findall(r"<!--(.*?)-->", block, re.DOTALL))
        yield re.sub(r"<!--.*?-->", "", block, flags=re.DOTALL), comments


def faults(text: str, results: Path) -> list[str]:
    """What is wrong with the numbers of a page: decimals without a source, and numbers that are not their value.

    Args:
        text: of the page, Markdown.
        results: folder of the tables.

    Returns:
        One sentence per fault; empty if all is well.
    """
    found = []
    for block, comments in paragraphs(text):
        try:
            entries = [entry_of(line) for line in comments.splitlines() if " = " in line]
        except ValueError as error:
            found.append(str(error))
            continue
        named = {text.lstrip("+-\u2212") for entry in entries for text in entry.texts}
        plain = block
        for pattern in IGNORED[2:]:
            plain = pattern.sub(" ", plain)
        for number in NUMBER.findall(plain):
            if number.lstrip("+-\u2212") not in named:
                found.append(f"{number} has no source: {' '.join(block.split())[:70]}")
        for entry in entries:
            found += [f"{text} is named and not printed" for text in entry.texts if text not in block]
            if entry.file in FREE:
                continue
            try:
                values = values_of(entry, results)
            except ValueError as error:
                found.append(str(error))
                continue
            pairs = zip(entry.texts, values, strict=True)
            found += [
                f"{text} is {value:.6g} in {entry.file}" for text, value in pairs if differs(text, value, entry.size)
            ]
    return found


def regenerate(text: str, tables: Mapping[str, str]) -> str:
    """The page with its generated tables written again.

    Args:
        text: of the page; a table stands between `<!-- generated: NAME -->` and `<!-- end -->`.
        tables: name -> Markdown; other tables stay as they are.
    """

    def written(one: re.Match[str]) -> str:
        name = one["name"]
        return f"<!-- generated: {name} -->\n{tables[name]}\n<!-- end -->" if name in tables else one[0]

    return GENERATED.sub(written, text)
