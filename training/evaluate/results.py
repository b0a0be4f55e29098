"""Results of an evaluation: accuracy per method, paired differences between methods, and their tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from steerkit.io.files import write_text
from steerkit.io.markdown import markdown_table
from steerkit.io.tables import write_table
from steerkit.stats.format import interval_text
from steerkit.stats.mean import accuracy_interval
from steerkit.stats.paired import Ratio, ratio
from steerkit.stats.seeds import OverSeeds, over_seeds

NO_RATIO = Ratio(math.nan, math.nan, math.nan, 0)
"""The ratio of values that there are none of."""
PUBLISHED_ON = ("GSM8K", "MMLU-Pro", "BBH")
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


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Return accuracy and cost of each method and training seed.

    Args:
        rows: one row per family, method, decoding, seed and question, with the columns of
            `training.evaluate.methods.one_answer`; or several, of several decoding seeds.

    Returns:
        One row per family, method, decoding and seed: number of questions `n`, `accuracy` in [0, 1] with its 95 %
        interval over questions, which holds for this checkpoint, mean `tokens_in` and `tokens_out` (of the questions
        whose calls report them), unparsed answers, `failed` calls (0 for rows without that column), mean number of
        agents.

    Example:
        >>> summary(pd.read_parquet("runs/imad-tiny/clues/seed-0/questions.parquet"))
    """
    lines = []
    keys = ["family", "method", "decoding", "seed"]
    for key, part in rows.groupby(keys, sort=False):
        interval = accuracy_interval(part["correct"].astype(float).to_numpy(), groups=part["id"].tolist())
        lines.append(
            {
                **dict(zip(keys, key, strict=True)),
                "n": part["id"].nunique(),
                "accuracy": interval.mean,
                "accuracy_low": interval.low,
                "accuracy_high": interval.high,
                "tokens_in": part["tokens_in"].mean(),
                "tokens_out": part["tokens_out"].mean(),
                "parse_failures": int((~part["parsed"]).sum()),
                "failed": int(part["failed"].sum()) if "failed" in part else 0,
                "mean_agents": part["agents"].mean(),
            }
        )
    return pd.DataFrame(lines)


def by_method(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return a column of the rows by seed and question, with one column per method; some may be missing.

    Several decodings of a question count as their mean.
    """
    return rows.pivot_table(index=["seed", "id"], columns="method", values=column, aggfunc="mean").astype(float)


def difference_of(wide: pd.DataFrame, first: str, second: str) -> OverSeeds:
    """Return the mean of `first - second` over training seeds, questions paired.

    Args:
        wide: see `by_method`. Questions without both values are left out.
        first: column of the first method.
        second: column of the second method.
    """
    both = wide[[first, second]].dropna()
    seeds, questions = both.index.get_level_values("seed"), both.index.get_level_values("id")
    runs = wide.index.get_level_values("seed").nunique()
    return over_seeds(both[first] - both[second], seeds.tolist(), questions.tolist(), of=runs)


def ratio_of(wide: pd.DataFrame, first: str, second: str) -> Ratio:
    """Return the ratio of two methods' means, over training seeds; with one seed, over its questions.

    Args:
        wide: see `by_method`. Questions without both values are left out.
        first: column of the numerator.
        second: column of the denominator.

    Returns:
        The ratio; NaN where no question has both values.
    """
    both = wide.reindex(columns=list(dict.fromkeys((first, second)))).dropna()
    if both.empty:
        return NO_RATIO
    by_seed = both.groupby(level="seed").mean()
    units = by_seed if len(by_seed) > 1 else both
    return ratio(units[first], units[second])


def differences(rows: pd.DataFrame, method: str) -> pd.DataFrame:
    """Compare `method` with every other method on the same questions and training seeds.

    Args:
        rows: as in `summary`.
        method: the method to compare with all others.

    Returns:
        One row per family, decoding and other method: `difference`, the accuracy of `method` minus that of `minus`,
        with its 95 % interval, p-value and `unit` (training seed; or question, where there is one seed), the number of
        `seeds` and of values `n`, `by_seed`, and `token_ratio`, the ratio of mean tokens, with its interval.

    Example:
        >>> differences(pd.read_parquet("runs/imad-tiny/clues/seed-0/questions.parquet"), "IMAD")
    """
    lines = []
    for (family, decoding), part in rows.groupby(["family", "decoding"], sort=False):
        correct = by_method(part, "correct")
        tokens = by_method(part.assign(tokens=part["tokens_in"] + part["tokens_out"]), "tokens")
        if method not in correct:
            continue
        for other in correct.columns.drop(method):
            gap, cost = difference_of(correct, method, other), ratio_of(tokens, method, other)
            lines.append(
                {
                    "family": family,
                    "decoding": decoding,
                    "method": method,
                    "minus": other,
                    "unit": gap.unit,
                    "seeds": gap.seeds,
                    "n": gap.n,
                    "difference": gap.mean,
                    "low": gap.low,
                    "high": gap.high,
                    "p": gap.p,
                    "by_seed": listed(gap.by_seed),
                    "token_ratio": cost.value,
                    "token_ratio_low": cost.low,
                    "token_ratio_high": cost.high,
                }
            )
    return pd.DataFrame(lines)


def listed(by_seed: Sequence[float]) -> str:
    """Return the values of all seeds as text."""
    return " ".join(f"{value:.4g}" for value in by_seed)


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
        interval_text(100 * row.accuracy, 100 * row.accuracy_low, 100 * row.accuracy_high, 1)
        for row in table.itertuples()
    ]
    columns = ["method", "decoding", "seed", "n", "accuracy", "tokens", "parse_failures", "failed", "mean_agents"]
    shown = table.assign(
        accuracy=intervals,
        tokens=[f"{tokens:.0f}" for tokens in table["tokens_in"] + table["tokens_out"]],
        mean_agents=table["mean_agents"].round(2),
    )[columns]
    write_text(folder / "results.md", markdown(shown) + published(rows["family"]) + "\n")
    write_text(folder / "results.tex", latex(shown))
    return table


def published(families: Iterable[str]) -> str:
    """Return the published table as Markdown, where one of its benchmarks is among the families; else nothing."""
    measured = {name.lower().replace("-", "_") for name in PUBLISHED_ON}
    return f"\n\nPublished, for comparison:\n\n{markdown(PAPER)}" if measured & set(families) else ""


def markdown(table: pd.DataFrame) -> str:
    """Return a table in Markdown."""
    return markdown_table(list(table.columns), table.astype(str).to_numpy().tolist())


def latex(table: pd.DataFrame) -> str:
    """Return a table in LaTeX for the `booktabs` package."""

    def escape(value: Any) -> str:
        return str(value).replace("_", r"\_").replace("%", r"\%").replace("&", r"\&")

    def cells(values: Sequence[Any]) -> str:
        return " & ".join(map(escape, values)) + r" \\"

    head = [rf"\begin{{tabular}}{{{'l' * len(table.columns)}}}", r"\toprule", cells(list(table.columns)), r"\midrule"]
    return "\n".join([*head, *map(cells, table.to_numpy().tolist()), r"\bottomrule", r"\end{tabular}", ""])
