"""Every Python block of the documents runs unchanged on the real checkpoint, and every link has a target."""

from __future__ import annotations

import json
import linecache
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import steerkit as sk
from steerkit.models.kernels import missing

DOCS = Path(__file__).parents[2] / "docs"
ELSEWHERE = {DOCS / "serving.md", *(DOCS / "recipes").glob("*.md")}
"""Pages whose code needs vLLM (run by `make test-vllm`), or a tiny model and files: run by `test_recipes.py`."""
PAGES = sorted(
    page for page in DOCS.rglob("*.md") if "```python" in page.read_text(encoding="utf-8") and page not in ELSEWHERE
)
CODE = r"```python\n(.*?)```(?:\n\nprints[^\n]*\n\n```\n(.*?)```)?"  # and what it prints, where the page shows it
LINKED = [*sorted(DOCS.rglob("*.md")), *sorted(DOCS.parent.glob("*.md"))]


@pytest.fixture(scope="module")
def names_of_pages(smollm):
    """The names that a page may use: a model, contrast pairs, a vector and its controls, a sweep."""
    model, tokenizer = smollm
    words = ["glad", "kind", "warm", "bright", "calm", "fond"]
    pairs = [sk.ContrastPair(f"I am {w} and", " happy as well", " sad as ever", w) for w in words]
    vector = sk.difference_in_means(sk.collect(model, tokenizer, pairs, position="mean"))
    controls = {f"random-{i}": sk.random_like(vector, seed=i) for i in range(2)}
    prompts = [
        {"id": f"{i}", "prompt": text, "reference": "deep and blue"}
        for i, text in enumerate(("The sea is", "A day is"))
    ]
    result = sk.sweep(
        model,
        tokenizer,
        {"persona": vector, **controls},
        prompts,
        layers=[14],
        coefficients=[-1, 0, 1],
        max_new_tokens=6,
    )
    return {
        "sk": sk, "model": model, "tokenizer": tokenizer, "pairs": pairs, "vector": vector, "controls": controls,
        "result": result,
    }  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_the_code_of_a_page_runs_and_prints_what_the_page_shows(
    page, names_of_pages, smollm, tmp_path, monkeypatch, capsys
) -> None:
    if page.name == "kernels.md" and (reason := missing()):
        pytest.skip(f"oneDNN's linear layers cannot be used: {reason}")
    if page.name == "coming-from.md":
        for package in ("steering_vectors", "repeng", "transformer_lens", "nnsight"):
            if find_spec(package) is None:
                pytest.skip(f"the page compares with {package}, which is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sk, "load", lambda *_, **__: smollm)
    names = dict(names_of_pages)
    blocks = re.findall(CODE, page.read_text(encoding="utf-8"), re.DOTALL)
    for number, (block, shown) in enumerate(blocks, 1):
        name = f"{page.name}, block {number}"
        linecache.cache[name] = (len(block), None, block.splitlines(keepends=True), name)  # nnsight reads the source
        exec(compile(block, name, "exec"), names)
        assert capsys.readouterr().out == shown or not shown


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(DOCS.parent)))
def test_links_between_pages_have_a_target(page) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_footnote_is_written_once_in_the_order_of_its_marks() -> None:
    marks_of = {page: re.findall(r"\[\^(\w+)\](:?)", page.read_text(encoding="utf-8")) for page in LINKED}
    assert any(marks_of.values())
    for page, notes in marks_of.items():
        marks, written = ([name for name, colon in notes if bool(colon) == after] for after in (False, True))
        assert marks == written and len(set(marks)) == len(marks), page


def test_each_example_writes_into_its_own_folder() -> None:
    pages = [*LINKED, *sorted(DOCS.glob("notebooks/*.ipynb"))]
    texts = [page.read_text(encoding="utf-8").replace('\\"', '"') for page in pages]
    folders = [folder for text in texts for folder in re.findall(r'(?:out="|--out )(runs/[\w./-]+)', text)]
    assert len(folders) > 2 and sorted(set(folders)) == sorted(folders)


def test_the_reference_names_every_public_name() -> None:
    listed = set(re.findall(r"^::: steerkit\.(\w+)$", (DOCS / "reference.md").read_text(), re.MULTILINE))
    assert set(sk.__all__) <= listed


@pytest.mark.parametrize("notebook", sorted(DOCS.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_from_its_first_cell_to_its_last_and_is_stored_without_output(
    notebook, smollm, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sk, "load", lambda *_, **__: smollm)
    names: dict[str, object] = {}
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], f"{notebook.name}, cell {number}"
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), names)
