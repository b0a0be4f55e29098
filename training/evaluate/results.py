"""Results of an evaluation: accuracy per method, paired differences between methods, and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from steerkit.io.files import write_text
from steerkit.io.tables import write_table
from steerkit.stats.bootstrap import Interval, bootstrap_ci
from steerkit.stats.paired import paired_difference

PAPER = pd.DataFrame(
    [
        ("Llama-3.1-8B-Instruct", "Single", 79.93, 61.10, 56.37, 547, 638, 463),
        ("Llama-3.1-8B-Instruct", "Debate", 83.03, 64.60, 51.06, 5758, 8705, 8888),
        ("Llama-3.1-8B-Instruct", "DebateGPT", 74.42, 60.58, 55.83, 455, 1023, 433),
        ("Llama-3.1-8B-Instruct", "SFT", 79.23, 75.60, 54.91, 992, 1447, 1133),
        ("Llama-3.1-8B-Instruct", "IMAD", 85.20, 62.00, 58.53, 644, 728, 563),
        ("Qwen2.5-7B-Instruct", "Single", 86.07, 48.87, 62.51, 577, 912, 805),
        ("Qwen2.5-7B-Instruct", "Debate", 91.37, 57.67, 67.58, 2320, 5368, 5458),
        ("Qwen2.5-7B-Instruct", "DebateGPT", 89.43, 54.10, 63.93, 358, 636, 444),
        ("Qwen2.5-7B-Instruct", "SFT", 86.37, 50.60, 67.14, 957, 1162, 1063),
        ("Qwen2.5-7B-Instruct", "IMAD", 89.67, 52.87, 70.11, 389, 660, 490),
        ("Mistral-Nemo-Instruct-2407", "Single", 75.40, 39.17, 58.70, 332, 542, 352),
        ("Mistral-Nemo-Instruct-2407", "Debate", 61.03, 41.30, 62.76, 1697, 3857, 2059),
        ("Mistral-Nemo-Instruct-2407", "DebateGPT", 71.70, 40.40, 59.07, 327, 465, 324),
        ("Mistral-Nemo-Instruct-2407", "SFT", 74.37, 36.20, 63.66, 1053, 1110, 1022),
        ("Mistral-Nemo-Instruct-2407", "IMAD", 80.00, 38.97, 63.73, 358, 565, 367),
    ],
    columns=["model", "method", "GSM8K", "MMLU-Pro", "BBH", "tokens GSM8K", "tokens MMLU-Pro", "tokens BBH"],
)
"""Published results: accuracy in %, and mean number of prompt and new tokens per question (arXiv 2604.24881)."""


def summary(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return accuracy and cost of each method.

    Args:
        rows: one row per family, method, decoding, seed and question, with the columns of
            `training.evaluate.methods.one_answer`.
        seed: seed of the bootstrap.

    Returns:
        One row per family, method, decoding and seed: number of questions `n`, `accuracy` in [0, 1] with its 95 %
        bootstrap interval over questions, mean `tokens_in` and `tokens_out`, unparsed answers, mean number of agents.

    Example:
        >>> summary(pd.read_parquet("runs/imad-tiny/clues/seed-0/questions.parquet"))
    """
    lines = []
    keys = ["family", "method", "decoding", "seed"]
    for key, part in rows.groupby(keys, sort=False):
        interval = bootstrap_ci(part["correct"].astype(float).to_numpy(), groups=part["id"].tolist(), seed=seed)
        lines.append(
            {
                **dict(zip(keys, key, strict=True)),
                "n": len(part),
                "accuracy": interval.mean,
                "accuracy_low": interval.low,
                "accuracy_high": interval.high,
                "tokens_in": part["tokens_in"].mean(),
                "tokens_out": part["tokens_out"].mean(),
                "parse_failures": int((~part["parsed"]).sum()),
                "mean_agents": part["agents"].mean(),
            }
        )
    return pd.DataFrame(lines)


def difference_of(values: pd.DataFrame, first: str, second: str, seed: int = 0) -> Interval:
    """Return the mean of `first - second` over the same questions with its 95 % bootstrap interval.

    Args:
        values: one row per (seed, question), one column per method; the index names the resampled questions. Rows
            without both values are left out.
        first: column of the first method.
        second: column of the second method.
        seed: seed of the bootstrap.

    Returns:
        The interval; its `n` is the number of questions.
    """
    both = values[[first, second]].dropna().astype(float)
    questions = ["/".join(map(str, key)) for key in both.index]
    return paired_difference(both[first].to_numpy(), both[second].to_numpy(), questions, seed=seed)


def differences(rows: pd.DataFrame, method: str, seed: int = 0) -> pd.DataFrame:
    """Compare `method` with every other method on the same questions and seeds.

    Args:
        rows: as in `summary`.
        method: the method to compare with all others.
        seed: seed of the bootstrap.

    Returns:
        One row per family, decoding and other method: `difference`, the accuracy of `method` minus that of `minus`,
        its 95 % bootstrap interval over questions with seeds pooled, and `token_ratio`, the ratio of mean tokens. The
        interval does not cover the variance between training seeds.

    Example:
        >>> differences(pd.read_parquet("runs/imad-tiny/clues/seed-0/questions.parquet"), "IMAD")
    """
    lines = []
    for (family, decoding), part in rows.groupby(["family", "decoding"], sort=False):
        wide = part.pivot_table(index=["seed", "id"], columns="method", values="correct", aggfunc="first")
        cost = part.assign(tokens=part["tokens_in"] + part["tokens_out"]).groupby("method")["tokens"].mean()
        if method not in wide:
            continue
        for other in wide.columns.drop(method):
            interval = difference_of(wide, method, other, seed)
            lines.append(
                {
                    "family": family,
                    "decoding": decoding,
                    "method": method,
                    "minus": other,
                    "n": interval.n,
                    "difference": interval.mean,
                    "low": interval.low,
                    "high": interval.high,
                    "token_ratio": cost[method] / cost[other],
                }
            )
    return pd.DataFrame(lines)


def write_results(out: str | Path, rows: pd.DataFrame, method: str, meta: dict[str, Any]) -> pd.DataFrame:
    """Write `questions.parquet`, `results.csv`, `differences.csv`, `results.md` and `results.tex` into a folder.

    Args:
        out: the folder.
        rows: as in `summary`.
        method: the method that `differences.csv` compares with all others.
        meta: metadata of the tables.

    Returns:
        The table of `summary`.
    """
    folder = Path(out)
    table = summary(rows)
    write_table(folder / "questions.parquet", rows, meta)
    write_table(folder / "results.csv", table, meta)
    write_table(folder / "differences.csv", differences(rows, method), meta)
    intervals = [
        f"{100 * row.accuracy:.1f} [{100 * row.accuracy_low:.1f}, {100 * row.accuracy_high:.1f}]"
        for row in table.itertuples()
    ]
    shown = table.assign(
        accuracy=intervals,
        tokens=(table["tokens_in"] + table["tokens_out"]).round(0).astype(int),
        mean_agents=table["mean_agents"].round(2),
    )[["method", "decoding", "seed", "n", "accuracy", "tokens", "parse_failures", "mean_agents"]]
    write_text(folder / "results.md", f"{markdown(shown)}\n\nPublished, for comparison:\n\n{markdown(PAPER)}\n")
    write_text(folder / "results.tex", latex(shown))
    return table


def markdown(table: pd.DataFrame) -> str:
    """Return a table in Markdown."""
    lines = [list(map(str, table.columns)), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latex(table: pd.DataFrame) -> str:
    """Return a table in LaTeX for the `booktabs` package."""

    def escape(value: Any) -> str:
        return str(value).replace("_", r"\_").replace("%", r"\%").replace("&", r"\&")

    def cells(values: Sequence[Any]) -> str:
        return " & ".join(map(escape, values)) + r" \\"

    head = [rf"\begin{{tabular}}{{{'l' * len(table.columns)}}}", r"\toprule", cells(list(table.columns)), r"\midrule"]
    return "\n".join([*head, *map(cells, table.to_numpy().tolist()), r"\bottomrule", r"\end{tabular}", ""])
