"""Trainings that show what a debate adds: other questions' turns, gold answers, right single answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from steerkit.text.tags import TAG
from steerkit.text.tokens import encode
from steerkit.text.traces import DebateTrace, Turn, read_traces, write_traces
from training.debates.answerers import Answerer, Request, Sampling
from training.debates.debate import template_of
from training.evaluate.methods import Ask
from training.problems.answers import read_answer, same
from training.problems.problem import Kinds, Problem
from training.train.sft import SFT, examples


def with_foreign_turns(traces: Sequence[DebateTrace], seed: int = 0) -> list[DebateTrace]:
    """Return the traces with the turns of other questions; question, tags and consensus stay.

    The turns of each agent and round are permuted among the traces that have one, so that a trace holds turns of
    several questions and what they say is independent of the question and of its answer. Shortened traces keep turns
    by their answers: pass the original traces as `cut_like` to SFT.

    Args:
        traces: at least two debates with each agent and round.
        seed: of the permutations.

    Raises:
        ValueError: a turn of an agent and round that no other trace has.

    Example:
        >>> shuffled = with_foreign_turns(traces, seed=0)
    """
    rng = random.Random(seed)
    holders: dict[tuple[int, int], list[int]] = {}
    for number, trace in enumerate(traces):
        for turn in trace.turns:
            holders.setdefault((turn.agent, turn.round), []).append(number)
    if alone := [key for key, owners in holders.items() if len(owners) < 2]:
        raise ValueError(f"expected two traces or more with each (agent, round); got one with {alone}. Pass more.")
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


def gold_answers(problems: Sequence[Problem]) -> list[DebateTrace]:
    """Return the right answers as traces of one turn, for `SFT.target` "gold"."""
    return [_single(problem, rf"\boxed{{{problem.gold}}}") for problem in problems]


def _single(problem: Problem, text: str) -> DebateTrace:
    """A trace of one turn that is right.

    Raises:
        ValueError: the text holds a tag.
    """
    consensus = rf"All agents reached a consensus of \boxed{{{problem.gold}}}"
    return DebateTrace.of(problem.question, [Turn(1, 1, text.strip())], consensus, problem.gold)


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

    Raises:
        ValueError: no answer is right.
    """
    if out.exists():
        return read_traces(out)
    requests = [Request(f"{problem.id}/{i}", ask(problem)) for problem in problems for i in range(samples)]
    replies = {reply.id: reply.text for reply in answerer(requests, sampling)}
    opened = any(template_of(answerer, request.prompt).opens_thinking for request in requests[:1])
    traces = []
    for problem in problems:
        for text in (replies[f"{problem.id}/{i}"] for i in range(samples)):
            read = read_answer(text or "", problem.kind, opened=opened)
            if text and not TAG.search(text) and same(read, problem.gold):
                traces.append(_single(problem, text))
                break
    if not traces:
        raise ValueError(f"expected a right answer among {len(requests)} to {len(problems)} problems; got none.")
    write_traces(out, traces)
    return traces


def with_equal_tokens(
    setting: SFT,
    traces: Sequence[DebateTrace],
    other: SFT,
    others: Sequence[DebateTrace],
    tokenizer: Any,
    kind: Kinds,
    cut_like: Sequence[DebateTrace] | None = None,
) -> SFT:
    """Return `other` with as many steps as `setting` has, and a batch whose targets have as many tokens.

    Args:
        setting: SFT on whole traces.
        traces: its traces.
        other: SFT on other targets.
        others: its traces.
        tokenizer: the tokenizer with the tags.
        kind: kind of the answers, or a mapping from each question to it.
        cut_like: of `others`, see `training.train.sft.examples`.

    Example:
        >>> with_equal_tokens(sft, traces, replace(sft, target="gold"), traces, tokenizer, "number").batch
        512
    """

    def lengths(of: SFT, debates: Sequence[DebateTrace], like: Sequence[DebateTrace] | None = None) -> list[int]:
        return [len(encode(tokenizer, row["completion"])) + 1 for row in examples(debates, of, kind, like)]

    mine, theirs = lengths(setting, traces), lengths(other, others, cut_like)
    ratio = (sum(mine) / len(mine)) / (sum(theirs) / len(theirs))
    passes = setting.batch // setting.micro_batch
    micro_batch = max(1, round(setting.micro_batch * ratio))
    return replace(other, steps=setting.steps_for(len(mine)), batch=passes * micro_batch, micro_batch=micro_batch)
