"""Numbers of the documents: each decimal is a value of a table, and what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from figures.numbers import differs, entry_of, faults, regenerate
from steerkit.io.tables import write_table

PAGE = """# Page 1.5.2

The gain is 0.72 [0.57, 0.85], of 71.9 % at a dose of 0.5; `0.33` and
[arXiv](x.md#0.3) 2604.24881 and Python 3.11 and $0.1$.
<!-- 0.72, 0.57, 0.85 = demo/gains.csv mean, low, high vector=numbered_steps
     71.9 = demo/gains.csv mean vector=numbered_steps *100
     0.5 = setting -->

```
0.25
```

<!-- generated: table -->
| 0.99 |
<!-- end -->
"""


@pytest.fixture
def results(tmp_path) -> Path:
    table = pd.DataFrame(
        {"vector": ["numbered steps", "other"], "mean": [0.7188, -0.2], "low": [0.5712, 0.1], "high": [0.85, 0.2]}
    )
    (tmp_path / "demo").mkdir()
    write_table(tmp_path / "demo" / "gains.csv", table, {})
    return tmp_path


def test_a_page_whose_decimals_are_those_of_the_tables_has_no_fault(results) -> None:
    assert faults(PAGE, results) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("is 0.72", "is 0.73", "0.73 has no source"),
        ("dose of 0.5", "dose of 0.6", "0.6 has no source"),
        ("0.72, 0.57, 0.85 = demo/gains.csv", "0.72, 0.57, 0.85 = demo/gain.csv", "expected a table"),
        ("low, high vector=numbered_steps", "low, low vector=numbered_steps", "0.85 is 0.5712"),
        ("low, high vector=numbered_steps", "low, wide vector=numbered_steps", "expected columns"),
        ("vector=numbered_steps *100", "vector=nothing *100", "expected one row"),
        ("vector=numbered_steps *100", "vector=numbered_steps", "71.9 is 0.7188"),
        ("     0.5 = setting", "     0.5, 0.9 = setting", "0.9 is named and not printed"),
        ("mean, low, high", "mean, low", "expected a column for each"),
    ],
)  # fmt: skip
def test_each_kind_of_fault_is_found(results, old, new, fault) -> None:
    found = faults(PAGE.replace(old, new), results)
    assert any(fault in one for one in found)


def test_a_changed_cell_is_a_fault(results) -> None:
    path = results / "demo" / "gains.csv"
    path.with_suffix(".meta.json").unlink()
    path.write_text(path.read_text().replace("0.7188", "0.7255"))
    import figures.numbers as numbers

    numbers._table.cache_clear()
    assert {one.split()[0] for one in faults(PAGE, results)} == {"0.72", "71.9"}


@pytest.mark.parametrize(
    ("text", "value", "size", "wrong"),
    [
        ("0.72", 0.7249, False, False), ("0.72", 0.7251, False, True), ("-0.03", -0.03, False, False),
        ("0.03", -0.03, False, True), ("0.03", -0.03, True, False), ("+1.5", 1.5, False, False),
        ("1 723.4", 1723.41, False, False),
    ],
)  # fmt: skip
def test_a_number_is_its_value_rounded_to_the_printed_digits(text, value, size, wrong) -> None:
    assert differs(text, value, size) == wrong


def test_an_entry_without_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="TEXTS = FILE"):
        entry_of("0.5")


def test_generated_tables_are_written_between_their_marks() -> None:
    page = regenerate(PAGE, {"table": "| 1 |"})
    assert "| 1 |\n<!-- end -->" in page and "0.99" not in page and regenerate(page, {"table": "| 1 |"}) == page
    assert regenerate(PAGE, {}) == PAGE
