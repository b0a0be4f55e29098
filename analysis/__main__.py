"""`python -m analysis`: list the analyses; `python -m analysis NAME ...`: run one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from steerkit.io.run_folder import RunFolderBusy
from steerkit.io.signals import restore_interrupt


@dataclass(frozen=True)
class Analysis:
    """A command of `python -m analysis`.

    Args:
        module: its `main(arguments)` is called.
        purpose: one line for the list.
        example: arguments of an example call.
    """

    module: str
    purpose: str
    example: str


ANALYSES = {
    "agents": Analysis(
        "analysis.own_debates",
        "steer each agent of your debates by its own direction, with controls: tables, figures, a page",
        "--traces my.jsonl --checkpoint MODEL --out runs/mine",
    ),
    "agreement": Analysis(
        "analysis.agents.agreement",
        "check the scores on texts whose agent is known, and against labels given by hand",
        "--run runs/imad-tiny/clues/seed-0 --out runs/analysis --labels labels.csv",
    ),
    "separability": Analysis(
        "analysis.probes.separability",
        "probe at which layers the agents can be told apart",
        "--run runs/imad-tiny/arithmetic/seed-0 --out runs/analysis",
    ),
    "erasure": Analysis(
        "analysis.probes.erased",
        "does an agent's identity, by tag or by vector, survive its linear erasure?",
        "runs/imad-tiny/clues/seed-0 --out runs/analysis/erasure",
    ),
    "suppression": Analysis(
        "analysis.suppression.suppress",
        "suppress a malicious agent's trait, and measure what it costs",
        "--run runs/imad-tiny/malice/seed-0 --words fools,ha --out runs/analysis",
    ),
    "caa": Analysis(
        "analysis.recipes.caa",
        "CAA on A/B questions: letters, answers and texts against random directions",
        "--checkpoint CHECKPOINT --data DATA --out runs/caa",
    ),
    "persona": Analysis(
        "analysis.recipes.persona",
        "a trait from instructions, steered and judged, against random directions",
        "--checkpoint CHECKPOINT --judge-url URL --judge-model MODEL --out runs/persona",
    ),
    "refusal": Analysis(
        "analysis.recipes.refusal",
        "refusal by one direction: rates, addition and ablation against random directions",
        "--checkpoint CHECKPOINT --data DATA --out runs/refusal",
    ),
    "judge": Analysis(
        "analysis.recipes.judge",
        "agreement of a judge with 50 texts labelled by hand",
        "--url http://127.0.0.1:8000 --model MODEL --out results/recipes/judge",
    ),
    "conditional": Analysis(
        "analysis.recipes.conditional",
        "steer a real model only where a condition holds",
        "--out runs/conditional --results results/recipes/conditional",
    ),
    "protocol": Analysis(
        "analysis.paper.protocol",
        "the paper's steering protocol, with random, shuffled and planted directions",
        "runs/imad-tiny/clues/seed-0 --out runs/analysis/protocol",
    ),
    "malicious": Analysis(
        "analysis.paper.malicious",
        "the paper's experiment with a malicious agent, with random directions",
        "runs/imad-tiny/malice/seed-0 --words fools,ha --out runs/analysis/malicious",
    ),
    "transplant": Analysis(
        "analysis.paper.transplant",
        "does an answer depend on what the first round of the model's text says?",
        "runs/imad-tiny/clues/seed-0 --out runs/analysis/transplant",
    ),
    "fact-recall": Analysis(
        "analysis.patching.fact_recall",
        "activation patching of capitals: which layers and positions hold the country and the capital",
        "--out runs/fact-recall --results results/patching",
    ),
    "patch-rounds": Analysis(
        "analysis.patching.rounds",
        "does an answer follow the activations at round 1 of another debate?",
        "runs/imad-tiny/clues/seed-0 --out runs/analysis/patch-rounds",
    ),
    "rates": Analysis(
        "analysis.paper.rates",
        "search the learning rate of every method on the tuning seed",
        "clues --out runs/rates",
    ),
    "main-table": Analysis(
        "analysis.paper.main_table",
        "accuracy and tokens of all methods over training seeds",
        "runs/imad-tiny/arithmetic/seed-0 --out runs/tables",
    ),
    "results": Analysis(
        "analysis.paper.results",
        "tables of a reproduction over its seeds, and a verdict on each claim",
        "runs/reproduce/tiny --page docs/results.md",
    ),
    "archive": Analysis(
        "analysis.paper.archive",
        "keep the small files of a finished training seed, from which all tables can be made again",
        "runs/reproduce/tiny --seed 20 --out results/seeds/tiny",
    ),
    "documents": Analysis(
        "analysis.documents",
        "run the code of the tutorial and of the page on steering, and store its tables",
        "--out results",
    ),
    "notebooks": Analysis(
        "analysis.notebooks",
        "run the notebooks of docs and store what they show",
        "docs/notebooks/steering.ipynb",
    ),
    "jobs": Analysis(
        "analysis.recipes.jobs",
        "run the scripts of docs/recipes on real checkpoints, and store what they print and draw",
        "monitoring --out runs/jobs --results results/recipes/jobs",
    ),
    "reproduce": Analysis(
        "analysis.paper.reproduce",
        "run everything: training, analyses, tables and figures",
        "--preset tiny --seeds 3",
    ),
}


def listing() -> str:
    """The analyses, one line and one example each."""
    lines = ["Usage: python -m analysis NAME [options]; --help after a name shows its options.", ""]
    for name, analysis in ANALYSES.items():
        lines += [f"{name:14}{analysis.purpose}", f"{'':14}python -m analysis {name} {analysis.example}", ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one analysis. Bad input or a missing file ends it with exit code 2 and one line on stderr."""
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if name in ("-h", "--help"):
        print(listing())
        return
    if name not in ANALYSES:
        print(listing(), file=sys.stderr)
        sys.exit(f"expected an analysis among {', '.join(ANALYSES)}; got {name!r}. Pass one of these names.")
    restore_interrupt()
    module = import_module(ANALYSES[name].module)
    try:
        module.main(rest)
    except (ValueError, OSError, RunFolderBusy) as error:
        print(f"python -m analysis {name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
