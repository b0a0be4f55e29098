"""The script for GPU machines runs whole on a CPU with small sizes, and reports every part."""

from __future__ import annotations

import json
import math
import shlex

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import pack as packing
from benchmarks.gpu.measure import ratio
from benchmarks.gpu.pack import in_pieces
from benchmarks.gpu.recipe import METHODS
from benchmarks.gpu.sizes import CPU
from benchmarks.gpu.texts import byte_tokenizer, debates
from benchmarks.gpu.unpack import CUT, GSM8K, LARGER, commands, joined, unpack
from training import __main__ as training_command


def test_every_part_runs_on_a_cpu_or_says_why_not(tmp_path, capsys) -> None:
    small = [name for name in gpu.PARTS if name != "recipe"]  # the next test
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), "--parts", ",".join(small)]) == 0
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {name: part["state"] for name, part in parts.items()} == {
        "equivalence": "ran",
        "decoding": "ran",
        "capture": "ran",
        "static-cache": "skipped",
        "training": "ran",
        "recipe": "skipped",
    }
    assert parts["static-cache"]["reason"] == "CUDA graphs need a GPU"
    figures = [row for part in parts.values() for row in part.get("figures", [])]
    assert len(figures) >= 14 and all(math.isfinite(row["value"]) for row in figures)
    names = {row["figure"]: row for row in figures}
    assert {"engine steered / unsteered, seconds", "capture / bare forward, seconds"} <= set(names)
    assert names["GRPO step, 4 x 8 new tokens: mean length"]["value"] == 8
    assert {"SFT step, 2 x 128 tokens", "SFT step, 2 x 128 tokens: estimated peak"} <= set(names)
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"## {name}:" in page for name in parts) and "no figures to publish" in page


def test_the_recipe_trains_every_method_in_its_own_process_and_does_not_repeat_what_ended(tmp_path, capsys) -> None:
    call = ["--device", "cpu", "--out", str(tmp_path), "--parts", "recipe"]
    assert gpu.main(call) == 0
    part = json.loads((tmp_path / "gpu.json").read_text())["parts"]["recipe"]
    names = {row["figure"]: row["value"] for row in part["figures"]}
    assert {f"accuracy of {method}, training seed 0" for method in METHODS} <= set(names)
    assert names["share of the trainings that ended in time"] == 1.0
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "recipe").rglob("checkpoint")}
    assert len(written) >= 5  # base, SFT, IMAD, GRPO alone, DebateGPT and its GRPO
    assert gpu.main(call) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "recipe").rglob("checkpoint")} == written


def test_a_part_that_fails_is_reported_and_the_others_go_on(tmp_path, monkeypatch, capsys) -> None:
    def broken(sizes: object, device: object) -> list[dict[str, object]]:
        raise ValueError("no such kernel")

    monkeypatch.setattr(
        gpu, "PARTS", {"broken": broken, "whole": lambda *_: [{"figure": "f", "value": 1.0, "unit": ""}]}
    )
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts["broken"]["state"] == "failed" and "no such kernel" in parts["broken"]["reason"]
    assert parts["whole"]["state"] == "ran"


def test_no_part_starts_once_the_budget_is_spent_and_a_part_can_be_left_out(tmp_path, capsys) -> None:
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), "--budget", "-1", "--parts", "capture"]) == 0
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {part["state"] for part in parts.values()} == {"skipped"}
    assert "no time left" in parts["capture"]["reason"] and parts["decoding"]["reason"] == "not chosen"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_script_says_so(capsys) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "Pass --device cpu" in capsys.readouterr().err


def test_debates_of_a_benchmark_have_exactly_the_tokens_that_were_asked_for() -> None:
    from steerkit.text.tags import tags
    from training.train.checkpoints import with_tags
    from training.train.sft import SFT, encode_examples, examples

    tokenizer = byte_tokenizer()
    rows = examples(debates(tokenizer, [128, 200]), SFT())
    encoded = encode_examples(with_tags(tokenizer, tags(2, 1)), rows, frozenset({tokenizer.eos_token_id}))
    assert [len(row["input_ids"]) for row in encoded] == [128, 200]
    with pytest.raises(ValueError, match="expected at least"):
        debates(tokenizer, [5])


def test_a_ratio_of_paired_times_has_the_interval_of_student_s_t() -> None:
    found = ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    assert found["ratio"] == pytest.approx(2.0) and found["low"] == pytest.approx(found["high"])
    spread = ratio([2.0, 1.0, 4.0], [1.0, 1.0, 1.0])
    half = 4.303 * math.log(2) / math.sqrt(3)
    assert math.log(spread["high"] / spread["ratio"]) == pytest.approx(half, rel=1e-3)
    assert CPU.pairs == 3


def test_pieces_are_below_the_limit_and_join_to_what_was_packed() -> None:
    files = {"small": b"ab", "large": bytes(range(25)), "empty": b"", "last": b"xyz"}
    pieces = in_pieces(files, 10)
    assert max(sum(map(len, piece.values())) for piece in pieces) == 10 and len(pieces) == 3
    found: dict[str, bytes] = {}
    for piece in pieces:
        for name, data in piece.items():
            whole = name.partition(CUT)[0]
            found[whole] = found.get(whole, b"") + data
    assert found == files


def test_a_packed_kit_holds_source_wheels_and_weights_and_a_missing_piece_is_an_error(tmp_path, monkeypatch) -> None:
    weights = tmp_path / "model.gguf"
    weights.write_bytes(bytes(range(256)) * 4000)

    def download(packages, folder, python) -> None:
        assert python == "3.12" and "trl" in packages
        (folder / "trl-1-py3-none-any.zip").write_bytes(b"no wheel")

    monkeypatch.setattr(packing, "LIMIT", 500_000)
    pieces = packing.pack(tmp_path / "kit", weights, None, "3.12", download)
    assert len(pieces) > 2 and (pieces[0] / "unpack.py").exists()
    kit = unpack(tmp_path / "kit")
    assert (kit / "weights" / "model.gguf").read_bytes() == weights.read_bytes()
    assert (kit / "wheels" / "trl-1-py3-none-any.zip").read_bytes() == b"no wheel"
    assert (kit / "benchmarks" / "gpu" / "speed.py").exists() and (kit / "steerkit" / "__init__.py").exists()
    with pytest.raises(FileExistsError):
        packing.pack(tmp_path / "kit", weights, None, "3.12", download)
    assert len(commands(kit)) == 2
    (tmp_path / "kit" / "piece-2").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="Carry the missing ones"):
        joined(tmp_path / "kit")


def test_a_kit_with_the_larger_model_prints_commands_that_its_programs_accept(tmp_path, monkeypatch) -> None:
    for name in (LARGER, GSM8K):
        (tmp_path / "weights" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "weights" / name).touch()
    given = [shlex.split(line.partition(" -m training ")[2]) for line in commands(tmp_path)[2:]]
    assert [arguments[0] for arguments in given] == ["imad", "imad", "benchmark", "benchmark"]
    accepted = []
    monkeypatch.setattr("training.imad.dry_run", lambda preset, *_: accepted.append(preset.checkpoint) or "")
    monkeypatch.setattr("training.imad.run_all", lambda run, only: accepted.append(run.preset.checkpoint))
    for arguments in given[:2]:
        training_command.main(arguments)
    assert accepted == [str(tmp_path / "weights" / LARGER)] * 2
    for arguments in given[2:]:
        with pytest.raises(SystemExit):  # the files are empty
            training_command.main(arguments)
