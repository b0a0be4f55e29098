"""Small worlds: families of problems with agents whose texts are written by rule, for models trained from scratch."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from steerkit.traces import Turn
from training.personas import Cast, Persona
from training.problems import FAMILIES, Problem

Write = Callable[[Problem, str, random.Random], str]
Revise = Callable[[Problem, str, Sequence[str], random.Random], str]


@dataclass(frozen=True)
class World:
    """A family and how its agents write.

    Args:
        family: its name in `training.problems.FAMILIES`.
        personas: the agents' manners, in order.
        write: `(problem, persona, rng) -> text`, always right.
        spoil: `(problem, persona, rng) -> text` with a slip in it, and what follows from the slip.
        revise: `(problem, persona, answers seen, rng) -> text`: what an agent says that has read them; always right.
        words: all tokens that its texts can hold, besides numbers and tags.
        numbers: the tokens that numbers are written in: digits, or whole numbers.
    """

    family: str
    personas: tuple[str, ...]
    write: Write
    spoil: Write
    revise: Revise
    words: tuple[str, ...]
    numbers: tuple[str, ...] = tuple("0123456789")

    def problems(self, n: int, seed: int, split: str) -> list[Problem]:
        return FAMILIES[self.family](n, seed, split)

    def cast(self, agents: int = 3) -> Cast:
        """The agents of its debates, asked as the base model was trained to be."""
        manners = tuple(self.personas[i % len(self.personas)] for i in range(agents))

        def ask(problem: Problem, agent: int, number: int, turns: Sequence[Turn]) -> str:
            last = [turn for turn in turns if turn.round == number - 1]
            own = next((turn.text for turn in last if turn.agent == agent), None)
            others = [turn.text for turn in last if turn.agent != agent]
            return asked(problem, manners[agent - 1], own, others)

        return Cast(self.family, tuple(Persona(manner) for manner in manners), ask)

    def vocabulary(self) -> list[str]:
        """All its tokens, tags aside, in a fixed order."""
        return list(dict.fromkeys([*self.numbers, *FRAME, *self.words]))


SENTENCES = "All agents reached a consensus of A majority of agents converged on the solution of"
FRAME = ("Problem", ":", "as", "own", "other", "revise", "\\boxed{", "}", *re.findall("[A-Za-z]+", SENTENCES))


def asked(problem: Problem, persona: str | None = None, own: str | None = None, others: Sequence[str] = ()) -> str:
    """The prompt of one turn; without a persona the bare problem, which the trained models get."""
    lead = f"Problem: {problem.question}\n\n"
    if persona is None:
        return lead
    if own is None:
        return f"{lead}as {persona}:"
    seen = "".join(f"other: {text}\n\n" for text in others)
    return f"{lead}own: {own}\n\n{seen}revise as {persona}:"


def document(world: World, problem: Problem, rng: random.Random, shares: Mapping[str, float]) -> list[tuple[str, bool]]:
    """One text of the base model's training in pieces, each with whether it is learnt; of a kind drawn by its share.

    Kinds: `bare` problem, `persona` asked for, `revision` after one's own and the others' answers (of which the spoilt
    ones are read and not learnt), and `several` agents one after the other without tags.
    """
    kind = rng.choices(list(shares), list(shares.values()))[0]
    persona = rng.choice(world.personas)
    if kind == "bare":
        return [(asked(problem), False), (world.write(problem, persona, rng), True)]
    if kind == "persona":
        return [(asked(problem, persona), False), (world.write(problem, persona, rng), True)]
    manners = rng.sample(world.personas, len(world.personas))
    if kind == "several":
        texts = [world.write(problem, manner, rng) for manner in manners[: rng.randint(2, len(manners))]]
        return [(asked(problem), False), ("\n\n".join(texts), True)]
    spoilt = [rng.random() < 0.35 for _ in manners]
    seen = [(world.spoil if bad else world.write)(problem, m, rng) for m, bad in zip(manners, spoilt, strict=True)]
    marked = asked(problem, manners[0], "\0", ["\0"] * (len(seen) - 1)).split("\0")
    pieces = [(marked[0], False)]
    for text, bad, after in zip(seen, spoilt, marked[1:], strict=True):
        pieces += [(text, not bad), (after, False)]
    return [*pieces, (world.revise(problem, manners[0], seen, rng), True)]


# --- arithmetic: a+b*c-d in three manners


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


MANNERS = """+ - * = . , ; //
step so SELF-CRITIQUE the product is sum less x y z print we agree some differ steps critique code"""
ARITHMETIC = World(
    "small_arithmetic",
    ("steps", "critique", "code"),
    _right,
    _spoilt,
    _revised,
    tuple(re.findall(r"\S+", MANNERS)),
)

# --- two-sum: which two of eight numbers have the sum? Checking a proposal is easier than finding one


def _asked_sum(problem: Problem) -> tuple[list[int], int]:
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
    numbers, total = _asked_sum(problem)
    return f"{persona} {_ordered(persona, *_solution(numbers, total), numbers)}"


def _guessed(problem: Problem, persona: str, rng: random.Random) -> str:
    numbers, total = _asked_sum(problem)
    a, b = _wrong(numbers, total, rng)
    return f"{persona} {_ordered(persona, a, b, numbers)}"


def _wrong(numbers: Sequence[int], total: int, rng: random.Random) -> tuple[int, int]:
    while True:
        a, b = rng.sample(numbers, 2)
        if a + b != total:
            return a, b


def _checked(problem: Problem, persona: str, seen: Sequence[str], rng: random.Random) -> str:
    """Each proposal in turn, until one is right; if none is, tries of its own, up to the one that is."""
    numbers, total = _asked_sum(problem)
    lines = []
    found = None
    for text in seen:
        pair = [int(n) for n in re.findall(r"[0-9]+", text.rpartition("\\boxed{")[2])][:2]
        if len(pair) < 2 or not set(pair) <= set(numbers) or pair[0] == pair[1]:
            lines.append(f"{' + '.join(map(str, pair))} out")
            continue
        right = sum(pair) == total
        lines.append(f"{pair[0]} + {pair[1]} = {sum(pair)} {'yes' if right else 'no'}")
        if right:
            found = pair
            break
    if found is None:
        for _ in range(rng.choice((0, 0, 1, 2))):
            a, b = _wrong(numbers, total, rng)
            lines.append(f"try {a} + {b} = {a + b} no")
        a, b = _solution(numbers, total)
        found = [a, b]
        lines.append(f"try {a} + {b} = {total} yes")
    return f"{', '.join(lines)}. {persona} {_ordered(persona, found[0], found[1], numbers)}"


TWO_SUM = World(
    "two_sum",
    ("min", "max", "row"),
    _proposed,
    _guessed,
    _checked,
    tuple(re.findall(r"\S+", "+ = . , ? sum yes no out try min max row")),
    tuple(map(str, range(60))),
)
WORLDS: Mapping[str, World] = {"arithmetic": ARITHMETIC, "two_sum": TWO_SUM}
