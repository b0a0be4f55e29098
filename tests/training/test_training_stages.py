"""`python -m training` lists the stages; every example is accepted by the stage's options, and errors are one line."""

from __future__ import annotations

import inspect
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from training import __main__ as commands

ROOT = Path(__file__).parents[2]


def test_the_list_is_printed_without_loading_torch() -> None:
    code = "import sys; sys.argv = ['training']; import runpy\n"
    code += "try:\n    runpy.run_module('training', run_name='__main__')\nexcept SystemExit as stop:\n"
    code += "    assert stop.code == 0, stop.code\nassert 'torch' not in sys.modules\n"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip() == commands.listing()
    for name, stage in commands.STAGES.items():
        assert f"{name}: {stage.does}" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 120


@pytest.mark.parametrize(
    ("name", "example"), [(name, one) for name, stage in commands.STAGES.items() for one in stage.examples]
)
def test_an_example_of_the_list_passes_the_options_of_its_stage(name, example, monkeypatch) -> None:
    pytest.importorskip("trl", reason="the extra `train` is not installed")
    module = import_module(commands.STAGES[name].module)
    assert list(inspect.signature(module.main).parameters) == ["arguments"]

    class Parsed(Exception):
        pass

    import argparse

    original = argparse.ArgumentParser.parse_args

    def parse(parser, arguments=None, namespace=None):
        original(parser, arguments, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed):
        commands.main([name, *shlex.split(example)])


def test_an_unknown_stage_exits_with_2_and_names_the_list(capsys) -> None:
    assert commands.main(["sftt"]) == 2
    assert (
        "expected a stage among problems, debates, sft, grpo, evaluate, benchmark, imad; got 'sftt'"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (["problems", "--problems", "chess"], "expected a family among"),
        (["problems", "--problems", "missing.jsonl"], "missing.jsonl"),
        (["problems", "--problems", "arithmetic"], "expected a number of problems of the family arithmetic"),
        (["debates"], "expected problems at"),
        (["debates", "--set", "debates=many"], "expected a value of type int"),
        (["sft"], "expected debates at"),
        (["grpo"], "expected problems at"),
        (["evaluate", "--trained", "x"], "expected problems at"),
    ],
)
def test_bad_input_of_a_stage_ends_in_one_line_and_writes_nothing(call, message, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("trl", reason="the extra `train` is not installed")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        commands.main([call[0], "--run", "run", *call[1:]])
    assert stopped.value.code == 2
    shown = capsys.readouterr().err.strip()
    assert shown.startswith(f"python -m training {call[0]}: ") and message in shown and "\n" not in shown
    assert list(tmp_path.iterdir()) == []
