"""Which modules import what, and the public names."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['steerkit', '--help']\nfrom steerkit.cli.main import main\n"
    code += "try:\n  main()\nexcept SystemExit: pass\n"
    done = run("-c", code + "print(sorted({'torch', 'pandas', 'numpy', 'matplotlib'} & set(sys.modules)))")
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    commands = ("demo", "inspect", "extract", "steer", "sweep", "score", "report", "probe", "play", "convert")
    assert all(command in done.stdout for command in commands)


@pytest.mark.parametrize(
    "command", ["demo", "inspect", "extract", "steer", "sweep", "score", "report", "probe", "play", "convert"]
)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = run("-m", "steerkit.cli", command, "--help")
    assert done.returncode == 0 and f"Example: steerkit {command}" in done.stdout


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    import steerkit

    for name in steerkit.__all__:
        assert (getattr(steerkit, name).__doc__ or "").strip(), name
    packages = {path.stem for path in (ROOT / "steerkit").iterdir()}
    assert not packages & set(steerkit.__all__), "importing a package of that name would hide the public name"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        steerkit.nothing  # noqa: B018


def test_the_command_line_extracts_steers_sweeps_scores_and_probes(tmp_path) -> None:
    from typer.testing import CliRunner

    from steerkit.cli.main import app
    from steerkit.io.tables import read_table, write_table
    from steerkit.text.pairs import ContrastPair, write_pairs
    from tests.tiny import tiny_model, tiny_tokenizer

    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    pairs, prompts, vector, out = (str(tmp_path / n) for n in ("pairs.jsonl", "prompts.jsonl", "v.safetensors", "run"))
    write_pairs(pairs, [ContrastPair(f"q{i}", "yes yes", "no, not", f"g{i}") for i in range(6)])
    Path(prompts).write_text("".join(json.dumps({"prompt": p, "reference": p}) + "\n" for p in ("one", "two")))
    runner = CliRunner()

    def ok(*arguments: str) -> str:
        done = runner.invoke(app, arguments)
        assert done.exit_code == 0, done.output + repr(done.exception)
        return done.stdout

    assert json.loads(ok("inspect", str(model), "--json"))["n_layers"] == 4
    assert "norm at layer 3" in ok("extract", str(model), pairs, "--out", vector, "--position", "mean")
    texts = json.loads(
        ok("steer", str(model), vector, "hi", "--layer", "1", "--coefficient", "30", "--max-new-tokens", "6", "--json")
    )
    assert len(set(texts.values())) == 2
    unsteered, title = texts
    assert unsteered == "unsteered" and re.fullmatch(r"layer 1, coefficient 30, dose \d+\.\d\d", title)
    weaker = json.loads(
        ok("steer", str(model), vector, "hi", "--layer", "1", "--coefficient", "15", "--max-new-tokens", "6", "--json")
    )
    strong, weak = (float(text.split()[-1]) for text in (title, list(weaker)[1]))
    assert strong > 0 and strong == pytest.approx(2 * weak, abs=0.03)  # the dose is of the unsteered text, and linear
    ok("steer", str(model), vector, "hi", "--layer", "1", "--max-new-tokens", "6")
    sweep = ok(
        "sweep",
        str(model),
        vector,
        "--prompts",
        prompts,
        "--layers",
        "1,2,1+2",
        "--out",
        out,
        "--max-new-tokens",
        "4",
        "--json",
    )
    found = json.loads(sweep)
    assert (found["rows"], found["texts generated"], found["unsteered among them"]) == (
        3 * 5 * 2 * 3,
        3 * 4 * 2 * 3 + 2,
        2,
    )
    curve, gain = json.loads(ok("score", out, "rouge_l", "--json")).values()
    assert len(curve) == 3 * 5 * 3
    assert {str(row["layer"]) for row in curve} == {"1", "2", "1+2"}
    assert [(row["vector"], row["over"]) for row in gain] == [("v", "coefficient 0")] * 12 + [("v", "random")] * 12
    ok("score", out, "--words", "yes,no")
    table = read_table(Path(out) / "scored.parquet")[0]
    assert {"rouge_l", "words"} <= set(table)  # scores add to those that are there
    write_table(Path(out) / "scored.parquet", table.assign(text="of another sweep", words=9.0), {})
    ok("score", out, "distinct_2")
    table = read_table(Path(out) / "scored.parquet")[0]
    assert "words" not in table and (table["text"] != "of another sweep").all()
    assert runner.invoke(app, ["score", out]).exit_code != 0
    hinted = runner.invoke(app, ["score", out, "rouge_l"]).stderr
    page = ROOT / hinted.split()[-1].rstrip(".")
    assert page.is_file()  # what the numbers mean is where it says
    ok("probe", str(model), pairs)
    assert {row["labels"] for row in json.loads(ok("probe", str(model), pairs, "--json"))} == {"true", "shuffled"}


def test_a_table_in_a_terminal_joins_intervals_and_says_once_what_all_rows_share(capsys) -> None:
    import pandas as pd

    from steerkit.show import terminal

    rows = pd.DataFrame(
        {"layer": ["1", "2", "3"], "mean": [0.5, 0.25, 1.0], "low": [0.1, 0.2, 0.3], "high": [0.6, 0.7, 0.8], "n": 4}
    )
    terminal.table("curve", rows, as_json=False)
    shown = capsys.readouterr().out
    assert "0.500 [0.100, 0.600]" in shown and "n 4" in shown and "low" not in shown
    terminal.table("probe", rows.rename(columns={"low": "mean_low", "high": "mean_high"}), as_json=False)
    assert "1.000 [0.300, 0.800]" in capsys.readouterr().out
