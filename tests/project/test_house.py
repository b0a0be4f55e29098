"""Which modules import what, and the public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_library_never_imports_training_analysis_figures_or_trl() -> None:
    for path in (ROOT / "steerkit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not {name.split(".")[0] for name in names} & {"training", "analysis", "figures", "trl"}


def test_hooks_are_registered_in_one_file_only() -> None:
    users = [path.name for path in (ROOT / "steerkit").rglob("*.py") if "register_forward" in path.read_text()]
    assert users == ["hooks.py"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize(
    "module",
    [
        "steerkit",
        "steerkit.scores.text",
        "steerkit.show.plots",
        "steerkit.sweeps.result",
        "steerkit.show.report",
        "steerkit.cli.main",
    ],
)
def test_light_modules_do_not_import_torch(module: str) -> None:
    done = run("-c", f"import sys, {module}; print('torch' in sys.modules, 'transformers' in sys.modules)")
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_every_public_name_exists_and_has_a_docstring() -> None:
    import steerkit

    for name in steerkit.__all__:
        assert (getattr(steerkit, name).__doc__ or "").strip(), name
    packages = {path.stem for path in (ROOT / "steerkit").iterdir()}
    assert not packages & set(steerkit.__all__), "importing a package of that name would hide the public name"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        steerkit.nothing  # noqa: B018
