"""Single answers, self-consistency and debates on GSM8K, MMLU-Pro and BBH; resumable reply by reply.

`python -m training benchmark` is the command. The questions are drawn with a fixed seed; each reply is on disk as soon
as its chunk ends. The token limit starts at 512 and is doubled until at most 5 % of the replies are cut, or to 2,048.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd

from steerkit.io.files import file_name, sha256
from steerkit.io.json import canonical_json
from steerkit.io.rows import append_rows, read_rows
from steerkit.io.run_folder import CONFIG, run_folder
from steerkit.io.tables import write_table
from steerkit.models.ends import ends_of
from steerkit.models.identity import provenance
from steerkit.models.kernels import resume_kernels
from steerkit.text.prompt import PromptLike
from steerkit.text.traces import Turn
from training.debates.answerers import Answerer, Reply, Request, Sampling
from training.debates.debate import (
    CALLS,
    Call,
    Debate,
    Setting,
    Template,
    answerer_identity,
    counted,
    run_debates,
    template_of,
)
from training.evaluate.methods import warn_of_lacking
from training.evaluate.prompts import DEBATERS, plain, read_finished
from training.evaluate.questions import chance
from training.evaluate.recorded import Recorded
from training.problems.problem import Problem, write_problems
from training.toy.worlds import bare

METHODS = ("Single", "Self-consistency", "Debate")
SAMPLES = 5
"""Samples of self-consistency; Single is the mean over them."""
LIMITS = (512, 1024, 2048)
CUT = 0.05
"""Share of cut replies up to which a token limit is kept."""
BASE = "base"
PROBLEMS = "problems.jsonl"
SAMPLED, DEBATED = "samples", "debates"
TABLES = {SAMPLED: METHODS[:2], DEBATED: METHODS[2:]}
"""Table of the calls that count, in the folder of a benchmark and a model -> methods that it is for."""


def evaluate(
    problems: Mapping[str, Sequence[Problem]],
    answerer: Answerer,
    out: str | Path,
    methods: Sequence[str] = METHODS,
    seed: int = 0,
    trained: str | None = None,
) -> None:
    """Answer the questions of each benchmark by one model; the same call resumes. `write_tables` makes the tables.

    Five samples are generated for Single and self-consistency together, with one token limit per benchmark and model,
    then the debates, with a limit of their own. A trained model is sampled alone, by the prompt that it was trained
    with. Its limit follows from its own replies, so it may differ from that of the untrained model.

    Args:
        problems: benchmark -> questions, see `training.evaluate.questions.drawn`.
        answerer: the model, see `training.evaluate.chunks.Chunks`.
        out: folder with a folder per benchmark, and in it one of the calls of each model.
        methods: some of `METHODS`; of a trained model they are not used.
        seed: seed of the sampling.
        trained: name of a trained model in the tables; None for the untrained one.

    Raises:
        TimeUp: the time of `Chunks` is over.
        ConfigurationChanged, RunFolderBusy: see `steerkit.io.run_folder`.

    Example:
        >>> answerer = Chunks(LocalModel(*sk.load("runs/model")), rows=16)
        >>> evaluate({"gsm8k": drawn("data", "gsm8k")}, answerer, "runs/gsm8k")
        >>> write_tables("runs/gsm8k")["accuracy"]
    """
    sampling, who, ask = Sampling(seed=seed), file_name(trained or BASE), bare if trained else plain
    if getattr(answerer, "tokenizer", None) is not None:
        for config in sorted(Path(out).glob(f"*/{who}/{CONFIG}"))[:1]:
            resume_kernels(answerer.model, config.parent)  # type: ignore[attr-defined]
    meta = {"model": trained, "answerer": answerer_identity(answerer.about())}
    asked = [table for table, names in TABLES.items() if set(names) & set(methods)]
    for table in [SAMPLED] if trained else asked:
        for name, some in problems.items():
            with _folder(Path(out) / name, some, answerer, sampling, who, ask) as folder:
                if table == SAMPLED:
                    calls = sampled(some, answerer, ask, sampling, folder)
                else:
                    calls = debated(some, answerer, sampling, folder)
                write_table(folder / f"{table}.parquet", calls, meta)


@contextlib.contextmanager
def _folder(
    benchmark: Path,
    problems: Sequence[Problem],
    answerer: Answerer,
    sampling: Sampling,
    who: str,
    ask: Callable[[Problem], PromptLike],
) -> Iterator[Path]:
    """Hold the folder of a model below that of a benchmark; what determines the calls is in both configurations."""
    shared = {
        "problems": sha256(canonical_json([asdict(problem) for problem in problems])),
        "sampling": {name: getattr(sampling, name) for name in ("temperature", "top_p", "seed")},
        "limits": LIMITS,
        "cut": CUT,
        "samples": SAMPLES,
    }
    about = answerer.about()
    tokenizer = getattr(answerer, "tokenizer", None)
    own = {
        "answerer": answerer_identity(about),
        "ends": None if tokenizer is None else sorted(ends_of(answerer.model, tokenizer)),  # type: ignore[attr-defined]
        "template": asdict(template_of(answerer, ask(problems[0]))),
        "prompts": _prompts(problems[0], ask),
        "prompts_sha256": sha256(canonical_json([_prompts(problem, ask) for problem in problems])),
    }
    with run_folder(benchmark, shared):
        write_problems(benchmark / PROBLEMS, problems)
        with run_folder(benchmark / who, own, provenance(about) if "versions" in about else None) as folder:
            yield folder


def _prompts(problem: Problem, ask: Callable[[Problem], PromptLike]) -> list[Any]:
    """The prompts of a problem: of a sample, and of each agent in both rounds (for the untrained model)."""
    agents = range(1, len(DEBATERS.personas) + 1) if ask is plain else ()
    turns = [Turn(agent, 1, f"answer {agent}") for agent in agents]
    rounds = [
        DEBATERS.ask(problem, agent, number, turns if number > 1 else []) for number in (1, 2) for agent in agents
    ]
    return [ask(problem), *rounds]


def sampled(
    problems: Sequence[Problem],
    answerer: Answerer,
    ask: Callable[[Problem], PromptLike],
    sampling: Sampling,
    folder: Path,
) -> pd.DataFrame:
    """Return one row per sample, `SAMPLES` per problem, under one token limit; replies on disk are read.

    All attempts are kept with their limit. If more than 5 % of all replies are cut at a limit, all cut ones are
    generated again with the next limit. The decision follows from the attempts alone, wherever a part ended.

    Args:
        problems: the problems.
        answerer: the model.
        ask: problem -> prompt.
        sampling: its limit is replaced by those of `LIMITS`.
        folder: folder of `calls.jsonl`.

    Returns:
        The table of `call_row`.
    """
    requests = [Request(f"{problem.id}/{i}", ask(problem)) for problem in problems for i in range(SAMPLES)]
    recorded = Recorded(answerer, folder)
    last: dict[str, Reply] = {}
    asked, used = requests, LIMITS[0]
    for limit in LIMITS:
        last |= {reply.id: reply for reply in recorded(asked, replace(sampling, max_new_tokens=limit))}
        used = limit
        asked = [request for request in requests if is_cut(last[request.id])]
        if len(asked) <= CUT * len(requests):
            break
    warn_of_lacking(list(last.values()))
    template = template_of(answerer, requests[0].prompt)
    rows = []
    for problem in problems:
        for i in range(SAMPLES):
            reply = last[f"{problem.id}/{i}"]
            call = Call(0, 1, reply.text, reply.tokens_in, reply.tokens_out, reply.error, reply.finished)
            rows.append(call_row(problem, call, template, i, used))
    return pd.DataFrame(rows)


def is_cut(reply: Reply | Call) -> bool:
    """Return whether a reply was cut at its token limit; a failed one was not."""
    return reply.text is not None and not reply.finished


def debated(problems: Sequence[Problem], answerer: Answerer, sampling: Sampling, folder: Path) -> pd.DataFrame:
    """Return one row per call of the debates under the first limit with at most 5 % cut calls.

    A cut call abstains, also for the early stop. A call that ended under a limit is the same under a larger one: it is
    copied into the log of the next limit, where its prompt is the same.

    Args:
        problems: the problems.
        answerer: the model.
        sampling: its limit is replaced by those of `LIMITS`.
        folder: has a folder of debates per limit.

    Returns:
        The table of `call_row`.
    """
    debates: list[Debate] = []
    calls: list[Call] = []
    limit = LIMITS[0]
    for number, limit in enumerate(LIMITS):
        setting = Setting(sampling=replace(sampling, max_new_tokens=limit))
        own = folder / f"debates-{limit}"
        if number:
            copy_finished(folder / f"debates-{LIMITS[number - 1]}" / CALLS, own / CALLS)
        debates = run_debates(problems, answerer, DEBATERS, setting, own, read=read_finished)
        calls = [call for debate in debates for call in debate.calls]
        if sum(map(is_cut, calls)) <= CUT * len(calls):
            break
    warn_of_lacking(calls)
    rows = [call_row(debate.problem, call, debate.template, 0, limit) for debate in debates for call in debate.calls]
    return pd.DataFrame(rows)


def copy_finished(source: Path, target: Path) -> None:
    """Append the finished calls of one log to another, where that has no call of the same agent and round."""
    known = {row["key"] for row in read_rows(target)} if target.exists() else set()
    last = {row["key"]: row for row in read_rows(source)}
    new = [row for key, row in last.items() if key not in known and row["text"] is not None and row["finished"]]
    if new:
        append_rows(target, new)


def call_row(problem: Problem, call: Call, template: Template, sample: int, limit: int) -> dict[str, Any]:
    """Return the row of a call that counts.

    Args:
        problem: its problem.
        call: the call; agent 0 is none.
        template: what the chat template does to the prompts.
        sample: number of the sample, from 0.
        limit: token limit of the benchmark.

    Returns:
        Ids of problem, category, agent, round and sample; `gold` and `answer` (None where it cannot be read or was
        cut); `chance`; token counts, NaN where none are reported; whether the call was `cut`, is `unread` (it ended
        without an answer that can be read), or `failed`; the `limit`; and the `text` of an unread call, else None.
    """
    answer, cut = read_finished(problem, call, template), is_cut(call)
    unread = answer is None and call.text is not None and not cut
    return {
        "id": problem.id,
        "category": problem.family,
        "agent": call.agent,
        "round": call.round,
        "sample": sample,
        "gold": problem.gold,
        "answer": answer,
        "chance": chance(problem),
        "tokens_in": counted(call.tokens_in),
        "tokens_out": counted(call.tokens_out),
        "cut": cut,
        "unread": unread,
        "failed": call.text is None,
        "limit": limit,
        "text": call.text if unread else None,
    }
