"""The package: declared dependencies are those imported, and an installed steerkit imports from every folder."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTIONS = {
    "huggingface_hub": "huggingface-hub",
    "inspect_ai": "inspect-ai",
    "lm_eval": "lm-eval",
    "rouge_score": "rouge-score",
    "sklearn": "scikit-learn",
    "transformer_lens": "transformer-lens",
}
"""Import names that differ from the name of their distribution."""
OPTIONAL = ("train", "backends", "inspect", "lm-eval", "play", "vllm")
"""The extras whose packages our code imports; `serve`, `docs` and `dev` bring programs that it starts."""


def load_script(name: str):
    """A script of the folder .ci as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bounds = load_script("bounds")


def imported_distributions(*folders: str) -> set[str]:
    """The distributions that the modules of these folders import, lazy imports included."""
    names = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    own = {"steerkit", "training", "analysis", "figures"}
    return {DISTRIBUTIONS.get(name, name) for name in names - own - set(sys.stdlib_module_names)}


def declared(*extras: str) -> set[str]:
    """The distributions of the dependencies and of these extras."""
    lines = [*PROJECT["dependencies"], *(line for name in extras for line in PROJECT["optional-dependencies"][name])]
    return {bounds.name_of(line) for line in lines}


@pytest.mark.parametrize("page", ["README.md", "docs/guide/install.md"])
def test_a_page_about_the_installation_names_every_extra_for_users(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    extras = PROJECT["optional-dependencies"].keys() - {"docs", "dev"}
    assert [name for name in extras if f"`{name}`" not in text] == []


def test_every_imported_package_is_declared() -> None:
    assert imported_distributions("steerkit") - declared("backends", "inspect", "lm-eval", "play", "vllm") == set()
    assert imported_distributions("training", "analysis", "figures") - declared("train") == set()


def test_every_declared_package_is_imported_by_our_code() -> None:
    imported = imported_distributions("steerkit", "training", "analysis", "figures")
    assert declared(*OPTIONAL) - imported == set()


def test_each_dependency_has_one_lower_bound_and_no_upper_bound() -> None:
    lines = bounds.requirements()
    assert len(bounds.lower_bounds(lines)) == len({bounds.name_of(line) for line in lines})
    assert not [line for line in lines if "<" in line or "==" in line or "~" in line]


def test_lower_bounds_admit_the_versions_of_gpu_machines() -> None:
    low = {name: tuple(map(int, text.split("."))) for name, text in bounds.lower_bounds(bounds.requirements()).items()}
    assert low["torch"] <= (2, 11) and low["transformers"] <= (5, 17)


def test_the_higher_of_two_lower_bounds_is_pinned() -> None:
    assert bounds.lower_bounds(["a>=1.9", "A>=1.10", "b_c[x]>=2"]) == {"a": "1.10", "b-c": "2"}
    with pytest.raises(ValueError, match="expected one lower bound"):
        bounds.lower_bounds(["a>=1,<2"])


@pytest.fixture(scope="module", params=["standard", "editable"])
def installed(request, tmp_path_factory) -> Path:
    """A folder like site-packages that holds steerkit, installed from a wheel of this kind."""
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling, which builds the wheel, is missing")
    folder = tmp_path_factory.mktemp(request.param)
    built = next(wheel.WheelBuilder(str(ROOT)).build(directory=str(folder / "dist"), versions=[request.param]))
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.parametrize("where", ["the folder that contains the clone", "the clone", "another folder"])
def test_an_installed_steerkit_imports_from(where, installed, tmp_path) -> None:
    (tmp_path / "steerkit").symlink_to(ROOT, target_is_directory=True)
    (tmp_path / "other").mkdir()
    folder = {"the clone": ROOT, "another folder": tmp_path / "other"}.get(where, tmp_path)
    code = f"import site; site.addsitedir({str(installed)!r}); import steerkit; print(steerkit.load.__name__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    without_our_site = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
    done = subprocess.run(
        [sys.executable, "-c", without_our_site + code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "load\n", done.stderr


def test_a_wheel_holds_the_package_its_data_and_nothing_else(tmp_path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling, which builds the wheel, is missing")
    built = next(wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    with zipfile.ZipFile(built) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "steerkit").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == files
    assert {"steerkit/py.typed", "steerkit/show/templates/report.html"} <= names
    assert any(name.endswith(".jsonl") for name in names)


def test_a_source_archive_holds_code_tests_and_documents_and_no_build_output(tmp_path) -> None:
    import tarfile

    sdist = pytest.importorskip("hatchling.builders.sdist", reason="hatchling, which builds the archive, is missing")
    built = next(sdist.SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "steerkit/__init__.py", "tests/tiny.py", "docs/index.md"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".venv", "runs/"))]
    assert Path(built).stat().st_size < 10_000_000


def test_the_version_is_that_of_the_project() -> None:
    import steerkit

    try:
        importlib.metadata.version("imad-steerkit")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("steerkit is not installed here")
    assert steerkit.__version__ == PROJECT["version"]
