"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(columns: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return rows under a header as a Markdown table.

    Args:
        columns: the header.
        rows: cells of each row, as many as columns; `str` is applied to each.

    Example:
        >>> print(markdown_table(["layer", "gain"], [[3, "0.42"]]))
        | layer | gain |
        | --- | --- |
        | 3 | 0.42 |
    """
    lines: list[Sequence[object]] = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
