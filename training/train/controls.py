"""Trainings that show what a debate adds: other questions' turns, gold answers, right single answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from steerkit.text.tokens import encode
from steerkit.text.traces import DebateTrace, Turn, read_traces, write_traces
from training.debates.answerers import Answerer, Request, Sampling
from training.evaluate.methods import Ask
from training.problems.answers import read_answer, same
from training.problems.problem import Problem
from training.train.sft import SFT, examples


def with_foreign_turns(traces: Sequence[DebateTrace], seed: int = 0) -> list[DebateTrace]:
    """Return the traces with the turns of other questions; question, tags and consensus stay.

    The turns of each agent and round are permuted among the traces that have one, so that a trace holds turns of
    several questions and what they say is independent of the question and of its answer.

    Args:
        traces: at least two debates.
        seed: of the permutations.

    Example:
        >>> shuffled = with_foreign_turns(traces, seed=0)
    """
    rng = random.Random(seed)
    holders: dict[tuple[int, int], list[int]] = {}
    for number, trace in enumerate(traces):
        for turn in trace.turns:
            holders.setdefault((turn.agent, turn.round), []).append(number)
    text_of = {(number, t.agent, t.round): t.text for number, trace in enumerate(traces) for t in trace.turns}
    given: dict[tuple[int, int, int], str] = {}
    for (agent, number), owners in holders.items():
        order = owners[:]
        rng.shuffle(order)
        for owner, donor in zip(order, order[1:] + order[:1], strict=True):  # a cycle: nobody keeps its own
            given[owner, agent, number] = text_of[donor, agent, number]
    return [
        DebateTrace.of(
            trace.question,
            [Turn(t.agent, t.round, given[number, t.agent, t.round]) for t in trace.turns],
            trace.consensus,
            trace.gold,
        )
        for number, trace in enumerate(traces)
    ]


def right_answers(
    problems: Sequence[Problem], answerer: Answerer, ask: Ask, sampling: Sampling, samples: int, out: Path
) -> list[DebateTrace]:
    """Return the first right one of several single answers to each problem, as traces of one turn; resumable.

    Problems without a right answer are left out. This is rejection sampling without a debate.

    Args:
        problems: the problems.
        answerer: the base model.
        ask: problem -> prompt.
        sampling: of the answers.
        samples: answers per problem.
        out: the file of the traces, `.jsonl`; read if it is there.
    """
    if out.exists():
        return read_traces(out)
    requests = [Request(f"{problem.id}/{i}", ask(problem)) for problem in problems for i in range(samples)]
    replies = {reply.id: reply.text for reply in answerer(requests, sampling)}
    traces = []
    for problem in problems:
        texts = [replies[f"{problem.id}/{i}"] for i in range(samples)]
        right = [text for text in texts if text and same(read_answer(text, problem.kind), problem.gold)]
        if right:
            consensus = f"All agents reached a consensus of \\boxed{{{problem.gold}}}"
            traces.append(DebateTrace.of(problem.question, [Turn(1, 1, right[0].strip())], consensus, problem.gold))
    write_traces(out, traces)
    return traces


def with_equal_tokens(
    setting: SFT, traces: Sequence[DebateTrace], other: SFT, others: Sequence[DebateTrace], tokenizer: Any, kind: str
) -> SFT:
    """Return `other` with a batch whose targets have as many tokens as a batch of `setting`, and as many steps.

    Args:
        setting: SFT on whole traces.
        traces: its traces.
        other: SFT on shorter targets.
        others: its traces.
        tokenizer: the tokenizer with the tags.
        kind: kind of the answers.

    Example:
        >>> with_equal_tokens(sft, traces, replace(sft, target="gold"), traces, tokenizer, "number").batch
        512
    """

    def mean(of: SFT, debates: Sequence[DebateTrace]) -> float:
        rows = examples(debates[:200], of, kind)
        return sum(len(encode(tokenizer, row["completion"])) + 1 for row in rows) / len(rows)

    times = max(1, round(mean(setting, traces) / mean(other, others)))
    return replace(other, batch=setting.batch * times)
