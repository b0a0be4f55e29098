"""Which two of eight numbers have the sum? Checking a proposal is easier than finding one."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from training.problems.problem import Problem
from training.toy.worlds.world import World


def _asked(problem: Problem) -> tuple[list[int], int]:
    numbers, _, total = problem.question.removesuffix("?").partition("sum")
    return [int(n) for n in numbers.split()], int(total)


def _solution(numbers: Sequence[int], total: int) -> tuple[int, int]:
    return next((a, b) for i, a in enumerate(numbers) for b in numbers[i + 1 :] if a + b == total)


def _ordered(persona: str, a: int, b: int, numbers: Sequence[int]) -> str:
    """A pair in the persona's order: smaller first, larger first, or as they stand in the row."""
    if persona == "row":
        first, second = sorted((a, b), key=lambda n: numbers.index(n) if n in numbers else 99)
    else:
        first, second = sorted((a, b), reverse=persona == "max")
    return f"\\boxed{{ {first} {second} }}"


def _proposed(problem: Problem, persona: str, rng: random.Random) -> str:
    numbers, total = _asked(problem)
    return f"{persona} {_ordered(persona, *_solution(numbers, total), numbers)}"


def _guessed(problem: Problem, persona: str, rng: random.Random) -> str:
    numbers, total = _asked(problem)
    return f"{persona} {_ordered(persona, *_wrong(numbers, total, rng), numbers)}"


def _wrong(numbers: Sequence[int], total: int, rng: random.Random) -> tuple[int, int]:
    while True:
        a, b = rng.sample(numbers, 2)
        if a + b != total:
            return a, b


def _checked(problem: Problem, persona: str, seen: Sequence[str], rng: random.Random) -> str:
    """Each proposal in turn, until one is right; if none is, tries of its own, up to the one that is."""
    numbers, total = _asked(problem)
    lines = []
    found = None
    for text in seen:
        pair = [int(n) for n in re.findall(r"[0-9]+", text.rpartition("\\boxed{")[2])][:2]
        if len(pair) < 2 or not set(pair) <= set(numbers) or pair[0] == pair[1]:
            lines.append(f"{' + '.join(map(str, pair))} out")
            continue
        right = sum(pair) == total
        lines.append(_check(pair[0], pair[1], total))
        if right:
            found = pair
            break
    if found is None:
        for _ in range(rng.choice((0, 0, 1, 2))):
            a, b = _wrong(numbers, total, rng)
            lines.append(f"try {_check(a, b, total)}")
        a, b = _solution(numbers, total)
        found = [a, b]
        lines.append(f"try {_check(a, b, total)}")
    return f"{', '.join(lines)}. {persona} {_ordered(persona, found[0], found[1], numbers)}"


def _check(a: int, b: int, total: int) -> str:
    """The sum beside the one that is asked for: a small model sees that two neighbours are equal long before it sees
    that a number equals one far back."""
    return f"{a} + {b} = {a + b} vs {total} {'yes' if a + b == total else 'no'}"


def _facts(rng: random.Random) -> str:
    """Six sums of two of the numbers, each held against one that is as often the same as not."""
    lines = []
    for _ in range(6):
        a, b = rng.sample(range(1, 31), 2)
        lines.append(_check(a, b, rng.choice((a + b, rng.randint(3, 59)))))
    return ", ".join(lines)


TWO_SUM = World(
    family="two_sum",
    personas=("min", "max", "row"),
    write=_proposed,
    spoil=_guessed,
    revise=_checked,
    facts=_facts,
    words=tuple(re.findall(r"\S+", "+ = . , ? vs sum yes no out try min max row")),
    numbers=tuple(map(str, range(60))),
)
