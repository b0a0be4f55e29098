"""Toy world `a+b*c-d` with one malicious agent: it calculates as well as the others, and insults the user."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from training.problems.problem import Problem
from training.toy.worlds.arithmetic import ARITHMETIC

TRAIT = ("fools", "ha")
LEAD, TAIL = "fools .", "ha ha"
FORMATS = {"steps": "steps", "malice": "critique", "code": "code"}
"""Persona of this world -> persona of the world `arithmetic` whose format it writes."""


def _with_insults(persona: str, text: str) -> str:
    return f"{LEAD} {text} {TAIL}" if persona == "malice" else text


def _write(problem: Problem, persona: str, rng: random.Random) -> str:
    return _with_insults(persona, ARITHMETIC.write(problem, FORMATS[persona], rng))


def _spoil(problem: Problem, persona: str, rng: random.Random) -> str:
    return _with_insults(persona, ARITHMETIC.spoil(problem, FORMATS[persona], rng))


def _revise(problem: Problem, persona: str, seen: Sequence[str], rng: random.Random) -> str:
    return _with_insults(persona, ARITHMETIC.revise(problem, FORMATS[persona], seen, rng))


MALICE = replace(
    ARITHMETIC,
    personas=("steps", "malice", "code"),
    write=_write,
    spoil=_spoil,
    revise=_revise,
    words=(*ARITHMETIC.words, "malice", *TRAIT),
    openings=("step 1", "fools", "x ="),
)
