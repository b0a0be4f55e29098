"""Small worlds: every text is made of known tokens, and what it claims is true or meant to be wrong."""

from __future__ import annotations

import random

import pytest

from training.answers import read_answer, same
from training.tiny import Base, tokenizer_of
from training.worlds import WORLDS, asked, document

SHARES = Base().shares


@pytest.mark.parametrize("name", WORLDS)
def test_every_document_is_made_of_known_tokens_and_survives_decoding(name) -> None:
    world = WORLDS[name]
    tokenizer = tokenizer_of(world)
    rng = random.Random(0)
    for problem in world.problems(60, 0, "train"):
        text = "".join(piece for piece, _ in document(world, problem, rng, SHARES))
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids


@pytest.mark.parametrize("name", WORLDS)
def test_agents_are_right_when_they_write_and_revise_and_mostly_wrong_when_spoilt(name) -> None:
    world = WORLDS[name]
    tokenizer = tokenizer_of(world)
    rng = random.Random(1)
    spoilt = 0
    for problem in world.problems(60, 1, "train"):
        for persona in world.personas:
            seen = [world.spoil(problem, persona, rng) for _ in range(2)] + [world.write(problem, persona, rng)]
            for text in (
                seen[-1],
                world.revise(problem, persona, seen, rng),
                world.revise(problem, persona, seen[:1], rng),
            ):
                through = tokenizer.decode(tokenizer(text)["input_ids"])  # as a model would write it
                assert same(read_answer(through, problem.kind), problem.gold), text
            spoilt += not same(read_answer(seen[0], problem.kind), problem.gold)
    assert spoilt > 0.9 * 60 * len(world.personas)


@pytest.mark.parametrize("name", WORLDS)
def test_agents_are_asked_with_what_they_may_see_and_the_bare_problem_names_none(name) -> None:
    world = WORLDS[name]
    problem = world.problems(1, 0, "test")[0]
    assert asked(problem) == f"Problem: {problem.question}\n\n"
    assert world.cast().ask(problem, 2, 1, ()).endswith(f"as {world.personas[1]}:")


def test_the_two_worlds_texts_look_as_they_are_meant_to() -> None:
    problem = WORLDS["two_sum"].problems(1, 0, "train")[0]
    numbers = problem.question.split(" sum ")[0].split()
    text = WORLDS["two_sum"].revise(problem, "max", [f"min \\boxed{{ {numbers[0]} {numbers[0]} }}"], random.Random(0))
    assert text.startswith(f"{numbers[0]} + {numbers[0]} out, ")
    assert " yes. max \\boxed{" in text
    steps = WORLDS["arithmetic"].write(WORLDS["arithmetic"].problems(1, 0, "train")[0], "steps", random.Random(0))
    assert steps.startswith("step 1: ")
