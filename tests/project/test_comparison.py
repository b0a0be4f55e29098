"""The comparison of packages in README and docs is what the installed packages do."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import pytest

from steerkit.io.tables import read_table
from tests.comparison import OUT, PACKAGES, QUESTIONS

STORED = read_table(OUT)[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_each_answer_of_the_comparison_is_given_again_by_the_installed_package(package: str) -> None:
    name, distribution = PACKAGES[package]
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    cells = STORED[STORED["package"] == package].set_index("question")
    if package != "steerkit" and version(distribution) != cells["version"].iloc[0]:
        pytest.skip(f"{distribution} {version(distribution)} is installed; the comparison names another version")
    assert {question: "yes" if check(package) else "no" for question, (check, _) in QUESTIONS.items()} == dict(
        cells["answer"]
    )
