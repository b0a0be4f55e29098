"""`python -m training`: list the training stages with one example each; `python -m training imad` runs them."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from steerkit.io.signals import restore_interrupt


@dataclass(frozen=True)
class Stage:
    """One stage of the training.

    Args:
        name: name of the stage.
        does: what it does, in one line.
        code: folder or file.
        command: shell command; empty if the stage has none.
        python: Python statements, one per line; empty if the stage has a command.
    """

    name: str
    does: str
    code: str
    command: str = ""
    python: str = ""


STAGES = (
    Stage(
        "problems",
        "Generate problems, or load GSM8K, MMLU-Pro, BBH or open questions.",
        "training/problems/",
        python="from training.problems.families import addition\nproblems = addition(100, seed=0, split='train')",
    ),
    Stage(
        "base model",
        "Train a toy base model from scratch (CPU, minutes); other presets start from a checkpoint.",
        "training/toy/",
        python=(
            "from training.presets import get_preset\n"
            "from training.toy.base_model import train_base\n"
            "from training.toy.worlds import WORLDS\n"
            "train_base(WORLDS['clues'], get_preset('tiny', 'clues').base, 'runs/base')"
        ),
    ),
    Stage(
        "debates",
        "Run debates of the base model and keep the traces with a consensus.",
        "training/debates/",
        command="python -m training imad tiny --family clues --only Debate",
    ),
    Stage(
        "SFT",
        "Fine-tune on the traces; the DebateGPT baselines train on their answers only.",
        "training/train/sft.py",
        command="python -m training imad tiny --family clues --only SFT --only 'DebateGPT (answer)'",
    ),
    Stage(
        "GRPO",
        "Reward short correct debates, starting from the SFT checkpoint; the result is IMAD.",
        "training/train/grpo.py",
        command="python -m training imad tiny --family clues --only IMAD",
    ),
    Stage(
        "evaluate",
        "Answer test questions by a checkpoint, self-consistency or debate, and compare the methods.",
        "training/evaluate/",
        python=(
            "import steerkit as sk\n"
            "from training.debates.answerers import LocalModel, Sampling\n"
            "from training.evaluate.methods import one_answer\n"
            "from training.problems.families import clues\n"
            "from training.toy.worlds import bare\n"
            "model = LocalModel(*sk.load('runs/imad-tiny/clues/seed-0/grpo/checkpoint'))\n"
            "rows = one_answer(clues(100, 0, 'test'), model, bare, Sampling(max_new_tokens=240))"
        ),
    ),
    Stage(
        "imad",
        "Run all stages, baselines, controls and the evaluation; the same command resumes a run.",
        "training/imad.py, training/presets.py",
        command="python -m training imad tiny --family clues --seed 0",
    ),
    Stage(
        "estimate",
        "Estimate tokens and memory of each stage; nothing is trained.",
        "training/estimate.py",
        command="python -m training imad llama-3.1-8b --dry-run",
    ),
)


def listing() -> str:
    """Return the stages with their examples, as printed by `python -m training`."""
    lines = ["Internalized Multi-Agent Debate (arXiv 2604.24881). Stages in order, each with an example:", ""]
    for stage in STAGES:
        example = [f"$ {stage.command}"] if stage.command else [f">>> {line}" for line in stage.python.splitlines()]
        lines += [f"{stage.name}: {stage.does}", f"    code: {stage.code}", *(f"    {line}" for line in example), ""]
    lines.append("Options of imad: python -m training imad --help")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line: list the stages, or pass the arguments after `imad` to `training.imad`.

    Args:
        arguments: command-line arguments; default: those of the process.

    Returns:
        The exit code: 0, or 2 for an unknown command.
    """
    restore_interrupt()
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("--help", "-h"):
        print(listing())
        return 0
    if command != "imad":
        print(
            f"expected the command imad; got {command!r}. Run `python -m training` for the list of stages.",
            file=sys.stderr,
        )
        return 2
    from training import imad

    imad.main(rest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
