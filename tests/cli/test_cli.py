"""The command line: options, defaults, the order of checks, JSON, errors and tables."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import steerkit as sk
from steerkit.cli.demo import demo
from steerkit.cli.inputs import parse_layer_sets, parse_layers
from steerkit.cli.main import app, main
from steerkit.cli.models import bake, doctor, lens
from steerkit.cli.models import inspect as inspect_command
from steerkit.cli.steer import play, steer
from steerkit.cli.sweeps import report, score, sweep
from steerkit.cli.vectors import extract, probe
from steerkit.io.tables import read_table, write_table
from steerkit.show import terminal
from steerkit.show.pivot import pivots
from steerkit.stats.format import digits_for, interval_text, number_text
from steerkit.sweeps.result import SweepResult
from steerkit.text.pairs import ContrastPair, write_pairs
from tests import sweep_tables
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "lens",
    "bake",
    "demo",
    "inspect",
    "doctor",
    "extract",
    "steer",
    "sweep",
    "score",
    "report",
    "probe",
    "play",
    "convert",
)
LOADING = (demo, inspect_command, doctor, lens, bake, extract, steer, sweep, score, report, probe, play)
IDENTIFIER = re.compile(r"[a-z0-9_]+")


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


@pytest.fixture
def leave(tmp_path, monkeypatch) -> Callable[..., object]:
    """Run `main` in a folder of its own; returns its exit code."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> object:
        monkeypatch.setattr(sys, "argv", ["steerkit", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code

    return call


class Work:
    """A checkpoint on disk with a vector and a finished sweep of it, and the command line in this process."""

    def __init__(self, folder: Path) -> None:
        self.model, self.run = str(folder / "model"), str(folder / "run")
        self.pairs, self.prompts, self.vector = (
            str(folder / name) for name in ("pairs.jsonl", "prompts.jsonl", "v.safetensors")
        )
        self.one_layer = str(folder / "one.safetensors")
        tiny_model().save_pretrained(self.model)
        tiny_tokenizer().save_pretrained(self.model)
        write_pairs(self.pairs, [ContrastPair(f"q{i}", "yes yes", "no, not", f"g{i}") for i in range(6)])
        rows = ({"prompt": p, "reference": p} for p in ("one", "two"))
        Path(self.prompts).write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.ok("extract", self.model, self.pairs, "--out", self.vector)
        sk.SteeringVector.load(self.vector).at(1).save(self.one_layer)
        self.sweep(self.run)

    def ok(self, *arguments: str) -> str:
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output + repr(done.exception)
        return done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.ok(*arguments, "--json"), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))

    def sweep(self, out: str, *arguments: str) -> Any:
        options = arguments or ("--layers", "1,2", "--coefficients=-20,20")
        command = ("sweep", self.model, self.vector, "--prompts", self.prompts, "--out", out)
        return self.json(*command, *options, *(() if "--choices" in options else ("--max-new-tokens", "4")))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(tmp_path_factory.mktemp("work"))


# Help and defaults


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['steerkit', '--help']\nfrom steerkit.cli.main import main\n"
    code += "try:\n  main()\nexcept SystemExit: pass\n"
    done = run("-c", code + "print(sorted({'torch', 'pandas', 'numpy', 'matplotlib'} & set(sys.modules)))")
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    commands = ("demo", "inspect", "extract", "steer", "sweep", "score", "report", "probe", "play", "convert")
    assert all(command in done.stdout for command in commands)
    assert "..." not in done.stdout.replace("[ARGS]...", "")  # no description is cut


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = run("-m", "steerkit.cli", command, "--help")
    assert done.returncode == 0 and f"Example: steerkit {command}" in done.stdout


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_h_is_help_everywhere(command: str | None) -> None:
    words = [] if command is None else [command]
    runner = CliRunner()
    assert runner.invoke(app, [*words, "-h"]).stdout == runner.invoke(app, [*words, "--help"]).stdout != ""


def test_version_prints_the_installed_version(leave, capsys) -> None:
    assert leave("--version") == 0
    assert capsys.readouterr().out == f"steerkit {sk.__version__}\n"


def defaults(command: Callable[..., Any]) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}


@pytest.mark.parametrize(
    ("command", "function", "names"),
    [
        (steer, sk.Steering, ("layer", "coefficient", "positions", "operation", "foreign")),
        (steer, sk.generate, ("temperature", "top_p", "seed")),
        (sweep, sk.sweep, ("layers", "positions", "operation", "samples", "temperature", "top_p", "max_new_tokens")),
        (sweep, sk.sweep, ("seed", "foreign")),
        (extract, sk.collect_means, ("position", "layers")),
        (probe, sk.collect, ("position",)),
        (probe, sk.probe_layers, ("seed",)),
        (inspect_command, sk.load, ("adapter", "device", "dtype", "bits", "backend")),
    ],
)
def test_the_command_line_has_the_defaults_of_python(command: Any, function: Any, names: tuple[str, ...]) -> None:
    ours, theirs = defaults(command), defaults(function)
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


# Options


@pytest.mark.parametrize("command", LOADING, ids=lambda command: command.__name__)
def test_device_dtype_bits_and_backend_are_options_of_every_command_that_loads(command: Any) -> None:
    shown = CliRunner().invoke(app, [command.__name__, "--help"]).stdout
    for option in ("--device", "--dtype", "--bits", "--backend"):
        assert option in shown


def test_the_load_options_reach_load_from_every_command(work: Work, tmp_path: Path, monkeypatch) -> None:
    seen: list[dict[str, Any]] = []
    loaded = sk.load(work.model)

    def load(checkpoint: str, **options: Any) -> Any:
        seen.append(options)
        return loaded

    monkeypatch.setattr("steerkit.models.load.load", load)
    monkeypatch.setattr("steerkit.show.play.play", lambda *_, **__: None)
    monkeypatch.setattr("steerkit.demo.run.run_demo", lambda *_, **__: {})
    monkeypatch.setattr("steerkit.demo.summary.print_summary", lambda *_: None)
    sweeping = ("sweep", work.model, work.one_layer, "--prompts", work.prompts, "--out", str(tmp_path / "run"))
    commands = [
        ("demo", "--model", work.model),
        ("inspect", work.model),
        ("doctor", work.model),
        ("lens", work.model, "hi"),
        ("bake", work.model, work.one_layer, "--out", str(tmp_path / "baked"), "--foreign"),
        ("extract", work.model, work.pairs, "--out", str(tmp_path / "v.safetensors")),
        ("steer", work.model, work.one_layer, "hi", "--max-new-tokens", "2"),
        (*sweeping, "--max-new-tokens", "2"),
        ("score", work.run, "perplexity", "--checkpoint", work.model),
        ("report", work.run, "--checkpoint", work.model, "--out", str(tmp_path / "page.html")),
        ("probe", work.model, work.pairs),
        ("play", work.model, "--vectors", work.vector),
    ]
    options = {"adapter": "owner/name", "device": "cpu", "dtype": "bfloat16", "bits": 8, "kernels": "torch"}
    options["backend"] = "nnsight"
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    for command in commands:
        work.ok(*command, *words)
    assert seen == [options] * len(LOADING) == [options] * len(commands)


def test_dtype_is_that_of_the_loaded_model(work: Work) -> None:
    assert work.json("inspect", work.model, "--dtype", "bfloat16", "--device", "cpu")["dtype"] == "bfloat16"


def test_operation_temperature_and_adapter_are_options_where_python_has_them(work: Work, tmp_path: Path) -> None:
    loaded = sk.load(work.model)
    vector = sk.SteeringVector.load(work.one_layer)
    asked = [[{"role": "user", "content": "hi"}]]
    command = ("steer", work.model, work.one_layer, "hi", "--max-new-tokens", "8", "--seed", "3")

    def texts(steering: sk.Steering, **options: Any) -> list[str]:
        return [
            sk.generate(*loaded, asked, max_new_tokens=8, steering=one, **options)[0] for one in (None, steering)
        ]

    ablated = work.json(*command, "--operation", "ablate")
    assert [ablated["unsteered"], ablated["steered"]] == texts(sk.Steering(vector, operation="ablate"))
    assert ablated["relative_dose"] is None
    sampled = work.json(*command, "--temperature", "1.5", "--top-p", "0.5", "--coefficient", "20")
    options = {"temperature": 1.5, "top_p": 0.5, "seed": 3}
    assert [sampled["unsteered"], sampled["steered"]] == texts(sk.Steering(vector, 20.0), **options)
    nothing = work.json(*command, "--temperature", "1.5", "--coefficient", "0")
    assert nothing["unsteered"] == nothing["steered"] != sampled["unsteered"]
    out = tmp_path / "run"
    work.sweep(str(out), "--layers", "1", "--operation", "ablate", "--temperature", "1", "--coefficients", "1")
    table = SweepResult.load(out).table
    assert set(table["operation"]) == {"ablate"} and set(table["temperature"]) == {1.0}
    for command_ in (score, report, sweep, steer, extract):
        assert "--adapter" in CliRunner().invoke(app, [command_.__name__, "-h"]).stdout


def test_a_prompt_of_one_token_has_no_dose_to_print_and_takes_none(work: Work) -> None:
    command = ("steer", work.model, work.one_layer, "a", "--verbatim", "--positions", "prompt", "--max-new-tokens", "2")
    shown = work.ok(*command, "--coefficient", "2")
    assert "coefficient 2" in shown and "nan" not in shown
    with pytest.raises(ValueError, match=r"expected a steered position beyond the first.*Pass --coefficient"):
        CliRunner().invoke(app, [*command, "--dose", "0.5"], catch_exceptions=False)


def test_sweep_scores_choices_and_grows_in_its_folder(work: Work, tmp_path: Path) -> None:
    out = tmp_path / "run"
    work.sweep(str(out), "--layers", "1", "--coefficients", "1", "--choices", " (A), (B)")
    rows = (out / "rows.jsonl").read_bytes()
    work.sweep(str(out), "--layers", "1", "--coefficients", "1,2", "--choices", '[" (A)", " (B)"]')
    assert (out / "rows.jsonl").read_bytes().startswith(rows)
    table = SweepResult.load(out).table
    assert set(table["choice"]) == {" (A)", " (B)"} and set(table["coefficient"]) == {0.0, 1.0, 2.0}
    sums = table.groupby(["vector", "layer", "coefficient", "prompt_id"])["probability"].sum()
    assert sums.sub(1).abs().max() < 1e-12


def test_score_prints_one_choice_per_prompt_by_its_text_or_by_a_column(work: Work, tmp_path: Path) -> None:
    out = tmp_path / "run"
    rows = [{"id": str(n), "prompt": f"hi {n}", "matching": " (A)" if n else " (B)", "wrong": "(A)"} for n in range(2)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = (
        "--choices",
        " (A), (B)",
        "--prompts",
        str(tmp_path / "prompts.jsonl"),
        "--coefficients",
        "1",
        "--random",
        "1",
    )
    work.sweep(str(out), "--layers", "1", *asked)
    result = SweepResult.load(out)
    kept = {
        ("--choice", " (A)"): result.table["choice"] == " (A)",
        ("--choice-column", "matching"): result.table["choice"] == result.table["matching"],
    }
    for option, rows_of in kept.items():
        found = work.json("score", str(out), "probability", "log_prob", "distinct_2", "--words", "a", *option)
        for name in ("probability", "log_prob"):
            wanted = result.where(rows_of).curve(name)["mean"]
            assert [row["mean"] for row in found["curves"][name]] == pytest.approx(wanted.tolist())
    scored = SweepResult.load(out / "scored.parquet").table
    assert len(scored) == len(result.table) and {"distinct_2", "words"} <= set(scored)
    bad = {
        (): "expected one choice per prompt; got no options. Pass --choice TEXT, or --choice-column COLUMN",
        ("--choice", " (A)", "--choice-column", "matching"): "got both options",
        ("--choice", "(A)"): r"expected a choice among \[' \(A\)', ' \(B\)'\]; got another by --choice='\(A\)'",
        ("--choice-column", "wrong"): "got another by --choice-column='wrong' for the prompts",
        ("--choice-column", "right"): "expected a column of the prompts; got 'right'",
    }
    for option, message in bad.items():
        with pytest.raises(ValueError, match=message):
            CliRunner().invoke(app, ["score", str(out), "probability", *option], catch_exceptions=False)
    for words, message in (
        (("probability",), "expected a sweep of choices"),
        (("distinct_2", "--choice", "a"), "no --"),
    ):
        with pytest.raises(ValueError, match=message):
            CliRunner().invoke(app, ["score", work.run, *words], catch_exceptions=False)


def test_score_after_growth_keeps_earlier_scores_and_names_what_lacks_them(work: Work, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--layers", "1", "--random", "0", "--max-new-tokens", "4")
    work.sweep(str(out), *options, "--coefficients", "1")
    work.ok("score", str(out), "perplexity", "distinct_2", "--words", "a", "--checkpoint", work.model)
    first = SweepResult.load(out / "scored.parquet").table.set_index("coefficient")
    work.sweep(str(out), *options, "--coefficients", "1,2")
    done = CliRunner().invoke(app, ["score", str(out), "distinct_2"], catch_exceptions=False)
    grown = SweepResult.load(out / "scored.parquet").table.set_index("coefficient")
    for name in ("perplexity", "words"):
        assert grown[name][[0, 1]].tolist() == first[name].tolist() and grown[name][2].isna().all()
        assert f"{len(grown) // 3} of {len(grown)} rows have no {name}" in done.stderr
    work.ok("score", str(out), "perplexity", "--checkpoint", work.model)
    again = SweepResult.load(out / "scored.parquet").table.set_index("coefficient")
    assert again["perplexity"].notna().all() and again["words"].equals(grown["words"])
    work.sweep(str(out), *options, "--coefficients", "3")
    done = CliRunner().invoke(app, ["score", str(out), "distinct_2"], catch_exceptions=False)
    (kept,) = out.glob("scored-*.parquet")
    assert SweepResult.load(kept).table.set_index("coefficient").equals(again) and kept.name in done.stderr


def test_lens_prints_the_tokens_asked_for_or_the_best_one(work: Work) -> None:
    loaded = sk.load(work.model)
    rows = work.json("lens", work.model, "one two", "--token", "a", "--token", "b", "--layers", "1,3")
    table = sk.logit_lens(*loaded, ["one two"], ["a", "b"], layers=[1, 3])
    assert [row["rank"] for row in rows] == table["rank"].tolist()
    assert {row["rank"] for row in work.json("lens", work.model, "one two")} == {1}


@pytest.mark.parametrize(("command", "resumes"), [("sweep", True), ("demo", True), ("lens", False), ("steer", False)])
def test_an_interrupted_command_that_resumes_says_so(command: str, resumes: bool, leave, monkeypatch, capsys) -> None:
    monkeypatch.setattr("steerkit.cli.main.app", lambda **_: 130)
    assert leave(command, "m") == 130
    assert ("to resume" in capsys.readouterr().err) == resumes


def test_a_missing_value_of_a_table_is_null_in_json(capsys) -> None:
    rows = pd.DataFrame({"rank": pd.array([1, None], "Int64"), "prob": [0.5, float("nan")]})
    terminal.table("ranks", rows, as_json=True)
    assert json.loads(capsys.readouterr().out) == [{"rank": 1, "prob": 0.5}, {"rank": None, "prob": None}]


def test_bake_writes_a_checkpoint_whose_texts_are_the_steered_ones(work: Work, tmp_path: Path) -> None:
    vector = sk.SteeringVector.load(work.one_layer)
    out = tmp_path / "baked"
    assert work.json("bake", work.model, work.one_layer, "--coefficient", "20", "--out", str(out))["written"] == str(
        out
    )
    steering = sk.Steering(vector, 20.0, "all")
    wanted = sk.generate(*sk.load(work.model), ["hi"], max_new_tokens=6, steering=steering)
    assert sk.generate(*sk.load(str(out)), ["hi"], max_new_tokens=6) == wanted
    refused = CliRunner().invoke(app, ["bake", work.model, work.one_layer, "--out", str(out)])
    assert "expected a new or empty folder" in str(refused.exception)
    ablated = tmp_path / "ablated"
    work.ok("bake", work.model, work.one_layer, "--operation", "ablate", "--out", str(ablated))
    model = sk.load(str(ablated))[0]
    with sk.capture_resid(model, 2) as streams, torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    assert float((streams[2] @ vector.unit().layers[1]).abs().max()) < 1e-4


def test_sweep_takes_doses_and_score_is_over_them(work: Work, tmp_path: Path) -> None:
    out = tmp_path / "run"
    work.sweep(str(out), "--layers", "1", "--doses=-0.5,0.5")
    table = SweepResult.load(out).table
    assert set(table["dose"]) == {-0.5, 0.0, 0.5}
    assert table["relative_dose"].sub(table["dose"].abs()).abs().max() < 1e-12
    gains = work.json("score", str(out), "distinct_2")["gains"]["distinct_2"]
    assert {row["dose"] for row in gains} == {-0.5, 0.5}


def test_score_uses_the_adapter_for_perplexity_and_kl(work: Work, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model(), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)
    adapter, out = str(tmp_path / "adapter"), str(tmp_path / "run")
    model.save_pretrained(adapter)
    work.sweep(out, "--layers", "1", "--coefficients", "20", "--adapter", adapter, "--foreign")
    runner = CliRunner()
    refused = runner.invoke(app, ["score", out, "kl", "--checkpoint", work.model])
    assert "the sweep's own model" in str(refused.exception)
    scored = work.json("score", out, "perplexity", "kl", "--checkpoint", work.model, "--adapter", adapter)
    base = work.json("score", out, "perplexity", "--checkpoint", work.model)
    assert scored["curves"]["perplexity"] != base["curves"]["perplexity"]
    values = {row["coefficient"]: row["mean"] for row in scored["curves"]["kl"] if row["vector"] == "v"}
    assert values[0.0] == 0.0 < values[20.0]


def test_steer_needs_a_layer_only_for_a_vector_with_several(work: Work) -> None:
    short = ("--max-new-tokens", "4", "--coefficient", "20")
    one = work.json("steer", work.model, work.one_layer, "hi", *short)
    assert one == work.json("steer", work.model, work.vector, "hi", "--layer", "1", *short)
    assert one["layer"] == 1
    assert work.json("steer", work.model, work.vector, "hi", "--layer", "1+2", *short)["layer"] == [1, 2]
    assert work.json("steer", work.model, work.vector, "hi", "--layer", "all", *short)["layer"] == [0, 1, 2, 3]
    refused = CliRunner().invoke(app, ["steer", work.model, work.vector, "hi"])
    assert "Pass layer=" in str(refused.exception)


def test_sweep_takes_single_layers_sets_and_all(work: Work, tmp_path: Path) -> None:
    assert parse_layer_sets("8,12+14,all") == [8, (12, 14), "all"]
    assert (parse_layers("all"), parse_layers("3,1")) == ("all", [3, 1])
    work.sweep(str(tmp_path / "run"), "--layers", "1,2+3,all", "--coefficients", "20", "--random", "0")
    assert list(SweepResult.load(tmp_path / "run").table["layer"].unique()) == [1, "2+3", "all"]


# Checks before loading


@pytest.fixture
def no_loading(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr("steerkit.models.load.load", lambda *_, **__: pytest.fail("a model was loaded"))
    return


BEFORE = [
    ("inspect", "./none"),
    ("inspect", "m.gguf"),
    ("inspect", "hub/id", "--adapter", "./none"),
    ("inspect", "hub/id", "--dtype", "int3"),
    ("inspect", "hub/id", "--bits", "3"),
    ("inspect", "hub/id", "--backend", "keras"),
    ("doctor", "./none"),
    ("demo", "--model", "./none"),
    ("extract", "hub/id", "none.jsonl"),
    ("extract", "hub/id", "pairs.jsonl", "--position", "middle"),
    ("extract", "hub/id", "pairs.jsonl", "--layers=-1"),
    ("extract", "hub/id", "pairs.jsonl", "--out", "."),
    ("probe", "hub/id", "none.jsonl"),
    ("steer", "hub/id", "none.safetensors", "hi"),
    ("steer", "hub/id", "v.safetensors", "hi", "--layer", "x"),
    ("steer", "hub/id", "v.safetensors", "hi", "--coefficient", "nan"),
    ("steer", "hub/id", "v.safetensors", "hi", "--positions", "here"),
    ("steer", "hub/id", "v.safetensors", "hi", "--max-new-tokens", "0"),
    ("sweep", "hub/id", "none.safetensors", "--prompts", "q.jsonl"),
    ("sweep", "hub/id", "v.safetensors", "--prompts", "none.jsonl"),
    ("sweep", "hub/id", "v.safetensors", "--prompts", "pairs.jsonl", "--layers", "one"),
    ("sweep", "hub/id", "v.safetensors", "--prompts", "pairs.jsonl", "--coefficients", "1,inf"),
    ("score", "none", "perplexity", "--checkpoint", "hub/id"),
    ("report", "none", "--checkpoint", "hub/id"),
    ("play", "hub/id", "--vectors", "none"),
]
NEEDS_TORCH = [  # what only the content of a vector or a row shows
    ("steer", "hub/id", "v.safetensors", "hi", "--layer", "3"),
    ("steer", "hub/id", "deep.safetensors", "hi"),
    ("sweep", "hub/id", "v.safetensors", "--prompts", "q.jsonl", "--layers", "3"),
    ("sweep", "hub/id", "deep.safetensors", "--prompts", "q.jsonl"),
    ("sweep", "hub/id", "v.safetensors", "--prompts", "twice.jsonl"),
    ("sweep", "hub/id", "v.safetensors", "--prompts", "pairs.jsonl"),
    ("extract", "hub/id", "q.jsonl"),
]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    vector = sk.SteeringVector({1: torch.ones(32)})
    vector.save(tmp_path / "v.safetensors")
    sk.SteeringVector({1: vector.layers[1], 2: vector.layers[1]}).save(tmp_path / "deep.safetensors")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "positive": "yes", "negative": "no", "text": "x"}\n')
    (tmp_path / "q.jsonl").write_text('{"prompt": "p"}\n')
    (tmp_path / "twice.jsonl").write_text('{"prompt": "p", "id": 1}\n' * 2)
    return tmp_path


@pytest.mark.parametrize("arguments", [*BEFORE, *NEEDS_TORCH], ids=" ".join)
def test_inputs_are_checked_before_a_model_is_loaded(arguments, files, leave, no_loading, capsys) -> None:
    assert leave(*arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("steerkit: ") and len(shown.splitlines()) == 1


def test_a_missing_file_takes_under_two_seconds_to_report_and_imports_no_torch(files: Path) -> None:
    code = "import sys, time\nfrom steerkit.cli.main import main\nbad = []\n"
    code += f"for words in {BEFORE!r}:\n  sys.argv = ['steerkit', *words]\n  start = time.monotonic()\n"
    code += "  try:\n    main()\n  except SystemExit as left:\n    assert left.code == 2, words\n"
    code += "  if 'torch' in sys.modules or time.monotonic() - start > 2:\n    bad.append(words)\nprint(bad)"
    done = run("-c", code, cwd=files)
    assert done.stdout == "[]\n", done.stdout + done.stderr[-2000:]
    start = time.monotonic()
    alone = run("-m", "steerkit.cli", "steer", "hub/id", "none.safetensors", "hi", cwd=files)
    assert time.monotonic() - start < 2 and "none.safetensors" in alone.stderr


# JSON


def keys_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from keys_of(inner)


def test_json_keys_are_identifiers_and_values_are_never_nan(work: Work, tmp_path: Path) -> None:
    shown = {
        "inspect": work.json("inspect", work.model),
        "extract": work.json("extract", work.model, work.pairs, "--out", str(tmp_path / "w.safetensors")),
        "steer": work.json("steer", work.model, work.vector, "hi", "--layer", "1", "--max-new-tokens", "2"),
        "sweep": work.sweep(work.run),
        "score": work.json("score", work.run, "rouge_l", "distinct_2", "repeated_4grams"),
        "report": work.json("report", work.run),
        "probe": work.json("probe", work.model, work.pairs),
        "doctor": work.json("doctor", work.model),
        "convert": work.json("convert", work.vector, str(tmp_path / "v.gguf"), "--layers", "1,2"),
    }
    versions = shown["inspect"].pop("versions")  # its keys are package names
    assert "torch" in versions
    for command, value in shown.items():
        assert all(IDENTIFIER.fullmatch(key) for key in keys_of(value)), command
    assert set(shown["steer"]) == {"unsteered", "steered", "layer", "coefficient", "relative_dose"}
    assert set(shown["score"]) == {"curves", "gains"}
    assert set(shown["score"]["curves"]) == set(shown["score"]["gains"]) == {
        "rouge_l", "distinct_2", "repeated_4grams"
    }  # fmt: skip
    assert shown["sweep"]["texts_generated"] == 2 * 2 * 2 * 20 + 2 and shown["sweep"]["unsteered_texts"] == 2
    assert shown["extract"]["layers"] == [0, 1, 2, 3] and set(shown["extract"]["norms"]) == {"0", "1", "2", "3"}
    (converted,) = shown["convert"]["vectors"]
    assert (converted["name"], converted["written"]) == ("v", str(tmp_path / "v.gguf"))


def test_a_score_without_a_value_is_null_in_json(work: Work, tmp_path: Path) -> None:
    result = SweepResult.load(work.run)
    write_table(tmp_path / "table.parquet", result.table.assign(text=""), result.meta)
    curves = work.json("score", str(tmp_path), "distinct_2")["curves"]["distinct_2"]
    assert curves and all(row["mean"] is None for row in curves)


# Errors


def test_a_type_error_of_ours_is_an_internal_error_and_not_bad_input(leave, monkeypatch, capsys) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise TypeError("'NoneType' object is not subscriptable")

    monkeypatch.setattr("steerkit.models.load.load", broken)
    assert leave("inspect", "hub/id") == 1
    shown = capsys.readouterr().err
    assert shown.startswith("steerkit: internal error: TypeError: 'NoneType' object is not subscriptable.")
    assert "--traceback" in shown and len(shown.splitlines()) == 1


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), KeyError("layer"), AttributeError("x"), IndexError()])
def test_other_unexpected_errors_are_internal_too(error: Exception, leave, monkeypatch, capsys) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("steerkit.models.load.load", broken)
    assert leave("inspect", "hub/id") == 1
    assert "internal error" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [("--traceback", "inspect", "./none"), ("inspect", "./none", "--traceback"), ("inspect", "--traceback", "./none")],
)
def test_traceback_shows_where_any_error_was_raised(words, leave, capsys) -> None:
    assert leave(*words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and "check_checkpoint" in shown
    assert shown.splitlines()[-1].startswith("steerkit: expected a checkpoint at none")


def test_documented_errors_are_bad_input(leave, work: Work, monkeypatch, capsys) -> None:
    from steerkit.io.run_folder import ConfigurationChanged, RunFolderBusy

    errors = (RunFolderBusy("busy"), ConfigurationChanged("other"), ModuleNotFoundError("no extra"), OSError("gone"))
    for error in errors:

        def failing(*_: Any, error: Exception = error, **__: Any) -> Any:
            raise error

        monkeypatch.setattr("steerkit.models.load.load", failing)
        assert leave("inspect", work.model) == 2
        assert capsys.readouterr().err == f"steerkit: {error}\n"


def test_running_out_of_memory_names_the_options_that_help(leave, monkeypatch, capsys) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("steerkit.models.load.load", broken)
    assert leave("inspect", "hub/id") == 2
    assert "--dtype bfloat16" in capsys.readouterr().err


def test_a_broken_environment_is_not_reported_as_a_damaged_checkpoint(leave, work: Work, monkeypatch, capsys) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ImportError("Could not import module 'LlamaForCausalLM': operator torchvision::nms does not exist")

    monkeypatch.setattr("steerkit.models.load.load", broken)
    assert leave("inspect", work.model) == 2
    shown = capsys.readouterr().err
    assert "torchvision::nms does not exist" in shown and "whole checkpoint" not in shown


# Tables


def words_of(text: str) -> list[str]:
    return re.sub(r"[\u2500-\u257f|]", " ", text).split()


def test_tables_wrap_at_words_and_are_not_cut_at_80_columns(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    sentence = "inner layers equal output_hidden_states; its last entry is after the final norm, ours before it"
    rows = pd.DataFrame({"check": ["hidden states", "cache"], "state": ["note", "ok"], "detail": [sentence, "x" * 90]})
    terminal.table("doctor", rows, as_json=False)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80 and "\u2026" not in shown
    assert set(sentence.split()) <= set(words_of(shown)) and shown.count("x") == 90
    wide = pd.DataFrame({f"column_{i}": [f"value_{i}", f"other_{i}"] for i in range(20)})
    terminal.table("wide", wide, as_json=False)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80 and "\u2026" not in shown
    assert {cell for column in wide for cell in (column, *wide[column])} <= set(words_of(shown))


def test_a_table_in_a_terminal_joins_intervals_and_says_once_what_all_rows_share(capsys) -> None:
    rows = pd.DataFrame(
        {"layer": ["1", "2", "3"], "mean": [0.5, 0.25, 1.0], "low": [0.1, 0.2, 0.3], "high": [0.6, 0.7, 0.8], "n": 4}
    )
    terminal.table("curve", rows, as_json=False)
    shown = capsys.readouterr().out
    assert "0.500 [0.100, 0.600]" in shown and "n 4" in shown and "low" not in shown
    terminal.table("probe", rows.rename(columns={"low": "mean_low", "high": "mean_high"}), as_json=False)
    assert "1.000 [0.300, 0.800]" in capsys.readouterr().out


def swept() -> SweepResult:
    vectors = ("formal", "formal/random-0", "formal/random-1", "formal/shuffled-0")
    return SweepResult(sweep_tables.table(vectors=vectors, layers=(8, 12, 16)))


def test_score_prints_a_pivot_that_fits_one_screen(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    swept().save(tmp_path / "table.parquet")
    done = CliRunner().invoke(app, ["score", str(tmp_path), "distinct_2"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    means, gains = done.stdout.split("distinct_2 of formal: gain")
    assert max(map(len, lines)) <= 80
    assert len(means.splitlines()) <= 24 and len(gains.splitlines()) <= 24
    assert "2 random" in means and "1 shuffled" in means and "random-0" not in done.stdout


def test_a_pivot_has_the_means_of_the_vector_and_of_each_role_of_its_controls() -> None:
    result = swept()
    tables = pivots(result, ["trait"])
    means, gains = tables.values()
    assert means["layer"] == ["8"] * 3 + ["12"] * 3 + ["16"] * 3
    assert means["vector"] == ["formal", "2 random", "1 shuffled"] * 3
    assert list(means) == ["layer", "vector", "-2", "-0.5", "0", "0.5", "2"]
    table = result.table
    at = (table["layer"] == 12) & (table["coefficient"] == 2)
    controls = table["vector"].isin(["formal/random-0", "formal/random-1"])
    digits = digits_for(table["trait"])
    assert means["2"][4] == number_text(table[at & controls]["trait"].mean(), digits)
    assert means["2"][3] == number_text(table[at & (table["vector"] == "formal")]["trait"].mean(), digits)
    assert gains["over"] == ["0", "random", "shuffled"] * 3
    expected = result.gains("trait")
    row = expected[(expected["layer"] == 8) & (expected["coefficient"] == 2) & (expected["over"] == "random")].iloc[0]
    wanted = interval_text(row["gain"], row["low"], row["high"], min(3, digits_for(expected["gain"])))
    assert gains["2"][1].replace("\n", " ") == wanted


@pytest.mark.parametrize(
    ("numbers", "typographic", "text"),
    [
        ((0.42, 0.31, 0.53), False, "0.42 [0.31, 0.53]"),
        ((-0.001, -1.0, 0.5), False, "0.00 [-1.00, 0.50]"),
        ((-0.5, -1.0, 0.5), True, "\u22120.50 [\u22121.00, 0.50]"),
        ((0.5, float("nan"), float("nan")), True, "0.50"),
        ((float("nan"), 0.0, 1.0), False, "nan"),
        ((float("nan"), 0.0, 1.0), True, "\u2013"),
        ((0.5, None, None), False, "0.50"),
    ],
)
def test_an_interval_is_written_in_one_way(numbers: Any, typographic: bool, text: str) -> None:
    assert interval_text(*numbers, 2, typographic=typographic) == text


# One pass through the commands


def test_the_command_line_extracts_steers_sweeps_scores_and_probes(tmp_path) -> None:
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
    steering = ("steer", str(model), vector, "hi", "--layer", "1", "--max-new-tokens", "6")
    strong = json.loads(ok(*steering, "--coefficient", "30", "--json"))
    assert strong["unsteered"] != strong["steered"]
    assert (strong["layer"], strong["coefficient"]) == (1, 30)
    weak = json.loads(ok(*steering, "--coefficient", "15", "--json"))
    # the dose is of the unsteered text, and linear
    assert strong["relative_dose"] > 0 and strong["relative_dose"] == pytest.approx(2 * weak["relative_dose"], abs=0.03)
    dosed = json.loads(ok(*steering, "--dose=-0.5", "--json"))
    assert dosed["relative_dose"] == pytest.approx(0.5) and dosed["coefficient"] < 0
    again = json.loads(ok(*steering, f"--coefficient={dosed['coefficient']}", "--json"))
    assert again["steered"] == dosed["steered"] != dosed["unsteered"]
    shown = ok(*steering, "--coefficient", "30")
    assert re.search(r"layer 1, coefficient 30, dose \d+\.\d\d", " ".join(words_of(shown)))
    sweep = ok(
        "sweep",
        str(model),
        vector,
        "--prompts",
        prompts,
        "--layers",
        "1,2,1+2",
        "--random",
        "2",
        "--out",
        out,
        "--max-new-tokens",
        "4",
        "--json",
    )
    found = json.loads(sweep)
    assert (found["rows"], found["texts_generated"], found["unsteered_texts"]) == (
        3 * 5 * 2 * 3,
        3 * 4 * 2 * 3 + 2,
        2,
    )
    curve, gain = (part["rouge_l"] for part in json.loads(ok("score", out, "rouge_l", "--json")).values())
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


def test_commands_do_not_write_over_their_input_or_under_a_false_ending(work: Work, tmp_path: Path) -> None:
    pairs, vector = tmp_path / "pairs.jsonl", tmp_path / "v.safetensors"
    pairs.write_bytes(Path(work.pairs).read_bytes())
    vector.write_bytes(Path(work.vector).read_bytes())
    run = tmp_path / "run"
    shutil.copytree(work.run, run)
    before = {path: path.read_bytes() for path in (pairs, vector, run / "table.parquet")}
    for call, message in (
        (("extract", work.model, str(pairs), "--out", str(pairs)), "ends in .safetensors"),
        (("extract", work.model, str(pairs), "--out", str(tmp_path / "v.gguf")), "ends in .safetensors"),
        (("convert", str(vector), str(vector), "--layers", "1"), "another file to write than the input"),
        (("report", str(run), "--out", str(run / "table.parquet")), "ends in .html"),
        (("score", str(run), "distinct_2", "--dtype", "float64"), "no score needs a model"),
        (("report", str(run), "--dtype", "float64"), "expected --checkpoint with options"),
        (("doctor", "http://127.0.0.1:9", "--bits", "4"), "no options of loading for a server"),
    ):
        done = CliRunner().invoke(app, call)
        assert isinstance(done.exception, ValueError) and message in str(done.exception), call
    assert {path: path.read_bytes() for path in before} == before and not (tmp_path / "v.gguf").exists()


def test_the_next_command_can_be_pasted_and_bidi_controls_do_not_reach_the_terminal(work: Work, tmp_path: Path) -> None:
    out = tmp_path / "my run"
    shown = work.json("sweep", work.model, work.vector, "--prompts", work.prompts, "--layers", "1", "--coefficients",
                      "1", "--random", "0", "--max-new-tokens", "2", "--out", str(out))  # fmt: skip
    assert shlex.split(shown["next_command"])[-1] == str(out)
    assert terminal.plain("a\u202eb\u2028c\u200d") == "a\ufffdb\ufffdc\u200d"
