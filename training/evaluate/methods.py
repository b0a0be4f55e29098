"""Ways to answer: one answer, self-consistency, debate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steerkit.text.prompt import Prompt
from steerkit.text.tags import agents_in
from training.debates.answerers import Answerer, Reply, Request, Sampling
from training.debates.debate import Debate, Setting, hold
from training.debates.personas import Cast
from training.problems.answers import read_answer, same
from training.problems.problem import Problem

Ask = Callable[[Problem], Prompt]
DEBATES = ("Debate", "Round-1 majority")


def one_answer(problems: Sequence[Problem], answerer: Answerer, ask: Ask, sampling: Sampling) -> pd.DataFrame:
    """Each problem asked once: a row each with answer, correctness, tokens, and how many agents the text holds."""
    requests = [Request(f"{problem.id}/0", ask(problem)) for problem in problems]
    replies = {reply.id: reply for reply in answerer(requests, sampling)}
    return pd.DataFrame([_row(p, [replies[f"{p.id}/0"]]) for p in problems])


def self_consistency(
    problems: Sequence[Problem], answerer: Answerer, ask: Ask, sampling: Sampling, samples: Sequence[int]
) -> list[pd.DataFrame]:
    """The most frequent answer of several samples, the earliest on a tie (Wang et al. 2022, arXiv 2203.11171).

    One table per number of samples; fewer are the first of more.
    """
    requests = [Request(f"{p.id}/{i}", ask(p)) for p in problems for i in range(max(samples))]
    replies = {reply.id: reply for reply in answerer(requests, sampling)}
    return [pd.DataFrame([_row(p, [replies[f"{p.id}/{i}"] for i in range(k)]) for p in problems]) for k in samples]


def _row(problem: Problem, replies: Sequence[Reply]) -> dict[str, Any]:
    answers = [None if reply.text is None else read_answer(reply.text, problem.kind) for reply in replies]
    votes = Counter(answer for answer in answers if answer is not None)
    answer = votes.most_common(1)[0][0] if votes else None
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
    problems: Sequence[Problem], answerer: Answerer, cast: Cast, setting: Setting, out: str | Path | None = None
) -> dict[str, pd.DataFrame]:
    """`Debate`: the last round's strict majority; `Round-1 majority`: the first round's alone, at its own cost.

    No majority is wrong, and stands apart in the column `parsed`.
    """
    held = hold(problems, answerer, cast, setting, out)
    first = [Debate(one.problem, one.calls[: one.agents], one.agents) for one in held]
    return dict(zip(DEBATES, (_debate_rows(held), _debate_rows(first)), strict=True))


def _debate_rows(held: Sequence[Debate]) -> pd.DataFrame:
    rows = []
    for one in held:
        tokens_in, tokens_out = one.tokens()
        rows.append(
            {
                "id": one.problem.id, "answer": one.answer(), "correct": one.correct,
                "parsed": one.answer() is not None, "failed": one.failed, "tokens_in": tokens_in,
                "tokens_out": tokens_out, "agents": float(one.agents),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)
