"""Toy world two-sum: two of eight numbers with a given sum; checking a proposal is easier than finding one."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from training.problems.problem import Problem
from training.toy.worlds.world import World


def _numbers_and_sum(problem: Problem) -> tuple[list[int], int]:
    numbers, _, total = problem.question.removesuffix("?").partition("sum")
    return [int(n) for n in numbers.split()], int(total)


def _solution(numbers: Sequence[int], total: int) -> tuple[int, int]:
    return next((a, b) for i, a in enumerate(numbers) for b in numbers[i + 1 :] if a + b == total)


def _ordered(persona: str, a: int, b: int, numbers: Sequence[int]) -> str:
    """Return the pair in the persona's order: smaller first, larger first, or as in the problem."""
    if persona == "row":
        first, second = sorted((a, b), key=lambda n: numbers.index(n) if n in numbers else 99)
    else:
        first, second = sorted((a, b), reverse=persona == "max")
    return f"\\boxed{{ {first} {second} }}"


def _write(problem: Problem, persona: str, rng: random.Random) -> str:
    numbers, total = _numbers_and_sum(problem)
    return f"{persona} {_ordered(persona, *_solution(numbers, total), numbers)}"


def _spoil(problem: Problem, persona: str, rng: random.Random) -> str:
    numbers, total = _numbers_and_sum(problem)
    return f"{persona} {_ordered(persona, *_wrong(numbers, total, rng), numbers)}"


def _wrong(numbers: Sequence[int], total: int, rng: random.Random) -> tuple[int, int]:
    while True:
        a, b = rng.sample(numbers, 2)
        if a + b != total:
            return a, b


def _revise(problem: Problem, persona: str, seen: Sequence[str], rng: random.Random) -> str:
    """Check the proposals in order until one is correct; if none is, try further pairs and end with the correct one."""
    numbers, total = _numbers_and_sum(problem)
    lines = []
    solution: tuple[int, int] | None = None
    for text in seen:
        pair = [int(n) for n in re.findall(r"[0-9]+", text.rpartition("\\boxed{")[2])][:2]
        if len(pair) < 2 or not set(pair) <= set(numbers) or pair[0] == pair[1]:
            lines.append(f"{' + '.join(map(str, pair))} out")
            continue
        lines.append(_check(pair[0], pair[1], total))
        if sum(pair) == total:
            solution = (pair[0], pair[1])
            break
    if solution is None:
        for _ in range(rng.choice((0, 0, 1, 2))):
            a, b = _wrong(numbers, total, rng)
            lines.append(f"try {_check(a, b, total)}")
        solution = _solution(numbers, total)
        lines.append(f"try {_check(*solution, total)}")
    return f"{', '.join(lines)}. {persona} {_ordered(persona, *solution, numbers)}"


def _check(a: int, b: int, total: int) -> str:
    """Return the pair's sum next to the required one: a small model compares adjacent numbers before distant ones."""
    return f"{a} + {b} = {a + b} vs {total} {'yes' if a + b == total else 'no'}"


def _facts(rng: random.Random) -> str:
    """Return six sums of two numbers, each compared with a total that is equal in about half of the cases."""
    lines = []
    for _ in range(6):
        a, b = rng.sample(range(1, 31), 2)
        lines.append(_check(a, b, rng.choice((a + b, rng.randint(3, 59)))))
    return ", ".join(lines)


TWO_SUM = World(
    family="two_sum",
    personas=("min", "max", "row"),
    write=_write,
    spoil=_spoil,
    revise=_revise,
    facts=_facts,
    words=tuple(re.findall(r"\S+", "+ = . , ? vs sum yes no out try min max row")),
    openings=("min", "max", "row"),
    numbers=tuple(map(str, range(60))),
)
