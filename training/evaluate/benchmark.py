"""Single answers, self-consistency and debates of a checkpoint on GSM8K, MMLU-Pro and BBH; resumable reply by reply.

`python -m training benchmark` is the command. The questions are drawn with a fixed seed; each reply is on disk as soon
as it is there. The token limit starts at 512 and is doubled until at most 5 % of the replies are cut, or to 2,048.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from steerkit.io.files import sha256, write_text
from steerkit.io.json import canonical_json
from steerkit.io.rows import append_rows, read_rows
from steerkit.io.run_folder import run_folder
from steerkit.io.tables import write_table
from steerkit.io.versions import versions
from steerkit.stats.format import interval_text
from steerkit.stats.mean import accuracy_interval
from training.debates.answerers import Answerer, Reply, Request, Sampling
from training.debates.debate import Debate, Setting, answerer_identity, run_debates
from training.debates.personas import Cast, cast_of
from training.evaluate.results import markdown
from training.problems.answers import read_answer, same
from training.problems.benchmarks import BBH_TASKS, load_bbh, load_gsm8k, load_mmlu_pro
from training.problems.problem import Problem

BENCHMARKS = ("gsm8k", "mmlu_pro", "bbh")
METHODS = ("Single", "Self-consistency", "Debate")
SEED = 28
"""Seed of the questions."""
SAMPLES = 5
"""Samples of self-consistency; the first of them is the single answer."""
LIMITS = (512, 1024, 2048)
CUT = 0.05
"""Share of cut replies up to which a token limit is kept."""
CALLS = "calls.jsonl"


class TimeUp(Exception):
    """The minutes of this part are over; what is answered is on disk."""


@dataclass(frozen=True)
class Until:
    """An answerer that raises `TimeUp` after a moment; replies that it has given are kept by its caller.

    Args:
        answerer: the answerer.
        deadline: `time.monotonic()` after which no further reply is given.
    """

    answerer: Answerer
    deadline: float

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Reply]:
        """Yield replies until the deadline."""
        for reply in self.answerer(requests, sampling):
            yield reply
            if time.monotonic() > self.deadline:
                raise TimeUp

    def about(self) -> dict[str, Any]:
        """Return the provenance of the answerer."""
        return self.answerer.about()


def drawn(folder: str | Path, benchmark: str, seed: int = SEED) -> list[Problem]:
    """Return the questions of a benchmark: 100 of GSM8K, 7 of each category of MMLU-Pro, 20 of each task of BBH.

    Args:
        folder: has `gsm8k/test.jsonl`, `mmlu_pro/test_sample.jsonl` (or another `.jsonl`) and `bbh/TASK.json`.
        benchmark: one of `BENCHMARKS`.
        seed: of the draw.

    Raises:
        ValueError: an unknown benchmark. See also `training.problems.benchmarks`.

    Example:
        >>> len(drawn("data", "mmlu_pro"))
        98
    """
    rng, data = random.Random(f"{benchmark} {seed}"), Path(folder)

    def some(problems: Sequence[Problem], n: int) -> list[Problem]:
        return rng.sample(list(problems), min(n, len(problems)))

    if benchmark == "gsm8k":
        return some(load_gsm8k(data / "gsm8k" / "test.jsonl"), 100)
    if benchmark == "bbh":
        return [one for task in BBH_TASKS for one in some(load_bbh(data / "bbh", task), 20)]
    if benchmark == "mmlu_pro":
        file = next(iter(sorted((data / "mmlu_pro").glob("*.jsonl"))), data / "mmlu_pro" / "test.jsonl")
        categories = {f"mmlu_pro/{row['question_id']}": row["category"] for row in read_rows(file)}
        problems = load_mmlu_pro(file)
        names = sorted(set(categories.values()))
        return [one for name in names for one in some([p for p in problems if categories[p.id] == name], 7)]
    raise ValueError(f"expected a benchmark among {BENCHMARKS}; got {benchmark!r}. Pass one of these.")


def replies(
    problems: Sequence[Problem], answerer: Answerer, cast: Cast, sampling: Sampling, samples: int, folder: Path
) -> dict[str, Reply]:
    """Return the replies to `samples` requests per problem by id, from disk where they are there.

    A limit is kept if at most 5 % of the replies are cut; else the cut ones are generated again with the next limit.

    Args:
        problems: the problems.
        answerer: the answerer.
        cast: how a single answer is asked for.
        sampling: its limit is that of `LIMITS`.
        samples: requests per problem.
        folder: folder of `calls.jsonl`.
    """
    requests = {f"{p.id}/{i}": Request(f"{p.id}/{i}", cast.plain(p)) for p in problems for i in range(samples)}
    found: dict[str, Reply] = {}
    limits: dict[str, int] = {}
    if (folder / CALLS).exists():
        for row in read_rows(folder / CALLS):
            limits[row["id"]] = row.pop("limit")
            found[row["id"]] = Reply(**row)
    for limit in LIMITS:
        missing = [key for key in requests if key not in found]
        cut = [key for key in requests if key in found and not found[key].finished and limits[key] < limit]
        again = cut if limit > LIMITS[0] and too_many_cut([found[k] for k in requests if k in found]) else []
        asked = [requests[key] for key in (*missing, *again)]
        for reply in answerer(asked, replace(sampling, max_new_tokens=limit)) if asked else ():
            append_rows(folder / CALLS, [{**asdict(reply), "limit": limit}])
            found[reply.id], limits[reply.id] = reply, limit
    return {key: found[key] for key in requests}


def too_many_cut(given: Sequence[Reply]) -> bool:
    """Return whether more than 5 % of the replies are cut at the limit."""
    return sum(not reply.finished for reply in given) > CUT * len(given)


def answer_rows(problems: Sequence[Problem], given: Mapping[str, Reply], samples: int) -> pd.DataFrame:
    """Return one row per problem: the most frequent answer of its samples, the first one on a tie.

    A cut reply counts as an abstention, so that a single cut answer is wrong. `unread` counts the finished replies
    without an answer that can be read.
    """
    rows = []
    for problem in problems:
        mine = [given[f"{problem.id}/{i}"] for i in range(samples)]
        read = [read_answer(r.text, problem.kind) if r.finished and r.text is not None else None for r in mine]
        votes = Counter(answer for answer in read if answer is not None)
        answer = votes.most_common(1)[0][0] if votes else None
        finished = [answer for answer, reply in zip(read, mine, strict=True) if reply.finished]
        rows.append(_row(problem, answer, mine, sum(not r.finished for r in mine), finished.count(None)))
    return pd.DataFrame(rows)


def debate_rows(debates: Sequence[Debate], limit: int) -> pd.DataFrame:
    """Return one row per debate; a call of `limit` new tokens counts as cut."""
    rows = []
    for debate in debates:
        cut = [call.tokens_out is not None and call.tokens_out >= limit for call in debate.calls]
        votes = [vote for number in range(1, debate.rounds + 1) for vote in debate.votes(number)]
        unread = sum(vote is None and not is_cut for vote, is_cut in zip(votes, cut, strict=True))
        rows.append(_row(debate.problem, debate.answer(), debate.calls, sum(cut), unread))
    return pd.DataFrame(rows)


def _row(problem: Problem, answer: str | None, calls: Sequence[Any], cut: int, unread: int) -> dict[str, Any]:
    return {
        "id": problem.id,
        "answer": answer,
        "gold": problem.gold,
        "correct": same(answer, problem.gold),
        "tokens_in": sum(call.tokens_in or 0 for call in calls),
        "tokens_out": sum(call.tokens_out or 0 for call in calls),
        "calls": len(calls),
        "cut": cut,
        "unread": unread,
    }


def debated(
    problems: Sequence[Problem], answerer: Answerer, cast: Cast, sampling: Sampling, folder: Path
) -> tuple[list[Debate], int]:
    """Return the debates under the first limit with at most 5 % cut calls, and that limit."""
    debates: list[Debate] = []
    for limit in LIMITS:
        setting = Setting(sampling=replace(sampling, max_new_tokens=limit))
        debates = run_debates(problems, answerer, cast, setting, folder / f"debates-{limit}")
        calls = [call for debate in debates for call in debate.calls]
        if sum((call.tokens_out or 0) >= limit for call in calls) <= CUT * len(calls):
            return debates, limit
    return debates, LIMITS[-1]


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row per benchmark and method: accuracy with its 95 % interval over questions, and the counts."""
    lines = []
    for (benchmark, method), part in rows.groupby(["benchmark", "method"], sort=False):
        interval = accuracy_interval(part["correct"].astype(float).to_numpy(), groups=part["id"].tolist())
        lines.append(
            {
                "benchmark": benchmark,
                "method": method,
                "n": len(part),
                "accuracy": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "tokens_in": part["tokens_in"].mean(),
                "tokens_out": part["tokens_out"].mean(),
                "calls": int(part["calls"].sum()),
                "cut": int(part["cut"].sum()),
                "unread": int(part["unread"].sum()),
                "limit": int(part["limit"].max()),
            }
        )
    return pd.DataFrame(lines)


def evaluate(
    problems: Mapping[str, Sequence[Problem]],
    answerer: Answerer,
    out: str | Path,
    methods: Sequence[str] = METHODS,
    cast: Cast | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Answer the questions of each benchmark by each method, and write the tables; the same call resumes.

    Args:
        problems: benchmark -> questions, see `drawn`.
        answerer: the model.
        out: folder of `questions.parquet`, `results.csv`, `results.md`, `unread.jsonl` (finished replies without an
            answer that can be read), and a folder of replies per benchmark.
        methods: some of `METHODS`.
        cast: agents of the debates; default: the diverse ones.
        seed: seed of the sampling.

    Returns:
        The table of `summary`.

    Raises:
        TimeUp: see `Until`.
        ConfigurationChanged, RunFolderBusy: see `steerkit.io.run_folder`.

    Example:
        >>> table = evaluate({"gsm8k": drawn("data", "gsm8k")}, LocalModel(*sk.load("runs/model")), "runs/gsm8k")
    """
    agents, sampling, parts = cast or cast_of("diverse"), Sampling(seed=seed), []
    unread: list[dict[str, Any]] = []
    about = answerer_identity(answerer.about())
    asked = {name: sha256(canonical_json([asdict(one) for one in some])) for name, some in problems.items()}
    for name, some in problems.items():
        config = {"problems": asked[name], "answerer": about, "cast": agents.name, "sampling": asdict(sampling)}
        with run_folder(Path(out) / name, config) as folder:
            for method in methods:
                if method == "Debate":
                    debates, limit = debated(some, answerer, agents, sampling, folder)
                    rows = debate_rows(debates, limit)
                else:
                    samples = SAMPLES if method == "Self-consistency" else 1
                    given = replies(some, answerer, agents, sampling, samples, folder)
                    rows, limit = answer_rows(some, given, samples), LIMITS[-1]
                    limit = max(row["limit"] for row in read_rows(folder / CALLS) if row["id"] in given)
                    unread += [
                        {"benchmark": name, "method": method, "id": key, "text": reply.text}
                        for key, reply in given.items()
                        if reply.finished and read_answer(reply.text or "", _kind(some, key)) is None
                    ]
                parts.append(rows.assign(benchmark=name, method=method, limit=limit))
    table = summary(pd.concat(parts, ignore_index=True))
    meta = {"answerer": about, "problems": asked, "seed": seed, "versions": versions()}
    write_table(Path(out) / "questions.parquet", pd.concat(parts, ignore_index=True), meta)
    write_table(Path(out) / "results.csv", table, meta)
    write_text(Path(out) / "unread.jsonl", "".join(canonical_json(row) + "\n" for row in unread))
    texts = [interval_text(100 * r.accuracy, 100 * r.low, 100 * r.high, 1) for r in table.itertuples()]
    shown = table.assign(accuracy=texts).drop(columns=["low", "high"]).round(1)
    write_text(Path(out) / "results.md", markdown(shown) + "\n")
    return table


def _kind(problems: Sequence[Problem], key: str) -> str:
    return next(problem.kind for problem in problems if problem.id == key.rpartition("/")[0])
