"""`python -m training` lists the stages; the examples in the list use existing functions and valid options."""

from __future__ import annotations

import ast
import importlib
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from training import __main__ as stages

ROOT = Path(__file__).parents[2]


def test_the_list_is_printed_without_loading_torch() -> None:
    code = "import sys; sys.argv = ['training']; import runpy\n"
    code += "try:\n    runpy.run_module('training', run_name='__main__')\nexcept SystemExit as stop:\n"
    code += "    assert stop.code == 0, stop.code\nassert 'torch' not in sys.modules\n"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip() == stages.listing()
    for stage in stages.STAGES:
        assert f"{stage.name}: {stage.does}" in shown.stdout


@pytest.mark.parametrize("stage", [one for one in stages.STAGES if one.python], ids=lambda one: one.name)
def test_the_names_in_a_python_example_exist(stage) -> None:
    tree = ast.parse(stage.python)
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        module = importlib.import_module(str(node.module))
        assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("stage", [one for one in stages.STAGES if one.command], ids=lambda one: one.name)
def test_a_command_of_the_list_reaches_imad_with_options_that_it_accepts(stage, monkeypatch, capsys) -> None:
    pytest.importorskip("trl", reason="the extra `train` is not installed")
    from training import imad

    python, dash, module, *arguments = shlex.split(stage.command)
    assert (python, dash, module) == ("python", "-m", "training")
    calls = []
    monkeypatch.setattr(imad, "run_all", lambda run, only: calls.append((run, only)))
    monkeypatch.setattr(imad, "_hide_library_progress", lambda: None)
    assert stages.main(arguments) == 0
    if "--dry-run" in arguments:
        assert "memory_gib" in capsys.readouterr().out and not calls
    else:
        [(run, only)] = calls
        assert set(only) <= {"Debate", *run.preset.trained}


def test_each_code_path_of_the_list_exists() -> None:
    for stage in stages.STAGES:
        for path in stage.code.split(", "):
            assert (ROOT / path).exists(), path


def test_an_unknown_command_exits_with_2_and_names_the_list(capsys) -> None:
    assert stages.main(["grpo"]) == 2
    assert "expected the command imad; got 'grpo'" in capsys.readouterr().err
