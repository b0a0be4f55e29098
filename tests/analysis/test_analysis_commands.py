"""`python -m analysis`: every analysis is listed and runs by its name."""

from __future__ import annotations

import ast
import inspect
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from analysis import __main__ as commands
from analysis.paper.reproduce import RUNS, plan, seeds_of
from steerkit.io.run_folder import RunFolderBusy

ROOT = Path(__file__).parents[2]


def test_without_a_name_the_analyses_are_listed_with_one_line_and_one_example_each(capsys) -> None:
    commands.main([])
    printed = capsys.readouterr().out
    for name, analysis in commands.ANALYSES.items():
        assert f"{name:14}{analysis.purpose}\n" in printed
        assert f"python -m analysis {name} {analysis.example}\n" in printed
    assert max(map(len, printed.splitlines())) <= 120
    commands.main(["--help"])
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("name", commands.ANALYSES)
def test_an_analysis_has_a_main_that_takes_arguments_and_shows_its_own_name(name, capsys) -> None:
    module = import_module(commands.ANALYSES[name].module)
    assert list(inspect.signature(module.main).parameters) == ["arguments"]
    with pytest.raises(SystemExit) as stopped:
        commands.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"usage: python -m analysis {name} " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", commands.ANALYSES)
def test_the_example_of_an_analysis_passes_its_argument_parser(name, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    module = import_module(commands.ANALYSES[name].module)
    parsed = []

    class Parsed(Exception):
        pass

    original = module.argparse.ArgumentParser.parse_args

    def parse(parser, arguments=None, namespace=None):
        parsed.append(original(parser, arguments, namespace))
        raise Parsed

    monkeypatch.setattr(module.argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed):
        commands.main([name, *commands.ANALYSES[name].example.split()])
    assert parsed


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SystemExit, match=r"expected an analysis among agents, .*; got 'subspaces'. Pass one"):
        commands.main(["subspaces"])


@pytest.mark.parametrize(
    "call",
    [
        *(f"{name} none --out out" for name in ("protocol", "patch-rounds", "transplant", "erasure")),
        "malicious none --words ha --out out",
        "separability --run none --out out",
        "suppression --run none --words ha --out out",
        "agreement --run none --labels none --out out",
        "agents --traces none.jsonl --checkpoint none --out out",
        "refusal --checkpoint none --data none --out out",
        "fact-recall --checkpoint ./none --out out",
        "results none",
    ],
    ids=lambda call: call.partition(" ")[0],
)
def test_a_wrong_path_ends_a_command_with_one_line_and_exit_code_2(call, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    name, *rest = call.split()
    with pytest.raises(SystemExit) as stopped:
        commands.main([name, *rest])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith(f"python -m analysis {name}: expected ") and "none" in line


@pytest.mark.parametrize("error", [RunFolderBusy("another run\nholds it"), ValueError("another run\nholds it")])
def test_a_message_of_several_lines_is_printed_as_one(error, monkeypatch, capsys) -> None:
    def stopped(_: list[str]) -> None:
        raise error

    monkeypatch.setattr(commands, "import_module", lambda _: SimpleNamespace(main=stopped))
    with pytest.raises(SystemExit):
        commands.main(["agents"])
    assert capsys.readouterr().err == "python -m analysis agents: another run holds it\n"


def test_the_steps_of_a_reproduction_name_listed_analyses(tmp_path) -> None:
    def used(full: bool) -> set[str]:
        steps = [step for preset in RUNS for step in plan(preset, seeds_of(preset, full, 7), tmp_path, full)]
        return {step.arguments[0] for step in steps if step.module == "analysis"}

    assert used(False) == {"agents", "separability", "suppression", "main-table", "results"}
    of_full = {"protocol", "malicious", "transplant", "patch-rounds", "erasure"}
    assert used(True) == used(False) | of_full < set(commands.ANALYSES)


def test_an_analysis_can_be_interrupted_where_its_shell_ignores_the_signal() -> None:
    code = (
        "import signal; from analysis import __main__ as commands; "
        "commands.import_module = lambda _: __import__('types').SimpleNamespace(main=lambda _: "
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)); commands.main(['agents'])"
    )

    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, preexec_fn=ignore, capture_output=True, text=True)
    assert ran.stdout == "True\n", ran.stderr


def calls_of(name: str) -> list[ast.Call]:
    """Every call of `sk.NAME` in the code of the analyses."""
    nodes = [
        node for path in sorted((ROOT / "analysis").rglob("*.py")) for node in ast.walk(ast.parse(path.read_text()))
    ]
    return [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == f"sk.{name}"]


def test_analyses_whose_numbers_are_published_rely_on_no_default_of_steering() -> None:
    sweeps, steerings = calls_of("sweep"), calls_of("Steering")
    assert len(sweeps) >= 2 and steerings
    for call in sweeps:
        named = {keyword.arg for keyword in call.keywords}
        assert None in named or {"positions", "layers"} <= named, ast.unparse(call)
        assert "temperature" not in named or "top_p" in named, ast.unparse(call)
    for call in steerings:
        assert len(call.args) >= 3 or "positions" in {keyword.arg for keyword in call.keywords}, ast.unparse(call)
