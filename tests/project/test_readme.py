"""README: its size, and what its table of guarantees links to."""

from __future__ import annotations

import ast
import importlib
import re

import pytest

from tests.documents import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUARANTEE = re.compile(
    r"^\| (.+?) \| \[`(\w+)`\]\((tests/[\w/]+\.py)\) \| \[(\w+)\]\(tests/silent_wrong/(\w+)\.py\): (.+?) \|$",
    re.MULTILINE,
)
MUTANTS_OF = {
    "bit for bit": ("coefficient 0",),
    "added at the place at which it was read": ("acts where it was read",),
    "Positions count from the first token": ("position ids",),
    "bit-identical": ("same bits in any batch",),
    "other weights": ("other weights",),
    "has the rows of an uninterrupted one": ("resumed sweep",),
}
"""Words of a guarantee -> words of the check that its mutant fails."""


def test_readme_has_at_most_200_lines_of_at_most_120_characters() -> None:
    lines = README.splitlines()
    assert len(lines) <= 200
    code = re.findall(r"```.*?```", README, re.DOTALL)
    prose = [line for line in lines if not line.startswith("|") and not any(line in block for block in code)]
    assert max(map(len, prose)) <= 120


def test_the_two_commands_are_in_the_first_screen() -> None:
    assert {"make demo", "make test"} <= {line.partition("  ")[0].strip() for line in README.splitlines()[:12]}


@pytest.mark.parametrize(("words", "of_the_mutant"), MUTANTS_OF.items())
def test_a_guarantee_names_its_test_and_a_mutant_of_the_same_property(words, of_the_mutant) -> None:
    (row,) = [row for row in GUARANTEE.findall(README) if words in row[0]]
    _, test, file, name, module, mutant = row
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert mutant in importlib.import_module(f"tests.silent_wrong.{module}").SILENT and name == module
    assert all(word in mutant for word in of_the_mutant)


def test_every_guarantee_is_checked_here() -> None:
    section = README.partition("## Guarantees")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    assert len(rows) - 1 == len(GUARANTEE.findall(README)) == len(MUTANTS_OF)


def test_the_commands_need_no_environment_at_a_fixed_place() -> None:
    assert ".venv" not in "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))


def test_the_tables_have_no_empty_column() -> None:
    for block in re.findall(r"<!-- generated: [\w-]+ -->\n(.*?)<!-- end -->", README, re.DOTALL):
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
        assert all(any(column[2:]) for column in zip(*rows, strict=True))
