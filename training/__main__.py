"""`python -m training`: list the training stages with examples; `python -m training STAGE ...`: run one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module

from steerkit.io.signals import restore_interrupt


@dataclass(frozen=True)
class Stage:
    """One stage of the training.

    Args:
        module: its `main(arguments)` is called.
        does: what it does, in one line.
        examples: arguments of example calls.
    """

    module: str
    does: str
    examples: tuple[str, ...]


STAGES = {
    "problems": Stage(
        "training.commands.problems",
        "Write training and test problems: generated, a benchmark's, or your own.",
        (
            "--run runs/mine --problems arithmetic --n 1000 --n-test 1000 --test bbh=lukaemon/bbh",
            "--run runs/mine --problems my.jsonl",
        ),
    ),
    "debates": Stage(
        "training.commands.debates",
        "Run debates of a model or of a server, and keep the traces with a consensus.",
        (
            "--run runs/mine --checkpoint MODEL --cast diverse",
            "--run runs/mine --answerer http://127.0.0.1:8000/v1 MODEL",
        ),
    ),
    "sft": Stage(
        "training.commands.sft",
        "Fine-tune on the traces, or on your own debates; the baselines learn shorter targets of them.",
        (
            "--run runs/mine --checkpoint MODEL",
            "--run runs/mine --checkpoint MODEL --traces my-debates.jsonl",
        ),
    ),
    "grpo": Stage(
        "training.commands.grpo",
        "Reward short correct debates, starting from the SFT checkpoint; the result is IMAD.",
        (
            "--run runs/mine",
            "--run runs/mine --judge http://127.0.0.1:8000/v1 MODEL --criterion ethical",
        ),
    ),
    "evolve": Stage(
        "training.commands.evolve",
        "Train on the majority answers of a model's own debates, a baseline without right answers and without debates.",
        ("--run runs/mine --checkpoint runs/mine/sft-first/checkpoint",),
    ),
    "curve": Stage(
        "training.commands.curve",
        "Tabulate loss and accuracy over the steps that sft has kept.",
        ("--run runs/mine --checkpoint MODEL",),
    ),
    "evaluate": Stage(
        "training.commands.evaluate",
        "Answer the test problems by every method, and compare the methods.",
        (
            "--run runs/mine --checkpoint MODEL --samples 5",
            "--run runs/mine --method IMAD --trained IMAD=runs/mine/grpo/checkpoint",
        ),
    ),
    "benchmark": Stage(
        "training.commands.benchmark",
        "Answer questions of GSM8K, MMLU-Pro and BBH by single answers, self-consistency and debates of one model.",
        (
            "--checkpoint MODEL --data data --out runs/benchmark --minutes 150",
            "--answerer http://127.0.0.1:8000/v1 MODEL --data data --out runs/benchmark",
        ),
    ),
    "imad": Stage(
        "training.imad",
        "Run all stages of a preset with baselines and controls; the same command resumes.",
        (
            "tiny --family clues --seed 0",
            "tiny --family clues --only SFT",
            "llama-3.1-8b --dry-run",
        ),
    ),
}


def listing() -> str:
    """Return the stages with their examples, as printed by `python -m training`."""
    lines = ["Internalized Multi-Agent Debate (arXiv 2604.24881). Each stage reads files of the stages before it:", ""]
    for name, stage in STAGES.items():
        lines += [f"{name}: {stage.does}", *(f"    python -m training {name} {one}" for one in stage.examples), ""]
    lines.append("Options of a stage: python -m training STAGE --help")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line: list the stages, or run one.

    Args:
        arguments: command-line arguments; default: those of the process.

    Returns:
        The exit code: 0, 2 for an unknown stage, or that of the stage.
    """
    restore_interrupt()
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("--help", "-h"):
        print(listing())
        return 0
    if name not in STAGES:
        print(
            f"expected a stage among {', '.join(STAGES)}; got {name!r}. Run `python -m training` for the list.",
            file=sys.stderr,
        )
        return 2
    return int(import_module(STAGES[name].module).main(rest) or 0)


if __name__ == "__main__":
    sys.exit(main())
