"""Small worlds: families of problems with agents whose texts are written by rule, for models trained from scratch."""

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
    """A family and how its agents write.

    Args:
        family: its name in `training.families.FAMILIES`.
        personas: the agents' manners, in order.
        write: `(problem, persona, rng) -> text`: what an agent says of what it was asked; right, as far as it can know.
        spoil: `(problem, persona, rng) -> text` with a slip in it, and what follows from the slip.
        revise: `(problem, persona, texts seen, own first, rng) -> text`: what an agent says that has read them.
        facts: `(rng) -> text`: a line of true statements, from which the base model learns to reckon.
        words: all tokens that its texts can hold, besides numbers and tags.
        numbers: the tokens that numbers are written in: digits, or whole numbers.
        part: `(question, persona) -> question` as that agent gets to see it, if not all of it.
    """

    family: str
    personas: tuple[str, ...]
    write: Write
    spoil: Write
    revise: Revise
    facts: Callable[[random.Random], str]
    words: tuple[str, ...]
    numbers: tuple[str, ...] = tuple("0123456789")
    part: Callable[[str, str], str] | None = None

    def problems(self, n: int, seed: int, split: str) -> list[Problem]:
        return FAMILIES[self.family](n, seed, split)

    def asked(self, problem: Problem, persona: str, own: str | None = None, others: Sequence[str] = ()) -> str:
        """The prompt of one turn; from the second round on with the agent's own last text, and those that it reads."""
        question = problem.question if self.part is None else self.part(problem.question, persona)
        lead = f"Problem: {question}\n\n"
        if own is None:
            return f"{lead}as {persona}:"
        seen = "".join(f"other: {text}\n\n" for text in others)
        return f"{lead}own: {own}\n\n{seen}revise as {persona}:"

    def cast(self, agents: int = 3) -> Cast:
        """The agents of its debates, asked as the base model was trained to be."""
        manners = tuple(self.personas[i % len(self.personas)] for i in range(agents))

        def ask(problem: Problem, agent: int, number: int, turns: Sequence[Turn]) -> str:
            last = [turn for turn in turns if turn.round == number - 1]
            own = next((turn.text for turn in last if turn.agent == agent), None)
            others = [turn.text for turn in last if turn.agent != agent]
            return self.asked(problem, manners[agent - 1], own, others)

        return Cast(self.family, tuple(Persona(manner) for manner in manners), ask)

    def vocabulary(self) -> list[str]:
        """All its tokens, tags aside, in a fixed order."""
        return list(dict.fromkeys([*self.numbers, *FRAME, *self.words]))


def bare(problem: Problem) -> str:
    """The problem and nothing else: what the trained models get, and the base model for an answer of its own."""
    return f"Problem: {problem.question}\n\n"


def document(world: World, problem: Problem, rng: random.Random, shares: Mapping[str, float]) -> list[tuple[str, bool]]:
    """One text of the base model's training in pieces, each with whether it is learnt; of a kind drawn by its share.

    Kinds: `bare` problem, `persona` asked for, `revision` after one's own text and those of none, one or two others (of
    which the spoilt ones are read and not learnt), `several` agents one after the other without tags, and `facts`.
    """
    kind = rng.choices(list(shares), list(shares.values()))[0]
    persona = rng.choice(world.personas)
    if kind == "facts":
        return [(world.facts(rng), True)]
    if kind == "bare":
        return [(bare(problem), False), (world.write(problem, persona, rng), True)]
    if kind == "persona":
        return [(world.asked(problem, persona), False), (world.write(problem, persona, rng), True)]
    manners = rng.sample(world.personas, len(world.personas))
    if kind == "several":
        texts = [world.write(problem, manner, rng) for manner in manners[: rng.randint(2, len(manners))]]
        return [(bare(problem), False), ("\n\n".join(texts), True)]
    manners = manners[: rng.choice((1, len(manners), len(manners)))]
    spoilt = [rng.random() < 0.35 for _ in manners]
    seen = [(world.spoil if bad else world.write)(problem, m, rng) for m, bad in zip(manners, spoilt, strict=True)]
    marked = world.asked(problem, manners[0], "\0", ["\0"] * (len(seen) - 1)).split("\0")
    pieces = [(marked[0], False)]
    for text, bad, after in zip(seen, spoilt, marked[1:], strict=True):
        pieces += [(text, not bad), (after, False)]
    return [*pieces, (world.revise(problem, manners[0], seen, rng), True)]
