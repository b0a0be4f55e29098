"""The site: every page is in the navigation, under a title of its own, and common words lead to a page."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.banned_words import NONE_IN_PAGES, WORDS
from tests.browser import Tab

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
PAGES = sorted(DOCS.rglob("*.md"))
OUTSIDE = {"changelog.md", "contributing.md", "speed.md"}
"""Pages that `docs/site/outside.py` adds."""


GENERATED = {"results.md", "results-smollm2.md", "architectures.md", "reliability.md"}
"""Pages whose words are those of runs and of errors."""


def listed() -> list[str]:
    return re.findall(r"^\s+- (?:\w+: )?([\w/-]+\.md)$", CONFIG.partition("\nnav:\n")[2], re.MULTILINE)


def title_of(page: Path) -> str:
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def test_every_page_is_in_the_navigation_once() -> None:
    assert Counter(listed()) == Counter([*(str(page.relative_to(DOCS)) for page in PAGES), *OUTSIDE])


def test_no_two_pages_have_one_title() -> None:
    titles = Counter(title_of(page) for page in PAGES)
    assert [title for title, times in titles.items() if times > 1] == []


@pytest.mark.parametrize("word", ["GPU", "quantized", "out of memory", "troubleshooting", "install"])
def test_a_heading_or_a_title_has_a_word_that_newcomers_search(word: str) -> None:
    headings = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    assert any(word.lower() in line.lower() for line in headings)


def test_the_home_page_has_an_installation_code_and_a_picture() -> None:
    home = (DOCS / "index.md").read_text(encoding="utf-8")
    assert "## Install" in home and "```python" in home and "![" in home


def test_no_page_loads_anything_from_a_network() -> None:
    for page in PAGES:
        text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.search(r"<script|!\[[^]]*\]\(https?:|<img[^>]+https?:|```mermaid", text), page
    assert "http" not in CONFIG and "font: false" in CONFIG


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a warning is an error."""
    pytest.importorskip("mkdocs", reason="the site is built where the extra docs is installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_reference_shows_the_source_of_a_name_and_its_examples_as_code(site: Path) -> None:
    page = (site / "reference" / "generation.html").read_text(encoding="utf-8")
    assert page.count("Source code in") >= 3 and 'class="example"' not in page
    assert re.search(r'<span class="gp">&gt;&gt;&gt; </span>.*steering', page)


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """The site at a local server, which its search needs."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_table_fits_a_window_of_1280_pixels(site: Path, address: str, tab: Tab) -> None:
    tab.window(1280)
    wide = []
    pages = [page for page in sorted(site.rglob("*.html")) if page.parent.name != "reference"]
    heads = {page: re.findall(r"<thead>.*?</thead>", page.read_text(encoding="utf-8"), re.DOTALL) for page in pages}
    pages = [page for page in pages if any(head.count("<th") > 4 for head in heads[page])]
    for page in pages:
        tab.open(f"{address}/{page.relative_to(site)}")
        fits = tab.js(
            "document.documentElement.scrollWidth <= innerWidth && [...document.querySelectorAll('.md-content table')]"
            ".every((t) => t.closest('.md-typeset__scrollwrap').scrollWidth <= t.closest('.md-content').clientWidth)"
        )
        wide += [] if fits else [page.name]
    assert len(pages) > 10 and wide == []


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_no_word_that_readers_stumble_over(page: Path) -> None:
    if page.name in GENERATED:
        pytest.skip("its words are those of runs")
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = {word for word in NONE_IN_PAGES if re.search(rf"\b(?:{WORDS[word]})\b", text, re.IGNORECASE)}
    assert found == set()


def test_make_docs_needs_no_network_once_its_packages_are_installed() -> None:
    command = ["make", "--dry-run", "--old-file=.venv/.docs", "docs"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "mkdocs build" in told and "pip" not in told
    rule = (ROOT / "Makefile").read_text().partition("$(VENV)/.docs: ")[2].partition("\n\n")[0]
    assert "'.[docs]'" in rule and "touch $@" in rule
