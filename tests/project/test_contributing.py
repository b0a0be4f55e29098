"""CONTRIBUTING.md: each standard term is defined in the file that the list names."""

from __future__ import annotations

import re

import pytest

from tests.import_graph import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TERMS = re.findall(r"^\| ([\w -]+?) \| .+? \| `([\w./]+)` \|$", PAGE, re.MULTILINE)
REQUIRED = {
    "residual stream", "resid_post", "layer", "contrast pair", "positive", "negative", "difference in means", "CAA",
    "steering vector", "direction", "coefficient", "relative dose", "probe", "rouge_l", "curve_auc", "roc_auc",
    "debate", "agent", "round", "turn", "trace", "consensus", "training seed", "control direction", "role", "sweep",
}  # fmt: skip


def test_the_standard_terms_are_listed_once_each() -> None:
    names = [term for term, _ in TERMS]
    assert set(names) >= REQUIRED and len(set(names)) == len(names)
    assert len(TERMS) == PAGE.split("## Standard terms")[1].split("\n## ")[0].count("| `")


@pytest.mark.parametrize(("term", "file"), TERMS)
def test_the_file_of_a_standard_term_contains_it(term, file) -> None:
    text = " ".join((ROOT / file).read_text(encoding="utf-8").lower().split())
    assert re.search(rf"\b{re.escape(term.lower()).replace('_', '[_ ]')}", text), f"{file} does not contain {term!r}"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:steerkit|training|analysis|tests)/[\w./]+)`", PAGE))))
def test_every_path_in_the_page_exists(path) -> None:
    assert (ROOT / path).exists()
