"""Terminal output: facts, tables and texts side by side, or JSON for scripts."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from steerkit.io.json import jsonable
from steerkit.stats.format import interval_text, number_text

READING = "How to read these numbers: docs/reading-the-numbers.md."
NUMBER = re.compile(r"[-+]?\d|nan|inf")
GAP = 2  # spaces between two columns of a table
DOSE = (
    "The relative dose is the norm of the added vector over the norm of the stream. SmolLM2-135M showed effects "
    "from 0.4 to 0.8; smaller doses show little, larger ones break the text: docs/reading-the-numbers.md."
)


BIDI = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
"""Characters that change the order of others."""


def plain(text: object, replacement: str = "\ufffd") -> str:
    """Text with its control characters replaced, so that a model's or a file's text cannot act on the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() or _is_harmless(c) else replacement for c in str(text))


def _is_harmless(character: str) -> bool:
    """Whether a character that is not printable changes its own place alone: no control, new line or other order."""
    acts = unicodedata.bidirectional(character) in BIDI or unicodedata.category(character) in ("Zl", "Zp")
    return ord(character) > 159 and not acts


def print_json(value: Any) -> None:
    """Print a value as JSON; NaN and infinities become null."""
    print(json.dumps(jsonable(value), indent=1, ensure_ascii=False, allow_nan=False))


def facts(values: Mapping[str, Any], as_json: bool, shown: Mapping[str, Any] | None = None) -> None:
    """Print one line per fact, or the facts as a JSON object.

    Args:
        values: snake_case key -> value; printed as JSON.
        shown: name -> value, printed as lines; default `values` with spaces for underscores.
    """
    if as_json:
        print_json(values)
        return
    lines = {key.replace("_", " "): value for key, value in values.items()} if shown is None else shown
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{plain(name):<{width}}  {f'{value:.4g}' if isinstance(value, float) else plain(value)}")


def table(title: str, rows: Any, as_json: bool) -> None:
    """Print a data frame as a table, or as a JSON list of rows.

    A value and its interval (`mean, low, high`, or `x, x_low, x_high`) become one column. Columns that have the same
    value in every row are named once, above the table.
    """
    if as_json:
        print_json(rows.astype(object).where(rows.notna(), None).to_dict("records"))
        return
    columns, same = _compact(rows)
    constants = ", ".join(f"{name} {value}" for name, value in same.items())
    draw(f"{title}\n{constants}" if same else title, columns)


def draw(title: str, columns: Mapping[str, Sequence[str]], keys: int = 1) -> None:
    """Print columns of text as a table as wide as the terminal, wrapped at words.

    Where even one word per line does not fit, the table is printed in several parts, each with the first `keys`
    columns.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    columns = {plain(name): [plain(value) for value in values] for name, values in columns.items()}
    for number, part in enumerate(_parts(columns, console.width, keys)):
        drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        console.print(Text(plain(title if number == 0 else f"{title} (continued)"), style="bold"))
        widths = _widths([[name, *columns[name]] for name in part], console.width)
        for name, width in zip(part, widths, strict=True):
            justify: Any = "right" if all(map(NUMBER.match, columns[name])) else "left"
            drawn.add_column(Text(name), justify=justify, overflow="fold", width=width)
        for row in zip(*(columns[name] for name in part), strict=True):
            drawn.add_row(*map(Text, row))
        console.print(drawn)
        console.print()


def _parts(columns: Mapping[str, Sequence[str]], width: int, keys: int) -> list[list[str]]:
    """The names of the columns in parts, each narrow enough at one word per line and led by the first `keys`."""
    names = list(columns)
    need = {name: min(_longest_word([name, *columns[name]]), width // 2) + GAP for name in names}
    shared = names[:keys]
    parts = [list(shared)]
    for name in names[keys:]:
        if len(parts[-1]) > len(shared) and sum(need[one] for one in (*parts[-1], name)) > width + GAP:
            parts.append(list(shared))
        parts[-1].append(name)
    return parts


def _widths(columns: Sequence[Sequence[str]], width: int) -> list[int]:
    """Widths of columns of cells: the longest word each, then the rest of `width` where cells are longer."""
    chosen = [_longest_word(cells) for cells in columns]
    longest = [max(len(line) for cell in cells for line in (cell.splitlines() or [""])) for cells in columns]
    free = width - sum(chosen) - GAP * (len(columns) - 1)
    while free > 0 and chosen != longest:
        for number, wanted in enumerate(longest):
            if chosen[number] < wanted and free > 0:
                chosen[number] += 1
                free -= 1
    while free < 0 and max(chosen) > 8:  # a word longer than the terminal is wide is folded
        chosen[chosen.index(max(chosen))] -= 1
        free += 1
    return chosen


def _longest_word(cells: Sequence[str]) -> int:
    return max((len(word) for cell in cells for word in cell.split()), default=1)


def _compact(rows: Any) -> tuple[dict[str, list[str]], dict[str, str]]:
    """A data frame's columns as text with intervals joined to their values, and the columns that are constant."""
    names = list(map(str, rows.columns))
    ends = _interval_columns(names)
    joined: dict[str, list[str]] = {}
    for name in names:
        if name in ends:
            low, high = ends[name]
            triples = zip(rows[name], rows[low], rows[high], strict=True)
            joined[name] = [interval_text(*triple, digits=3) for triple in triples]
        elif name not in {end for pair in ends.values() for end in pair}:
            joined[name] = [_cell(value) for value in rows[name]]
    same = {name: values[0] for name, values in joined.items() if len(values) > 2 and len(set(values)) == 1}
    return {name: values for name, values in joined.items() if name not in same}, same


def _interval_columns(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The columns that have an interval -> the columns of its ends: `x_low, x_high`, or `low, high` after the value."""
    ends = {name: (f"{name}_low", f"{name}_high") for name in names if {f"{name}_low", f"{name}_high"} <= set(names)}
    if {"low", "high"} <= set(names) and names.index("low") > 0:
        ends[names[names.index("low") - 1]] = ("low", "high")
    return ends


def _cell(value: object) -> str:
    return number_text(value, 3) if isinstance(value, float) else str(value)


def hint(text: str, as_json: bool) -> None:
    """Print one line of advice on stderr; nothing with `--json`."""
    if not as_json:
        print(text, file=sys.stderr)


def side_by_side(texts: Mapping[str, str]) -> None:
    """Print texts in boxes of equal width next to each other, each under its title."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    drawn = Table(width=console.width)
    for title in texts:
        drawn.add_column(Text(plain(title)), overflow="fold", ratio=1)
    drawn.add_row(*(Text(plain(text)) for text in texts.values()))
    console.print(drawn)
