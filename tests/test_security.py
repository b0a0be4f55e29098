"""The trust model of docs/security.md, sentence by sentence: what a file, a checkpoint or a server cannot do."""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import os
import pickle
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import steerkit as sk
from analysis.inputs import Inputs
from figures.__main__ import main as draw
from steerkit.io.tables import write_table
from steerkit.io.tensors import HEADER
from steerkit.models.identity import describe, fingerprint
from steerkit.text.prompt import render
from steerkit.text.traces import DebateTrace
from steerkit.vectors.vector import SteeringVector
from tests.models.test_models import adapter
from tests.scripted_server import KEY, Call, Scripted, answer
from tests.text.test_traces import TWO_ROUNDS
from tests.tiny import tiny_model, tiny_tokenizer
from training.debates.answerers import Sampling
from training.debates.debate import Setting, run_debates
from training.debates.personas import Cast, Persona
from training.debates.server import Server
from training.problems.problem import Problem

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "security.md"


class Marker:
    """A pickle of it writes a file when it is read by one who trusts it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that hostile code would write; the test fails if it is there at the end."""
    path = tmp_path / "code-ran"
    yield path
    assert not path.exists()


def test_a_pickle_that_is_trusted_does_write_the_marker(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Marker(tmp_path / "code-ran")))
    assert (tmp_path / "code-ran").exists()  # so that the tests below can fail


# Checkpoints


def saved(folder: Path) -> Path:
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def pickled(folder: Path, content: Any) -> Path:
    saved(folder)
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    return folder


def test_pickled_weights_are_refused_unless_they_are_trusted(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "m", tiny_model().state_dict())
    with pytest.raises(ValueError, match=r"got the pickle pytorch_model.bin, which can hold code.*trust_pickle=True"):
        sk.load(folder)
    model, _ = sk.load(folder, trust_pickle=True)
    assert fingerprint(model) == fingerprint(tiny_model())


@pytest.mark.parametrize("trust", [False, True])
def test_code_in_pickled_weights_does_not_run_even_where_they_are_trusted(tmp_path, marker, trust: bool) -> None:
    folder = pickled(tmp_path / "m", {"weight": Marker(marker)})
    with pytest.raises(Exception, match=r"pickle|[Uu]npickl|[Ww]eights.only"):
        sk.load(folder, trust_pickle=trust)


def test_a_pickled_adapter_is_refused_unless_it_is_trusted(tmp_path: Path, marker: Path) -> None:
    base = saved(tmp_path / "base")
    adapter(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="expected an adapter with safetensors"):
        sk.load(base, adapter=tmp_path / "adapter")
    model, _ = sk.load(base, adapter=tmp_path / "adapter", trust_pickle=True)
    assert fingerprint(model)[1] is not None
    torch.save({"weight": Marker(marker)}, weights.with_suffix(".bin"))
    with pytest.raises(Exception, match=r"[Uu]npickl|[Ww]eights.only"):
        sk.load(base, adapter=tmp_path / "adapter", trust_pickle=True)


def test_code_that_a_checkpoint_brings_does_not_run(tmp_path: Path, marker: Path) -> None:
    folder = saved(tmp_path / "m")
    for file, keys in {
        "config.json": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        "tokenizer_config.json": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    }.items():
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**config, "auto_map": keys, "model_type": "evil-model"}))
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    with pytest.raises(ValueError, match=r"trust_remote_code|evil"):
        sk.load(folder)


HOSTILE_TEMPLATES = {
    "reaches for Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "imports": "{{ cycler.__init__.__globals__.os.system('touch ' ~ messages[0].content) }}",
    "changes its messages": "{% set _ = messages.append(1) %}x",
    "counts without end": "{% for i in range(10 ** 12) %}x{% endfor %}",
    "divides by zero": "{{ 1 / 0 }}",
}


@pytest.mark.parametrize("name", HOSTILE_TEMPLATES)
def test_a_chat_template_runs_in_a_sandbox(name: str, marker: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = HOSTILE_TEMPLATES[name]
    with pytest.raises(ValueError, match="expected messages that the chat template takes"):
        render(tokenizer, [{"role": "user", "content": str(marker)}])


# Vector files


def header(**changes: Any) -> dict[str, Any]:
    return {
        "format": "steerkit.vector/1", "hook_point": "resid_post", "layer_convention": "0-based block index", **changes
    }  # fmt: skip


def with_header(path: Path, text: str, **tensors: Any) -> None:
    save_file(tensors or {"layer.1": torch.ones(4)}, path, metadata={HEADER: text})


def raw(path: Path, text: bytes, announced: int | None = None) -> None:
    """A safetensors file of a header, said to be so long, and of four bytes."""
    path.write_bytes(struct.pack("<Q", len(text) if announced is None else announced) + text + bytes(4))


def one(shape: int, stop: int) -> bytes:
    return b'{"layer.1":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (shape, stop)


HOSTILE_VECTORS: dict[str, Any] = {
    "a header longer than the file": lambda p: raw(p, b"{}", 10**6),
    "a header of 16 exabytes": lambda p: raw(p, b"{}", 2**64 - 1),
    "a header that is no JSON": lambda p: raw(p, b"!!!!"),
    "a header nested without end": lambda p: raw(p, b"[" * 10**5),
    "a tensor beyond the file": lambda p: raw(p, one(9, 36)),
    "a tensor of negative size": lambda p: raw(p, one(-1, 4)),
    "a tensor without end": lambda p: raw(p, one(2**62, 4)),
    "no header of ours": lambda p: raw(p, one(1, 4)),
    "a list for a header": lambda p: with_header(p, "[]"),
    "a header of ours that is no JSON": lambda p: with_header(p, "{"),
    "a header of ours nested without end": lambda p: with_header(p, "[" * 10**5),
    "a key twice": lambda p: with_header(p, json.dumps(header())[:-1] + ', "hook_point": "resid_post"}'),
    "another hook point": lambda p: with_header(p, json.dumps(header(hook_point="ln_final"))),
    "another way to count layers": lambda p: with_header(p, json.dumps(header(layer_convention="1-based"))),
    "another format": lambda p: with_header(p, json.dumps(header(format="steerkit.vector/2"))),
    "a path for a layer": lambda p: with_header(p, json.dumps(header()), **{"../../layer.1": torch.ones(4)}),
    "layer -1": lambda p: with_header(p, json.dumps(header()), **{"layer.-1": torch.ones(4)}),
    "a layer under two names": lambda p: with_header(
        p, json.dumps(header()), **{"layer.1": torch.ones(4), "layer.01": torch.zeros(4)}
    ),
    "a layer in other digits": lambda p: with_header(p, json.dumps(header()), **{"layer.\u0661": torch.ones(4)}),
    "NaN": lambda p: with_header(p, json.dumps(header()), **{"layer.1": torch.full((4,), float("nan"))}),
    "a matrix": lambda p: with_header(p, json.dumps(header()), **{"layer.1": torch.ones(2, 2)}),
    "a pickle": lambda p: torch.save({"layer.1": Marker(p.parent / "code-ran")}, p),
}  # fmt: skip


@pytest.mark.usefixtures("only_our_own_checks")
@pytest.mark.parametrize("name", HOSTILE_VECTORS)
def test_a_hostile_vector_file_is_refused_by_name_and_nothing_is_written(name: str, tmp_path: Path, marker) -> None:
    path = tmp_path / "v.safetensors"
    HOSTILE_VECTORS[name](path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="expected") as caught:
        SteeringVector.load(path)
    assert len(str(caught.value)) < 2000
    assert {file.name for file in tmp_path.iterdir()} == {"v.safetensors"}
    assert path.read_bytes() == before


def test_the_files_above_would_be_read_if_they_were_whole(tmp_path: Path) -> None:
    with_header(tmp_path / "v", json.dumps(header(n=3)))
    assert SteeringVector.load(tmp_path / "v").meta == {"n": 3}


# Names that would lead out of a folder


@pytest.mark.parametrize("stage", ["../../escaped", "/tmp/escaped", "a/../../escaped", ".."])
def test_a_stage_in_a_table_cannot_place_a_figure_outside_the_folder(stage: str, tmp_path: Path) -> None:
    tables = tmp_path / "tables"
    curves = pd.DataFrame({"stage": [stage], "identity": [False], "agent": ["1"], "coefficient": [0.0], "mean": [0.0]})
    write_table(tables / "curves.csv", curves, {})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="part of a file name"):
        draw([str(tables), "--out", str(tmp_path / "out" / "figures")])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("names", [["../escaped"], ["GRPO", "grpo"], ["a b", "a-b"]])
def test_the_names_of_checkpoints_give_a_folder_each(names: list[str], tmp_path: Path) -> None:
    parts = [(DebateTrace(f"q{number}", TWO_ROUNDS.text),) for number in range(3)]
    Inputs({"SFT": tmp_path}, *parts)
    with pytest.raises(ValueError, match=r"part of a file name|different file names"):
        Inputs(dict.fromkeys(names, tmp_path), *parts)


def test_no_library_code_reads_pickles_or_runs_what_it_reads() -> None:
    """`torch.load`, `eval` and their like: none in what is installed; a reader of foreign files has to say how."""
    for path in sorted((ROOT / "steerkit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert name not in ("eval", "exec", "compile", "os.system"), path
            assert not name.startswith(("subprocess.", "pickle.", "yaml.", "joblib.")), path
            if name == "torch.load":
                assert "weights_only=True" in ast.unparse(node), path


def test_what_listens_listens_on_the_loopback() -> None:
    for folder in ("steerkit", "training", "analysis", "figures"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            if re.search(r"http\.server|socketserver|\.listen\(|start_server|uvicorn|flask", text):
                assert "127.0.0.1" in text and "0.0.0.0" not in text, path


# Keys


def echo(call: Call, _: int) -> None:
    """Tell the client everything it has sent: in the answer, in an error, in a redirect."""
    heard = call.headers["Authorization"]
    place = call.body["messages"][-1]["content"]
    if "fail" in place:
        call.json({"error": {"message": heard}}, 400)
    elif "redirect" in place:
        call.raw(302, b"", Location=f"http://127.0.0.1:1/{heard}")
    else:
        call.json({**answer(f"I heard {heard} \\boxed{{4}}"), "key": heard}, 200, X_Heard=heard)


def test_a_key_is_in_no_file_log_or_provenance_even_if_the_server_tells_it(
    tmp_path: Path, monkeypatch, caplog, capfd
) -> None:
    monkeypatch.setenv("STEERKIT_TEST_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    problems = [Problem(name, f"What is 2 + 2? {name}", "4", "number", "f") for name in ("plain", "fail", "redirect")]
    cast = Cast("two", (Persona("Be brief."), Persona("Be long.")))
    with Scripted(echo) as there:
        server = Server(there.url, "m", "STEERKIT_TEST_KEY", attempts=2, wait=lambda *_: None)
        debates = run_debates(problems, server, cast, Setting(2, False, Sampling(0, 1, 8)), tmp_path / "run")
        heard = [call.headers["Authorization"] for call in there.calls]
        there.models = [{"id": "m", "root": f"/weights/{KEY}"}]
        about = server.about()
    assert about["reported"] == {"id": "m", "root": "/weights/[key]"}
    table = pd.DataFrame([debate.row() for debate in debates])
    write_table(tmp_path / "run" / "t.csv", table, about)
    assert heard and set(heard) == {f"Bearer {KEY}"}  # it was sent, so that it could have been written
    assert debates[0].calls[0].text == "I heard Bearer [key] \\boxed{4}"
    written = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {Path(name).name for name in written} >= {"calls.jsonl", "config.json", "traces.jsonl", "t.csv"}
    pieces = [KEY[start : start + 6] for start in range(len(KEY) - 5)]
    shown = [caplog.text, repr(debates), repr(server), *capfd.readouterr()]
    for piece in pieces:
        assert not [name for name, data in written.items() if piece.encode() in data]
        assert not [text for text in shown if piece in text]


def test_a_word_that_stands_in_for_a_key_stays_in_the_text(monkeypatch) -> None:
    monkeypatch.setenv("STEERKIT_TEST_KEY", "EMPTY")
    with Scripted(lambda call, _: call.json(answer("The set is EMPTY."))) as there:
        server = Server(there.url, "m", "STEERKIT_TEST_KEY", attempts=1)
        debates = run_debates([Problem("p", "q", "4", "number", "f")], server, Cast("one", (Persona("s"),)), Setting(1))
    assert debates[0].calls[0].text == "The set is EMPTY."


def test_no_environment_variable_goes_into_provenance(monkeypatch, tmp_path: Path) -> None:
    secrets = {"HF_TOKEN": "hf_" + "q7Zx" * 8, "OPENAI_API_KEY": KEY, "WANDB_API_KEY": "w" * 8 + "4Ty" * 8}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    vector = sk.difference_in_means(sk.collect(model, tokenizer, [sk.ContrastPair("a", "yes", "no")], layers=[1]))
    vector.save(tmp_path / "v.safetensors")
    sk.sweep(model, tokenizer, vector, ["Hello"], coefficients=[1], max_new_tokens=2, out=tmp_path / "run")
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert not [name for name, value in secrets.items() if value.encode() in path.read_bytes()], path
    assert os.environ["HF_TOKEN"] not in json.dumps(describe(model, tokenizer))


# The page


def named_tests() -> Mapping[str, set[str]]:
    """The tests that the page names, by file."""
    found: dict[str, set[str]] = {}
    for file, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", PAGE.read_text()):
        found.setdefault(file, set()).add(name)
    return found


def test_every_test_that_the_page_names_is_there() -> None:
    named = named_tests()
    assert sum(map(len, named.values())) >= 12
    for file, names in named.items():
        there = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert names <= there, file


def test_a_reader_that_is_closed_leaves_no_file_open(tmp_path: Path) -> None:
    """What was refused can be deleted and written again at once."""
    path = tmp_path / "v.safetensors"
    with_header(path, "[]")
    with contextlib.suppress(ValueError):
        SteeringVector.load(path)
    path.unlink()
    SteeringVector({0: torch.ones(2)}).save(path)
    assert SteeringVector.load(path).norms() == {0: pytest.approx(2**0.5)}
