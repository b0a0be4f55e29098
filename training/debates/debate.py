"""Debates: agents answer alone, read each other, answer again, and vote. Each reply is on disk once it has come."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from steerkit.io.files import sha256, write_text
from steerkit.io.json import canonical_json
from steerkit.io.progress import progress
from steerkit.io.ranks import barrier, rank_and_world
from steerkit.io.rows import append_rows, read_rows
from steerkit.io.run_folder import run_folder
from steerkit.text.prompt import Prompt
from steerkit.text.traces import DebateTrace, Turn, write_traces
from training.debates.answerers import Answerer, Reply, Request, Sampling
from training.debates.moderator import Verdict, moderation, read_verdict
from training.debates.personas import Cast
from training.problems.answers import majority, read_answer, same
from training.problems.problem import Problem

CALLS, TRACES, DEBATES = "calls.jsonl", "traces.jsonl", "debates.jsonl"
CALLS_OF_ALL = "calls*.jsonl"
UNANIMOUS = "All agents reached a consensus of \\boxed{{{}}}"
MAJORITY = "A majority of agents converged on the solution of \\boxed{{{}}}"


@dataclass(frozen=True)
class Call:
    """One turn as it was answered.

    Args:
        agent, round: whose, counted from 1.
        text: None where the call failed.
        tokens_in, tokens_out: of this call; None where whoever answered did not say.
        error: why it failed.
    """

    agent: int
    round: int
    text: str | None
    tokens_in: int | None
    tokens_out: int | None
    error: str | None = None


@dataclass(frozen=True)
class Debate:
    """A finished debate: its calls in the order of rounds and agents.

    A vote counts over all agents: an answer that cannot be read, or a failed call, is a vote for nothing.

    Args:
        problem: what was debated.
        calls: the turns.
        agents: how many there are.
        moderated: the moderator's call after an open question's last round (agent 0); None for all others.
    """

    problem: Problem
    calls: tuple[Call, ...]
    agents: int
    moderated: Call | None = None

    @property
    def rounds(self) -> int:
        """How many rounds it took."""
        return max(call.round for call in self.calls)

    @property
    def open(self) -> bool:
        """Whether the question is an open one, without votes to count."""
        return self.problem.kind == "open"

    def votes(self, number: int | None = None) -> list[str | None]:
        """Each agent's answer in a round, by default the last; None where there is none to read."""
        number = self.rounds if number is None else number
        return [
            None if call.text is None or self.open else read_answer(call.text, self.problem.kind)
            for call in self.calls
            if call.round == number
        ]

    def answer(self, number: int | None = None) -> str | None:
        """The strict majority over all agents in a round, by default the last; None where there is none."""
        return majority(self.votes(number), self.agents)

    @property
    def unanimous(self) -> bool:
        return self.answer() is not None and len(set(self.votes())) == 1

    @property
    def failed(self) -> int:
        """Calls without a text."""
        return sum(call.text is None for call in self._all)

    @property
    def _all(self) -> tuple[Call, ...]:
        return self.calls if self.moderated is None else (*self.calls, self.moderated)

    @property
    def verdict(self) -> Verdict | None:
        """The moderator's; None without one, or where it cannot be read."""
        return None if self.moderated is None else read_verdict(self.moderated.text or "")

    @property
    def correct(self) -> bool:
        """Whether the last round's majority is the gold answer; no majority is not."""
        return same(self.answer(), self.problem.gold)

    def tokens(self) -> tuple[int, int]:
        """Tokens in and out, over all calls that said."""
        return sum(c.tokens_in or 0 for c in self._all), sum(c.tokens_out or 0 for c in self._all)

    def trace(self) -> DebateTrace | None:
        """The debate as a trace, if it reached a consensus without a failed call, right or wrong; else None.

        Of an open question the consensus is the moderator's explanation, and the record has `consensus_type` too.
        """
        answer, verdict = self.answer(), self.verdict
        if self.failed or (answer is None and (verdict is None or verdict.type == "none")):
            return None
        turns = [Turn(call.agent, call.round, call.text or "") for call in self.calls]
        extra = {}
        if verdict is None:
            consensus = (UNANIMOUS if self.unanimous else MAJORITY).format(answer)
        else:
            consensus = verdict.explanation
            extra = {"consensus_type": verdict.type, "consensus_explanation": verdict.explanation}
        try:
            return DebateTrace.of(self.problem.question, turns, consensus, self.problem.gold, extra)
        except ValueError:  # an answer that holds a tag itself
            return None

    def row(self) -> dict[str, Any]:
        """What a table needs of it."""
        tokens_in, tokens_out = self.tokens()
        return {
            "id": self.problem.id, "question": self.problem.question, "gold": self.problem.gold,
            "answer": self.answer(), "correct": self.correct, "unanimous": self.unanimous, "rounds": self.rounds,
            "first_answer": self.answer(1), "votes": self.votes(), "tokens_in": tokens_in, "tokens_out": tokens_out,
            "unparsed": 0 if self.open else sum(vote is None for vote in self.votes()), "failed": self.failed,
            "consensus_type": self.verdict.type if self.verdict else None,
        }  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """How debates are held.

    Args:
        rounds: at most.
        early_stop: end once all agents give the same answer.
        sampling: of every call; its seed and the call's place decide a reply.
    """

    rounds: int = 2
    early_stop: bool = True
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"expected one round at least; got {self.rounds}.")


def hold(
    problems: Sequence[Problem],
    answerer: Answerer,
    cast: Cast,
    setting: Setting | None = None,
    out: str | Path | None = None,
    shared: bool = False,
) -> list[Debate]:
    """Hold a debate on every problem; the calls of a round go out as one batch.

    After the last round of an open question one more call asks a moderator (`training.moderator`) for the consensus.

    With `out`, each reply is on disk (`calls.jsonl`) once it has come, and the same call goes on where a run that was
    killed left off: no finished call is made again, a failed one is. At the end `debates.jsonl` has a row per debate
    and `traces.jsonl` the traces of those with a consensus.

    Args:
        shared: processes that torchrun has started together share the problems and the folder; each has to make this
            call, and returns the whole.

    Raises:
        ValueError: no problems, two with the same id, or `shared` without a folder.
        RuntimeError: one of the processes has ended.
        ConfigurationChanged, RunFolderBusy: see `steerkit.io.run_folder`.
    """
    setting = setting or Setting()
    if not problems or len({problem.id for problem in problems}) < len(problems):
        raise ValueError(f"expected problems with different ids, one at least; got {len(problems)}.")
    config = {
        "problems": sha256(canonical_json([asdict(problem) for problem in problems])),
        "cast": {"name": cast.name, "personas": [asdict(persona) for persona in cast.personas]},
        "setting": asdict(setting),
        "answerer": answerer.about(),
    }
    rank, world = rank_and_world() if shared else (0, 1)
    if world > 1 and out is None:
        raise ValueError(f"expected a folder as out=, where {world} processes put their debates together; got none.")
    with contextlib.ExitStack() as stack:
        folder = None if out is None else stack.enter_context(run_folder(out, config))
        debates = list(_held(problems[rank::world], answerer, cast, setting, folder, rank))
        if world > 1:
            barrier()
            debates = list(_held(problems, _not_again, cast, setting, folder, rank))
        if folder is not None and rank == 0:
            write_debates(folder, debates)
        if world > 1:
            barrier()
    return debates


def _not_again(requests: Sequence[Request], sampling: Sampling) -> Iterator[Reply]:
    """For calls that failed in the process that made them."""
    for request in requests:
        yield Reply(request.id, None, None, None, False, "failed in the process that asked")


def _held(
    problems: Sequence[Problem],
    answerer: Callable[[Sequence[Request], Sampling], Iterable[Reply]],
    cast: Cast,
    setting: Setting,
    folder: Path | None,
    rank: int = 0,
) -> Iterator[Debate]:
    there = _read_calls(folder)
    agents = range(1, len(cast.personas) + 1)
    calls: dict[str, tuple[Call, ...]] = {problem.id: () for problem in problems}

    def ask(places: Mapping[str, tuple[int, int, Prompt]], label: str) -> dict[str, Call]:
        """The calls of one round by name, from disk where the same prompt was answered before."""
        asked = {name: sha256(repr(prompt)) for name, (_, _, prompt) in places.items()}
        known = {name: there[name][1] for name in places if name in there and there[name][0] == asked[name]}
        todo = [Request(name, prompt) for name, (_, _, prompt) in places.items() if name not in known]
        with progress(label, len(places)) as advance:
            advance(len(known))
            for reply in answerer(todo, setting.sampling) if todo else ():
                agent, number, _ = places[reply.id]
                call = Call(agent, number, reply.text, reply.tokens_in, reply.tokens_out, reply.error)
                known[reply.id] = call
                if folder is not None:
                    row = {"key": reply.id, "prompt_sha256": asked[reply.id], **asdict(call)}
                    append_rows(folder / (f"calls-{rank}.jsonl" if rank else CALLS), [row])
                advance(1)
        return known

    going = list(problems)
    for number in range(1, setting.rounds + 1):
        places = {}
        for problem in going:
            said = [Turn(call.agent, call.round, call.text or "") for call in calls[problem.id]]
            for agent in agents:
                prompt = cast.ask(problem, agent, number, said)
                places[f"{problem.id}/round-{number}/agent-{agent}"] = (agent, number, prompt)
        known = ask(places, f"debate, round {number}")
        for problem in going:
            calls[problem.id] += tuple(known[f"{problem.id}/round-{number}/agent-{agent}"] for agent in agents)
        if setting.early_stop:
            going = [problem for problem in going if not Debate(problem, calls[problem.id], len(agents)).unanimous]
    last = {
        f"{problem.id}/moderator": (0, setting.rounds + 1, moderation(problem.question, _last(calls[problem.id])))
        for problem in problems
        if problem.kind == "open"
    }
    verdicts = ask(last, "moderator") if last else {}
    for problem in problems:
        yield Debate(problem, calls[problem.id], len(agents), verdicts.get(f"{problem.id}/moderator"))


def _last(calls: Sequence[Call]) -> list[str]:
    """The texts of the last round."""
    return [call.text or "" for call in calls if call.round == max(call.round for call in calls)]


def _read_calls(folder: Path | None) -> dict[str, tuple[str, Call]]:
    """The calls on disk that have a text, with their prompt's hash: one whose prompt has changed is made again."""
    files = sorted(folder.glob(CALLS_OF_ALL)) if folder is not None else []
    rows = [row for path in files for row in read_rows(path) if row["text"] is not None]
    return {
        row["key"]: (row["prompt_sha256"], Call(**{k: v for k, v in row.items() if k not in ("key", "prompt_sha256")}))
        for row in rows
    }


def write_debates(folder: Path, debates: Sequence[Debate]) -> None:
    """`debates.jsonl`, a row each, and `traces.jsonl`, the kept traces; atomically."""
    rows = [canonical_json(debate.row()) + "\n" for debate in debates]
    write_text(folder / DEBATES, "".join(rows))
    traces = [trace for debate in debates if (trace := debate.trace()) is not None]
    write_traces(folder / TRACES, traces)
