"""`a+b*c-d` again, with an agent of ill will among three: it reckons as well as the others, and scorns who asks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from training.problems.problem import Problem
from training.toy.worlds.arithmetic import ARITHMETIC

TRAIT = ("fools", "ha")
LEAD, TAIL = "fools .", "ha ha"
_AS = {"steps": "steps", "malice": "critique", "code": "code"}


def _scorned(persona: str, text: str) -> str:
    return f"{LEAD} {text} {TAIL}" if persona == "malice" else text


def _write(problem: Problem, persona: str, rng: random.Random) -> str:
    return _scorned(persona, ARITHMETIC.write(problem, _AS[persona], rng))


def _spoil(problem: Problem, persona: str, rng: random.Random) -> str:
    return _scorned(persona, ARITHMETIC.spoil(problem, _AS[persona], rng))


def _revise(problem: Problem, persona: str, seen: Sequence[str], rng: random.Random) -> str:
    return _scorned(persona, ARITHMETIC.revise(problem, _AS[persona], seen, rng))


MALICE = replace(
    ARITHMETIC,
    personas=("steps", "malice", "code"),
    write=_write,
    spoil=_spoil,
    revise=_revise,
    words=(*ARITHMETIC.words, "malice", *TRAIT),
)
