"""Bad input on the command line: one line on stderr, exit code 2, no traceback, and every file as it was."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from steerkit.cli.main import main
from steerkit.io.json import read_json, write_json
from steerkit.show.terminal import facts, side_by_side, table
from steerkit.vectors.vector import SteeringVector
from tests.bad_input.cases import LAYER, LINE, LIST, PAIR, POSITION, Files, lay, push, row, tree
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
QUESTIONS = b'{"prompt": "one", "reference": "one"}\n{"prompt": "two", "reference": "two"}\n'


def vector_file(layers: Sequence[int] = (1,), **given: Any) -> bytes:
    vector = push(**given)
    with tempfile.TemporaryDirectory() as folder:
        SteeringVector(dict.fromkeys(layers, vector.layers[1]), vector.meta).save(Path(folder) / "v")
        return (Path(folder) / "v").read_bytes()


V = vector_file()
DEEP = vector_file(layers=(1, 2))
STEER = ("steer", "{model}", "v.safetensors")
SWEEP = ("sweep", "{model}", "v.safetensors", "--prompts", "q.jsonl", "--out", "run", "--max-new-tokens", "2")
ASKED: Files = {"v.safetensors": V, "q.jsonl": QUESTIONS}
COMMANDS: dict[str, tuple[Sequence[str], Files, str, str, str]] = {
    "inspect a file that is not there": (("inspect", "m.gguf"), {}, "expected a GGUF file", "there is none", "Check"),
    "inspect junk": (("inspect", "m.gguf"), {"m.gguf": PAIR}, "expected a whole GGUF file", "; got", "Fetch it again"),
    "inspect a folder that is not there": (
        ("inspect", "./none"), {}, "expected a checkpoint at none", "there is none", "Check the path"
    ),
    "inspect an empty folder": (
        ("inspect", "empty"), {"empty": None}, "expected a file at empty/config.json", "there is none", "Check"
    ),
    "inspect half a configuration": (
        ("inspect", "m"), {"m/config.json": b'{"a"'}, "expected JSON in m/config.json", "got something else", "Correct"
    ),
    "inspect weights that are cut off": (
        ("inspect", "{torn}"), {}, "expected a whole checkpoint", "got SafetensorError", "Fetch it again"
    ),
    "inspect fewer blocks than configured": (
        ("inspect", "{deeper}"), {}, "9 blocks", "got 45 tensors too few", "Correct its config.json"
    ),
    "inspect more blocks than configured": (
        ("inspect", "{shallower}"), {}, "2 blocks", "18 in further blocks", "Correct its config.json"
    ),
    "inspect another width than configured": (
        ("inspect", "{wider}"), {}, "expected a whole checkpoint", "got RuntimeError", "Fetch it again"
    ),
    "inspect a tokenizer of junk": (
        ("inspect", "{mute}"), {}, "expected a whole checkpoint", "got KeyError", "look at the file"
    ),
    "inspect a file": (
        ("inspect", "m.bin"), {"m.bin": b"?"}, "expected a folder, a .gguf file", "got the file m.bin", "Name its"
    ),
    "inspect a name with markup": (
        ("inspect", "./[/]"), {}, "expected a checkpoint at [/]", "there is none", "Check the path"
    ),
    "inspect with an adapter that is not there": (
        ("inspect", "{model}", "--adapter", "./none"), {}, "an adapter with safetensors", "none", "Check the path"
    ),
    "doctor a folder that is not there": (
        ("doctor", "./none"), {}, "expected a checkpoint at none", "there is none", "Check the path"
    ),
    "extract from pairs that are not there": (
        ("extract", "{model}", "p.jsonl"), {}, "expected a file at p.jsonl", "there is none", "Check the path"
    ),
    "extract from an empty file": (
        ("extract", "{model}", "p.jsonl"), {"p.jsonl": b""}, "expected at least one pair", "it is empty", "Write one"
    ),
    "extract from pairs that are cut off": (
        ("extract", "{model}", "p.jsonl"), {"p.jsonl": PAIR + PAIR[:20]}, "expected a JSON object", "line 2", LINE
    ),
    "extract from binary": (
        ("extract", "{model}", "p.jsonl"), {"p.jsonl": bytes(range(256))}, "expected a JSON object", "line 1", LINE
    ),
    "extract at no position": (
        ("extract", "{model}", "p.jsonl", "--position", "middle"), {"p.jsonl": PAIR, "vector.safetensors": b"mine"},
        POSITION, "got 'middle'", "Pass one of these as --position",
    ),
    "extract at layers in words": (
        ("extract", "{model}", "p.jsonl", "--layers", "one,two"), {"p.jsonl": PAIR},
        "expected layers as integers", "got 'one'", "Pass block indices such as 8,12,16, or all",
    ),
    "extract at layer -1": (
        ("extract", "{model}", "p.jsonl", "--layers=-1"), {"p.jsonl": PAIR},
        "expected layers as block indices from 0", "got -1", "Pass block indices",
    ),
    "extract at layer 4 of 4": (
        ("extract", "{model}", "p.jsonl", "--layers", "4"), {"p.jsonl": PAIR}, LAYER[0], "got 4", "the last layer is 3"
    ),
    "extract at two layers at once": (
        ("extract", "{model}", "p.jsonl", "--layers", "1+2"), {"p.jsonl": PAIR},
        "expected single layers", "got '1+2'", "Pass block indices",
    ),
    "extract at 3 bits": (
        ("extract", "{model}", "p.jsonl", "--bits", "3"), {"p.jsonl": PAIR}, "bits to be 4 or 8", "got 3", "omit --bits"
    ),
    "extract onto a folder": (
        ("extract", "{model}", "p.jsonl", "--out", "d"), {"p.jsonl": PAIR, "d": None},
        "expected a file to write", "got a folder", "Name a file in it",
    ),
    "steer with a vector that is not there": (
        (*STEER, "hi", "--layer", "1"), {}, "expected a steering vector", "there is no such file", ""
    ),
    "steer with pairs for a vector": (
        (*STEER, "hi", "--layer", "1"), {"v.safetensors": PAIR}, "expected a safetensors file", "; got", ""
    ),
    "steer at a layer that the vector has not": (
        (*STEER, "hi", "--layer", "3"), {"v.safetensors": V}, "expected layers among [1]", "got [3]", "Pass layers that"
    ),
    "steer with NaN": (
        (*STEER, "hi", "--layer", "1", "--coefficient", "nan"), {"v.safetensors": V},
        "expected a finite coefficient", "got nan", "another",
    ),
    "steer with a coefficient and a dose": (
        (*STEER, "hi", "--layer", "1", "--coefficient", "2", "--dose", "1"), {"v.safetensors": V},
        "expected a coefficient or a dose", "got 2.0 and dose=1.0", "Pass one",
    ),
    "ablate with a dose": (
        (*STEER, "hi", "--layer", "1", "--operation", "ablate", "--dose", "1"), {"v.safetensors": V},
        "expected a coefficient for 'ablate'", "got dose=1.0", "Pass a coefficient",
    ),
    "steer at a layer in words": (
        (*STEER, "hi", "--layer", "x"), {"v.safetensors": V}, "expected layers as integers", "got 'x'", "Pass block"
    ),
    "steer with several layers and no --layer": (
        (*STEER, "hi"), {"v.safetensors": DEEP}, "expected a layer, since the vector holds 2", "[1, 2]", "Pass layer=2"
    ),
    "steer in an unknown dtype": (
        (*STEER, "hi", "--layer", "1", "--dtype", "int3"), {"v.safetensors": V},
        "Invalid value for '--dtype'", "'int3' is not one of", "See --help",
    ),
    "steer at no positions": (
        (*STEER, "hi", "--layer", "1", "--positions", "here"), {"v.safetensors": V},
        "expected positions among", "got 'here'", "Choose one",
    ),
    "steer nothing": (
        (*STEER, "", "--layer", "1", "--verbatim"), {"v.safetensors": V}, "at least one character", "empty", "Write one"
    ),
    "steer for no tokens": (
        (*STEER, "hi", "--layer", "1", "--max-new-tokens", "0"), {"v.safetensors": V},
        "Invalid value for '--max-new-tokens'", "1", "See --help",
    ),
    "steer with a vector of another width": (
        (*STEER, "hi", "--layer", "1"), {"v.safetensors": vector_file(width=5)},
        "a vector of width 32", "got 5", "Extract it from this model",
    ),
    "steer with a vector of another model": (
        (*STEER, "hi", "--layer", "1"), {"v.safetensors": vector_file(model_fingerprint="b")},
        "expected a vector read from this model", "('b', None)", "Pass foreign=True",
    ),
    "sweep two vectors of one name": (
        ("sweep", "{model}", "v.safetensors", "w/v.safetensors", *SWEEP[3:], "--layers", "1"),
        {**ASKED, "w/v.safetensors": V}, "expected files with different names", "got ['v.safetensors'", "Rename one",
    ),
    "sweep prompts that are not there": (
        (*SWEEP, "--layers", "1"), {"v.safetensors": V}, "expected a file at q.jsonl", "there is none", "Check the path"
    ),
    "sweep prompts that are cut off": (
        (*SWEEP, "--layers", "1"), {**ASKED, "q.jsonl": QUESTIONS[:-5]}, "expected a JSON object", "line 2", LINE
    ),
    "sweep prompts in a list": (
        (*SWEEP, "--layers", "1"), {**ASKED, "q.jsonl": b'["one"]\n'}, "a JSON object", "got b'[\"one\"]'", LINE
    ),
    "sweep prompts of one id": (
        (*SWEEP, "--layers", "1"), {**ASKED, "q.jsonl": b'{"id": 1, "prompt": "a"}\n' * 2},
        "expected prompt ids that differ", "got ['1']", "Number them",
    ),
    "sweep no prompts": ((*SWEEP, "--layers", "1"), {**ASKED, "q.jsonl": b""}, LIST[0], "got []", LIST[1]),
    "sweep layers in words": (
        (*SWEEP, "--layers", "one,two"), ASKED, "expected layers as integers", "got 'one'", "Pass block indices"
    ),
    "sweep coefficients in words": (
        (*SWEEP, "--layers", "1", "--coefficients", "low,high"), ASKED,
        "expected floats with commas between", "got 'low,high'", "Write 1,2,3",
    ),
    "sweep coefficients and doses": (
        (*SWEEP, "--layers", "1", "--coefficients", "1", "--doses", "1"), ASKED,
        "expected --coefficients or --doses", "got both", "Pass one",
    ),
    "sweep doses of an ablation": (
        (*SWEEP, "--layers", "1", "--operation", "ablate", "--doses", "1"), ASKED,
        "expected a coefficient for 'ablate'", "got dose=1.0", "Pass a coefficient",
    ),
    "sweep a choice twice": (
        (*SWEEP, "--layers", "1", "--choices", "a,a"), ASKED, "expected texts that differ", "got 'a,a'", "Write"
    ),
    "sweep choices that are no JSON": (
        (*SWEEP, "--layers", "1", "--choices", "[a"), ASKED, "expected texts that differ", "got '[a'", "Write"
    ),
    "sweep numbers as choices": (
        (*SWEEP[:-2], "--layers", "1"), {**ASKED, "q.jsonl": b'{"prompt": "a", "choices": [1, 2]}\n'},
        "expected choices as a list of texts in q.jsonl, row 1", "got [1, 2]", "Write e.g.",
    ),
    "sweep choices with a seed and a length": (
        (*SWEEP, "--layers", "1", "--choices", "a,b", "--seed", "1"), ASKED,
        "expected no --max-new-tokens, --seed for choices", "scored and not generated", "Leave it out",
    ),
    "sweep no coefficients": (
        (*SWEEP, "--layers", "1", "--coefficients", ""), ASKED, "expected floats with commas between", "got ''", "Write"
    ),
    "sweep infinity": (
        (*SWEEP, "--layers", "1", "--coefficients", "1,inf"), ASKED, "a finite coefficient", "got inf", "another"
    ),
    "sweep a coefficient twice": (
        (*SWEEP, "--layers", "1", "--coefficients", "1,1.0"), ASKED,
        "expected coefficients that differ", "got [1.0, 1.0]", "List each once",
    ),
    "sweep no samples": (
        (*SWEEP, "--layers", "1", "--samples", "0"), ASKED,
        "Invalid value for '--samples'", "1", "See --help",
    ),
    "sweep beyond the context": (
        (*SWEEP, "--layers", "1", "--max-new-tokens", "999"), ASKED, "context of 256", "+ 999", "Shorten either"
    ),
    "sweep into a file": (
        (*SWEEP, "--layers", "1"), {**ASKED, "run": b"mine"}, "a folder for the run", "got a file", "another path"
    ),
    "sweep into another one's folder": (
        (*SWEEP, "--layers", "1"), {**ASKED, "run/config.json": b'{"seed": 7}'},
        "expected the configuration", "seed: 7 -> 0", "Use another folder",
    ),
    "score by an unknown score": (
        ("score", "run", "beauty"), {}, "expected scores among ['rouge_l'", "got ['beauty']", "Pass some of these"
    ),
    "score perplexity without a model": (
        ("score", "run", "perplexity"), {}, "expected a model for ['perplexity']", "got none", "Pass --checkpoint"
    ),
    "score a folder that is not there": (
        ("score", "run", "rouge_l"), {}, "expected a finished sweep", "there is none", "repeat the sweep"
    ),
    "score a sweep that is not finished": (
        ("score", "run", "rouge_l"), {"run/rows.jsonl": b"{}\n"}, "expected a finished sweep", "there is none",
        "repeat the",
    ),
    "score junk": (
        ("score", "run", "rouge_l"), {"run/table.parquet": PAIR}, "expected a table in", "got something else", "Write"
    ),
    "play at no port": (
        ("play", "{model}", "--vectors", "v.safetensors", "--port", "99999"), {"v.safetensors": V},
        "Invalid value for '--port'", "65535", "See --help",
    ),
    "serve at no port": (
        ("serve", "{model}", "--vectors", "d", "--port", "0"), {"d": None}, "Invalid value for '--port'", "1",
        "See --help",
    ),
    "probe one group": (
        ("probe", "{model}", "p.jsonl"), {"p.jsonl": row(group="g") * 6}, "groups as folds", "1 groups", "Read more"
    ),
    "probe at no position": (
        ("probe", "{model}", "p.jsonl", "--position", "2nd"), {"p.jsonl": PAIR}, POSITION, "got '2nd'", "Pass one"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint on disk, and such that are broken."""
    changes = {"deeper": {"num_hidden_layers": 9}, "shallower": {"num_hidden_layers": 2}, "wider": {"hidden_size": 64}}
    saved = {name: tmp_path_factory.mktemp(name) for name in ("model", "torn", "mute", *changes)}
    for name, folder in saved.items():
        tiny_model().save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        config = read_json(folder / "config.json")
        write_json(folder / "config.json", {**config, **changes.get(name, {})})
    weights = saved["torn"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (saved["mute"] / "tokenizer.json").write_text("{}")
    return saved


@pytest.fixture
def leave(checkpoints, tmp_path, monkeypatch) -> Callable[[Sequence[str]], object]:
    """Run the command line in this process and in a folder of its own: the exit code that it leaves with."""
    monkeypatch.chdir(tmp_path)

    def run(arguments: Sequence[str]) -> object:
        monkeypatch.setattr(sys, "argv", ["steerkit", *(part.format(**checkpoints) for part in arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_bad_input_says_so_in_one_line_and_leaves_with_2(name, leave, tmp_path, capsys) -> None:
    arguments, files, *parts = COMMANDS[name]
    lay(tmp_path, files)
    before = tree(tmp_path)
    assert leave(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (message,) = (line for line in shown.err.splitlines() if not line.startswith("loading "))  # shown after a second
    assert message.startswith("steerkit: ")
    for part in parts:
        assert part in message
    assert tree(tmp_path) == before


def test_a_port_in_use_is_found_before_the_model_is_loaded(leave, tmp_path, monkeypatch, capsys) -> None:
    lay(tmp_path, {"v.safetensors": V})
    monkeypatch.setattr("steerkit.cli.steer.load_model", lambda *_: pytest.fail("loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert leave(("play", "{model}", "--vectors", "v.safetensors", "--port", str(port))) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and f"expected a free port; 127.0.0.1:{port} cannot be used" in shown.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("fly",),
        ("steer",),
        ("steer", "m", "v", "hi", "--coefficient", "x"),
        ("sweep", "m", "v", "--prompts", "q", "--layers", "1", "--samples", "many"),
        ("extract", "m", "p", "--nothing"),
        ("probe", "m", "p", "--seed", "1.5"),
    ],
)
def test_a_command_that_was_misspelt_is_explained_and_leaves_with_2(arguments, leave, capsys) -> None:
    assert leave(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert shown.err.startswith("steerkit: ") and shown.err.strip().endswith("See --help.")


def test_a_process_of_its_own_says_the_same(tmp_path: Path) -> None:
    arguments, files, *parts = COMMANDS["score junk"]
    lay(tmp_path, files)
    command = [sys.executable, "-m", "steerkit.cli", *arguments]
    environment = {"PATH": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert all(part in done.stderr for part in parts)


def test_a_file_name_cannot_move_the_cursor(leave, capsys) -> None:
    assert leave(("extract", "m", "\x1b[2Jp\n.jsonl")) == 2
    line, newline, rest = capsys.readouterr().err.partition("\n")
    assert line.isprintable()
    assert (newline, rest) == ("\n", "")


def test_what_a_model_writes_cannot_act_on_the_terminal(capsys) -> None:
    side_by_side({"unsteered": "\x1b[31mred\x07", "steered": "two\n[bold]lines[/bold] \u202e"})
    table("[/]", pd.DataFrame({"[red]vector": ["[/x]", "\x9b31m"]}), as_json=False)
    facts({"checkpoint": "a\x1b]0;b"}, as_json=False)
    shown = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\x9b"} & set(shown)
    for kept in ("[31mred", "[bold]lines[/bold]", "[/]", "[red]vector", "[/x]"):
        assert kept in shown
