"""Learning rates of SFT, the same small search for every method, on a seed and questions that no result uses.

Each method is trained with half, once and twice 1e-3. While the best rate is at an end of those tried, half or twice of
it is tried too, down to 1/16 and up to 16 times. The rate with the highest accuracy on validation questions is kept, on
a tie the one nearest to 1e-3. SFT and IMAD share one: that of IMAD. DebateGPT (answer) has that of the same with GRPO.
The presets hold what was found (`rates`; `sft.learning_rate` for SFT and IMAD). The settings of GRPO are those of the
preset for every method; GRPO without debate has no SFT in the miniature, and so nothing to search.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from analysis.paper.reproduce import FULL
from steerkit.io.run_folder import check_config
from steerkit.io.tables import read_table, write_table
from training.evaluate.methods import one_answer
from training.imad import RIGHT_ANSWERS, SELF_CHECKS, Run, base_checkpoint, collect_debates, recipes, self_checks
from training.presets import RATED, SELF_CHECKED, get_preset
from training.toy.worlds import bare

METHODS = ("IMAD", *RATED)
CENTRE = 1e-3
FACTORS = (0.5, 1.0, 2.0)
WIDEST = 16.0
"""The largest factor that is tried, and its inverse the smallest."""
TUNING_SEED = 100


def search(
    preset: str, family: str, out: Path, questions: int = 500, known: Mapping[tuple[str, float], float] | None = None
) -> pd.DataFrame:
    """Validation accuracy of each method at each rate; finished trials are read from `out`.

    Args:
        preset: name of the preset.
        family: family of problems.
        out: folder of the trials.
        questions: number of validation questions.
        known: method and factor -> accuracy, of an earlier search with the same settings; these are not trained again.

    Returns:
        Columns method, factor, learning_rate, accuracy, chosen.

    Raises:
        ConfigurationChanged: `out` has trials of other settings.
    """
    settings = (*FULL[preset][family], "untagged=false", "turns=false")
    chosen = replace(get_preset(preset, family, settings), rates={})
    shared = Run(chosen, TUNING_SEED, out / "shared")
    shared.folder.mkdir(parents=True, exist_ok=True)
    check_config(out, {**asdict(chosen), "seed": TUNING_SEED, "questions": questions})
    base = base_checkpoint(shared)
    collect_debates(shared, base, shared.cast)
    if SELF_CHECKED in chosen.trained:
        self_checks(shared, base)
    problems, earlier = shared.problems(questions, "validation"), known or {}

    def accuracy(method: str, factor: float) -> float:
        if (method, factor) in earlier:
            return earlier[method, factor]
        rate = CENTRE * factor
        folder = out / f"factor-{factor:g}"
        folder.mkdir(exist_ok=True)
        path = folder / f"{method.replace(' ', '-').lower()}.csv"
        if not path.exists():
            for part in ("base", "debates", SELF_CHECKS, RIGHT_ANSWERS):
                link, target = folder / part, shared.folder / part
                if target.exists() and not link.exists():
                    link.symlink_to(target.resolve())
            trial = replace(chosen, sft=replace(chosen.sft, learning_rate=rate))
            checkpoint = recipes(Run(trial, TUNING_SEED, folder), base)[method]()
            own = folder / RIGHT_ANSWERS
            if own.is_file() and not own.is_symlink():
                own.rename(shared.folder / RIGHT_ANSWERS)  # the same for every rate
            table = one_answer(problems, shared.load_answerer(checkpoint), bare, shared.sampling())
            write_table(path, table, {"method": method, "learning_rate": rate})
        found = float(read_table(path)[0]["correct"].mean())
        print(f"{method}, {factor:g} x: {found:.3f}", flush=True)
        return found

    rows = []
    for method in (method for method in METHODS if method in chosen.trained):
        tried = {factor: accuracy(method, factor) for factor in FACTORS}
        while (further := beyond(tried)) is not None:
            tried[further] = accuracy(method, further)
        best = nearest_best(tried)
        rows += [
            {
                "method": method,
                "factor": factor,
                "learning_rate": CENTRE * factor,
                "accuracy": value,
                "chosen": factor == best,
            }
            for factor, value in sorted(tried.items())
        ]
    table = pd.DataFrame(rows)
    write_table(out / f"rates-{family}.csv", table, {"preset": preset, "seed": TUNING_SEED, "questions": questions})
    return table


def nearest_best(tried: Mapping[float, float]) -> float:
    """The factor with the highest accuracy; on a tie the one nearest to 1.

    Example:
        >>> nearest_best({0.5: 0.7, 1.0: 0.7, 2.0: 0.6})
        1.0
    """
    return max(tried, key=lambda factor: (tried[factor], -abs(math.log(factor)), -factor))


def beyond(tried: Mapping[float, float]) -> float | None:
    """The next factor to try: beyond the end at which the best one is; None where it is not at an end, or too far.

    Example:
        >>> beyond({0.5: 0.7, 1.0: 0.6, 2.0: 0.6}), beyond({0.5: 0.6, 1.0: 0.7, 2.0: 0.6})
        (0.25, None)
    """
    best = nearest_best(tried)
    further = best / 2 if best == min(tried) else best * 2 if best == max(tried) else None
    return further if further is not None and 1 / WIDEST <= further <= WIDEST else None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis rates", description=__doc__)
    parser.add_argument("family", help="family of problems, e.g. clues")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--out", type=Path, help="default: runs/rates/PRESET/FAMILY")
    parser.add_argument("--known", type=Path, metavar="CSV", help="table of an earlier search with the same settings")
    given = parser.parse_args(arguments)
    known = {}
    if given.known:
        earlier = read_table(given.known)[0]
        known = {(row.method, row.factor): row.accuracy for row in earlier.itertuples()}
    out = given.out or Path("runs/rates") / given.preset / given.family
    print(search(given.preset, given.family, out, known=known).round(3).to_string(index=False))
