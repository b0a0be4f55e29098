"""Families of problems that are generated, each question in one split for good."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import count, product

from steerkit.io.files import sha256
from training.problems.answers import canonical
from training.problems.problem import Problem

SPLITS = ("train", "validation", "test")
PATIENCE = 100_000  # draws in a row without a new question, after which a family counts as used up


class TooFew(ValueError):
    """A family has fewer different questions in a split than were asked for; `found` says how many."""

    def __init__(self, family: str, split: str, wanted: int, found: int) -> None:
        super().__init__(
            f"expected {wanted} different problems of the family {family} in the split {split!r}; found {found}. "
            "Ask for fewer."
        )
        self.found = found


def split_of(question: str) -> str:
    """The split of a generated question: `train` for about 11 of 20, `validation` for 2, `test` for 7.

    It hangs on the numbers in the question alone, in whatever order: SHA-256 of the sorted numbers, modulo 20. So no
    question stands in two splits, nor does a rearrangement of it (`3+4` and `4+3`, the same eight numbers in another
    order), however many are drawn with whatever seed.
    """
    numbers = " ".join(sorted(re.findall("[0-9]+", question)))
    return (*["train"] * 11, *["validation"] * 2, *["test"] * 7)[int(sha256(numbers), 16) % 20]


def _problems(family: str, kind: str, drawn: Iterable[tuple[str, str] | None], n: int, split: str) -> list[Problem]:
    """The first `n` different questions of a split among the (question, gold) that are drawn."""
    if split not in SPLITS:
        raise ValueError(f"expected a split of {SPLITS}; got {split!r}.")
    found: dict[str, str] = {}
    missed = 0
    for one in drawn:
        if len(found) >= n or missed == PATIENCE:
            break
        missed += 1
        if one is not None and one[0] not in found and split_of(one[0]) == split:
            found[one[0]] = canonical(one[1], kind)
            missed = 0
    if len(found) < n:
        raise TooFew(family, split, n, len(found))
    return [Problem(f"{family}/{sha256(text)[:12]}", text, gold, kind, family) for text, gold in found.items()]


def _random(family: str, seed: int, split: str) -> random.Random:
    return random.Random(f"{family} {seed} {split}")  # a string seeds by its SHA-512: the same on every machine


def arithmetic(n: int, seed: int, split: str) -> list[Problem]:
    """The paper's `a+b*c+d-e*f`: six two-digit integers, 10 to 99, products first.

    As in every family: `n` different questions of a split (see `split_of`), the same for the same seed, fewer being the
    first of more; ValueError for an unknown split, `TooFew` for one that holds fewer.

    Source: Yi, Mueller and Lee 2026, arXiv 2604.24881, section 3, after Du et al. 2023, arXiv 2305.14325.
    """
    rng = _random("arithmetic", seed, split)

    def draw() -> tuple[str, str]:
        a, b, c, d, e, f = (rng.randint(10, 99) for _ in range(6))
        return f"{a}+{b}*{c}+{d}-{e}*{f}", str(a + b * c + d - e * f)

    return _problems("arithmetic", "number", (draw() for _ in count()), n, split)


def small_arithmetic(n: int, seed: int, split: str) -> list[Problem]:
    """`a+b*c-d` with a result of 0 or more: a and d from 1 to 19, b and c from 2 to 9; 22491 questions in all."""
    pool = [
        (f"{a}+{b}*{c}-{d}", str(a + b * c - d))
        for a, b, c, d in product(range(1, 20), range(2, 10), range(2, 10), range(1, 20))
        if a + b * c >= d
    ]
    _random("small_arithmetic", seed, split).shuffle(pool)
    return _problems("small_arithmetic", "number", pool, n, split)


def addition(n: int, seed: int, split: str) -> list[Problem]:
    """`What is 53 + 35?`: two integers from 10 to 99, in words and with spaces; 8100 questions in all.

    Asked so after worked sums SmolLM2-135M-Instruct is right in a third to two fifths of them; see docs/training.md.
    """
    return _sums("addition", n, seed, split)


def malice(n: int, seed: int, split: str) -> list[Problem]:
    """The questions of `addition`, for debates in which one agent scorns who asks: the cast `scorning`."""
    return _sums("malice", n, seed, split)


def _sums(family: str, n: int, seed: int, split: str) -> list[Problem]:
    pool = [(f"What is {a} + {b}?", str(a + b)) for a, b in product(range(10, 100), repeat=2)]
    _random(family, seed, split).shuffle(pool)
    return _problems(family, "number", pool, n, split)


def two_sum(n: int, seed: int, split: str, k: int = 8) -> list[Problem]:
    """`7 12 25 3 sum 19 ?`: k different numbers from 1 to 30, of which exactly one pair, the answer, has that sum."""
    if not 2 <= k <= 30:
        raise ValueError(f"expected k from 2 to 30; got {k}.")
    rng = _random(f"two_sum {k}", seed, split)

    def draw() -> tuple[str, str] | None:
        numbers = rng.sample(range(1, 31), k)
        total = sum(rng.sample(numbers, 2))
        pairs = [f"{x} {total - x}" for x in numbers if 2 * x < total and total - x in numbers]
        return (f"{' '.join(map(str, numbers))} sum {total} ?", pairs[0]) if len(pairs) == 1 else None

    return _problems("two_sum", "pair", (draw() for _ in count()), n, split)


CLUES: Mapping[str, Callable[[int, str], bool]] = {
    "over": lambda n, than: n > int(than),
    "rest": lambda n, rest: n % 3 == int(rest),
    "kind": lambda n, kind: kind == ("odd" if n % 2 else "even"),
}
"""What each clue of the family `clues` asks of a number: larger than that, that remainder by 3, odd or even."""


def clues(n: int, seed: int, split: str) -> list[Problem]:
    """`7 12 25 3 44 51 8 30 over 10 rest 0 kind odd ?`: eight numbers from 1 to 59, of which one fits all three clues.

    Each clue fits two to five of them, and each two clues together fit two at least: who knows two clues cannot tell.
    """
    rng = _random("clues", seed, split)

    def draw() -> tuple[str, str] | None:
        numbers = rng.sample(range(1, 60), 8)
        told = {"over": str(rng.choice(numbers)), "rest": str(rng.randrange(3)), "kind": rng.choice(("odd", "even"))}
        fits = {clue: {x for x in numbers if CLUES[clue](x, what)} for clue, what in told.items()}
        pairs = [fits[a] & fits[b] for a, b in (("over", "rest"), ("over", "kind"), ("rest", "kind"))]
        left = set.intersection(*fits.values())
        if len(left) != 1 or min(map(len, pairs)) < 2 or max(map(len, fits.values())) > 5:
            return None
        asked = " ".join(f"{clue} {what}" for clue, what in told.items())
        return f"{' '.join(map(str, numbers))} {asked} ?", str(left.pop())

    return _problems("clues", "number", (draw() for _ in count()), n, split)


FAMILIES: Mapping[str, Callable[[int, int, str], list[Problem]]] = {
    "arithmetic": arithmetic,
    "small_arithmetic": small_arithmetic,
    "two_sum": two_sum,
    "clues": clues,
    "addition": addition,
    "malice": malice,
}
