"""The script for GPU machines runs whole on a CPU with small sizes, and reports every part."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import equivalence
from benchmarks.gpu import pack as packing
from benchmarks.gpu import recipe as recipes
from benchmarks.gpu.measure import Figure, ratio
from benchmarks.gpu.merge import merged
from benchmarks.gpu.pack import in_pieces
from benchmarks.gpu.page import markdown
from benchmarks.gpu.parts import PARTS, Part, Settings, run_apart
from benchmarks.gpu.recipe import BASE, METHODS
from benchmarks.gpu.sizes import SMALL
from benchmarks.gpu.texts import byte_tokenizer, debates
from benchmarks.gpu.unpack import CUT, GSM8K, LARGER, SECONDS, SPEED, add, commands
from training import __main__ as training_command

FIGURE: Figure = {"figure": "f", "value": 1.0, "unit": ""}


def settings(folder: Path, device: str = "cpu") -> Settings:
    return Settings(device, False, None, None, folder / "work")


def _until_error(figures: Iterator[Figure]) -> Iterator[Figure]:
    with contextlib.suppress(RuntimeError):
        yield from figures


def test_every_part_runs_on_a_cpu(tmp_path, capsys) -> None:
    small = [name for name in PARTS if name != "recipe"]  # the next test
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), "--parts", ",".join(small)]) == 0
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: part["state"] for name, part in results["parts"].items()} == dict.fromkeys(small, "ran")
    assert {"commit", "python", "cuda", "torch", "peft", "trl", "accelerate"} <= set(results["machine"])
    figures = [row for part in results["parts"].values() for row in part["figures"]]
    assert all(math.isfinite(row["value"]) for row in figures)
    names = {row["figure"]: row for row in figures}
    assert {"prefill steered / unsteered, seconds", "capture / bare forward, seconds"} <= set(names)
    assert names["GRPO, checkpointing, 4 x 8 new tokens: mean length"]["value"] == 8
    assert names["static against no cache, largest deviation"]["value"] < 1e-3
    of_steps = {"SFT step, checkpointing, 4 x 128 tokens: the last of 3", "SFT step, 1 x 128 tokens: estimated peak"}
    assert of_steps <= set(names)
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"## {name}:" in page for name in small) and "no figures to publish" in page


def test_the_recipe_trains_every_method_in_its_own_process_and_does_not_repeat_what_ended(tmp_path, capsys) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    call = ["--device", "cpu", "--out", str(out), "--work", str(work), "--parts", "recipe"]
    assert gpu.main(call) == 0
    part = json.loads((out / "gpu.json").read_text())["parts"]["recipe"]
    names = {row["figure"]: row["value"] for row in part["figures"]}
    assert {f"accuracy of {method}, training seed 20" for method in (BASE, *METHODS)} <= set(names)
    assert names["share of the trainings and base models that ended in time"] == 1.0
    assert {path.name for path in out.iterdir()} == {"gpu.json", "gpu.md"}
    written = {path: path.stat().st_mtime_ns for path in work.rglob("checkpoint")}
    assert len(written) >= 5  # base, SFT, IMAD, GRPO alone, DebateGPT and its GRPO
    assert gpu.main(call) == 0
    assert {path: path.stat().st_mtime_ns for path in work.rglob("checkpoint")} == written


def test_a_training_that_fails_is_named_and_the_figures_of_the_others_are_kept(tmp_path, monkeypatch) -> None:
    pytest.importorskip("trl", reason="the extra `train` is not installed")

    def train_all(*_: object) -> Iterator[tuple[str, int, Path]]:
        for seed, right in ((20, 0.5), (21, 0.7)):
            path = tmp_path / f"{seed}.json"
            path.write_text(json.dumps({"accuracy": right, "questions": 6, "seconds": 1.0}))
            yield "IMAD", seed, path
        (tmp_path / "22.log").write_text("no memory left")
        yield "IMAD", 22, tmp_path / "22.json"

    monkeypatch.setattr(recipes, "train_all", train_all)
    monkeypatch.setattr(recipes, "_debates", lambda *_: tmp_path)
    sizes = replace(SMALL, recipe_seeds=(20, 21, 22))
    with pytest.raises(RuntimeError, match="1 failed: IMAD, training seed 22: no memory left"):
        list(recipes.recipe(sizes, torch.device("cpu")))
    figures = list(_until_error(recipes.recipe(sizes, torch.device("cpu"))))
    values = {row["figure"]: row["value"] for row in figures}
    assert values["accuracy of IMAD, training seed 21"] == 0.7
    assert values["accuracy of IMAD, mean over training seeds"] == pytest.approx(0.6)


def test_trainings_start_seed_by_seed_and_at_most_six_at_once(tmp_path, monkeypatch) -> None:
    started, alive = [], set()

    class Child:
        def __init__(self, command: list[str], **_: object) -> None:
            self.key = command[5:7]
            started.append((command[6], int(command[5])))
            alive.add(self)
            assert len(alive) <= 6

        def poll(self) -> int:
            alive.discard(self)
            return 0

    (tmp_path / "traces").touch()
    monkeypatch.setattr(recipes.subprocess, "Popen", Child)
    sizes = replace(SMALL, recipe_seeds=(20, 21, 22, 23), folder=tmp_path / "work")
    list(recipes.train_all(sizes, torch.device("cpu"), tmp_path / "traces", math.inf))
    first = [(method, seed) for seed in (20, 21, 22, 23) for method in METHODS[:2]]
    assert started == [
        *first,
        *((BASE, seed) for seed in range(20, 24)),
        *((METHODS[2], seed) for seed in range(20, 24)),
    ]


def test_a_part_that_fails_keeps_its_figures_and_the_others_go_on(tmp_path, monkeypatch, capsys) -> None:
    def broken(*_: object) -> Iterator[Figure]:
        yield FIGURE
        raise ValueError("no such kernel")

    monkeypatch.setitem(PARTS, "decoding", Part(broken, 1, 1))
    monkeypatch.setitem(PARTS, "capture", Part(lambda *_: iter([FIGURE]), 1, 1))
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), "--parts", "decoding,capture"]) == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts["decoding"]["state"] == "failed" and "no such kernel" in parts["decoding"]["reason"]
    assert parts["decoding"]["figures"] == [FIGURE] and parts["capture"]["state"] == "ran"


def test_a_part_starts_only_if_its_expected_seconds_are_left(tmp_path, monkeypatch, capsys) -> None:
    ran = []
    monkeypatch.setattr(gpu, "run_apart", lambda name, *_: ran.append(name) or {"state": "ran", "figures": []})
    results = {"machine": gpu.machine(settings(tmp_path), "0"), "parts": {}}
    gpu.run_all(["grpo", "capture"], settings(tmp_path, device="cuda"), 40.0, results, tmp_path)
    assert ran == ["capture"]  # 32 s, and first in the order of the parts
    assert results["parts"]["grpo"]["state"] == "skipped"
    assert results["parts"]["grpo"]["reason"] == "expected 120 s; 40 s are left"


def test_all_parts_without_weights_start_where_each_takes_what_is_expected() -> None:
    assert sum(PARTS[name].seconds for name in SPEED.split(",")) <= SECONDS - 5


def test_the_recipe_is_skipped_without_weights_or_a_reader_of_them_and_a_wrong_path_fails(
    tmp_path, monkeypatch, capsys
) -> None:
    call = ["--device", "cpu", "--out", str(tmp_path), "--work", str(tmp_path / "work"), "--parts", "recipe"]
    sizes = replace(SMALL, recipe=("smollm2", "addition", ()))
    monkeypatch.setattr("benchmarks.gpu.parts.sizes_for", lambda *_: sizes)

    def absent() -> Path:
        raise FileNotFoundError("expected SmolLM2")

    monkeypatch.setattr("steerkit.demo.checkpoint.default_checkpoint", absent)
    assert gpu.main(call) == 0
    monkeypatch.setattr("steerkit.demo.checkpoint.default_checkpoint", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(recipes, "find_spec", lambda name: None)
    assert gpu.main(call) == 0
    part = json.loads((tmp_path / "gpu.json").read_text())["parts"]["recipe"]
    assert part["state"] == "skipped" and "needs the package gguf" in part["reason"]
    assert gpu.main([*call, "--checkpoint", str(tmp_path / "nowhere")]) == 1


def test_the_memory_of_a_grpo_step_is_that_of_the_dry_run(monkeypatch) -> None:
    pytest.importorskip("trl", reason="the extra `train` is not installed")
    from benchmarks.gpu import training

    monkeypatch.setattr(training, "rollouts", lambda *_, **__: 2**40)
    figures = {row["figure"]: row["value"] for row in training.grpo_step(SMALL, torch.device("cpu"))}
    name = "GRPO, checkpointing, 4 x 8 new tokens: estimated peak"
    assert figures[name] == pytest.approx(1.1 * 1024)


def test_a_part_in_its_own_process_is_stopped_at_its_limit_and_reports_its_figures_otherwise(tmp_path) -> None:
    log, seen = tmp_path / "log.txt", []
    stopped = run_apart("capture", settings(tmp_path), 0.3, seen.append, log)
    assert stopped["state"] == "failed" and stopped["reason"].startswith("stopped after 0 s") and not seen
    ended = run_apart("capture", settings(tmp_path), 300.0, seen.append, log)
    assert ended["state"] == "ran" and len(ended["figures"]) == 3, log.read_text()
    assert log.read_text().startswith("# capture\n")


def test_equivalences_record_a_deviation_above_its_limit_and_fail_after_the_last(monkeypatch) -> None:
    monkeypatch.setattr(equivalence, "LIMITS", {torch.float32: -1.0, torch.bfloat16: 5e-2})
    figures = []
    with pytest.raises(AssertionError, match="float32"):
        for figure in equivalence.equivalences(SMALL, torch.device("cpu")):
            figures.append(figure)
    assert len(figures) == 8 and [row["holds"] for row in figures] == [False] * 3 + [True] * 5


def test_files_of_several_calls_are_merged_and_the_last_run_of_a_part_counts() -> None:
    def call(state: str, value: float, commit: str, **machine: str) -> dict[str, object]:
        figures = [{**FIGURE, "value": value}] if value else []
        part = {"state": state, "figures": figures}
        return {"machine": {"device": "H200", "commit": commit, **machine}, "parts": {"grpo": part}}

    calls = [call("failed", 1.0, "a"), call("ran", 2.0, "b"), call("skipped", 0.0, "c")]
    found = merged(calls)
    assert found["parts"]["grpo"]["figures"][0]["value"] == 2.0
    assert "Commit b." in markdown(found) and found["machine"]["commit"] == "a"
    with pytest.raises(ValueError, match="they differ in"):
        merged([calls[0], call("ran", 1.0, "a", torch="2")])


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
    assert SMALL.pairs == 3


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


def test_a_kit_is_joined_from_its_pieces_and_a_missing_or_changed_one_is_reported(tmp_path, monkeypatch) -> None:
    weights = tmp_path / "model.gguf"
    weights.write_bytes(bytes(range(256)) * 4000)

    def download(packages, folder, python) -> None:
        assert python == "3.12" and "trl" in packages
        (folder / "trl-1-py3-none-any.zip").write_bytes(b"no wheel")

    monkeypatch.setattr(packing, "LIMIT", 500_000)
    first, *rest = packing.pack(tmp_path / "pieces", weights, None, "3.12", download)
    assert len(rest) == 2
    kit = tmp_path / "kit"
    assert add(first, kit) == ["weights/model.gguf"] and len(commands(kit)) == 1
    assert (kit / "wheels" / "trl-1-py3-none-any.zip").read_bytes() == b"no wheel"
    assert add(rest[1], kit) == ["weights/model.gguf"]  # any order
    assert add(rest[0], kit) == []
    assert (kit / "weights" / "model.gguf").read_bytes() == weights.read_bytes() and len(commands(kit)) == 2
    with pytest.raises(FileExistsError):
        packing.pack(tmp_path / "pieces", weights, None, "3.12", download)
    changed = next((rest[1] / "weights").iterdir())
    changed.write_bytes(bytes(changed.stat().st_size))
    with pytest.raises(ValueError, match="carry all pieces"):
        for piece in (first, *rest):
            add(piece, tmp_path / "other")
    with pytest.raises(ValueError, match="expected a piece"):
        add(tmp_path, kit)


def test_commands_of_a_kit_have_absolute_paths_that_a_shell_and_the_script_read(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my kit" / "weights").mkdir(parents=True)
    for name in ("model.gguf", "traces.jsonl"):
        (tmp_path / "my kit" / "weights" / name).touch()
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "machine", lambda *_: {"device": "H200", "commit": "0"})
    asked = []
    monkeypatch.setattr(gpu, "run_all", lambda chosen, settings, *_: asked.append((chosen, settings)))
    for line in commands(Path("my kit")):
        assert shlex.split(line)[:2] == ["env", f"PYTHONPATH={tmp_path / 'my kit' / 'site'}"]
        assert gpu.main(shlex.split(line.partition(" -m benchmarks.gpu ")[2])) == 0
    assert [name for chosen, _ in asked for name in chosen] == list(PARTS)
    assert asked[1][1].checkpoint == tmp_path / "my kit" / "weights" / "model.gguf"
    assert asked[1][1].debates == tmp_path / "my kit" / "weights" / "traces.jsonl"


def test_a_kit_with_the_larger_model_prints_commands_that_its_programs_accept(tmp_path, monkeypatch) -> None:
    for name in (LARGER, GSM8K):
        (tmp_path / "weights" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "weights" / name).touch()
    given = [shlex.split(line.partition(" -m training ")[2]) for line in commands(tmp_path)[1:]]
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
