"""Debates: agents answer independently, read each other, answer again, and vote; every reply is stored on arrival."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from steerkit.io.files import sha256, write_text
from steerkit.io.json import canonical_json, read_json, write_json
from steerkit.io.progress import progress
from steerkit.io.ranks import barrier, rank_and_world
from steerkit.io.rows import append_rows, read_rows
from steerkit.io.run_folder import CONFIG, run_folder
from steerkit.models.identity import provenance
from steerkit.models.kernels import resume_kernels
from steerkit.text.prompt import Prompt, PromptLike
from steerkit.text.thinking import drops_system, template_opens_thinking
from steerkit.text.traces import DebateTrace, Turn, write_traces
from training.debates.answerers import Answerer, LocalModel, Reply, Request, Sampling, check_unique_ids
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
    """One turn of one agent.

    Args:
        agent: number of the agent, from 1; 0 is the moderator.
        round: number of the round, from 1.
        text: the answer; None if the call failed.
        tokens_in: prompt tokens of this call; None if the answerer does not report them.
        tokens_out: new tokens of this call; None if not reported.
        error: reason of the failure.
        finished: whether the model ended the answer; False if it was cut at the token limit, None in logs of earlier
            versions.
    """

    agent: int
    round: int
    text: str | None
    tokens_in: int | None
    tokens_out: int | None
    error: str | None = None
    finished: bool | None = None


@dataclass(frozen=True)
class Template:
    """What a chat template does to the prompts of a debate; None where the answerer does not show its template.

    Args:
        drops_system: whether it leaves out the system messages, and with them the personas.
        opens_thinking: whether it ends the prompt with an open `<think>`. A reply without `</think>` is then a thought
            that was cut off.
    """

    drops_system: bool | None = None
    opens_thinking: bool | None = None


Read = Callable[[Problem, Call, Template], str | None]
"""`read(problem, call, template)` returns the canonical answer of a call; None for an abstention."""


def read_call(problem: Problem, call: Call, template: Template) -> str | None:
    """Return the answer in the last box of a call, cut or not; None for a failed call and for an open question."""
    if call.text is None or problem.kind == "open":
        return None
    return read_answer(call.text, problem.kind, opened=bool(template.opens_thinking))


@dataclass(frozen=True)
class Debate:
    """A finished debate: its calls in the order of rounds and agents.

    Votes are counted over all agents. Unparsed answers and failed calls count as abstentions.

    Args:
        problem: the problem.
        calls: the turns.
        agents: number of agents.
        moderated: the moderator's call after the last round of an open question; None for other questions.
        template: what the answerer's chat template does to the prompts.
        read: how an answer is read from a call.

    Example:
        >>> debate = run_debates(problems, answerer, cast_of("diverse"))[0]
        >>> debate.votes(), debate.answer(), debate.correct
    """

    problem: Problem
    calls: tuple[Call, ...]
    agents: int
    moderated: Call | None = None
    template: Template = Template()
    read: Read = field(default=read_call, repr=False, compare=False)

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return max(call.round for call in self.calls)

    @property
    def open(self) -> bool:
        """Whether the question is open, so that there are no votes to count."""
        return self.problem.kind == "open"

    def votes(self, number: int | None = None) -> list[str | None]:
        """Return each agent's canonical answer in a round, by default the last; None for an abstention."""
        number = self.rounds if number is None else number
        return [self.read(self.problem, call, self.template) for call in self.calls if call.round == number]

    def answer(self, number: int | None = None) -> str | None:
        """Return the strict majority over all agents in a round, by default the last; None without a majority."""
        return majority(self.votes(number), self.agents)

    @property
    def unanimous(self) -> bool:
        """Whether all agents gave the same answer in the last round."""
        return self.answer() is not None and len(set(self.votes())) == 1

    @property
    def failed(self) -> int:
        """Number of failed calls."""
        return sum(call.text is None for call in self._all)

    @property
    def _all(self) -> tuple[Call, ...]:
        return self.calls if self.moderated is None else (*self.calls, self.moderated)

    @property
    def verdict(self) -> Verdict | None:
        """The moderator's verdict; None without a moderator, or if the verdict cannot be parsed."""
        if self.moderated is None:
            return None
        return read_verdict(self.moderated.text or "", opened=bool(self.template.opens_thinking))

    @property
    def correct(self) -> bool:
        """Whether the last round's majority is the gold answer; False without a majority."""
        return same(self.answer(), self.problem.gold)

    def tokens(self) -> tuple[float, float]:
        """Return prompt tokens and new tokens of all calls together; NaN where one does not report them."""
        return tokens_of(self._all)

    def trace(self) -> DebateTrace | None:
        """Return the debate as a trace if it has a consensus, right or wrong, and no failed call; else None.

        For an open question the consensus is the moderator's explanation, and the record has `consensus_type` too.
        `no_trace` has the reason for None.
        """
        return self._trace[0]

    @property
    def no_trace(self) -> str | None:
        """Why `trace` returns None; None if there is a trace."""
        return self._trace[1]

    @property
    def _trace(self) -> tuple[DebateTrace | None, str | None]:
        answer, verdict = self.answer(), self.verdict
        if self.failed:
            return None, f"{self.failed} failed calls"
        if answer is None and (verdict is None or verdict.type == "none"):
            return None, "no consensus"
        turns = [Turn(call.agent, call.round, call.text or "") for call in self.calls]
        extra = {}
        if verdict is None:
            consensus = consensus_text(str(answer), self.unanimous)
        else:
            consensus = verdict.explanation
            extra = {"consensus_type": verdict.type, "consensus_explanation": verdict.explanation}
        try:
            return DebateTrace.of(self.problem.question, turns, consensus, self.problem.gold, extra), None
        except ValueError as error:  # a reply contains a tag
            return None, str(error)

    def row(self) -> dict[str, Any]:
        """Return the debate as a table row."""
        tokens_in, tokens_out = self.tokens()
        no_trace = self.no_trace
        return {
            "id": self.problem.id,
            "question": self.problem.question,
            "gold": self.problem.gold,
            "answer": self.answer(),
            "correct": self.correct,
            "unanimous": self.unanimous,
            "rounds": self.rounds,
            "first_answer": self.answer(1),
            "votes": self.votes(),
            "tokens_in": tokens_in,
            "tokens_out": tokens_out,
            "unparsed": 0 if self.open else sum(vote is None for vote in self.votes()),
            "failed": self.failed,
            "consensus_type": self.verdict.type if self.verdict else None,
            "trace": no_trace is None,
            "no_trace": no_trace,
            "system_dropped": self.template.drops_system,
        }


def counted(tokens: int | None) -> float:
    """Return a number of tokens, NaN where none is reported."""
    return math.nan if tokens is None else tokens


def tokens_of(calls: Sequence[Call | Reply]) -> tuple[float, float]:
    """Return prompt tokens and new tokens, each summed over calls; NaN where a call does not report them."""
    return sum(counted(call.tokens_in) for call in calls), sum(counted(call.tokens_out) for call in calls)


def consensus_text(answer: str, unanimous: bool) -> str:
    """Return the sentence of a trace's consensus (arXiv 2604.24881, section 3)."""
    return (UNANIMOUS if unanimous else MAJORITY).format(answer)


@dataclass(frozen=True)
class Setting:
    """Settings of a debate; the defaults are the paper's (arXiv 2604.24881, section 3).

    Args:
        rounds: maximum number of rounds.
        early_stop: end a debate once all agents give the same answer; one agent alone always has all its rounds.
        sampling: sampling of every call; its seed, the problem, the round and the agent determine a reply.
    """

    rounds: int = 2
    early_stop: bool = True
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"expected at least one round; got {self.rounds}. Pass rounds=1 or more.")


def run_debates(
    problems: Sequence[Problem],
    answerer: Answerer,
    cast: Cast,
    setting: Setting | None = None,
    out: str | Path | None = None,
    shared: bool = False,
    moderator: Answerer | None = None,
    read: Read = read_call,
) -> list[Debate]:
    """Run one debate per problem; the calls of a round form one batch.

    After the last round of an open question, one more call asks a moderator (`training.debates.moderator`) for the
    consensus.

    With `out`, each reply is appended to `calls.jsonl` as it arrives, and the same call resumes an interrupted run:
    finished calls are not repeated, failed ones are. At the end `debates.jsonl` has one row per debate, and
    `traces.jsonl` the traces of the debates with a consensus. A row states why its debate has no trace (`no_trace`).
    A call with more problems, the stored ones first, adds their debates.

    A chat template that drops system messages loses the personas: a UserWarning says so, and `system_dropped` of each
    row. None there means unknown, as for a server.

    Args:
        problems: problems with different ids, at least one.
        answerer: model that answers for all agents, see `training.debates.answerers`.
        cast: the agents.
        setting: rounds, early stop and sampling; default: the paper's.
        out: run folder.
        shared: processes started by torchrun share the problems and the folder. Each process makes this call and
            receives all debates.
        moderator: model that moderates open questions; default: the answerer.
        read: how an answer is read from a call, for the votes and the early stop; default: the last box of the text,
            also of a text that was cut.

    Returns:
        The debates in the order of the problems.

    Raises:
        ValueError: no problems, two with the same id, or `shared` without a folder.
        RuntimeError: another process ended before the debates were complete.
        ConfigurationChanged, RunFolderBusy: see `steerkit.io.run_folder`.

    Source: Du et al. 2023, arXiv 2305.14325; Yi, Mueller and Lee 2026, arXiv 2604.24881, section 3.

    Example:
        >>> answerer = LocalModel(*sk.load("runs/model"))
        >>> debates = run_debates(addition(20, 0, "train"), answerer, cast_of("diverse"), out="runs/debates")
        >>> sum(debate.correct for debate in debates)
    """
    setting = setting or Setting()
    if not problems:
        raise ValueError("expected at least one problem; got none. Pass problems with different ids.")
    check_unique_ids("problems", (problem.id for problem in problems))
    if isinstance(answerer, LocalModel):
        resume_kernels(answerer.model, out)
    about = answerer.about()
    config: dict[str, Any] = {
        "cast": {"name": cast.name, "personas": [asdict(persona) for persona in cast.personas]},
        "setting": asdict(setting),
        "answerer": answerer_identity(about),
    }
    if moderator is not None:
        config["moderator"] = answerer_identity(moderator.about())
    rank, processes = rank_and_world() if shared else (0, 1)
    template = template_of(answerer, cast.ask(problems[0], 1, 1, []))
    if template.drops_system and rank == 0:
        warnings.warn(
            f"expected a chat template with the system messages of the cast {cast.name!r}; the template of the "
            "answerer drops them, so that all agents have the same persona. Use another model, or a cast whose "
            "prompts have the persona in the user message.",
            stacklevel=2,
        )
    if processes > 1 and out is None:
        raise ValueError(f"expected a folder in which {processes} processes merge their debates; got None. Pass out=.")
    started = provenance(about) if "versions" in about else None
    with contextlib.ExitStack() as stack:
        folder = None
        if out is not None:
            folder = stack.enter_context(run_folder(out, {**config, **_begun_with(Path(out), problems)}, started))
        asked = answerer, moderator or answerer
        debates = _run(problems[rank::processes], *asked, cast, setting, folder, rank, template, read)
        if processes > 1:
            barrier()
            debates = _run(problems, _fail_all, _fail_all, cast, setting, folder, rank, template, read)
        if folder is not None and rank == 0:
            write_debates(folder, debates)
            write_json(folder / CONFIG, {**read_json(folder / CONFIG), **_hashed(problems)})
        if processes > 1:
            barrier()
    return debates


def answerer_identity(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of an answerer's `about` determines its replies: not its address, device or versions."""
    return {name: value for name, value in about.items() if name not in ("base_url", "device", "versions")}


def _hashed(problems: Sequence[Problem]) -> dict[str, Any]:
    """Return the hash and the number of problems, for the configuration of a run."""
    return {"problems": sha256(canonical_json([asdict(one) for one in problems])), "n_problems": len(problems)}


def _begun_with(folder: Path, problems: Sequence[Problem]) -> dict[str, Any]:
    """Return `_hashed` of as many of the problems as a folder was started with: more problems continue it.

    A folder of earlier versions has the hash of all its problems, without their number.
    """
    stored = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    if not isinstance(stored, dict):
        return _hashed(problems)
    return {name: value for name, value in _hashed(problems[: stored.get("n_problems")]).items() if name in stored}


def _fail_all(requests: Sequence[Request], sampling: Sampling) -> Iterator[Reply]:
    """Answer the calls that failed in another process: they are not repeated."""
    for request in requests:
        yield Reply(request.id, None, None, None, False, "failed in the process that made the call")


def _run(
    problems: Sequence[Problem],
    answerer: Callable[[Sequence[Request], Sampling], Iterable[Reply]],
    moderator: Callable[[Sequence[Request], Sampling], Iterable[Reply]],
    cast: Cast,
    setting: Setting,
    folder: Path | None,
    rank: int,
    template: Template,
    read: Read,
) -> list[Debate]:
    log = _CallLog(folder, rank, _read_calls(folder))
    agents = range(1, len(cast.personas) + 1)
    calls: dict[str, tuple[Call, ...]] = {problem.id: () for problem in problems}
    unfinished = list(problems)
    for number in range(1, setting.rounds + 1):
        turns = {}
        for problem in unfinished:
            earlier = [Turn(call.agent, call.round, call.text or "") for call in calls[problem.id]]
            for agent in agents:
                prompt = cast.ask(problem, agent, number, earlier)
                turns[_call_id(problem, number, agent)] = (agent, number, prompt)
        answered = _answer(turns, f"debate, round {number}", answerer, setting.sampling, log)
        for problem in unfinished:
            calls[problem.id] += tuple(answered[_call_id(problem, number, agent)] for agent in agents)
        if setting.early_stop and len(agents) > 1:
            unfinished = [
                problem
                for problem in unfinished
                if not Debate(problem, calls[problem.id], len(agents), template=template, read=read).unanimous
            ]
    moderated = {
        f"{problem.id}/moderator": (0, setting.rounds + 1, moderation(problem.question, _last_texts(calls[problem.id])))
        for problem in problems
        if problem.kind == "open"
    }
    verdicts = _answer(moderated, "moderator", moderator, setting.sampling, log) if moderated else {}
    return [
        Debate(problem, calls[problem.id], len(agents), verdicts.get(f"{problem.id}/moderator"), template, read)
        for problem in problems
    ]


def template_of(answerer: Answerer, prompt: PromptLike) -> Template:
    """Return what the answerer's chat template does to a first prompt."""
    tokenizer = getattr(answerer, "tokenizer", None)
    if tokenizer is None or isinstance(prompt, str | Prompt):
        return Template()
    system = any(message["role"] == "system" for message in prompt)
    return Template(system and drops_system(tokenizer), template_opens_thinking(tokenizer))


def _call_id(problem: Problem, number: int, agent: int) -> str:
    """Request id of an agent's turn in a round; it seeds the reply and is the key in `calls.jsonl`."""
    return f"{problem.id}/round-{number}/agent-{agent}"


@dataclass(frozen=True)
class _CallLog:
    """Calls on disk.

    Args:
        folder: run folder; None writes nothing.
        rank: rank of this process, which has a log file of its own.
        finished: (request id, SHA-256 of the prompt) -> call, as read at the start. The same request has another prompt
            where a call of an earlier round had failed before.
    """

    folder: Path | None
    rank: int
    finished: Mapping[tuple[str, str], Call]

    def append(self, key: str, prompt_sha256: str, call: Call) -> None:
        if self.folder is not None:
            name = f"calls-{self.rank}.jsonl" if self.rank else CALLS
            append_rows(self.folder / name, [{"key": key, "prompt_sha256": prompt_sha256, **asdict(call)}])


def _answer(
    turns: Mapping[str, tuple[int, int, PromptLike]],
    label: str,
    answerer: Callable[[Sequence[Request], Sampling], Iterable[Reply]],
    sampling: Sampling,
    log: _CallLog,
) -> dict[str, Call]:
    """Return the calls of one round by request id; calls whose prompt is already answered on disk are read."""
    hashes = {key: sha256(repr(prompt)) for key, (_, _, prompt) in turns.items()}
    answered = {key: log.finished[key, hashes[key]] for key in turns if (key, hashes[key]) in log.finished}
    requests = [Request(key, prompt) for key, (_, _, prompt) in turns.items() if key not in answered]
    with progress(label, len(turns)) as advance:
        advance(len(answered))
        for reply in answerer(requests, sampling) if requests else ():
            agent, number, _ = turns[reply.id]
            call = Call(agent, number, reply.text, reply.tokens_in, reply.tokens_out, reply.error, reply.finished)
            answered[reply.id] = call
            log.append(reply.id, hashes[reply.id], call)
            advance(1)
    return answered


def _last_texts(calls: Sequence[Call]) -> list[str]:
    """Return the texts of the last round."""
    last = max(call.round for call in calls)
    return [call.text or "" for call in calls if call.round == last]


def _read_calls(folder: Path | None) -> dict[tuple[str, str], Call]:
    """Read the successful calls on disk by request id and hash of the prompt."""
    files = sorted(folder.glob(CALLS_OF_ALL)) if folder is not None else []
    rows = [row for path in files for row in read_rows(path) if row["text"] is not None]
    names = [field.name for field in fields(Call)]
    return {
        (row["key"], row["prompt_sha256"]): Call(**{name: row[name] for name in names if name in row}) for row in rows
    }


def write_debates(folder: Path, debates: Sequence[Debate]) -> None:
    """Write `debates.jsonl`, one row per debate, and `traces.jsonl`, the traces with a consensus; atomically."""
    rows = [canonical_json(debate.row()) + "\n" for debate in debates]
    write_text(folder / DEBATES, "".join(rows))
    traces = [trace for debate in debates if (trace := debate.trace()) is not None]
    write_traces(folder / TRACES, traces)
