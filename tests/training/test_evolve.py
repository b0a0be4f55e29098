"""Debate, Train, Evolve: labels are the debates' majority, each round debates anew, and the best one is returned."""

from __future__ import annotations

from dataclasses import replace

import pytest

from training.debates.answerers import Rule, Sampling
from training.debates.debate import Setting, run_debates
from training.debates.personas import Cast, Persona
from training.problems.families import addition

pytest.importorskip("trl", reason="the extra `train` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")
from steerkit.io.json import read_json, write_json  # noqa: E402
from steerkit.io.rows import read_rows  # noqa: E402
from steerkit.io.run_folder import ConfigurationChanged  # noqa: E402
from tests.training.test_training import grpo, model_and_tokenizer  # noqa: E402
from training.train import evolve as module  # noqa: E402
from training.train.checkpoints import save  # noqa: E402
from training.train.evolve import Evolve, evolve, majority_labels  # noqa: E402

COPIES = Cast("copies", (Persona("You are careful."),) * 3)
SETTING = Setting(sampling=Sampling(max_new_tokens=8))


def test_a_label_is_the_majority_right_or_wrong_and_a_problem_without_one_is_left_out(tmp_path) -> None:
    right, wrong, none = addition(3, 0, "train")
    votes = {right.id: [right.gold] * 3, wrong.id: ["7", "7", wrong.gold], none.id: ["1", "2", "3"]}

    def answer(request, rng) -> str:
        problem, _, agent = request.id.rsplit("/", 2)
        return rf"\boxed{{{votes[problem][int(agent.removeprefix('agent-')) - 1]}}}"

    run_debates([right, wrong, none], Rule(answer), COPIES, replace(SETTING, rounds=1), tmp_path)
    labelled = majority_labels([right, wrong, none], tmp_path)
    assert [(one.id, one.gold) for one in labelled] == [(right.id, right.gold), (wrong.id, "7")]
    assert labelled[1].question == wrong.question
    with pytest.raises(ValueError, match="expected debates with a majority"):
        majority_labels([none], tmp_path)


@pytest.fixture
def start(tmp_path):
    return save(*model_and_tokenizer(), tmp_path / "start")


def run(start, out, shares, first=None, rounds=3, cast=COPIES, held=10):
    """Evolve where the checkpoint of round r answers this share of the validation problems rightly."""
    problems, held = addition(6, 0, "train"), addition(held, 0, "validation")
    gold = {problem.id: problem.gold for problem in held}
    loaded = []

    def load(checkpoint):
        number = int(str(checkpoint).rpartition("round-")[2][:1] or 0) if "round-" in str(checkpoint) else 0
        loaded.append(number)
        right = set(list(gold)[: round(len(gold) * shares[number])])

        def answer(request, rng) -> str:
            problem = request.id.split("/round-")[0].removesuffix("/0")
            return rf"\boxed{{{gold[problem] if problem in right else number}}}"

        return Rule(answer)

    setting = Evolve(rounds, 0.05, replace(grpo(), steps=2, prompts=2, generations=2, micro_batch=4, save_every=2))
    return evolve(start, problems, held, cast, SETTING, setting, out, first, load), loaded


def test_each_round_debates_by_the_last_checkpoint_and_a_round_that_gains_little_ends_the_training(
    start, tmp_path, monkeypatch
) -> None:
    best, loaded = run(start, tmp_path / "run", (0.2, 0.6, 0.5, 1.0))
    assert best == tmp_path / "run" / "round-1" / "grpo" / "checkpoint"  # round 2 was worse, round 3 never ran
    log = read_json(tmp_path / "run" / "evolve.json")
    assert log[0] == {"round": 0, "accuracy": 0.2}
    assert [(row["round"], row["accuracy"], row["labels"]) for row in log[1:]] == [(1, 0.6, 6), (2, 0.5, 6)]
    assert [row["steps"] for row in log[1:]] == [2, 2]  # what was made, not the steps of three rounds
    assert loaded == [0, 0, 1, 1, 2]  # measured and debated by the start, then by round 1, then measured only
    second = read_rows(tmp_path / "run" / "round-2" / "debates" / "debates.jsonl")
    assert {row["answer"] for row in second} == {"1"}
    rewarded = read_rows(tmp_path / "run" / "round-1" / "grpo" / "log.jsonl")
    assert {row["format"] for row in rewarded} == {0.0}
    monkeypatch.setattr(module, "run_debates", pytest.fail)
    assert run(start, tmp_path / "run", (0.2, 0.6, 0.9, 1.0)) == (best, [])  # a rounding changes no finished run


def test_the_accuracies_of_finished_rounds_are_on_disk_and_not_measured_again(start, tmp_path, monkeypatch) -> None:
    class Killed(Exception):
        pass

    def train(model, tokenizer, problems, grpo, out):
        if out.parent.name == "round-2" and killed:
            raise Killed
        (out / "checkpoint").mkdir(parents=True, exist_ok=True)
        return out / "checkpoint"

    monkeypatch.setattr(module, "train_grpo", train)
    monkeypatch.setattr(module, "loaded", lambda checkpoint: (None, None))
    shares, file, killed = (0.2, 0.6, 0.7, 0.7), tmp_path / "run" / "evolve.json", True
    with pytest.raises(Killed):
        run(start, tmp_path / "run", shares)
    assert [(row["round"], row["accuracy"]) for row in read_json(file)] == [(0, 0.2), (1, 0.6)]
    killed = False
    assert run(start, tmp_path / "run", shares)[1] == [2, 2, 3]  # measured and debated, then measured
    write_json(file, read_json(file)[1:])  # as earlier versions wrote it
    assert run(start, tmp_path / "run", shares)[1] == [0] and len(read_json(file)) == 4
    (tmp_path / "run" / "round-2" / "grpo" / "checkpoint").rmdir()
    assert run(start, tmp_path / "run", (0.2, 0.6, 0.6))[1] == [2]  # trained again
    assert [row["accuracy"] for row in read_json(file)] == [0.2, 0.6, 0.6]


@pytest.mark.parametrize("before", [2, 5, 7, 29, 58])
def test_a_gain_of_one_answer_in_a_hundred_goes_on_whatever_the_accuracy(before, start, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "train_grpo", lambda model, tokenizer, problems, grpo, out: out / "checkpoint")
    monkeypatch.setattr(module, "loaded", lambda checkpoint: (None, None))
    shares = [before / 100, (before + 1) / 100, (before + 2) / 100]
    real = Evolve
    monkeypatch.setitem(run.__globals__, "Evolve", lambda rounds, least, grpo: real(rounds, 0.01, grpo))
    run(start, tmp_path / "run", shares, rounds=2, held=100)
    assert [row["round"] for row in read_json(tmp_path / "run" / "evolve.json")] == [0, 1, 2]


def test_another_cast_or_other_problems_are_another_run(start, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "train_grpo", lambda model, tokenizer, problems, grpo, out: out / "checkpoint")
    monkeypatch.setattr(module, "loaded", lambda checkpoint: (None, None))
    run(start, tmp_path / "run", (0.2, 0.6), rounds=1)
    other = Cast("pair", COPIES.personas[:2])
    for changed in ({"cast": other}, {"held": 9}, {"rounds": 2}):
        with pytest.raises(ConfigurationChanged):
            run(start, tmp_path / "run", (0.2, 0.6, 0.6), **{"rounds": 1, **changed})


def test_finished_debates_of_the_start_are_the_first_round_s(start, tmp_path) -> None:
    run_debates(addition(6, 0, "train"), Rule(lambda request, rng: r"\boxed{5}"), COPIES, SETTING, tmp_path / "debates")
    run(start, tmp_path / "run", (0.0, 0.0), tmp_path / "debates", rounds=1)
    assert not (tmp_path / "run" / "round-1" / "debates").exists()
    with pytest.raises(ValueError, match="expected at least one round"):
        Evolve(rounds=0)


def test_all_rounds_share_the_steps_of_one_training() -> None:
    assert Evolve.sharing(replace(grpo(), steps=150), problems=2500).grpo.steps == 50
    by_epochs = Evolve.sharing(replace(grpo(), epochs=3.0, prompts=2), problems=10, rounds=2)
    assert by_epochs.rounds == 2 and by_epochs.grpo.steps_for(8) == 8  # 3 x 10 / 2 / 2, whatever the labels
