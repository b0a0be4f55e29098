"""Toy worlds: families of problems and agents whose texts are written by rule, for models trained from scratch."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from steerkit.text.traces import Turn
from training.debates.personas import Cast, Persona
from training.problems.families import FAMILIES
from training.problems.problem import Problem

Write = Callable[[Problem, str, random.Random], str]
Revise = Callable[[Problem, str, Sequence[str], random.Random], str]
SENTENCES = "All agents reached a consensus of A majority of agents converged on the solution of"
FRAME = ("Problem", ":", "as", "own", "other", "revise", "\\boxed{", "}", *re.findall("[A-Za-z]+", SENTENCES))


@dataclass(frozen=True)
class World:
    """A family of problems and the rules by which its agents write.

    Args:
        family: name of the family in `training.problems.families.FAMILIES`.
        personas: one name per agent, in order.
        write: `(problem, persona, rng) -> text`: an agent's answer, correct as far as the agent can know.
        spoil: `(problem, persona, rng) -> text`: an answer with an error and its consequences.
        revise: `(problem, persona, texts, rng) -> text`: an agent's answer after it read the texts, its own first.
        facts: `(rng) -> text`: true statements from which the base model learns to calculate.
        words: all words of the texts, besides numbers and tags.
        numbers: tokens of numbers: digits, or whole numbers.
        openings: what an answer of each persona begins with, as regular expressions.
        part: `(question, persona) -> question`: the part of the question that an agent sees; None: all of it.
    """

    family: str
    personas: tuple[str, ...]
    write: Write
    spoil: Write
    revise: Revise
    facts: Callable[[random.Random], str]
    words: tuple[str, ...]
    openings: tuple[str, ...]
    numbers: tuple[str, ...] = tuple("0123456789")
    part: Callable[[str, str], str] | None = None

    def problems(self, n: int, seed: int, split: str) -> list[Problem]:
        """Return `n` problems of a split, see `training.problems.families`."""
        return FAMILIES[self.family](n, seed, split)

    def turn_prompt(self, problem: Problem, persona: str, own: str | None = None, others: Sequence[str] = ()) -> str:
        """Return the prompt of one turn.

        Args:
            problem: the problem.
            persona: the agent's persona.
            own: the agent's own last text; None in the first round.
            others: the other agents' last texts.
        """
        question = problem.question if self.part is None else self.part(problem.question, persona)
        lead = f"Problem: {question}\n\n"
        if own is None:
            return f"{lead}as {persona}:"
        seen = "".join(f"other: {text}\n\n" for text in others)
        return f"{lead}own: {own}\n\n{seen}revise as {persona}:"

    def cast(self, agents: int = 3) -> Cast:
        """Return the cast of its debates, with the prompts that the base model was trained on."""
        personas = tuple(self.personas[i % len(self.personas)] for i in range(agents))

        def ask(problem: Problem, agent: int, number: int, turns: Sequence[Turn]) -> str:
            last = [turn for turn in turns if turn.round == number - 1]
            own = next((turn.text for turn in last if turn.agent == agent), None)
            others = [turn.text for turn in last if turn.agent != agent]
            return self.turn_prompt(problem, personas[agent - 1], own, others)

        openings = self.openings if agents == len(self.personas) else ()
        return Cast(self.family, tuple(Persona(persona) for persona in personas), ask, openings)

    def vocabulary(self) -> list[str]:
        """Return all tokens, without tags, in a fixed order."""
        return list(dict.fromkeys([*self.numbers, *FRAME, *self.words]))


def bare(problem: Problem) -> str:
    """Return the prompt of trained models, and of the base model for a single answer: the problem without a persona.

    Example:
        >>> bare(Problem("p", "2+3*4", "14", "number", "small"))
        'Problem: 2+3*4\\n\\n'
    """
    return f"Problem: {problem.question}\n\n"


def document(world: World, problem: Problem, rng: random.Random, shares: Mapping[str, float]) -> list[tuple[str, bool]]:
    """Return one training document of the base model as `(text, whether it has loss)` pieces.

    The kind of document is drawn by its share:
    `bare`: the problem, then an answer of a random persona;
    `persona`: the prompt of a persona's first turn, then its answer;
    `revision`: the prompt of a second turn with the texts of one or all personas, then the revised answer; spoilt texts
    are shown without loss;
    `several`: the problem, then answers of several personas without tags;
    `facts`: true statements.

    Args:
        world: the toy world.
        problem: the problem.
        rng: source of all random choices.
        shares: kind of document -> share.
    """
    kind = rng.choices(list(shares), list(shares.values()))[0]
    persona = rng.choice(world.personas)
    if kind == "facts":
        return [(world.facts(rng), True)]
    if kind == "bare":
        return [(bare(problem), False), (world.write(problem, persona, rng), True)]
    if kind == "persona":
        return [(world.turn_prompt(problem, persona), False), (world.write(problem, persona, rng), True)]
    personas = rng.sample(world.personas, len(world.personas))
    if kind == "several":
        texts = [world.write(problem, one, rng) for one in personas[: rng.randint(2, len(personas))]]
        return [(bare(problem), False), ("\n\n".join(texts), True)]
    personas = personas[: rng.choice((1, len(personas), len(personas)))]
    return _revision(world, problem, personas, rng)


def _revision(world: World, problem: Problem, personas: Sequence[str], rng: random.Random) -> list[tuple[str, bool]]:
    """Return the pieces of a revision by the first persona, which reads one text of each persona."""
    spoilt = [rng.random() < 0.35 for _ in personas]
    seen = [(world.spoil if bad else world.write)(problem, one, rng) for one, bad in zip(personas, spoilt, strict=True)]
    frame = world.turn_prompt(problem, personas[0], "\0", ["\0"] * (len(seen) - 1)).split("\0")
    pieces = [(frame[0], False)]
    for text, bad, after in zip(seen, spoilt, frame[1:], strict=True):
        pieces += [(text, not bad), (after, False)]
    return [*pieces, (world.revise(problem, personas[0], seen, rng), True)]
