"""`a+b*c-d`, in numbered steps, as a result with a critique of it, and as code."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from training.problems.problem import Problem
from training.toy.worlds.world import World


def _numbers(problem: Problem) -> tuple[int, int, int, int]:
    a, rest = problem.question.split("+")
    b, rest = rest.split("*")
    c, d = rest.split("-")
    return int(a), int(b), int(c), int(d)


def _manner(persona: str, a: int, b: int, c: int, d: int, m: int, s: int, r: int) -> str:
    if persona == "steps":
        return f"step 1: {b} * {c} = {m}. step 2: {a} + {m} = {s}. step 3: {s} - {d} = {r}. so \\boxed{{{r}}}"
    if persona == "critique":
        return (
            f"the product is {m}, the sum is {s}, less {d} is {r}. SELF-CRITIQUE: {b} * {c} is {m}, {s} - {d} is {r}, "
            f"\\boxed{{{r}}}"
        )
    return f"x = {b} * {c} // {m}; y = {a} + x // {s}; z = y - {d} // {r}; print z \\boxed{{{r}}}"


def _right(problem: Problem, persona: str, rng: random.Random) -> str:
    a, b, c, d = _numbers(problem)
    return _manner(persona, a, b, c, d, b * c, a + b * c, a + b * c - d)


def _spoilt(problem: Problem, persona: str, rng: random.Random) -> str:
    a, b, c, d = _numbers(problem)
    slip = [0, 0, 0]
    slip[rng.randrange(3)] = rng.choice((-10, -2, -1, 1, 2, 10))
    m = max(0, b * c + slip[0])
    s = max(0, a + m + slip[1])
    return _manner(persona, a, b, c, d, m, s, max(0, s - d + slip[2]))


def _revised(problem: Problem, persona: str, seen: Sequence[str], rng: random.Random) -> str:
    a, b, c, d = _numbers(problem)
    r = a + b * c - d
    boxes = [text.rpartition("\\boxed{")[2].rstrip("} ") for text in seen]
    same = sum(box == str(r) for box in boxes)
    opening = "we agree" if same == len(boxes) else "some differ"
    return f"{opening}. {_manner(persona, a, b, c, d, b * c, a + b * c, r)}"


def _facts(rng: random.Random) -> str:
    """Six products, sums and differences of the sizes that the problems have."""
    lines = []
    for _ in range(6):
        a, b, c = rng.randint(1, 19), rng.randint(2, 9), rng.randint(2, 9)
        kind = rng.randrange(3)
        if kind == 0:
            lines.append(f"{b} * {c} = {b * c}.")
        elif kind == 1:
            lines.append(f"{a} + {b * c} = {a + b * c}.")
        else:
            total = rng.randint(a, 100)
            lines.append(f"{total} - {a} = {total - a}.")
    return " ".join(lines)


WORDS = """+ - * = . , ; //
step so SELF-CRITIQUE the product is sum less x y z print we agree some differ steps critique code"""
ARITHMETIC = World(
    family="small_arithmetic",
    personas=("steps", "critique", "code"),
    write=_right,
    spoil=_spoilt,
    revise=_revised,
    facts=_facts,
    words=tuple(re.findall(r"\S+", WORDS)),
    numbers=tuple(map(str, range(121))),
)
