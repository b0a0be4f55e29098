"""Tables of the benchmarks: accuracies, their differences, categories, agents, and replies that were not read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steerkit.io.files import write_text
from steerkit.io.json import canonical_json, read_json
from steerkit.io.rows import read_rows
from steerkit.io.run_folder import CONFIG
from steerkit.io.tables import read_table, write_table
from steerkit.io.versions import versions
from steerkit.stats.format import interval_text
from steerkit.stats.mean import accuracy_interval
from steerkit.stats.paired import paired_difference, ratio
from training.debates.debate import CALLS, Call, Template
from training.evaluate.benchmark import DEBATED, METHODS, PROBLEMS, SAMPLED, TABLES
from training.evaluate.methods import DEBATES, PLURALITIES
from training.evaluate.prompts import read_finished
from training.evaluate.questions import BENCHMARKS
from training.evaluate.results import NO_RATIO, markdown
from training.problems.answers import majority, same
from training.problems.problem import read_problems

POOLED = "all"
SINGLE, CONSISTENCY, DEBATE = METHODS
PAIRS = (
    (DEBATE, SINGLE),
    (CONSISTENCY, SINGLE),
    (DEBATE, CONSISTENCY),
    (PLURALITIES[0], CONSISTENCY),
    (PLURALITIES[0], PLURALITIES[1]),
    (PLURALITIES[1], SINGLE),
)
"""Methods that are compared. The last three separate the vote of three agents from what their second round adds."""
EXPORTED = ("results.csv", "differences.csv", "categories.csv", "agents.csv", "questions.csv", "calls.csv")
"""Tables without texts."""


def write_tables(out: str | Path) -> pd.DataFrame:
    """Write the tables of all methods whose calls are complete, and the list of all calls that there are.

    Args:
        out: folder of `training.evaluate.benchmark.evaluate`. It gets `results.csv` (see `summary`), `results.md`,
            `differences.csv` (see `differences`), `categories.csv` (`summary` of each category or task), `agents.csv`
            (cut and unread calls of each agent), `questions.csv` (see `question_rows`), `calls.csv` (see
            `finished_calls`), and `unread.jsonl` (complete replies without an answer that can be read).

    Returns:
        The table of `summary`; without a row if no method is complete.
    """
    folder = Path(out)
    parts, meta = _parts(folder)
    listed = finished_calls(folder)
    if len(listed):
        write_table(folder / "calls.csv", listed, meta)
    if not parts:
        return pd.DataFrame()
    calls = pd.concat(parts, ignore_index=True)
    rows = pd.concat([question_rows(part) for part in parts], ignore_index=True)
    table, gaps = summary(rows, ["benchmark"]), differences(rows)
    write_table(folder / "results.csv", table, meta)
    write_table(folder / "differences.csv", gaps, meta)
    write_table(folder / "categories.csv", summary(rows, ["benchmark", "category"]), meta)
    write_table(folder / "questions.csv", rows, meta)
    keys = ["benchmark", "model", "category", "agent", "round"]
    counts = calls.assign(calls=1).groupby(keys, sort=False)[["calls", "cut", "unread", "failed"]].sum()
    write_table(folder / "agents.csv", counts.reset_index(), meta)
    unread = calls[calls["unread"].astype(bool)]
    texts = unread[[*keys, "id", "sample", "text"]].to_dict("records")
    write_text(folder / "unread.jsonl", "".join(canonical_json(row) + "\n" for row in texts))
    write_text(folder / "results.md", f"{_shown(table, 'accuracy')}\n\n{_shown(gaps, 'difference')}\n")
    return table


def _parts(out: Path) -> tuple[list[pd.DataFrame], dict[str, Any]]:
    """The complete tables of calls, each of one benchmark and model, and the metadata of what is made from them."""
    found, answerers = [], {}
    for path in sorted(out.glob("*/*/*.parquet"), key=_order):
        if path.stem not in TABLES:
            continue
        calls, meta = read_table(path)
        model = meta.get("model") or ""
        answerers[model or "untrained"] = meta.get("answerer")
        found.append(calls.assign(benchmark=path.parts[-3], model=model, table=path.stem))
    configs = {path.parent.name: read_json(path) for path in sorted(out.glob(f"*/{CONFIG}"))}
    return found, {"answerers": answerers, "benchmarks": configs, "versions": versions()}


def _order(path: Path) -> tuple[int, str, int, str]:
    """Benchmarks in their order; the untrained model's samples, its debates, then the trained models."""
    name, who = path.parts[-3], path.parts[-2]
    known = BENCHMARKS.index(name) if name in BENCHMARKS else len(BENCHMARKS)
    return known, name, (who != "base") * 2 + (path.stem != SAMPLED), who


def finished_calls(out: str | Path) -> pd.DataFrame:
    """Return one row per call on disk, under every token limit, also of methods that are not complete.

    Returns:
        `benchmark`, `model` (its folder), `table` (samples or debates), `key` (question and sample, or question, round
        and agent), `limit`, `answer`, `correct`, `cut`, `failed`, token counts, and `prompt_sha256`.
    """
    rows = []
    for path in sorted([*Path(out).glob(f"*/*/{CALLS}"), *Path(out).glob(f"*/*/debates-*/{CALLS}")]):
        debates = path.parent.name.startswith("debates-")
        model = path.parent.parent if debates else path.parent
        problems = {problem.id: problem for problem in read_problems(model.parent / PROBLEMS)}
        template = Template(**read_json(model / CONFIG)["template"])
        last = {(row.get("key") or row["id"], row.get("limit")): row for row in read_rows(path)}
        for (key, limit), row in last.items():
            problem = problems[key.rpartition("/round-")[0] if debates else key.rpartition("/")[0]]
            call = Call(0, 1, row["text"], row["tokens_in"], row["tokens_out"], row["error"], row["finished"])
            answer = read_finished(problem, call, template)
            rows.append(
                {
                    "benchmark": model.parent.name,
                    "model": model.name,
                    "table": DEBATED if debates else SAMPLED,
                    "key": key,
                    "limit": limit or int(path.parent.name.partition("-")[2]),
                    "answer": answer,
                    "correct": same(answer, problem.gold),
                    "cut": row["text"] is not None and not row["finished"],
                    "failed": row["text"] is None,
                    "tokens_in": row["tokens_in"],
                    "tokens_out": row["tokens_out"],
                    "prompt_sha256": row["prompt_sha256"],
                }
            )
    return pd.DataFrame(rows)


def question_rows(calls: pd.DataFrame) -> pd.DataFrame:
    """Return one row per question and method.

    Samples give Single and Self-consistency. Single is the mean over the samples: `correct` is the share of right ones,
    tokens are means. Self-consistency is the most frequent answer, on a tie the first one; tokens are sums. A trained
    model has its mean over samples alone, under its name.

    Debates give four methods: a strict majority of all agents (`Debate`) or the most frequent answer (`Debate,
    plurality`) of the last round; and both of the first round alone, with the tokens of that round (`Round-1 majority`,
    `Round 1, plurality`).

    Args:
        calls: calls of one benchmark and model, see `training.evaluate.benchmark.call_row`.

    Returns:
        `benchmark`, `method`, `id`, `category`, `answer`, `gold`, `correct` in [0, 1], `chance`, mean or summed tokens,
        and the numbers of calls and of cut, unread and failed ones.
    """
    first = calls.iloc[0]
    rows: list[dict[str, Any]] = []
    for _, mine in calls.groupby("id", sort=False):
        if first["table"] == SAMPLED:
            rows.append(_mean_row(mine, first["model"] or SINGLE))
            if not first["model"]:
                rows.append(_row(mine, CONSISTENCY, plurality(_answers(mine))))
            continue
        start = mine[mine["round"] == 1]
        last = mine[mine["round"] == mine["round"].max()]
        rules: Sequence[Callable[[Sequence[str | None]], str | None]] = (majority, plurality)
        for names, rule in zip((DEBATES, PLURALITIES), rules, strict=True):
            rows.append(_row(mine, names[0], rule(_answers(last))))
            rows.append(_row(start, names[1], rule(_answers(start))))
    return pd.DataFrame(rows).sort_values("method", key=lambda names: names.map(_rank(rows)), kind="stable")


def _rank(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {name: number for number, name in enumerate(dict.fromkeys(row["method"] for row in rows))}


def plurality(answers: Sequence[str | None]) -> str | None:
    """Return the most frequent answer, on a tie the one that came first; None without an answer.

    Example:
        >>> plurality(["14", None, "20"])
        '14'
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def _answers(calls: pd.DataFrame) -> list[str | None]:
    return [None if pd.isna(answer) else str(answer) for answer in calls["answer"]]


def _mean_row(calls: pd.DataFrame, method: str) -> dict[str, Any]:
    answers, gold = _answers(calls), calls["gold"].iloc[0]
    row = _row(calls, method, None)
    means = {name: row[name] / len(calls) for name in ("tokens_in", "tokens_out")}
    shown = " | ".join(answer or "-" for answer in answers)
    return {**row, **means, "answer": shown, "correct": float(np.mean([same(answer, gold) for answer in answers]))}


def _row(calls: pd.DataFrame, method: str, answer: str | None) -> dict[str, Any]:
    first = calls.iloc[0]
    return {
        "benchmark": first["benchmark"],
        "method": method,
        **{name: first[name] for name in ("id", "category")},
        "answer": answer,
        "gold": first["gold"],
        "correct": float(same(answer, first["gold"])),
        "chance": first["chance"],
        **{name: float(calls[name].sum(skipna=False)) for name in ("tokens_in", "tokens_out")},
        "calls": len(calls),
        **{name: int(calls[name].sum()) for name in ("cut", "unread", "failed")},
        "limit": int(first["limit"]),
    }


def summary(rows: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Return one row per method and value of the keys.

    Args:
        rows: see `question_rows`.
        keys: columns whose values are kept apart, e.g. `["benchmark", "category"]`.

    Returns:
        Number of questions `n`, `accuracy` in [0, 1] with its 95 % interval over questions, the accuracy by `chance`,
        mean tokens per question, sums of calls and of cut, unread and failed ones, and the token limit.
    """
    lines = []
    for key, part in rows.groupby([*keys, "method"], sort=False):
        interval = accuracy_interval(part["correct"].to_numpy(), groups=part["id"].tolist())
        lines.append(
            {
                **dict(zip([*keys, "method"], key, strict=True)),
                "n": len(part),
                "accuracy": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "chance": part["chance"].mean(),
                **{name: part[name].mean() for name in ("tokens_in", "tokens_out")},
                **{name: int(part[name].sum()) for name in ("calls", "cut", "unread", "failed")},
                "limit": int(part["limit"].max()),
            }
        )
    return pd.DataFrame(lines)


def differences(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the differences of accuracy between methods, questions paired, per benchmark and over all of them.

    Args:
        rows: see `question_rows`.

    Returns:
        One row per benchmark (`all` for all of them together) and pair of `PAIRS`, and each trained model minus Single
        and minus Debate: `difference` in [-1, 1] with its 95 % interval over questions and p-value, their number `n`,
        and `token_ratio`, the ratio of mean prompt and new tokens, with Fieller's interval (NaN without token counts).
        No row where a pair shares fewer than two questions.
    """
    known = {SINGLE, CONSISTENCY, *DEBATES, *PLURALITIES}
    trained = [name for name in dict.fromkeys(rows["method"]) if name not in known]
    pairs = [*PAIRS, *((name, other) for name in trained for other in (SINGLE, DEBATE))]
    costed = rows.assign(tokens=rows["tokens_in"] + rows["tokens_out"])
    correct, tokens = (
        costed.pivot_table(index=["benchmark", "id"], columns="method", values=value, sort=False)
        for value in ("correct", "tokens")
    )
    tokens = tokens.reindex(index=correct.index, columns=correct.columns)  # a method without any count has no column
    names = list(dict.fromkeys(rows["benchmark"]))
    lines = []
    for name in [*names, *([POOLED] if len(names) > 1 else [])]:
        for one, other in pairs:
            if one not in correct or other not in correct:
                continue
            right, cost = (
                (wide if name == POOLED else wide.loc[[name]])[[one, other]].dropna() for wide in (correct, tokens)
            )
            if len(right) < 2:
                continue
            gap = paired_difference(right[one], right[other])
            times = ratio(cost[one], cost[other]) if len(cost) else NO_RATIO
            lines.append(
                {
                    "benchmark": name,
                    "method": one,
                    "minus": other,
                    "n": gap.n,
                    "difference": gap.mean,
                    "low": gap.low,
                    "high": gap.high,
                    "p": gap.p,
                    "token_ratio": times.value,
                    "token_ratio_low": times.low,
                    "token_ratio_high": times.high,
                }
            )
    return pd.DataFrame(lines)


def _shown(table: pd.DataFrame, column: str) -> str:
    """A table in Markdown, with a share and its interval in percent as one cell."""
    if table.empty:
        return ""
    texts = [
        interval_text(100 * value, 100 * low, 100 * high, 1)
        for value, low, high in zip(table[column], table["low"], table["high"], strict=True)
    ]
    return markdown(table.assign(**{column: texts}).drop(columns=["low", "high"]).round(3))
