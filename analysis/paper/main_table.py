"""Main table: accuracy and tokens of all methods over training seeds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steerkit.io.files import write_text
from steerkit.io.json import read_json
from steerkit.io.rows import read_rows
from steerkit.io.tables import read_table, write_table
from steerkit.io.versions import versions
from steerkit.stats.format import interval_text
from steerkit.stats.mean import accuracy_interval
from steerkit.stats.paired import Ratio
from steerkit.stats.seeds import over_seeds
from training.evaluate.results import (
    NO_RATIO,
    by_method,
    difference_of,
    differences,
    latex,
    listed,
    markdown,
    published,
    ratio_of,
)

KEYS = ["family", "method", "decoding"]
SINGLE, DEBATE = "Single", "Debate"


def read_runs(folders: Sequence[str | Path]) -> pd.DataFrame:
    """The questions of several runs of `training.imad`: a row per method, decoding, seed and question.

    Args:
        folders: the runs' folders.

    Raises:
        FileNotFoundError: a run without results.
        ValueError: two runs of the same family and seed.
    """
    parts = []
    for folder in folders:
        path = Path(folder) / "questions.parquet"
        if not path.is_file():
            raise FileNotFoundError(
                f"expected a finished run of training.imad at {folder}; {path.name} is missing. Finish the run first."
            )
        parts.append(read_table(path)[0])
    rows = pd.concat(parts, ignore_index=True)
    if rows.duplicated([*KEYS, "seed", "id"]).any():
        raise ValueError("expected runs of different seeds; got two with the same family and seed. Pass each run once.")
    return rows


def main_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per family, method and decoding: accuracy, tokens, their share of Debate's, and the share of its gain.

    With several training seeds, means and intervals are over the seeds (Student's t, Fieller's for ratios), each with
    its own questions. With one, they are over questions, and hold for this checkpoint.

    Args:
        rows: see `read_runs`.

    Returns:
        Columns family, method, decoding, seeds, n (questions of all seeds), unit (of the intervals), accuracy, low,
        high, by_seed (accuracies), tokens (in and out, mean per question), of_debate (tokens over Debate's, with
        of_debate_low and of_debate_high), parse_failures (share), agents (mean number in an output), gain_kept with
        gain_kept_low and gain_kept_high: `(a - Single) / (Debate - Single)`, NaN where Debate's gain is not above 0.
    """
    rows = rows.assign(tokens=rows["tokens_in"] + rows["tokens_out"])
    lines = []
    for (family, decoding), part in rows.groupby(["family", "decoding"], sort=False):
        correct, tokens = by_method(part, "correct"), by_method(part, "tokens")
        for method, some in part.groupby("method", sort=False):
            several = some["seed"].nunique() > 1
            right = some["correct"].astype(float).to_numpy()
            over = over_seeds(right, some["seed"].tolist(), some["id"].tolist())
            interval = over if several else accuracy_interval(right, some["id"].tolist())
            cost = ratio_of(tokens, str(method), DEBATE) if DEBATE in tokens else NO_RATIO
            kept = _kept(correct, str(method))
            lines.append(
                {
                    "family": family,
                    "method": method,
                    "decoding": decoding,
                    "seeds": over.seeds,
                    "n": len(some),
                    "unit": over.unit,
                    "accuracy": over.mean,
                    "low": max(0.0, interval.low),
                    "high": min(1.0, interval.high),
                    "by_seed": listed(over.by_seed),
                    "tokens": some["tokens"].mean(),
                    "of_debate": cost.value,
                    "of_debate_low": cost.low,
                    "of_debate_high": cost.high,
                    "parse_failures": float((~some["parsed"]).mean()),
                    "agents": some["agents"].mean(),
                    "gain_kept": kept.value,
                    "gain_kept_low": kept.low,
                    "gain_kept_high": kept.high,
                }
            )
    return pd.DataFrame(lines)


def _kept(correct: pd.DataFrame, method: str) -> Ratio:
    """The share of Debate's gain over Single that a method keeps.

    NaN where Debate's gain is not above 0: there the ratio can have any size and sign.
    """
    if not {SINGLE, DEBATE, method} <= set(correct):
        return NO_RATIO
    kept = ratio_of(correct[list(dict.fromkeys((method, DEBATE)))].sub(correct[SINGLE], axis=0), method, DEBATE)
    gain = difference_of(correct, DEBATE, SINGLE)
    return kept if kept.bounded and gain.low > 0 else NO_RATIO


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table in per cent and with intervals in brackets."""
    percent = [interval_text(100 * row.accuracy, 100 * row.low, 100 * row.high, 1) for row in table.itertuples()]
    kept = [
        "" if np.isnan(row.gain_kept) else interval_text(row.gain_kept, row.gain_kept_low, row.gain_kept_high)
        for row in table.itertuples()
    ]
    cost = [
        "" if np.isnan(row.of_debate) else interval_text(row.of_debate, row.of_debate_low, row.of_debate_high)
        for row in table.itertuples()
    ]
    each = [" ".join(f"{100 * float(value):.1f}" for value in text.split()) for text in table["by_seed"]]
    return table[[*KEYS, "seeds", "n"]].assign(
        accuracy=percent,
        by_seed=each,
        tokens=table["tokens"].round(0).astype(int),
        of_debate=cost,
        gain_kept=kept,
        unparsed=table["parse_failures"].round(3),
        agents=table["agents"].round(2),
    )


def training_logs(folders: Sequence[str | Path]) -> list[pd.DataFrame]:
    """GRPO's log of each run that has one, with the run's family and seed."""
    parts = []
    for folder in map(Path, folders):
        if (log := folder / "grpo" / "log.jsonl").is_file():
            config = read_json(folder / "config.json")
            parts.append(pd.DataFrame(read_rows(log)).assign(family=config["family"], seed=config["seed"]))
    return parts


def write(folders: Sequence[str | Path], out: str | Path, method: str = "IMAD") -> pd.DataFrame:
    """Write `main_table.csv`, `.md` and `.tex`, `differences.csv`, and GRPO's logs as `training.csv` to a folder.

    Args:
        folders: the runs' folders.
        out: folder of the tables.
        method: the method of which all others are subtracted in `differences.csv`.

    Returns:
        The main table.
    """
    rows, out = read_runs(folders), Path(out)
    table = main_table(rows)
    runs = ["/".join(Path(folder).resolve().parts[-2:]) for folder in folders]  # FAMILY/seed-N, on any machine
    meta: dict[str, Any] = {"runs": runs, "versions": versions()}
    write_table(out / "main_table.csv", table, meta)
    write_table(out / "differences.csv", differences(rows, method), meta)
    write_text(out / "main_table.md", markdown(shown(table)) + published(rows["family"]) + "\n")
    write_text(out / "main_table.tex", latex(shown(table)))
    if logs := training_logs(folders):
        write_table(out / "training.csv", pd.concat(logs, ignore_index=True), meta)
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis main-table", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of training.imad")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    try:
        print(shown(write(given.runs, given.out)).to_string(index=False))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
