"""Methods of answering: one answer, self-consistency, debate; each gives one table row per problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steerkit.text.prompt import PromptLike
from steerkit.text.tags import agents_in
from training.debates.answerers import Answerer, Reply, Request, Sampling
from training.debates.debate import Debate, Setting, run_debates
from training.debates.judge import Judge
from training.debates.personas import Cast
from training.problems.answers import read_answer, same
from training.problems.problem import Problem

Ask = Callable[[Problem], PromptLike]
DEBATES = ("Debate", "Round-1 majority")
PLURALITIES = ("Debate, plurality", "Round 1, plurality")
"""The same debates, decided as self-consistency is: by the most frequent answer."""


def one_answer(
    problems: Sequence[Problem], answerer: Answerer, ask: Ask, sampling: Sampling, judge: Judge | None = None
) -> pd.DataFrame:
    """Ask each problem once.

    Args:
        problems: problems with different ids.
        answerer: model that answers, see `training.debates.answerers`.
        ask: problem -> prompt.
        sampling: sampling settings.
        judge: decides which answers to open questions are right; a missing verdict counts as not parsed.

    Returns:
        One row per problem: `id`, `answer` (canonical or None), `correct`, `parsed`, `failed` (failed calls),
        `tokens_in`, `tokens_out`, and `agents` (number of agents whose tags are in the text).

    Raises:
        ValueError: a judge without any verdict.

    Example:
        >>> rows = one_answer(problems, LocalModel(*sk.load("runs/model")), bare, Sampling())
        >>> rows["correct"].mean()
    """
    requests = [Request(f"{problem.id}/0", ask(problem)) for problem in problems]
    replies = {reply.id: reply for reply in answerer(requests, sampling)}
    rows = [_row(problem, [replies[f"{problem.id}/0"]]) for problem in problems]
    opened = [index for index, problem in enumerate(problems) if problem.kind == "open"]
    if judge is not None and opened:
        pairs = [(problems[i].question, replies[f"{problems[i].id}/0"].text or "") for i in opened]
        verdicts = judge(pairs)
        if all(verdict is None for verdict in verdicts):
            raise ValueError(
                f"expected verdicts of the judge; got none on {len(pairs)} answers. Use another judge, or pass "
                "--judge-tokens 2048 for one that thinks first."
            )
        for index, verdict in zip(opened, verdicts, strict=True):
            rows[index] |= {"correct": verdict is True, "parsed": verdict is not None}
    return pd.DataFrame(rows)


def self_consistency(
    problems: Sequence[Problem], answerer: Answerer, ask: Ask, sampling: Sampling, samples: Sequence[int]
) -> list[pd.DataFrame]:
    """Ask each problem several times and return the most frequent answer; on a tie, the one that came first.

    Args:
        problems: problems with different ids.
        answerer: model that answers.
        ask: problem -> prompt.
        sampling: sampling settings.
        samples: numbers of samples; a smaller number uses the first samples of a larger one.

    Returns:
        One table per number of samples, with the columns of `one_answer`; tokens are summed over the samples.

    Source: Wang et al. 2022, arXiv 2203.11171.

    Example:
        >>> of_3, of_9 = self_consistency(problems, answerer, bare, Sampling(), samples=(3, 9))
    """
    requests = [Request(f"{problem.id}/{i}", ask(problem)) for problem in problems for i in range(max(samples))]
    replies = {reply.id: reply for reply in answerer(requests, sampling)}
    return [
        pd.DataFrame([_row(problem, [replies[f"{problem.id}/{i}"] for i in range(count)]) for problem in problems])
        for count in samples
    ]


def _row(problem: Problem, replies: Sequence[Reply]) -> dict[str, Any]:
    answers = [
        None if reply.text is None or problem.kind == "open" else read_answer(reply.text, problem.kind)
        for reply in replies
    ]
    answer = _most_frequent(answers)
    return {
        "id": problem.id,
        "answer": answer,
        "correct": same(answer, problem.gold),
        "parsed": answer is not None,
        "failed": sum(reply.text is None for reply in replies),
        "tokens_in": sum(reply.tokens_in or 0 for reply in replies),
        "tokens_out": sum(reply.tokens_out or 0 for reply in replies),
        "agents": float(np.mean([len(agents_in(reply.text or "")) for reply in replies])),
    }


def debates(
    problems: Sequence[Problem],
    answerer: Answerer,
    cast: Cast,
    setting: Setting,
    out: str | Path | None = None,
    shared: bool = False,
) -> dict[str, pd.DataFrame]:
    """Debate each problem.

    Args:
        problems: problems with different ids.
        answerer: model that answers for all agents.
        cast: the agents.
        setting: rounds, early stop and sampling.
        out: run folder of `training.debates.debate.run_debates`.
        shared: see `run_debates`.

    Returns:
        Four tables with the columns of `one_answer`. `Debate`: strict majority of the last round, tokens of all calls,
        as in the paper. `Round-1 majority`: strict majority of the first round, tokens of the first round. A debate
        without a majority is wrong and has `parsed` False. `Debate, plurality` and `Round 1, plurality`: the most
        frequent answer instead, on a tie that of the first agent, as in `self_consistency`.

    Example:
        >>> tables = debates(problems, answerer, cast_of("diverse"), Setting())
        >>> tables["Debate"]["correct"].mean()
    """
    whole = run_debates(problems, answerer, cast, setting, out, shared)
    first_rounds = [Debate(debate.problem, debate.calls[: debate.agents], debate.agents) for debate in whole]
    parts = [_debate_rows(some, plurality) for plurality in (False, True) for some in (whole, first_rounds)]
    return dict(zip((*DEBATES, *PLURALITIES), parts, strict=True))


def _most_frequent(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, on a tie the one that came first; None without an answer."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def _debate_rows(finished: Sequence[Debate], plurality: bool) -> pd.DataFrame:
    rows = []
    for debate in finished:
        tokens_in, tokens_out = debate.tokens()
        answer = _most_frequent(debate.votes()) if plurality else debate.answer()
        rows.append(
            {
                "id": debate.problem.id,
                "answer": answer,
                "correct": same(answer, debate.problem.gold) if plurality else debate.correct,
                "parsed": answer is not None,
                "failed": debate.failed,
                "tokens_in": tokens_in,
                "tokens_out": tokens_out,
                "agents": float(debate.agents),
            }
        )
    return pd.DataFrame(rows)
