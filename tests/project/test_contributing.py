"""CONTRIBUTING.md: each standard term is defined in the file that the list names."""

from __future__ import annotations

import re

import pytest

from tests.import_graph import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TERMS = re.findall(r"^\| ([\w -]+?) \| `([\w./]+)` \|$", PAGE, re.MULTILINE)
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (?!term \|)(.+?) \| (.+) \|$", GLOSSARY, re.MULTILINE)
REQUIRED = {
    "residual stream", "resid_post", "layer", "contrast pair", "positive", "negative", "difference in means", "CAA",
    "steering vector", "direction", "coefficient", "relative dose", "probe", "rouge_l", "curve_auc", "roc_auc",
    "debate", "agent", "round", "turn", "trace", "consensus", "training seed", "control direction", "role", "sweep",
}  # fmt: skip


def test_the_standard_terms_are_listed_once_each() -> None:
    names = [term for term, _ in TERMS]
    assert set(names) >= REQUIRED and len(set(names)) == len(names)
    assert len(TERMS) == PAGE.split("## Standard terms")[1].split("\n## ")[0].count("| `")


@pytest.mark.parametrize("term", [term for term, _ in TERMS])
def test_the_glossary_defines_every_standard_term(term) -> None:
    word = re.compile(rf"\b{re.escape(term)}s?\b", re.IGNORECASE)
    heads = [head for head, _ in ROWS if word.search(head.replace("-", " ")) or word.search(head)]
    assert heads or any(f"`{term}`" in text or f"{term} (" in text or f"Its {term}" in text for _, text in ROWS)


def test_the_glossary_has_each_term_once() -> None:
    names = [name.strip(" `") for head, _ in ROWS for name in re.sub(r"\(.*?\)", "", head).split(",")]
    assert len(names) == len(set(names)) > 60


DEFINED = {
    "relative dose": r"norms? of (?:what is added|the added vector)[^.|]{0,20}\b(?:over|divided by)\b",
    "sign-flip test": r"permutation test|signs of the paired differences",
    "fidelity": r"log-probability per token of (?:the|an) agent's own text",
}
"""Term -> words that define it."""


@pytest.mark.parametrize("term", DEFINED)
def test_a_term_is_defined_in_the_glossary_alone(term) -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    others = {
        "agents.md",
        "training.md",
        "results.md",
        "results-smollm2.md",
        *(p.name for p in (ROOT / "docs/recipes").glob("*.md")),
    }
    others |= {"README.md", "index.md"} if term == "relative dose" else set()  # a reader begins with these
    found = [
        page.name for page in pages
        if page.name not in others and re.search(DEFINED[term], " ".join(page.read_text().split()), re.IGNORECASE)
    ]  # fmt: skip
    assert found == ["glossary.md"]


@pytest.mark.parametrize(("term", "file"), TERMS)
def test_the_file_of_a_standard_term_contains_it(term, file) -> None:
    text = " ".join((ROOT / file).read_text(encoding="utf-8").lower().split())
    assert re.search(rf"\b{re.escape(term.lower()).replace('_', '[_ ]')}", text), f"{file} does not contain {term!r}"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:steerkit|training|analysis|tests)/[\w./]+)`", PAGE))))
def test_every_path_in_the_page_exists(path) -> None:
    assert (ROOT / path).exists()
