"""Toy world of clues: eight numbers, three clues, one number that fits all; each agent sees one clue.

No agent can determine the answer from its clue; the three lists together determine it. The bare problem contains all
three clues. As in every world, the base model answers it in the format of one agent: it uses one clue and guesses among
the numbers that fit.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from training.problems.families import CLUE_TESTS
from training.problems.problem import Problem
from training.toy.worlds.world import World


def _part(question: str, persona: str) -> str:
    """Return the numbers and the agent's own clue."""
    numbers, clue = re.match(r"[0-9 ]+", question), re.search(rf"{persona} [a-z0-9]+", question)
    assert numbers and clue, question
    return f"{numbers[0].strip()} {clue[0]} ?"


def _fitting(problem: Problem, persona: str) -> list[int]:
    """Return the numbers that fit the agent's clue."""
    *numbers, _, value, _ = _part(problem.question, persona).split()
    return [int(number) for number in numbers if CLUE_TESTS[persona](int(number), value)]


def _listing(persona: str, numbers: Sequence[int], candidates: Sequence[int], rng: random.Random) -> str:
    """Return the list of numbers, and one of the candidates in the box."""
    shown = " ".join(map(str, numbers)) or "none"
    return f"{persona} : {shown} \\boxed{{ {rng.choice(candidates) if candidates else 0} }}"


def _write(problem: Problem, persona: str, rng: random.Random) -> str:
    fitting = _fitting(problem, persona)
    return _listing(persona, fitting, fitting, rng)


def _spoil(problem: Problem, persona: str, rng: random.Random) -> str:
    """Return a list with one number too many or too few; the box is never the answer."""
    fitting = _fitting(problem, persona)
    numbers = [int(number) for number in re.match(r"[0-9 ]+", problem.question)[0].split()]  # type: ignore[index]
    wrong = rng.choice(numbers)
    listed = [number for number in numbers if (number in fitting) != (number == wrong)]
    return _listing(persona, listed, [number for number in listed if str(number) != problem.gold], rng)


def _revise(problem: Problem, persona: str, seen: Sequence[str], rng: random.Random) -> str:
    """Return the intersection of the seen lists, step by step, and one of the remaining numbers in the box."""
    common: list[int] | None = None
    lines = []
    for text in seen:
        name, _, rest = text.partition(":")
        listed = [int(number) for number in re.findall("[0-9]+", rest.partition("\\boxed")[0])]
        common = listed if common is None else [number for number in common if number in listed]
        author = name.split()[-1] if name.split() else persona
        lines.append(f"{author} : {' '.join(map(str, common)) or 'none'}")
    return f"{', '.join(lines)}. \\boxed{{ {rng.choice(common or [0])} }}"


def _facts(rng: random.Random) -> str:
    """Return six numbers, each with its properties of all three clues."""
    lines = []
    for _ in range(6):
        n, m = rng.sample(range(60), 2)
        lines.append(f"{n} rest {n % 3}, {n} kind {'odd' if n % 2 else 'even'}, {max(n, m)} over {min(n, m)}")
    return ". ".join(lines)


CLUES = World(
    family="clues",
    personas=("over", "rest", "kind"),
    write=_write,
    spoil=_spoil,
    revise=_revise,
    facts=_facts,
    words=tuple(re.findall(r"\S+", ". , ? over rest kind odd even none")),
    openings=("over :", "rest :", "kind :"),
    numbers=tuple(map(str, range(60))),
    part=_part,
)
