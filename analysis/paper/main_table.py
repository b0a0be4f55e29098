"""`python -m analysis.paper.main_table RUN...`: accuracy and tokens of all methods, seeds pooled, and the published."""

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
from training.evaluate.results import PAPER, differences, latex, markdown

KEYS = ["family", "method", "decoding"]


def read_runs(folders: Sequence[str | Path]) -> pd.DataFrame:
    """The questions of several runs of `training.imad`, a row per method, decoding, seed and question.

    Raises:
        FileNotFoundError: a run without results.
        ValueError: two runs of the same family and seed.
    """
    parts = []
    for folder in folders:
        path = Path(folder) / "questions.parquet"
        if not path.is_file():
            raise FileNotFoundError(f"expected a finished run of training.imad at {folder}; {path.name} is not there.")
        parts.append(read_table(path)[0])
    rows = pd.concat(parts, ignore_index=True)
    if rows.duplicated([*KEYS, "seed", "id"]).any():
        raise ValueError("expected runs of different seeds; two have the same family and seed. Name each run once.")
    return rows


def main_table(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """A line per family, method and decoding: accuracy with its interval, tokens, and what they are of Debate's.

    The 95 % interval resamples questions, each seed's its own. Columns: family, method, decoding, seeds, n, accuracy,
    low, high, tokens (in and out, mean per question), of_debate (tokens over Debate's), parse_failures (share),
    agents (mean number that an output holds), gain_kept and its interval: `(a - Single) / (Debate - Single)`, NaN
    where Debate's gain is not above 0.
    """
    rows = rows.assign(
        tokens=rows["tokens_in"] + rows["tokens_out"], question=rows["seed"].astype(str) + "/" + rows["id"]
    )
    lines = []
    for (family, decoding), part in rows.groupby(["family", "decoding"], sort=False):
        right = part.pivot_table(index="question", columns="method", values="correct", aggfunc="first").astype(float)
        debate = part.loc[part["method"] == "Debate", "tokens"].mean()
        for method, some in part.groupby("method", sort=False):
            ci = bootstrap_ci(some["correct"].astype(float).to_numpy(), groups=some["question"].tolist(), seed=seed)
            lines.append(
                {
                    "family": family, "method": method, "decoding": decoding, "seeds": some["seed"].nunique(),
                    "n": len(some), "accuracy": ci.mean, "low": ci.low, "high": ci.high,
                    "tokens": some["tokens"].mean(), "of_debate": some["tokens"].mean() / debate,
                    "parse_failures": float((~some["parsed"]).mean()), "agents": some["agents"].mean(),
                    **_kept(right, str(method), seed),
                }
            )  # fmt: skip
    return pd.DataFrame(lines)


def _kept(right: pd.DataFrame, method: str, seed: int, draws: int = 2000) -> dict[str, float]:
    """What a method keeps of Debate's gain over Single, with its interval over questions.

    NaN where the interval of that gain holds 0: there is nothing to keep, and the ratio would be of any size and sign.
    """
    none = {"gain_kept": np.nan, "gain_kept_low": np.nan, "gain_kept_high": np.nan}
    if not {"Single", "Debate", method} <= set(right):
        return none
    gap = right[[method, "Debate"]].sub(right["Single"], axis=0).dropna().to_numpy()
    rng = np.random.default_rng(seed)
    picked = rng.integers(len(gap), size=(draws, len(gap)))
    many = np.array([gap[rows].mean(0) for rows in picked])
    if not np.percentile(many[:, 1], 2.5) > 0:
        return none
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.nanpercentile(many[:, 0] / many[:, 1], [2.5, 97.5])
    whole = gap.mean(0)
    return {"gain_kept": whole[0] / whole[1], "gain_kept_low": low, "gain_kept_high": high}


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table as people read it: per cent, intervals in brackets."""
    percent = [f"{100 * r.accuracy:.1f} [{100 * r.low:.1f}, {100 * r.high:.1f}]" for r in table.itertuples()]
    kept = [
        "" if np.isnan(r.gain_kept) else f"{r.gain_kept:.2f} [{r.gain_kept_low:.2f}, {r.gain_kept_high:.2f}]"
        for r in table.itertuples()
    ]
    return table[[*KEYS, "seeds", "n"]].assign(
        accuracy=percent, tokens=table["tokens"].round(0).astype(int), of_debate=table["of_debate"].round(2),
        gain_kept=kept, unparsed=table["parse_failures"].round(3), agents=table["agents"].round(2),
    )  # fmt: skip


def training_logs(folders: Sequence[str | Path]) -> list[pd.DataFrame]:
    """The lines that GRPO left in each run that has them, with its family and seed."""
    parts = []
    for folder in map(Path, folders):
        if (log := folder / "grpo" / "log.jsonl").is_file():
            config = read_json(folder / "config.json")
            parts.append(pd.DataFrame(read_rows(log)).assign(family=config["family"], seed=config["seed"]))
    return parts


def write(folders: Sequence[str | Path], out: str | Path, method: str = "IMAD") -> pd.DataFrame:
    """`main_table.csv`, `.md`, `.tex`, `differences.csv`, and `training.csv`, GRPO's course, in a folder."""
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
    parser = argparse.ArgumentParser(prog="python -m analysis.paper.main_table", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of training.imad")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    try:
        print(shown(write(given.runs, given.out)).to_string(index=False))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
