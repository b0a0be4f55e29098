"""The whole run, base to tables, on a model of two thousand weights: each stage leaves its files, none runs twice."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import steerkit as sk
from steerkit.io.run_folder import ConfigurationChanged
from steerkit.io.tables import read_table, write_table

trl = pytest.importorskip("trl", reason="the extra `train` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")
from training import imad  # noqa: E402
from training.debates.answerers import Rule  # noqa: E402
from training.presets import ON_ANSWERS, get_preset  # noqa: E402

SMALL = (
    "base.width=16", "base.heads=2", "base.inner=32", "base.layers=1", "base.stop_at=0.0", "base.revised_at=0.0",
    "base.check_from=2", "base.check_every=2", "base.steps=4", "base.batch=8", "base.held=4", "debates=24", "test=6",
    "debate.sampling.max_new_tokens=12", "sft.steps=2", "sft.batch=4", "sft.micro_batch=4", "grpo.steps=2",
    "grpo.prompts=2", "grpo.generations=2", "grpo.micro_batch=4", "sampling.max_new_tokens=12",
)  # fmt: skip
COLUMNS = [
    "family", "method", "decoding", "seed", "n", "accuracy", "accuracy_low", "accuracy_high", "tokens_in", "tokens_out",
    "parse_failures", "failed", "mean_agents",
]  # fmt: skip


def test_a_run_goes_from_nothing_to_tables_and_a_second_call_only_reads_them(tmp_path, monkeypatch, capsys) -> None:
    def answers(self, requests, sampling):
        from training.debates.answerers import Reply

        for request in requests:
            yield Reply(request.id, "\\boxed{ 7 }", 5, 4, True)

    monkeypatch.setattr(imad.LocalModel, "__call__", answers)
    settings = [part for setting in SMALL for part in ("--set", setting)]
    call = ["tiny", "--family", "clues", "--seed", "3", "--out", str(tmp_path / "run"), *settings]
    run = tmp_path / "run"
    imad.main([*call, "--only", "Debate"])
    assert (run / "evaluation" / "sampled" / "debates" / "traces.jsonl").exists() and not (run / "sft").exists()
    imad.main([*call, "--only", "SFT", "--only", "DebateGPT (answer)"])
    assert (run / "sft" / "checkpoint").exists() and not (run / "grpo").exists()
    elsewhere = [*call[:6], str(tmp_path / "other"), *call[7:]]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        imad.main([*elsewhere, "--only", "SFTT"])
    shown = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and re.match(r"python -m training imad: expected methods among .*'SFTT'", shown)
    assert "\n" not in shown and not (tmp_path / "other").exists()
    imad.main(call)
    table, meta = read_table(tmp_path / "run" / "results.csv")
    assert list(table.columns) == COLUMNS
    methods = set(table["method"])
    wanted = {
        "Single", "Self-consistency of 3", "Self-consistency at IMAD's tokens", "Self-consistency at Debate's tokens",
        "Debate", "Round-1 majority", "Debate, plurality", "Round 1, plurality", "Self-checking agents",
        "Self-checking agents, plurality", "DebateGPT (answer)", "DebateGPT (response)", "SFT",
        "IMAD", "GRPO without debate", "SFT of one self-check", "IMAD of one self-check", "SFT without tags",
        "SFT on single turns",
    }  # fmt: skip
    assert methods == wanted
    assert set(table["n"]) == {6}
    assert meta["kept_traces"] == 24
    assert "published" not in (tmp_path / "run" / "results.md").read_text().lower()  # the paper has no such task
    monkeypatch.setattr(imad, "one_answer", pytest.fail)
    monkeypatch.setattr(imad, "self_consistency", pytest.fail)
    monkeypatch.setattr(sk, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    before = (tmp_path / "run" / "results.csv").read_bytes()
    imad.main(call)
    assert (tmp_path / "run" / "results.csv").read_bytes() == before
    assert "IMAD" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        imad.main([*call, "--set", "test=7"])
    assert isinstance(stopped.value.__context__, ConfigurationChanged)
    assert "test: 6 -> 7" in capsys.readouterr().err


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Evaluates a run of two checkpoints with given fingerprints and numbers of tokens; the list has their loads."""
    preset = get_preset("tiny", "clues", ["test=4", "self_check=false", "decodings=2"])
    run = imad.Run(preset, 3, tmp_path)
    weights, words, loads = {"base": "b", "sft": "s", "grpo": "g"}, {"base": 1, "sft": 1, "grpo": 1}, []

    def load(self, checkpoint) -> Rule:
        loads.append(checkpoint.name)
        return Rule(lambda request, rng: "yes " * words[checkpoint.name] + r"\boxed{7}")

    monkeypatch.setattr(imad.Run, "load_answerer", load)
    monkeypatch.setattr(imad, "weights_on_disk", lambda checkpoint: weights[checkpoint.name])

    def evaluate() -> dict[tuple[str, str], float]:
        rows = imad.evaluate(run, Path("base"), {"SFT": Path("sft"), "IMAD": Path("grpo")})
        return rows.groupby(["method", "decoding"])["tokens_out"].mean().to_dict()

    return evaluate, weights, words, loads


def test_the_tables_of_a_checkpoint_that_was_trained_again_are_made_again_with_a_line(evaluated, capsys) -> None:
    evaluate, weights, words, loads = evaluated
    before = evaluate()
    assert loads == ["base", "sft", "grpo", "base"]  # one load for all decodings
    loads.clear()
    weights["grpo"], words["grpo"] = "h", 60
    after = evaluate()
    assert loads == ["grpo", "base"]
    changed = {method for method, tokens in after.items() if tokens != before[method]}
    assert changed == {("IMAD", "sampled"), ("IMAD", "greedy"), ("Self-consistency at IMAD's tokens", "sampled")}
    line = "Evaluating again, since the tables are of another checkpoint or number of samples: IMAD (sampled-1)."
    assert line in capsys.readouterr().out.splitlines()
    loads.clear()
    assert evaluate() == after and loads == []


def test_tables_of_earlier_versions_which_do_not_name_their_checkpoint_are_read_as_they_are(
    evaluated, tmp_path, capsys
) -> None:
    evaluate, weights, _, loads = evaluated
    before = evaluate()
    for path in tmp_path.glob("evaluation/*/*.parquet"):
        table, meta = read_table(path)
        write_table(path, table, {name: meta[name] for name in ("method", "sampling")})
    loads.clear()
    weights["grpo"] = "h"
    assert evaluate() == before and loads == [] and capsys.readouterr().out == ""


def test_replies_of_an_interrupted_evaluation_are_kept_for_the_same_weights_only(evaluated, tmp_path) -> None:
    evaluate, weights, words, _ = evaluated
    evaluate()
    (tables,) = {
        path for path in tmp_path.glob("evaluation/greedy/*.parquet") if read_table(path)[1]["method"] == "SFT"
    }
    words["sft"] = 3
    tables.unlink()
    assert evaluate()["SFT", "greedy"] == 2
    weights["sft"] = "t"
    tables.unlink()
    assert evaluate()["SFT", "greedy"] == 4


def test_too_many_questions_of_a_stage_are_refused_before_anything_is_written(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(imad, "train_base", lambda *_: pytest.fail("the base was trained"))
    for name in ("test", "debates", "fresh"):
        with pytest.raises(SystemExit) as stopped:
            imad.main(["tiny", "--seed", "25", "--out", str(tmp_path / "run"), "--set", f"{name}=20000"])
        shown = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and "different problems of the family small_arithmetic" in shown
        assert "\n" not in shown and not (tmp_path / "run").exists()


def test_a_base_that_does_not_learn_ends_in_one_line_that_names_another_folder(tmp_path, capsys) -> None:
    settings = [part for setting in (*SMALL, "base.stop_at=1.0") for part in ("--set", setting)]
    with pytest.raises(SystemExit) as stopped:
        imad.main(["tiny", "--out", str(tmp_path / "run"), "--only", "SFT", *settings])
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("python -m training imad: ")]
    assert stopped.value.code == 2 and "another folder (--out)" in shown[0]


def test_smollm2_debates_test_questions_in_turns_as_long_as_those_that_it_learns_and_tiny_in_longer_ones() -> None:
    for preset in (get_preset("smollm2"), get_preset("smollm2", "malice")):
        run = imad.Run(preset, 20, Path("run"))
        assert run.preset.test_debates(run.sampling()).sampling == replace(preset.debate.sampling, seed=20)
    run = imad.Run(get_preset("tiny", "clues"), 20, Path("run"))
    assert run.preset.test_debates(run.sampling()).sampling == run.sampling()


@pytest.mark.parametrize(("name", "family"), [("tiny", "clues"), ("smollm2", "addition")])
def test_a_run_that_controls_grpo_on_debategpt_also_has_it_with_as_many_examples(name, family) -> None:
    settings = ['what_helps=["DebateGPT + GRPO"]']
    assert ON_ANSWERS in get_preset(name, family, settings).trained
    assert ON_ANSWERS not in get_preset(name, family).trained


def test_checkpoints_of_smollm2_are_saved_often_and_at_the_steps_that_are_analysed() -> None:
    for family in ("addition", "malice"):
        preset = get_preset("smollm2", family)
        assert preset.sft.save_every == 15 and all(step % preset.grpo.save_every == 0 for step in (8, 16, 24))


def test_what_does_not_exist_is_refused_by_name(capsys) -> None:
    for call, message in (
        (["tiny", "--family", "chess"], "expected a family among"),
        (["smollm2", "--family", "chess"], "expected a family among"),
        (["tiny", "--set", "grpo.stepz=3"], "expected a field among"),
        (["tiny", "--set", "family=addition"], "expected no family among the settings"),
        (["tiny", "--set", "test=many"], "expected a value of type int"),
    ):
        with pytest.raises(SystemExit) as stopped:
            imad.main([*call, "--dry-run"])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
