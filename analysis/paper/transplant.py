"""Transplant: does a model's answer depend on what the first round of its own debate says?

A checkpoint writes a text for each question. The turns of round 1 in that text are replaced by those of another
question's text, and the model continues. If it reads its debate, answers change, and follow what the turns say. Beside
it: the model's own prefix continued again with other random numbers; and the same transplant in an explicit debate of
the base, which must change answers.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inputs import IMAD, SFT, inputs_of_run
from steerkit.io.files import sha256
from steerkit.io.json import read_json
from steerkit.io.run_folder import run_folder
from steerkit.io.tables import write_table
from steerkit.text.prompt import render
from steerkit.text.tags import TAG
from steerkit.text.traces import DebateTrace, Turn, read_traces
from training.debates.answerers import LocalModel, Request, Sampling
from training.debates.personas import Cast
from training.imad import Run
from training.presets import get_preset
from training.problems.answers import majority, read_answer, same
from training.problems.problem import Problem

EXPLICIT = "explicit debate"


@dataclass(frozen=True)
class FirstRound:
    """The first round in a text that a model wrote.

    Args:
        agents: the agents with a turn, in order.
        text: the text up to the tag that follows the last turn.
    """

    agents: tuple[int, ...]
    text: str


def first_round(text: str) -> FirstRound | None:
    """The first round of a tagged text; None without a turn in it, or if no tag follows it."""
    agents: list[int] = []
    for tag in TAG.finditer(text):
        if tag["agent"] and not agents and tag.group().endswith("Revision|>"):
            return None
        if agents and not (tag["agent"] and tag.group().endswith("Solution|>")):
            return FirstRound(tuple(agents), text[: tag.start()])
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


def of_checkpoint(
    model: Any, tokenizer: Any, problems: Sequence[Problem], sampling: Sampling, seed: int
) -> pd.DataFrame:
    """The transplant in the texts of a checkpoint.

    Returns:
        A row per question: has_round_1; answer (of the own text), again (own prefix continued again), swapped (another
        question's first round), donated (the answer of that question's text), gold; NaN or None where there is no first
        round or no donor.
    """
    answerer = LocalModel(model, tokenizer)

    def asked(prompts: Sequence[Any], name: str) -> list[str]:
        requests = [Request(f"{name}/{index}", prompt) for index, prompt in enumerate(prompts)]
        replies = {reply.id: reply.text or "" for reply in answerer(requests, sampling)}
        return [replies[f"{name}/{index}"] for index in range(len(prompts))]

    prompts = [render(tokenizer, f"Problem: {problem.question}\n\n") for problem in problems]
    texts = asked(prompts, "own")
    rounds = [first_round(text) for text in texts]
    given = donors([None if one is None else one.agents for one in rounds], seed)
    able = [index for index, donor in enumerate(given) if donor is not None]
    answers: dict[str, list[str]] = {}
    for name in ("again", "swapped"):
        begun = []
        for index in able:
            source = rounds[index if name == "again" else given[index]]  # type: ignore[index]
            assert source is not None
            begun.append(prompts[index].followed_by(tokenizer, source.text))
        answers[name] = asked(begun, name)
    rows = []
    place = {index: number for number, index in enumerate(able)}
    for index, problem in enumerate(problems):
        line: dict[str, Any] = {
            "question": problem.question,
            "gold": problem.gold,
            "has_round_1": rounds[index] is not None,
            "answer": read_answer(texts[index], problem.kind),
            "again": None,
            "swapped": None,
            "donated": None,
            "transplanted": index in place,
        }
        if index in place:
            donor = given[index]
            assert donor is not None
            line |= {name: read_answer(texts_of[place[index]], problem.kind) for name, texts_of in answers.items()}
            line["donated"] = read_answer(texts[donor], problem.kind)
        rows.append(line)
    return pd.DataFrame(rows)


def of_debates(
    model: Any, tokenizer: Any, traces: Sequence[DebateTrace], cast: Cast, kind: str, sampling: Sampling, seed: int
) -> pd.DataFrame:
    """The transplant in explicit debates: round 2 after the own first round, again, and after another question's.

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
        replies = {reply.id: read_answer(reply.text or "", kind) for reply in answerer(requests, sampling)}
        return [
            majority([replies[f"{name}/{index}/{turn.agent}"] for turn in turns]) for index, turns in enumerate(rounds)
        ]

    own, again = (decided(name, first) for name in ("own", "again"))
    swapped = decided("swapped", [first[donor_of[index]] for index in range(len(traces))])
    return pd.DataFrame(
        {
            "question": [trace.question for trace in traces],
            "gold": [trace.gold for trace in traces],
            "has_round_1": True,
            "answer": own,
            "again": again,
            "swapped": swapped,
            "donated": [own[donor_of[index]] for index in range(len(traces))],
            "transplanted": True,
        }
    )


def effects(table: pd.DataFrame) -> pd.DataFrame:
    """What the transplant does to each question's answer.

    Returns:
        For the questions with a donor whose own answer was read: changed (the answer differs from the own one),
        changed_again (so does the answer after the own prefix), effect (their difference), follows (the answer is the
        donor's), right (it is correct), right_again. A missing answer after a transplant differs from every other.
    """
    some = table[table["transplanted"] & table["answer"].notna()].reset_index(drop=True)

    def differs(name: str) -> np.ndarray:
        return np.array([not same(a, b) for a, b in zip(some[name], some["answer"], strict=True)], dtype=float)

    def equal(first: str, second: str) -> np.ndarray:
        return np.array([same(a, b) for a, b in zip(some[first], some[second], strict=True)], dtype=float)

    changed, again = differs("swapped"), differs("again")
    return pd.DataFrame(
        {
            "question": some["question"],
            "changed": changed,
            "changed_again": again,
            "effect": changed - again,
            "follows": equal("swapped", "donated"),
            "right": equal("swapped", "gold"),
            "right_again": equal("again", "gold"),
        }
    )


def run_transplant(run: Path, out: Path, n: int = 300) -> pd.DataFrame:
    """The transplant at SFT, at IMAD and in the base's explicit debates; a finished one is not run again.

    Of the explicit debates those with a consensus are continued, also where round 1 had ended them.

    Args:
        run: folder of a run of `training.imad`.
        out: run folder.
        n: largest number of test questions.

    Returns:
        The rows of `effects` per stage (`explicit debate`, SFT, IMAD). `shares.csv` in the folder has for each stage
        the share of texts with a round-1 turn, and of own answers that were read.
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
                if stage == EXPLICIT:
                    table = of_debates(*inputs.load("base"), debated, of_run.cast, kind, sampling, config["seed"])
                else:
                    table = of_checkpoint(*inputs.load(stage), problems, sampling, config["seed"])
                write_table(path, table, about)
            table = pd.read_csv(path, dtype=dict.fromkeys(("answer", "again", "swapped", "donated", "gold"), str))
            table = table.where(table.notna(), None)
            parts.append(effects(table).assign(stage=stage))
            with_turn, read = float(table["has_round_1"].mean()), float(table["answer"].notna().mean())
            shares.append({"stage": stage, "n": len(table), "share_with_round_1": with_turn, "share_read": read})
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
