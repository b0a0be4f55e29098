"""docs/concepts/steering.md lists for each operation and site the tests that verify it, as the tests are marked."""

from __future__ import annotations

import pytest

from steerkit.models.site_names import DEFAULT, SITES
from steerkit.steering.operations import OPERATIONS
from tests.verified import CLAIMS, PAGE, collected, table, written


def test_the_table_of_the_page_is_that_of_the_marked_tests() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "<!-- verified by tests -->" in page
    assert written(page) == page, "run `python -m tests.verified`"


def test_every_operation_and_conditions_are_verified_by_every_claim_at_every_site() -> None:
    """The doctor runs every operation at `resid_post`, and two and a condition at the other sites."""
    shown = {(one.site, one.operation, one.claim) for one in collected()}
    for site in SITES:
        for operation in (*OPERATIONS, "sk.Operation", "condition"):
            missing = {claim for claim in CLAIMS if (site, operation, claim) not in shown}
            by_doctor = operation in ("add", "clamp", "condition") if site != DEFAULT else operation != "sk.Operation"
            assert missing <= (set() if by_doctor else {"doctor"}), (site, operation, missing)


def test_the_table_does_not_depend_on_the_order_of_import(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, found = table(), collected()
    files = list(dict.fromkeys(one.test.partition("::")[0] for one in found))
    other = [one for file in reversed(files) for one in found if one.test.startswith(f"{file}::")]
    monkeypatch.setattr("tests.verified.VERIFIED", other)
    assert other != found
    assert table() == whole
