"""Transplant: does a model's answer depend on what the first round of its own debate says?

A checkpoint writes a text for each question. The turns of round 1 in that text are replaced by those of another
question's text, and the model continues. If it reads its debate, answers change, and follow what the turns say. Beside
it: the model's own prefix continued again with other random numbers; the first round of another text of the same
question; and the same transplants in an explicit debate of the base, which must change answers.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inputs import IMAD, SFT, inputs_of_run
from steerkit.io.files import sha256
from steerkit.io.json import read_json
from steerkit.io.rows import append_rows, read_rows
from steerkit.io.run_folder import run_folder
from steerkit.io.tables import write_table
from steerkit.text.prompt import render
from steerkit.text.tags import CONSENSUS, TAG
from steerkit.text.traces import DebateTrace, Turn, read_traces
from training.debates.answerers import Answerer, LocalModel, Reply, Request, Sampling
from training.debates.personas import Cast
from training.imad import Run
from training.presets import get_preset
from training.problems.answers import majority, read_answer, same
from training.problems.problem import Problem

EXPLICIT = "explicit debate"
REVISION, AGREED = "round 2", "consensus"
"""What follows a first round."""
ARMS = ("again", "swapped", "resampled")
"""The own prefix; the first round of another question; that of another text of the same question."""


@dataclass(frozen=True)
class FirstRound:
    """The first round in a text that a model wrote.

    Args:
        agents: the agents with a turn, in order.
        text: the text up to the tag that follows the last turn.
        then: `round 2`, or `consensus`, by that tag.
    """

    agents: tuple[int, ...]
    text: str
    then: str


def first_round(text: str) -> FirstRound | None:
    """The first round of a tagged text; None without a turn in it, or if no tag follows it."""
    agents: list[int] = []
    for tag in TAG.finditer(text):
        if tag["agent"] and not agents and tag.group().endswith("Revision|>"):
            return None
        if agents and not (tag["agent"] and tag.group().endswith("Solution|>")):
            then = AGREED if tag.group() == CONSENSUS else REVISION
            return FirstRound(tuple(agents), text[: tag.start()], then)
        if tag["agent"]:
            agents.append(int(tag["agent"]))
    return None


def donors(kinds: Sequence[Hashable | None], seed: int) -> list[int | None]:
    """For each text the index of another one of the same kind; None where there is none, or its kind is None."""
    rng = random.Random(seed)
    groups: dict[Hashable, list[int]] = {}
    for index, one in enumerate(kinds):
        if one is not None:
            groups.setdefault(one, []).append(index)
    found: list[int | None] = [None] * len(kinds)
    for members in groups.values():
        order = members[:]
        rng.shuffle(order)
        if len(order) > 1:
            for owner, donor in zip(order, order[1:] + order[:1], strict=True):
                found[owner] = donor
    return found


def logged(answerer: Answerer, requests: Sequence[Request], sampling: Sampling, log: Path | None) -> Iterator[Reply]:
    """The replies to requests; those that the log has are not generated again.

    Args:
        answerer: what replies.
        requests: an id that is in the log with another prompt is answered anew.
        sampling: of the replies.
        log: JSON-lines file of replies; None keeps nothing.
    """
    known = read_rows(log) if log is not None and log.is_file() else []
    texts = {(row["id"], row["prompt_sha256"]): row["text"] for row in known}
    hashes = {request.id: sha256(repr(request.prompt)) for request in requests}
    missing = [request for request in requests if (request.id, hashes[request.id]) not in texts]
    for request in requests:
        if (key := (request.id, hashes[request.id])) in texts:
            yield Reply(request.id, texts[key], None, None, True)
    for reply in answerer(missing, sampling) if missing else ():
        if log is not None and reply.text is not None:
            append_rows(log, [{"id": reply.id, "prompt_sha256": hashes[reply.id], "text": reply.text}])
        yield reply


def of_checkpoint(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    sampling: Sampling,
    seed: int,
    log: Path | None = None,
) -> pd.DataFrame:
    """The transplant in the texts of a checkpoint; with a log (see `logged`) a killed call resumes.

    Returns:
        A row per question: has_round_1; agents (number of those with a turn in it) and then (what follows it); answer
        (of the own text), again (own prefix continued again), swapped (another question's first round), donated (the
        answer of that question's text), resampled (the first round of another text of the same question, by the same
        agents), gold; NaN or None where there is no first round or no donor.
    """
    answerer = LocalModel(model, tokenizer)

    def asked(prompts: Sequence[Any], name: str) -> list[str]:
        requests = [Request(f"{name}/{index}", prompt) for index, prompt in enumerate(prompts)]
        replies = {reply.id: reply.text or "" for reply in logged(answerer, requests, sampling, log)}
        return [replies[f"{name}/{index}"] for index in range(len(prompts))]

    prompts = [render(tokenizer, f"Problem: {problem.question}\n\n") for problem in problems]
    texts, others = asked(prompts, "own"), asked(prompts, "other")
    rounds, other_rounds = ([first_round(text) for text in some] for some in (texts, others))
    given = donors([None if one is None else one.agents for one in rounds], seed)
    sources: dict[str, dict[int, FirstRound]] = {name: {} for name in ARMS}
    for index, (one, other, donor) in enumerate(zip(rounds, other_rounds, given, strict=True)):
        if one is None or donor is None:
            continue
        foreign = rounds[donor]
        assert foreign is not None
        sources["again"][index], sources["swapped"][index] = one, foreign
        if other is not None and other.agents == one.agents:
            sources["resampled"][index] = other
    answers: dict[str, dict[int, str | None]] = {}
    for name, of_arm in sources.items():
        begun = [prompts[index].followed_by(tokenizer, one.text) for index, one in of_arm.items()]
        written = zip(of_arm, asked(begun, name), strict=True)
        answers[name] = {index: read_answer(text, problems[index].kind) for index, text in written}
    rows = []
    for index, problem in enumerate(problems):
        line: dict[str, Any] = {
            "question": problem.question,
            "gold": problem.gold,
            "has_round_1": rounds[index] is not None,
            "agents": 0,
            "then": None,
            "answer": read_answer(texts[index], problem.kind),
            **{name: of_arm.get(index) for name, of_arm in answers.items()},
            "donated": None,
            "transplanted": index in sources["swapped"],
            "has_resampled": index in sources["resampled"],
        }
        if (mine := rounds[index]) is not None:
            line |= {"agents": len(mine.agents), "then": mine.then}
        if (donor := given[index]) is not None:
            line["donated"] = read_answer(texts[donor], problem.kind)
        rows.append(line)
    return pd.DataFrame(rows)


def of_debates(
    model: Any,
    tokenizer: Any,
    traces: Sequence[DebateTrace],
    cast: Cast,
    kind: str,
    sampling: Sampling,
    seed: int,
    log: Path | None = None,
) -> pd.DataFrame:
    """The transplant in explicit debates: round 2 after the own first round, again, after another question's, and after
    another first round of the same agents on the same question. With a log (see `logged`) a killed call resumes.

    Returns:
        The columns of `of_checkpoint`; answers are those of the majority in round 2.
    """
    answerer = LocalModel(model, tokenizer)
    order = list(range(len(traces)))
    random.Random(seed).shuffle(order)
    donor_of = dict(zip(order, order[1:] + order[:1], strict=True))
    first = [[turn for turn in trace.turns if turn.round == 1] for trace in traces]

    def decided(name: str, rounds: Sequence[Sequence[Turn]]) -> list[str | None]:
        requests = []
        for index, (trace, turns) in enumerate(zip(traces, rounds, strict=True)):
            problem = Problem(trace.question, trace.question, trace.gold, kind, "")
            for turn in turns:
                requests.append(Request(f"{name}/{index}/{turn.agent}", cast.ask(problem, turn.agent, 2, turns)))
        answered = logged(answerer, requests, sampling, log)
        replies = {reply.id: read_answer(reply.text or "", kind) for reply in answered}
        return [
            majority([replies[f"{name}/{index}/{turn.agent}"] for turn in turns]) for index, turns in enumerate(rounds)
        ]

    requests = []
    for index, trace in enumerate(traces):
        problem = Problem(trace.question, trace.question, trace.gold, kind, "")
        requests += [
            Request(f"first/{index}/{turn.agent}", cast.ask(problem, turn.agent, 1, ())) for turn in first[index]
        ]
    said = {reply.id: reply.text or "" for reply in logged(answerer, requests, sampling, log)}
    anew = [
        [replace(turn, text=said[f"first/{index}/{turn.agent}"]) for turn in turns] for index, turns in enumerate(first)
    ]
    own, again = (decided(name, first) for name in ("own", "again"))
    swapped = decided("swapped", [first[donor_of[index]] for index in range(len(traces))])
    resampled = decided("resampled", anew)
    return pd.DataFrame(
        {
            "question": [trace.question for trace in traces],
            "gold": [trace.gold for trace in traces],
            "has_round_1": True,
            "agents": [len(turns) for turns in first],
            "then": REVISION,
            "answer": own,
            "again": again,
            "swapped": swapped,
            "resampled": resampled,
            "donated": [own[donor_of[index]] for index in range(len(traces))],
            "transplanted": True,
            "has_resampled": True,
        }
    )


def effects(table: pd.DataFrame) -> pd.DataFrame:
    """What the transplant does to each question's answer.

    Returns:
        For the questions with a donor whose own answer was read, each 1 or 0: changed, changed_again, changed_resampled
        (the answer after another question's first round, after the own prefix, after another first round of the same
        question differs from the own one; NaN where it was not read, or where there is no such round); missing,
        missing_again, missing_resampled (it was not read); effect (changed - changed_again); follows (the answer is the
        donor's; NaN where one of them was not read), chance (the same for the donors of the other questions, their
        mean), right and right_again (it is correct); then.
    """
    some = table[table["transplanted"] & table["answer"].notna()].reset_index(drop=True)

    def equal(first: str, second: str) -> np.ndarray:
        return np.array([same(a, b) for a, b in zip(some[first], some[second], strict=True)], dtype=float)

    found: dict[str, Any] = {"question": some["question"], "then": some["then"]}
    for arm, name in zip(ARMS, ("_again", "", "_resampled"), strict=True):
        there = some["has_resampled"].to_numpy(bool) if arm == "resampled" else np.full(len(some), True)
        read = some[arm].notna().to_numpy()
        found[f"changed{name}"] = np.where(there & read, 1 - equal(arm, "answer"), np.nan)
        found[f"missing{name}"] = np.where(there, 1.0 - read, np.nan)
    found["effect"] = found["changed"] - found["changed_again"]
    both = (some["swapped"].notna() & some["donated"].notna()).to_numpy()
    follows = equal("swapped", "donated")
    donated = [answer for answer in some["donated"] if answer is not None]
    any_of = np.array([sum(same(answer, other) for other in donated) for answer in some["swapped"]], dtype=float)
    found["follows"] = np.where(both, follows, np.nan)
    found["chance"] = np.where(both, (any_of - follows) / max(1, len(donated) - 1), np.nan)
    return pd.DataFrame({**found, "right": equal("swapped", "gold"), "right_again": equal("again", "gold")})


def run_transplant(run: Path, out: Path, n: int = 300) -> pd.DataFrame:
    """The transplant at SFT, at IMAD and in the base's explicit debates; a finished one is not run again.

    Of the explicit debates those with a consensus are continued, also where round 1 had ended them.

    Args:
        run: folder of a run of `training.imad`.
        out: run folder.
        n: largest number of test questions.

    Returns:
        The rows of `effects` per stage (`explicit debate`, SFT, IMAD). `shares.csv` in the folder has for each stage
        the share of texts with a round-1 turn, and of own answers that were read; of the texts with such a turn, the
        mean number of agents in it, and the share in which the consensus follows at once.
    """
    config = read_json(run / "config.json")
    inputs = inputs_of_run(run, only=("base", SFT, IMAD))
    preset = replace(get_preset(config["name"], config["family"]), test=config["test"])
    of_run = Run(preset, config["seed"], run)
    problems = of_run.test_problems[:n]
    kind = problems[0].kind
    sampling = replace(of_run.sampling(), seed=config["seed"] + 1)
    debated = read_traces(run / "evaluation" / "sampled" / "debates" / "traces.jsonl")[:n]
    about = {
        "n": n,
        "seed": config["seed"],
        "sampling": asdict(sampling),
        "questions": sha256("".join(problem.question for problem in problems)),
        "debates": sha256("".join(trace.text for trace in debated)),
        "stages": {name: inputs.about(name) for name in ("base", SFT, IMAD)},
    }
    parts, shares = [], []
    with run_folder(out, about) as folder:
        for stage in (EXPLICIT, SFT, IMAD):
            path = folder / f"{stage.replace(' ', '-')}.csv"
            if not path.exists():
                log = path.with_suffix(".jsonl")
                if stage == EXPLICIT:
                    turns = of_run.preset.test_debates(sampling).sampling
                    table = of_debates(*inputs.load("base"), debated, of_run.cast, kind, turns, config["seed"], log)
                else:
                    table = of_checkpoint(*inputs.load(stage), problems, sampling, config["seed"], log)
                write_table(path, table, about)
            table = pd.read_csv(path, dtype=dict.fromkeys(("answer", *ARMS, "donated", "gold", "then"), str))
            table = table.where(table.notna(), None)
            parts.append(effects(table).assign(stage=stage))
            with_turn, read = float(table["has_round_1"].mean()), float(table["answer"].notna().mean())
            begun = table[table["has_round_1"].astype(bool)]
            line = {"stage": stage, "n": len(table), "share_with_round_1": with_turn, "share_read": read}
            line |= {"agents": float(begun["agents"].mean()), "share_agreed": float((begun["then"] == AGREED).mean())}
            shares.append(line)
        found = pd.concat(parts, ignore_index=True)
        write_table(folder / "shares.csv", pd.DataFrame(shares), about)
        write_table(folder / "effects.csv", found, about)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis transplant", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run of training.imad")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=300, help="largest number of test questions")
    given = parser.parse_args(arguments)
    table = run_transplant(given.run, given.out, given.n)
    print(table.groupby("stage", sort=False).mean(numeric_only=True).round(3).to_string())


if __name__ == "__main__":
    main()
