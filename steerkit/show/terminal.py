"""What a terminal is told and shows: lists of numbers; facts, tables and texts side by side, or JSON for scripts."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Any

READING = "What such numbers say, and what not: docs/reading-the-numbers.md."
DOSE = (
    "The dose is the push over the stream's own length. SmolLM2-135M showed effects from 0.4 to 0.8; less shows "
    "little, more breaks the text: docs/reading-the-numbers.md."
)


def plain(text: object, instead: str = "\ufffd") -> str:
    """Text for a terminal: a control character in it, from a model or a file, must not act there."""
    return "".join(c if c in "\n\t" or c.isprintable() or ord(c) > 159 else instead for c in str(text))


def facts(found: Mapping[str, Any], as_json: bool) -> None:
    """A line per fact."""
    if as_json:
        print(json.dumps(found, indent=1, default=str))
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {f'{value:.4g}' if isinstance(value, float) else plain(value)}")


def table(title: str, rows: Any, as_json: bool) -> None:
    """A data frame."""
    if as_json:
        print(rows.to_json(orient="records", indent=1))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown, same = _compact(rows)
    said = f"{title}\n{', '.join(f'{name} {value}' for name, value in same.items())}" if same else title
    drawn = Table(title=Text(plain(said)), title_justify="left")
    for column in shown:
        drawn.add_column(Text(plain(column)), justify="right")
    for row in zip(*shown.values(), strict=True):
        drawn.add_row(*(Text(plain(value)) for value in row))
    Console().print(drawn)


def _compact(rows: Any) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Columns as a terminal has room for them, and what is the same in every row.

    A value and its interval are one column: `mean, low, high`, or `x, x_low, x_high`.
    """
    shown: dict[str, list[str]] = {}
    for name in rows.columns:
        if re.fullmatch("low|high|.+_(low|high)", str(name)):
            ends = [column for column in shown if name in (f"{column}_low", f"{column}_high")] or list(shown)[-1:]
            if ends:
                opening = " [" if str(name).endswith("low") else ", "
                closing = "" if str(name).endswith("low") else "]"
                old = shown[ends[0]]
                shown[ends[0]] = [f"{a}{opening}{_short(b)}{closing}" for a, b in zip(old, rows[name], strict=True)]
                continue
        shown[str(name)] = [_short(value) for value in rows[name]]
    same = {name: values[0] for name, values in shown.items() if len(values) > 2 and len(set(values)) == 1}
    return {name: values for name, values in shown.items() if name not in same}, same


def _short(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def tables(titled: Mapping[str, Any], as_json: bool) -> None:
    """Several data frames; as JSON, one object of them by title."""
    if as_json:
        print(
            json.dumps({title: json.loads(rows.to_json(orient="records")) for title, rows in titled.items()}, indent=1)
        )
        return
    for title, rows in titled.items():
        table(title, rows, as_json)


def hint(text: str, as_json: bool) -> None:
    """A line on stderr for whoever reads along; nothing for scripts."""
    if not as_json:
        print(text, file=sys.stderr)


def side_by_side(texts: Mapping[str, str], as_json: bool) -> None:
    """Texts in boxes beside each other, each under its title."""
    if as_json:
        print(json.dumps(texts, indent=1, ensure_ascii=False))
        return
    from rich.columns import Columns
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console()
    width = console.width // 2 - 2
    panels = [Panel(Text(plain(text)), title=title, width=width) for title, text in texts.items()]
    console.print(Columns(panels))


def numbers(text: str, kind: type[Any]) -> list[Any]:
    """What a command is told as `1,2,3`; `ValueError` for anything else."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"expected {kind.__name__}s with commas between; got {text!r}. Write 1,2,3.") from None


def places(text: str) -> list[int | tuple[int, ...]]:
    """Layers as a sweep has them: `8,12+14` is layer 8, and 12 and 14 at once; `ValueError` for anything else."""
    try:
        found = [[int(layer) for layer in part.split("+")] for part in text.split(",")]
    except ValueError:
        raise ValueError(f"expected ints with commas between; got {text!r}. Write 1,2,3, or 1,2+3.") from None
    return [several[0] if len(several) == 1 else tuple(several) for several in found]
