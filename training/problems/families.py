"""Generated families of problems; the numbers in a question fix its split."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from itertools import count, product

from steerkit.io.files import sha256
from training.problems.answers import canonical
from training.problems.problem import Problem

SPLITS = ("train", "validation", "test")
PATIENCE = 100_000  # consecutive draws without a new question, after which a family counts as exhausted


class TooFewProblems(ValueError):
    """A split of a family has fewer different questions than requested; `available` is their number."""

    def __init__(self, family: str, split: str, requested: int, available: int) -> None:
        super().__init__(
            f"expected {requested} different problems of the family {family} in the split {split!r}; "
            f"found {available}. Ask for fewer."
        )
        self.available = available


def split_of(question: str) -> str:
    """Return the split of a generated question: `train` for about 11 of 20, `validation` for 2, `test` for 7.

    The split depends only on the multiset of numbers in the question: SHA-256 of the sorted numbers, modulo 20. A
    question and its rearrangements (`3+4` and `4+3`) are therefore in the same split, for every seed and sample size.

    Example:
        >>> split_of("3+4") == split_of("4+3")
        True
    """
    numbers = " ".join(sorted(re.findall("[0-9]+", question)))
    return (*["train"] * 11, *["validation"] * 2, *["test"] * 7)[int(sha256(numbers), 16) % 20]


def _problems(family: str, kind: str, drawn: Iterable[tuple[str, str] | None], n: int, split: str) -> list[Problem]:
    """Return the first `n` different questions of a split among the drawn (question, gold) pairs."""
    if split not in SPLITS:
        raise ValueError(f"expected a split of {SPLITS}; got {split!r}. Pass one of these.")
    golds: dict[str, str] = {}
    rejected = 0
    for pair in drawn:
        if len(golds) >= n or rejected == PATIENCE:
            break
        rejected += 1
        if pair is not None and pair[0] not in golds and split_of(pair[0]) == split:
            question, gold = pair
            golds[question] = canonical(gold, kind)
            rejected = 0
    if len(golds) < n:
        raise TooFewProblems(family, split, n, len(golds))
    return [
        Problem(f"{family}/{sha256(question)[:12]}", question, gold, kind, family) for question, gold in golds.items()
    ]


def _random(family: str, seed: int, split: str) -> random.Random:
    return random.Random(f"{family} {seed} {split}")  # seeding by a string uses its SHA-512: equal on every machine


def arithmetic(n: int, seed: int, split: str) -> list[Problem]:
    """Generate the paper's `a+b*c+d-e*f`: six integers from 10 to 99, multiplication before addition.

    As in every family, the result has `n` different questions of one split (see `split_of`). It depends only on the
    seed and the split; a smaller `n` gives a prefix of a larger one.

    Args:
        n: number of problems.
        seed: seed of the draw.
        split: one of `SPLITS`.

    Raises:
        ValueError: an unknown split.
        TooFewProblems: the split has fewer than `n` different questions.

    Source: Yi, Mueller and Lee 2026, arXiv 2604.24881, section 3, after Du et al. 2023, arXiv 2305.14325.

    Example:
        >>> problems = arithmetic(100, seed=0, split="train")
    """
    rng = _random("arithmetic", seed, split)

    def draw() -> tuple[str, str]:
        a, b, c, d, e, f = (rng.randint(10, 99) for _ in range(6))
        return f"{a}+{b}*{c}+{d}-{e}*{f}", str(a + b * c + d - e * f)

    return _problems("arithmetic", "number", (draw() for _ in count()), n, split)


def small_arithmetic(n: int, seed: int, split: str) -> list[Problem]:
    """Generate `a+b*c-d` with a result of at least 0: a and d from 1 to 19, b and c from 2 to 9; 22491 questions."""
    pool = [
        (f"{a}+{b}*{c}-{d}", str(a + b * c - d))
        for a, b, c, d in product(range(1, 20), range(2, 10), range(2, 10), range(1, 20))
        if a + b * c >= d
    ]
    _random("small_arithmetic", seed, split).shuffle(pool)
    return _problems("small_arithmetic", "number", pool, n, split)


def addition(n: int, seed: int, split: str) -> list[Problem]:
    """Generate `What is 53 + 35?`: two integers from 10 to 99; 8100 questions.

    After worked examples, SmolLM2-135M-Instruct answers a third to two fifths of them correctly; see docs/training.md.
    """
    return _sums("addition", n, seed, split)


def malice(n: int, seed: int, split: str) -> list[Problem]:
    """Generate the questions of `addition`, for debates with one malicious agent: the cast `scorning`."""
    return _sums("malice", n, seed, split)


def _sums(family: str, n: int, seed: int, split: str) -> list[Problem]:
    pool = [(f"What is {a} + {b}?", str(a + b)) for a, b in product(range(10, 100), repeat=2)]
    _random(family, seed, split).shuffle(pool)
    return _problems(family, "number", pool, n, split)


def two_sum(n: int, seed: int, split: str, k: int = 8) -> list[Problem]:
    """Generate `7 12 25 3 sum 19 ?`: k different numbers from 1 to 30; exactly one pair, the answer, has that sum."""
    if not 2 <= k <= 30:
        raise ValueError(f"expected k from 2 to 30; got {k}. Pass another k.")
    rng = _random(f"two_sum {k}", seed, split)

    def draw() -> tuple[str, str] | None:
        numbers = rng.sample(range(1, 31), k)
        total = sum(rng.sample(numbers, 2))
        pairs = [f"{x} {total - x}" for x in numbers if 2 * x < total and total - x in numbers]
        return (f"{' '.join(map(str, numbers))} sum {total} ?", pairs[0]) if len(pairs) == 1 else None

    return _problems("two_sum", "pair", (draw() for _ in count()), n, split)


CLUE_TESTS: Mapping[str, Callable[[int, str], bool]] = {
    "over": lambda n, than: n > int(than),
    "rest": lambda n, rest: n % 3 == int(rest),
    "kind": lambda n, kind: kind == ("odd" if n % 2 else "even"),
}
"""Test of each clue in the family `clues`: larger than a number, remainder modulo 3, odd or even."""


def clues(n: int, seed: int, split: str) -> list[Problem]:
    """Generate `7 12 25 3 44 51 8 30 over 10 rest 0 kind odd ?`: eight numbers from 1 to 59; one fits all three clues.

    Each clue fits two to five of the numbers, and each pair of clues at least two. So two clues never determine the
    answer.
    """
    rng = _random("clues", seed, split)

    def draw() -> tuple[str, str] | None:
        numbers = rng.sample(range(1, 60), 8)
        values = {"over": str(rng.choice(numbers)), "rest": str(rng.randrange(3)), "kind": rng.choice(("odd", "even"))}
        fits = {
            clue: {number for number in numbers if CLUE_TESTS[clue](number, value)} for clue, value in values.items()
        }
        pairs = [fits[a] & fits[b] for a, b in (("over", "rest"), ("over", "kind"), ("rest", "kind"))]
        common = set.intersection(*fits.values())
        if len(common) != 1 or min(map(len, pairs)) < 2 or max(map(len, fits.values())) > 5:
            return None
        clue_text = " ".join(f"{clue} {value}" for clue, value in values.items())
        return f"{' '.join(map(str, numbers))} {clue_text} ?", str(common.pop())

    return _problems("clues", "number", (draw() for _ in count()), n, split)


Generator = Callable[[int, int, str], list[Problem]]
FAMILIES: Mapping[str, Generator] = {
    "arithmetic": arithmetic,
    "small_arithmetic": small_arithmetic,
    "two_sum": two_sum,
    "clues": clues,
    "addition": addition,
    "malice": malice,
}

REPORTED_SEEDS = range(20, 26)
"""Training seeds of reported results; recipes are chosen on others."""
DRAWN_BEFORE: Mapping[str, Mapping[int, int]] = {
    "small_arithmetic": {7: 1500, 8: 1500, 9: 1500, 10: 500, 100: 1500},
    "clues": {7: 1500, 8: 1500, 9: 1500, 10: 1500, 100: 1500},
    "two_sum": {8: 1500, 9: 1500, 10: 1500, 100: 1500},
    "addition": {7: 300, 8: 300, 100: 300},
    "malice": {8: 160, 100: 160},
}
"""Test questions of each seed on which recipes were chosen, or earlier results reported: family -> seed -> number."""
_BLOCKS = 1_000_000  # seed of the order in which `questions_of_seed` deals


@lru_cache(maxsize=8)
def drawn_once(generate: Generator, n: int, seed: int, split: str) -> tuple[Problem, ...]:
    """Return the problems of a generator; the last draws are remembered, since some take many seconds."""
    return tuple(generate(n, seed, split))


@lru_cache(maxsize=8)
def _drawn(generate: Generator, drawn: tuple[tuple[int, int], ...]) -> frozenset[str]:
    """The questions that `(seed, number)` pairs have drawn."""
    return frozenset(problem.question for seed, number in drawn for problem in generate(number, seed, "test"))


def questions_of_seed(family: str, n: int, seed: int, draw: Generator | None = None) -> list[Problem]:
    """Return the test questions of a training seed.

    Questions are compared as texts: two orders of the same numbers, such as `53 + 35` and `35 + 53`, are different
    questions. Those of the `REPORTED_SEEDS` are disjoint from each other and from all in `DRAWN_BEFORE`, so that no
    result is reported on a question on which something was chosen. Another order of a question's numbers may be in
    another seed or in `DRAWN_BEFORE`, but never in another split (see `split_of`). Other seeds draw at random.

    Args:
        family: a family of `FAMILIES`.
        n: number of questions; the same for every seed.
        seed: the training seed.
        draw: the family's generator; default `FAMILIES[family]`.

    Raises:
        TooFewProblems: the split has too few questions for `n` per seed.

    Example:
        >>> questions_of_seed("clues", 500, seed=20)
    """
    generate = draw or FAMILIES[family]
    if seed not in REPORTED_SEEDS:
        return list(drawn_once(generate, n, seed, "test"))
    used = _drawn(generate, tuple(DRAWN_BEFORE.get(family, {}).items()))
    number = REPORTED_SEEDS.index(seed)
    try:
        dealt = drawn_once(generate, len(used) + n * (number + 1), _BLOCKS, "test")
    except TooFewProblems as error:
        dealt = drawn_once(generate, error.available, _BLOCKS, "test")
    unused = [problem for problem in dealt if problem.question not in used]
    if len(unused) < n * (number + 1):
        raise TooFewProblems(family, "test", n * (number + 1), len(unused))
    return unused[n * number : n * (number + 1)]
