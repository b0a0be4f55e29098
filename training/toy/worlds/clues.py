"""Which of eight numbers fits three clues, of which each agent is told one? No agent can tell alone; together they can.

The bare problem holds all three clues. Asked for it, the base model answers in the manner of one agent, as in every
world: it heeds one clue and guesses among the numbers that fit.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from training.problems.families import CLUES as FITS
from training.problems.problem import Problem
from training.toy.worlds.world import World


def _part(question: str, persona: str) -> str:
    """The numbers and the one clue that this agent is told."""
    numbers, clue = re.match(r"[0-9 ]+", question), re.search(rf"{persona} [a-z0-9]+", question)
    assert numbers and clue, question
    return f"{numbers[0].strip()} {clue[0]} ?"


def _fitting(problem: Problem, persona: str) -> list[int]:
    clue = _part(problem.question, persona).split()
    return [int(n) for n in clue[:-3] if FITS[persona](int(n), clue[-2])]


def _said(persona: str, numbers: Sequence[int], rng: random.Random) -> str:
    shown = " ".join(map(str, numbers)) or "none"
    return f"{persona} : {shown} \\boxed{{ {rng.choice(numbers) if numbers else 0} }}"


def _listed(problem: Problem, persona: str, rng: random.Random) -> str:
    return _said(persona, _fitting(problem, persona), rng)


def _mistaken(problem: Problem, persona: str, rng: random.Random) -> str:
    """A list that lacks a number that fits, or holds one that does not; the box is never the answer."""
    fitting = _fitting(problem, persona)
    row = [int(n) for n in re.match(r"[0-9 ]+", problem.question)[0].split()]  # type: ignore[index]
    wrong = rng.choice(row)
    listed = [n for n in row if (n in fitting) != (n == wrong)]
    boxed = [n for n in listed if str(n) != problem.gold]
    shown = " ".join(map(str, listed)) or "none"
    return f"{persona} : {shown} \\boxed{{ {rng.choice(boxed) if boxed else 0} }}"


def _joined(problem: Problem, persona: str, seen: Sequence[str], rng: random.Random) -> str:
    """What its own list and the others' have in common, one after the other; of what is left, any."""
    left: list[int] | None = None
    lines = []
    for text in seen:
        name, _, rest = text.partition(":")
        listed = [int(n) for n in re.findall("[0-9]+", rest.partition("\\boxed")[0])]
        left = listed if left is None else [n for n in left if n in listed]
        lines.append(f"{name.split()[-1] if name.split() else persona} : {' '.join(map(str, left)) or 'none'}")
    left = left or [0]
    return f"{', '.join(lines)}. \\boxed{{ {rng.choice(left)} }}"


def _facts(rng: random.Random) -> str:
    """Six numbers, each with all that a clue can ask of it."""
    lines = []
    for _ in range(6):
        n, m = rng.sample(range(60), 2)
        lines.append(f"{n} rest {n % 3}, {n} kind {'odd' if n % 2 else 'even'}, {max(n, m)} over {min(n, m)}")
    return ". ".join(lines)


CLUES = World(
    family="clues",
    personas=("over", "rest", "kind"),
    write=_listed,
    spoil=_mistaken,
    revise=_joined,
    facts=_facts,
    words=tuple(re.findall(r"\S+", ". , ? over rest kind odd even none")),
    numbers=tuple(map(str, range(60))),
    part=_part,
)
