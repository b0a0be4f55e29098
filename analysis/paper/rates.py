"""Learning rates of SFT, the same small search for every method, on a seed and questions that no result uses.

Each method is trained with half, once and twice the preset's learning rate; the rate with the highest accuracy on
validation questions is kept. The presets hold what was found (`rates`, and `sft.learning_rate` for SFT and IMAD).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd

from steerkit.io.tables import read_table, write_table
from training.evaluate.methods import one_answer
from training.imad import Run, base_checkpoint, collect_debates, recipes
from training.presets import get_preset
from training.toy.worlds import bare

METHODS = (
    "SFT",
    "IMAD",
    "SFT on shuffled turns",
    "SFT on gold answers",
    "SFT on right answers",
    "DebateGPT + GRPO",
)
FACTORS = (0.5, 1.0, 2.0)
TUNING_SEED = 100


def search(preset: str, family: str, out: Path, questions: int = 500) -> pd.DataFrame:
    """Validation accuracy of each method at each rate; finished trials are read from `out`.

    Args:
        preset: name of the preset.
        family: family of problems.
        out: folder of the trials.
        questions: number of validation questions.

    Returns:
        Columns method, factor, learning_rate, accuracy, chosen.
    """
    settings = ("what_helps=true", "self_check=false", "untagged=false", "turns=false")
    chosen = get_preset(preset, family, settings)
    shared = Run(chosen, TUNING_SEED, out / "shared")
    shared.folder.mkdir(parents=True, exist_ok=True)
    base = base_checkpoint(shared)
    collect_debates(shared, base, shared.cast)
    problems = shared.problems(questions, "validation")
    rows = []
    for factor in FACTORS:
        rate = chosen.sft.learning_rate * factor
        trial = replace(chosen, sft=replace(chosen.sft, learning_rate=rate), rates=dict.fromkeys(METHODS[2:], rate))
        folder = out / f"factor-{factor:g}"
        folder.mkdir(exist_ok=True)
        for part in ("base", "debates", "right-answers.jsonl"):
            link, target = folder / part, shared.folder / part
            if target.exists() and not link.exists():
                link.symlink_to(target.resolve())
        trained = recipes(Run(trial, TUNING_SEED, folder), base)
        for method in METHODS:
            path = folder / f"{method.replace(' ', '-').lower()}.csv"
            if not path.exists():
                answerer = shared.load_answerer(trained[method]())
                table = one_answer(problems, answerer, bare, shared.sampling())
                write_table(path, table, {"method": method, "learning_rate": rate})
            accuracy = float(read_table(path)[0]["correct"].mean())
            rows.append({"method": method, "factor": factor, "learning_rate": rate, "accuracy": accuracy})
            print(f"{method}, {factor:g} x: {accuracy:.3f}", flush=True)
    table = pd.DataFrame(rows)
    best = table.groupby("method")["accuracy"].transform("max")
    table["chosen"] = table["accuracy"] == best
    write_table(out / f"rates-{family}.csv", table, {"preset": preset, "seed": TUNING_SEED, "questions": questions})
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis rates", description=__doc__)
    parser.add_argument("family", help="family of problems, e.g. clues")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--out", type=Path, help="default: runs/rates/PRESET/FAMILY")
    given = parser.parse_args(arguments)
    out = given.out or Path("runs/rates") / given.preset / given.family
    print(search(given.preset, given.family, out).round(3).to_string(index=False))
