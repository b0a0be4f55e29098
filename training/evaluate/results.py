"""Results of an evaluation: summary, paired differences, tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from steerkit.io.files import write_text
from steerkit.io.tables import write_table
from steerkit.stats.bootstrap import bootstrap_ci

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
"""The published results: accuracy in %, and average tokens in and out (arXiv 2604.24881)."""


def summary(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """A line per family, method, decoding and seed: accuracy with its 95 % interval over questions, mean tokens."""
    lines = []
    keys = ["family", "method", "decoding", "seed"]
    for key, part in rows.groupby(keys, sort=False):
        interval = bootstrap_ci(part["correct"].astype(float).to_numpy(), groups=part["id"].tolist(), seed=seed)
        lines.append(
            {
                **dict(zip(keys, key, strict=True)), "n": len(part), "accuracy": interval.mean,
                "accuracy_low": interval.low, "accuracy_high": interval.high, "tokens_in": part["tokens_in"].mean(),
                "tokens_out": part["tokens_out"].mean(), "parse_failures": int((~part["parsed"]).sum()),
                "mean_agents": part["agents"].mean(),
            }
        )  # fmt: skip
    return pd.DataFrame(lines)


def differences(rows: pd.DataFrame, method: str, seed: int = 0) -> pd.DataFrame:
    """`method` minus each other one on the same questions and seeds, 95 % intervals over questions, seeds pooled."""
    lines = []
    for (family, decoding), part in rows.groupby(["family", "decoding"], sort=False):
        wide = part.pivot_table(index=["seed", "id"], columns="method", values="correct", aggfunc="first")
        cost = part.assign(tokens=part["tokens_in"] + part["tokens_out"]).groupby("method")["tokens"].mean()
        if method not in wide:
            continue
        for other in wide.columns.drop(method):
            both = wide[[method, other]].dropna().astype(float)
            gap = (both[method] - both[other]).to_numpy()
            groups = [f"{s}/{i}" for s, i in both.index]
            interval = bootstrap_ci(gap, groups=groups, seed=seed)
            lines.append(
                {
                    "family": family, "decoding": decoding, "method": method, "minus": other, "n": len(both),
                    "difference": interval.mean, "low": interval.low, "high": interval.high,
                    "token_ratio": cost[method] / cost[other],
                }
            )  # fmt: skip
    return pd.DataFrame(lines)


def write_results(out: str | Path, rows: pd.DataFrame, method: str, meta: dict[str, Any]) -> pd.DataFrame:
    """`questions.parquet`, `results.csv`, `differences.csv`, `results.md` and `results.tex` in a folder."""
    folder = Path(out)
    table = summary(rows)
    write_table(folder / "questions.parquet", rows, meta)
    write_table(folder / "results.csv", table, meta)
    write_table(folder / "differences.csv", differences(rows, method), meta)
    shown = table.assign(
        accuracy=[
            f"{100 * r.accuracy:.1f} [{100 * r.accuracy_low:.1f}, {100 * r.accuracy_high:.1f}]"
            for r in table.itertuples()
        ],
        tokens=(table["tokens_in"] + table["tokens_out"]).round(0).astype(int),
        mean_agents=table["mean_agents"].round(2),
    )[["method", "decoding", "seed", "n", "accuracy", "tokens", "parse_failures", "mean_agents"]]
    write_text(folder / "results.md", f"{markdown(shown)}\n\nPublished, for comparison:\n\n{markdown(PAPER)}\n")
    write_text(folder / "results.tex", latex(shown))
    return table


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown."""
    lines = [list(map(str, table.columns)), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latex(table: pd.DataFrame) -> str:
    """A table in LaTeX, for the `booktabs` package."""

    def cells(values: Sequence[Any]) -> str:
        return " & ".join(str(v).replace("_", r"\_").replace("%", r"\%").replace("&", r"\&") for v in values) + r" \\"

    head = [rf"\begin{{tabular}}{{{'l' * len(table.columns)}}}", r"\toprule", cells(list(table.columns)), r"\midrule"]
    return "\n".join([*head, *map(cells, table.to_numpy().tolist()), r"\bottomrule", r"\end{tabular}", ""])
