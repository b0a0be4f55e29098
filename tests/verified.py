"""Which test verifies which operation at which site: marked on the tests, collected into a table of the docs.

`python -m tests.verified` writes the table of docs/concepts/steering.md. A test is marked by `verifies`. For an
operation or a site that a new test covers, mark that test and add its module to `MODULES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TypeVar

from steerkit.io.files import write_text
from steerkit.models.site_names import SITES
from steerkit.steering.operations import OPERATIONS

PAGE = Path(__file__).parents[1] / "docs" / "concepts" / "steering.md"
BLOCK = re.compile(r"(<!-- verified by tests -->\n).*?(<!-- end -->)", re.DOTALL)
MODULES = (
    "tests.steering.test_operations",
    "tests.steering.test_conditions",
    "tests.steering.test_sites",
    "tests.test_silent_wrong",
    "tests.doctor.test_doctor",
)
CLAIMS = {
    "formula": "the result of the operation equals its formula at each position, in float64",
    "batch": "text in a padded, cached batch equals the text alone without a cache",
    "mixed": "each row of a mixed batch is steered as if it were alone",
    "zero": "coefficient 0 changes no bit",
    "resume": "an interrupted sweep resumes to the same table",
    "mutant": "a wrong implementation of this operation at this site is caught",
    "doctor": "`steerkit doctor CHECKPOINT` finds a wrong implementation on the model that it checks",
}
"""Column of the table -> what a test of it shows."""
Test = TypeVar("Test", bound=Callable[..., None])


@dataclass(frozen=True)
class Verified:
    """One test that verifies a claim of an operation at a site."""

    site: str
    operation: str
    claim: str
    test: str


VERIFIED: list[Verified] = []


def verifies(*claims: str, operations: Sequence[str], sites: Sequence[str] = ("resid_post",)) -> Callable[[Test], Test]:
    """Mark a test as one that verifies these claims of these operations at these sites."""
    assert set(claims) <= set(CLAIMS), claims

    def mark(test: Test) -> Test:
        VERIFIED.extend(Verified(s, o, c, name_of(test)) for s in sites for o in operations for c in claims)
        return test

    return mark


def name_of(test: Callable[..., None]) -> str:
    """A test as pytest names it."""
    return f"{test.__module__.replace('.', '/')}.py::{test.__name__}"


def collected() -> list[Verified]:
    """All marks of the tests, each once, in the order of `MODULES`: pytest may have imported them in another one."""
    for module in MODULES:
        import_module(module)
    files = [f"{module.replace('.', '/')}.py" for module in MODULES]
    return sorted(dict.fromkeys(VERIFIED), key=lambda one: files.index(one.test.partition("::")[0]))


def table() -> str:
    """A row per site and operation, a column per claim with the numbers of the tests, which are listed below it."""
    found = collected()
    tests = sorted({one.test for one in found})
    lines = ["| site | operation | " + " | ".join(CLAIMS) + " |", "|---" * (len(CLAIMS) + 2) + "|"]
    order = [*OPERATIONS, "sk.Operation", "condition"]
    rows = {(one.site, one.operation) for one in found}
    for site, operation in sorted(rows, key=lambda row: (-SITES.index(row[0]), order.index(row[1]))):
        cells = []
        for claim in CLAIMS:
            mine = [one.test for one in found if (one.site, one.operation, one.claim) == (site, operation, claim)]
            cells.append(", ".join(str(tests.index(test) + 1) for test in sorted(mine)))
        lines.append(f"| `{site}` | `{operation}` | " + " | ".join(cells) + " |")
    claims = [f"- {name}: {text}." for name, text in CLAIMS.items()]
    numbered = [f"{number}. `{test}`" for number, test in enumerate(tests, 1)]
    return "\n".join([*lines, "", *claims, "", *numbered]) + "\n"


def written(page: str) -> str:
    """The page with the table of today."""
    return BLOCK.sub(lambda found: found[1] + "\n" + table() + "\n" + found[2], page)


if __name__ == "__main__":
    from tests import verified  # the module that the tests import, not this one as __main__

    write_text(PAGE, verified.written(PAGE.read_text(encoding="utf-8")))
