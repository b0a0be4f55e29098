"""Methods of answering: one answer, self-consistency, debate; each gives one table row per problem."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steerkit.io.ranks import is_first
from steerkit.text.prompt import PromptLike
from steerkit.text.tags import agents_in
from steerkit.text.thinking import reply_of
from training.debates.answerers import Answerer, Reply, Request, Sampling
from training.debates.debate import Call, Debate, Setting, run_debates, template_of, tokens_of
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
        judge: decides which answers to open questions are right; a missing verdict counts as not parsed. Failed calls
            are not judged, and a reply that ends within its thought does not pass.

    Returns:
        One row per problem: `id`, `answer` (canonical or None), `correct`, `parsed`, `failed` (failed calls),
        `tokens_in`, `tokens_out` (NaN where a call does not report them), and `agents` (number of agents whose tags are
        in the text).

    Raises:
        ValueError: a judge without any verdict.

    Warns:
        UserWarning: failed calls, or replies without token counts.

    Example:
        >>> rows = one_answer(problems, LocalModel(*sk.load("runs/model")), bare, Sampling())
        >>> rows["correct"].mean()
    """
    requests = [Request(f"{problem.id}/0", ask(problem)) for problem in problems]
    replies, opened = _asked(requests, answerer, sampling)
    rows = [_row(problem, [replies[f"{problem.id}/0"]], opened) for problem in problems]
    if judge is not None:
        texts = {
            index: text
            for index, problem in enumerate(problems)
            if problem.kind == "open" and (text := replies[f"{problem.id}/0"].text) is not None
        }
        spoken = [index for index, text in texts.items() if reply_of(text, opened) is not None]
        verdicts = judge([(problems[index].question, texts[index]) for index in spoken]) if spoken else ()
        if spoken and all(verdict is None for verdict in verdicts):
            raise ValueError(
                f"expected verdicts of the judge; got none on {len(spoken)} answers. Use another judge, or pass "
                "--judge-tokens 2048 for one that thinks first."
            )
        passed = dict.fromkeys(texts, False) | dict(zip(spoken, verdicts, strict=True))
        for index, verdict in passed.items():
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

    Warns:
        UserWarning: see `one_answer`.

    Source: Wang et al. 2022, arXiv 2203.11171.

    Example:
        >>> of_3, of_9 = self_consistency(problems, answerer, bare, Sampling(), samples=(3, 9))
    """
    requests = [Request(f"{problem.id}/{i}", ask(problem)) for problem in problems for i in range(max(samples))]
    replies, opened = _asked(requests, answerer, sampling)
    return [
        pd.DataFrame(
            [_row(problem, [replies[f"{problem.id}/{i}"] for i in range(count)], opened) for problem in problems]
        )
        for count in samples
    ]


def _asked(requests: Sequence[Request], answerer: Answerer, sampling: Sampling) -> tuple[dict[str, Reply], bool]:
    """The replies by id, and whether the chat template opens a thought in the prompts."""
    replies = {reply.id: reply for reply in answerer(requests, sampling)}
    warn_of_lacking(list(replies.values()))
    return replies, any(template_of(answerer, request.prompt).opens_thinking for request in requests[:1])


def warn_of_lacking(calls: Sequence[Call | Reply]) -> None:
    """Warn of failed calls, and of texts without token counts; once, in the first process."""
    if not is_first():
        return
    failed = [call for call in calls if call.text is None]
    if failed:
        warnings.warn(
            f"expected a reply to each of {len(calls)} calls; {len(failed)} failed, the first with "
            f"{failed[0].error!r}. A failed call is no answer.",
            stacklevel=2,
        )
    if any(call.text is not None and None in (call.tokens_in, call.tokens_out) for call in calls):
        warnings.warn(
            "expected token counts with each reply (`usage` of a server); got replies without. The tokens of these "
            "questions are NaN.",
            stacklevel=2,
        )


def _row(problem: Problem, replies: Sequence[Reply], opened: bool) -> dict[str, Any]:
    answers = [
        None if reply.text is None or problem.kind == "open" else read_answer(reply.text, problem.kind, opened=opened)
        for reply in replies
    ]
    answer = _most_frequent(answers)
    tokens_in, tokens_out = tokens_of(replies)
    return {
        "id": problem.id,
        "answer": answer,
        "correct": same(answer, problem.gold),
        "parsed": answer is not None,
        "failed": sum(reply.text is None for reply in replies),
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
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

    Warns:
        UserWarning: see `one_answer`.

    Example:
        >>> tables = debates(problems, answerer, cast_of("diverse"), Setting())
        >>> tables["Debate"]["correct"].mean()
    """
    whole = run_debates(problems, answerer, cast, setting, out, shared)
    warn_of_lacking([call for debate in whole for call in debate.calls])
    first_rounds = [replace(debate, calls=debate.calls[: debate.agents], moderated=None) for debate in whole]
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
