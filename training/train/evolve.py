"""Debate, Train, Evolve (arXiv 2505.15734): GRPO on the debates' majority answers, by the model that debated; repeated.

No right answer is used in training, and no debate is learned: the text of the policy is a single answer. `evolve` says
where it differs from the published training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from steerkit.io.files import sha256
from steerkit.io.json import canonical_json, read_json, write_json
from steerkit.io.ranks import in_first_process
from steerkit.io.rows import read_rows
from steerkit.io.run_folder import run_folder
from training.debates.answerers import LocalModel, loaded
from training.debates.debate import DEBATES, Setting, run_debates
from training.debates.personas import Cast
from training.debates.shared import Shared
from training.evaluate.methods import one_answer
from training.problems.problem import Problem
from training.toy.worlds import bare
from training.train.grpo import GRPO, train_grpo

LOG = "evolve.json"
HELD = 100
"""Validation problems on which each round is measured."""


@dataclass(frozen=True)
class Evolve:
    """Settings of Debate, Train, Evolve.

    Args:
        rounds: rounds of debate and training at most, as published 3.
        least: a round that raises the accuracy on the validation problems by less ends the training; published 0.01.
        grpo: settings of each round's GRPO. Tags are not rewarded, whatever `format` is.
    """

    rounds: int = 3
    least: float = 0.01
    grpo: GRPO = GRPO()  # noqa: RUF009  frozen

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"expected at least one round; got {self.rounds}. Pass rounds=1 or more.")

    @classmethod
    def sharing(cls, grpo: GRPO, problems: int, rounds: int = 3) -> Evolve:
        """Return the settings in which all rounds together have the steps of one GRPO training.

        A training that stops early has fewer: `evolve.json` has the steps of each round.

        Args:
            grpo: the settings of that training.
            problems: number of its problems.
            rounds: rounds at most.

        Example:
            >>> Evolve.sharing(GRPO(steps=150), problems=2500).grpo.steps
            50
        """
        return cls(rounds, grpo=replace(grpo, epochs=None, steps=max(1, round(grpo.steps_for(problems) / rounds))))


def majority_labels(problems: Sequence[Problem], debates: str | Path) -> list[Problem]:
    """Return the problems with the debates' strict majority in place of the right answer; those without are left out.

    Args:
        problems: problems with different ids.
        debates: run folder of `training.debates.debate.run_debates`, finished.

    Raises:
        ValueError: no debate of these problems has a majority.

    Example:
        >>> labelled = majority_labels(problems, "runs/debates")
    """
    answers = {row["id"]: row["answer"] for row in read_rows(Path(debates) / DEBATES)}
    labelled = [replace(one, gold=answers[one.id]) for one in problems if answers.get(one.id) is not None]
    if not labelled:
        raise ValueError(
            f"expected debates with a majority; none of {len(problems)} problems has one in {debates}. Pass more "
            "problems."
        )
    return labelled


def evolve(
    start: str | Path,
    problems: Sequence[Problem],
    validation: Sequence[Problem],
    cast: Cast,
    debate: Setting,
    setting: Evolve,
    out: str | Path,
    first: str | Path | None = None,
    load: Callable[[str | Path], LocalModel] = lambda checkpoint: LocalModel(*loaded(checkpoint)),
) -> Path:
    """Train a checkpoint by Debate, Train, Evolve; an interrupted run resumes.

    Round r debates the problems by the checkpoint of round r - 1 and trains that by GRPO, with the reward

        1 if the answer in the box is the majority answer of the debate, within the length limit; else 0.

    Args:
        start: checkpoint that debates first. It must answer in a box.
        problems: problems without use of their right answers.
        validation: problems on which each round is measured, greedy.
        cast: the agents.
        debate: settings of the debates.
        setting: see `Evolve`.
        out: folder; `round-1`, `round-2`, ... hold the debates and the training. `evolve.json` has the accuracy of the
            start (round 0), and for each finished round the number of labels, the share of right ones (for the report
            alone), the optimisation steps and the accuracy. What it has is not measured again.
        first: run folder of finished debates of `start`; they are the first round's.
        load: loads a checkpoint that debates or is measured.

    Returns:
        The checkpoint with the highest validation accuracy among the trained ones, which may be below that of the
        start.

    Raises:
        ValueError: no debate has a majority. See also `train_grpo`.

    Source: Srivastava et al. 2025, "Debate, Train, Evolve", arXiv 2505.15734. It differs from the published training:

    - Debates have the rounds and prompts of `debate` and `cast` (published: at most 3 rounds, prompts that reflect,
      criticise and refine, and for small models a falling temperature).
    - All rounds use the same problems (published: 500 new ones per round). The preset `tiny` measures its start on
      problems on which the training of its base model was stopped, so that the first gain is from a chosen value.
    - The completion is trained as it is written; the traces are not filtered.
    - The reward is 1 for the majority answer in the box within the length limit (published: 2 for it, with terms for a
      numeric answer, for XML tags and for the length).
    - Learning rate, batch, epochs, adapter, clip and KL weight are those of `setting.grpo` (published: 2e-5, 16, 3, r
      128 with alpha 256 and dropout 0.05, 0.2, 0.02).
    - A round ends the training if it gains less than `least` on `validation`: one answer of 100 problems.

    Example:
        >>> evolve("runs/base", problems, held_out, cast_of("diverse"), Setting(), Evolve(), "runs/dte")
    """
    greedy = replace(debate.sampling, temperature=0.0)

    def accuracy(checkpoint: str | Path) -> float:
        return float(one_answer(validation, Shared(load(checkpoint)), bare, greedy)["correct"].mean())

    config = {
        "problems": sha256(canonical_json([asdict(problem) for problem in problems])),
        "validation": sha256(canonical_json([asdict(problem) for problem in validation])),
        "cast": {"name": cast.name, "personas": [asdict(persona) for persona in cast.personas]},
        "debate": asdict(debate),
        "evolve": asdict(setting),
    }
    with run_folder(out, config, free=[f"evolve.grpo.{name}" for name in setting.grpo.free]):
        return _rounds(start, problems, cast, debate, setting, Path(out), first, load, accuracy)


def _rounds(
    start: str | Path,
    problems: Sequence[Problem],
    cast: Cast,
    debate: Setting,
    setting: Evolve,
    out: Path,
    first: str | Path | None,
    load: Callable[[str | Path], LocalModel],
    accuracy: Callable[[str | Path], float],
) -> Path:
    """The rounds of `evolve`; `accuracy` is that of a checkpoint on the validation problems."""
    path = out / LOG
    log: dict[int, dict[str, Any]] = {row["round"]: row for row in read_json(path)} if path.is_file() else {}

    def measured(number: int, of: str | Path, **about: float) -> float:
        """The accuracy after a round, from disk if it is there."""
        if number not in log:
            log[number] = {"round": number, **about, "accuracy": accuracy(of)}
            in_first_process(lambda: write_json(path, [log[one] for one in sorted(log)]))
        return float(log[number]["accuracy"])

    checkpoint, best = start, measured(0, start)
    trained: list[tuple[float, int, Path]] = []
    for number in range(1, setting.rounds + 1):
        folder = out / f"round-{number}"
        debates = Path(first) if number == 1 and first is not None else folder / "debates"
        if not (debates / DEBATES).exists():
            run_debates(problems, load(checkpoint), cast, debate, debates, shared=True)
        labelled = majority_labels(problems, debates)
        grpo = replace(setting.grpo, format=False, seed=setting.grpo.seed + 1000 * (number - 1))
        if not (folder / "grpo" / "checkpoint").exists():
            log = {one: row for one, row in log.items() if one < number}  # those of a training that was removed
        checkpoint = train_grpo(*loaded(checkpoint), labelled, grpo, folder / "grpo")
        right, steps = _right(problems, labelled), grpo.steps_for(len(labelled))
        now = measured(number, checkpoint, labels=len(labelled), right_labels=right, steps=steps)
        trained.append((now, -number, checkpoint))
        if round(now - best, 9) < setting.least:  # 0.03 - 0.02 is less than 0.01 in floating point
            break
        best = now
    return max(trained)[2]


def _right(problems: Sequence[Problem], labelled: Sequence[Problem]) -> float:
    """Return the share of labels that are the right answer; a report, not used in training."""
    gold: dict[str, Any] = {problem.id: problem.gold for problem in problems}
    return sum(problem.gold == gold[problem.id] for problem in labelled) / len(labelled)
