"""Main table: accuracy and tokens of all methods, training seeds pooled, with the published results for comparison."""

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
from steerkit.stats.bootstrap import bootstrap_ci
from steerkit.stats.format import interval_text
from steerkit.stats.paired import ratio
from training.evaluate.results import PAPER, differences, latex, markdown

KEYS = ["family", "method", "decoding"]


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


def main_table(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """A row per family, method and decoding: accuracy with its interval, tokens, and their share of Debate's.

    The 95 % intervals resample questions; questions of different seeds are different questions.

    Args:
        rows: see `read_runs`.
        seed: of the bootstraps.

    Returns:
        Columns family, method, decoding, seeds, n, accuracy, low, high, tokens (in and out, mean per question),
        of_debate (tokens over Debate's), parse_failures (share), agents (mean number in an output), gain_kept and
        its interval: `(a - Single) / (Debate - Single)`, NaN where Debate's gain is not above 0.
    """
    rows = rows.assign(
        tokens=rows["tokens_in"] + rows["tokens_out"], question=rows["seed"].astype(str) + "/" + rows["id"]
    )
    lines = []
    for (family, decoding), part in rows.groupby(["family", "decoding"], sort=False):
        right = part.pivot_table(index="question", columns="method", values="correct", aggfunc="first").astype(float)
        debate = part.loc[part["method"] == "Debate", "tokens"].mean()
        for method, some in part.groupby("method", sort=False):
            correct = some["correct"].astype(float).to_numpy()
            interval = bootstrap_ci(correct, groups=some["question"].tolist(), seed=seed)
            lines.append(
                {
                    "family": family,
                    "method": method,
                    "decoding": decoding,
                    "seeds": some["seed"].nunique(),
                    "n": len(some),
                    "accuracy": interval.mean,
                    "low": interval.low,
                    "high": interval.high,
                    "tokens": some["tokens"].mean(),
                    "of_debate": some["tokens"].mean() / debate,
                    "parse_failures": float((~some["parsed"]).mean()),
                    "agents": some["agents"].mean(),
                    **_kept(right, str(method), seed),
                }
            )
    return pd.DataFrame(lines)


def _kept(right: pd.DataFrame, method: str, seed: int) -> dict[str, float]:
    """The share of Debate's gain over Single that a method keeps, with its interval over questions.

    NaN where the interval of Debate's gain is not above 0: there the ratio can have any size and sign.
    """
    none = {"gain_kept": np.nan, "gain_kept_low": np.nan, "gain_kept_high": np.nan}
    if not {"Single", "Debate", method} <= set(right):
        return none
    gains = right[[method, "Debate"]].sub(right["Single"], axis=0).dropna().to_numpy()
    kept = ratio(gains[:, 0], gains[:, 1], seed=seed)
    if not kept.denominator_low > 0:
        return none
    return {"gain_kept": kept.value, "gain_kept_low": kept.low, "gain_kept_high": kept.high}


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table in per cent and with intervals in brackets."""
    percent = [interval_text(100 * row.accuracy, 100 * row.low, 100 * row.high, 1) for row in table.itertuples()]
    kept = [
        "" if np.isnan(row.gain_kept) else interval_text(row.gain_kept, row.gain_kept_low, row.gain_kept_high)
        for row in table.itertuples()
    ]
    return table[[*KEYS, "seeds", "n"]].assign(
        accuracy=percent,
        tokens=table["tokens"].round(0).astype(int),
        of_debate=table["of_debate"].round(2),
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
    meta: dict[str, Any] = {"runs": [str(folder) for folder in folders], "versions": versions()}
    write_table(out / "main_table.csv", table, meta)
    write_table(out / "differences.csv", differences(rows, method), meta)
    text = f"{markdown(shown(table))}\n\nPublished, for comparison:\n\n{markdown(PAPER)}\n"
    write_text(out / "main_table.md", text)
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
