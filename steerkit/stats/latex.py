"""Tables as LaTeX, with estimates and their intervals in one cell."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from steerkit.stats.format import interval_text, number_text, p_text

if TYPE_CHECKING:
    import pandas as pd

STRENGTHS = ("coefficient", "dose")
MISSING = ("None", "<NA>", "NaT")
SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$",
}  # fmt: skip


def latex_table(frame: pd.DataFrame, digits: int | Mapping[str, int] = 2) -> str:
    r"""A table as LaTeX for the package booktabs, an estimate with its interval as `0.30 [0.02, 0.60]`.

    Columns `low` and `high` are merged into the column to the left of `low`; `NAME_low` and `NAME_high` into `NAME`.
    p-values have three decimals: `p`, and columns whose names begin with `p_` and that have values from 0 to 1 and no
    interval. The columns coefficient and dose have the decimals that they need, whole numbers none; missing values are
    a dash.

    Args:
        frame: such as `SweepResult.gain`, `.curve`, `.wrong_way` or `ProbeResult.table` return; its index is left out.
        digits: decimals, one number or one per column (for columns that are not named as above, else 2).

    Raises:
        ValueError: a frame without rows; `low` without `high` or without a column to its left.

    Example:
        >>> print(sk.latex_table(result.gain("rouge_l")[["vector", "layer", "gain", "low", "high", "p"]]))
    """
    names = [str(name) for name in frame.columns]
    if not len(frame) or not names:
        raise ValueError(f"expected a table with rows; got {len(frame)} rows and columns {names}. Select others.")
    ends = _ends_of(names)
    hidden = {end for pair in ends.values() for end in pair}
    shown = [name for name in names if name not in hidden]
    cells = {name: frame.iloc[:, names.index(name)].tolist() for name in names}
    formats = {name: _format(name, cells[name], digits) for name in shown}
    lines = []
    for row in range(len(frame)):
        texts = []
        for name in shown:
            low, high = (float(cells[end][row]) for end in ends[name]) if name in ends else (math.nan, math.nan)
            places = digits if isinstance(digits, int) else digits.get(name, 2)
            texts.append(_cell(cells[name][row], low, high, places, formats[name]))
        lines.append(" & ".join(texts) + r" \\")
    numeric = [all(isinstance(value, int | float) for value in cells[name]) for name in shown]
    columns = "".join("r" if is_number else "l" for is_number in numeric)
    head = " & ".join(map(_escaped, shown)) + r" \\"
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *lines, r"\bottomrule"]
    return "\n".join([*body, r"\end{tabular}"]) + "\n"


def _ends_of(names: list[str]) -> dict[str, tuple[str, str]]:
    """Estimate -> the columns of its interval's ends."""
    ends = {name: (f"{name}_low", f"{name}_high") for name in names if {f"{name}_low", f"{name}_high"} <= set(names)}
    if "low" in names or "high" in names:
        if not {"low", "high"} <= set(names) or names.index("low") == 0:
            raise ValueError(
                f"expected low and high to the right of their estimate; got columns {names}. Add or reorder them."
            )
        ends[names[names.index("low") - 1]] = ("low", "high")
    return ends


def _format(name: str, values: Sequence[Any], digits: int | Mapping[str, int]) -> Callable[[float], str]:
    """How the numbers of a column without an interval are written."""
    if not isinstance(digits, int) and name in digits:
        return partial(number_text, digits=digits[name])
    if name in STRENGTHS:
        return "{:g}".format
    numbers = [value for value in values if isinstance(value, int | float) and not math.isnan(value)]
    if (name == "p" or name.startswith("p_")) and all(0 <= value <= 1 for value in numbers):
        return p_text
    return partial(number_text, digits=digits if isinstance(digits, int) else 2)


def _cell(value: Any, low: float, high: float, digits: int, number: Callable[[float], str]) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "--" if str(value) in MISSING else _escaped(str(value))
    if math.isnan(value):
        return "--"
    if not math.isnan(low) and not math.isnan(high):
        text = interval_text(value, low, high, digits)
    else:
        text = str(value) if isinstance(value, int) else number(value)
    return re.sub(r"(?<![e\d])-(?=[\d.i])", "$-$", text).replace("<", "$<$")


def _escaped(text: str) -> str:
    """The text in one line, with the characters that LaTeX reads as commands written out."""
    return "".join(SPECIAL.get(character, character) for character in " ".join(text.split()))
