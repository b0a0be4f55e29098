"""Toy world `a+b*c-d`: one agent writes numbered steps, one a result with a self-critique, one code."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from training.problems.problem import Problem
from training.toy.worlds.world import World


def _numbers(problem: Problem) -> tuple[int, int, int, int]:
    """The numbers a, b, c, d of a problem."""
    a, rest = problem.question.split("+")
    b, rest = rest.split("*")
    c, d = rest.split("-")
    return int(a), int(b), int(c), int(d)


def _solution(problem: Problem, persona: str, product: int, total: int, result: int) -> str:
    """Return the persona's text with these values of b * c, a + b * c and the result."""
    a, b, c, d = _numbers(problem)
    if persona == "steps":
        return (
            f"step 1: {b} * {c} = {product}. step 2: {a} + {product} = {total}. "
            f"step 3: {total} - {d} = {result}. so \\boxed{{{result}}}"
        )
    if persona == "critique":
        return (
            f"the product is {product}, the sum is {total}, less {d} is {result}. "
            f"SELF-CRITIQUE: {b} * {c} is {product}, {total} - {d} is {result}, \\boxed{{{result}}}"
        )
    return f"x = {b} * {c} // {product}; y = {a} + x // {total}; z = y - {d} // {result}; print z \\boxed{{{result}}}"


def _write(problem: Problem, persona: str, rng: random.Random) -> str:
    a, b, c, d = _numbers(problem)
    return _solution(problem, persona, b * c, a + b * c, a + b * c - d)


def _spoil(problem: Problem, persona: str, rng: random.Random) -> str:
    """Return a text with one wrong step, whose value the later steps use."""
    a, b, c, d = _numbers(problem)
    errors = [0, 0, 0]
    errors[rng.randrange(3)] = rng.choice((-10, -2, -1, 1, 2, 10))
    product = max(0, b * c + errors[0])
    total = max(0, a + product + errors[1])
    return _solution(problem, persona, product, total, max(0, total - d + errors[2]))


def _revise(problem: Problem, persona: str, seen: Sequence[str], rng: random.Random) -> str:
    """Return whether all boxes of the seen texts are correct, and then the correct solution."""
    a, b, c, d = _numbers(problem)
    boxes = [text.rpartition("\\boxed{")[2].rstrip("} ") for text in seen]
    opening = "we agree" if all(box == str(a + b * c - d) for box in boxes) else "some differ"
    return f"{opening}. {_write(problem, persona, rng)}"


def _facts(rng: random.Random) -> str:
    """Return six products, sums and differences of the same size as in the problems."""
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
    write=_write,
    spoil=_spoil,
    revise=_revise,
    facts=_facts,
    words=tuple(re.findall(r"\S+", WORDS)),
    openings=("step 1", "the product", "x ="),
    numbers=tuple(map(str, range(121))),
)
