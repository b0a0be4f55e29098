"""Toy worlds: every text consists of known tokens, and its statements are true, or wrong where it is spoilt."""

from __future__ import annotations

import random

import pytest

from steerkit.text.tokens import encode
from steerkit.text.traces import DebateTrace, Turn
from training.debates.debate import consensus_text
from training.problems.answers import read_answer, same
from training.toy.base_model import Base, tokenizer_of
from training.toy.worlds import WORLDS, World, bare, document

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


def decoded(world: World, text: str) -> str:
    """Return a text after encoding and decoding."""
    tokenizer = tokenizer_of(world)
    return tokenizer.decode(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("name", ["arithmetic", "malice", "two_sum"])
def test_agents_are_right_when_they_write_and_revise_and_mostly_wrong_when_spoilt(name) -> None:
    world = WORLDS[name]
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
                assert same(read_answer(decoded(world, text), problem.kind), problem.gold), text
            spoilt += not same(read_answer(seen[0], problem.kind), problem.gold)
    assert spoilt > 0.9 * 60 * len(world.personas)


def test_with_a_clue_each_no_agent_can_tell_alone_nor_two_of_them_and_all_three_can() -> None:
    world = WORLDS["clues"]
    rng = random.Random(2)
    one_clue = two_clues = 0
    problems = world.problems(200, 2, "train")
    for problem in problems:
        over, rest, kind = (world.write(problem, persona, rng) for persona in world.personas)
        for seen in ([over, rest, kind], [kind, over, rest]):
            assert same(read_answer(decoded(world, world.revise(problem, "over", seen, rng)), "number"), problem.gold)
        one_clue += same(read_answer(world.revise(problem, "over", [over], rng), "number"), problem.gold)
        two_clues += same(read_answer(world.revise(problem, "over", [over, kind], rng), "number"), problem.gold)
        assert not same(read_answer(world.spoil(problem, "rest", rng), "number"), problem.gold)
        asked = world.turn_prompt(problem, "rest")
        assert "over" not in asked and "kind" not in asked and " rest " in asked
    assert one_clue < 0.5 * len(problems) and two_clues < 0.6 * len(problems)


@pytest.mark.parametrize("name", WORLDS)
def test_agents_are_asked_with_what_they_may_see_and_the_bare_problem_names_none(name) -> None:
    world = WORLDS[name]
    problem = world.problems(1, 0, "test")[0]
    assert bare(problem) == f"Problem: {problem.question}\n\n"
    assert world.cast().ask(problem, 2, 1, ()).endswith(f"as {world.personas[1]}:")


def test_the_two_worlds_texts_look_as_they_are_meant_to() -> None:
    problem = WORLDS["two_sum"].problems(1, 0, "train")[0]
    numbers = problem.question.split(" sum ")[0].split()
    text = WORLDS["two_sum"].revise(problem, "max", [f"min \\boxed{{ {numbers[0]} {numbers[0]} }}"], random.Random(0))
    assert text.startswith(f"{numbers[0]} + {numbers[0]} out, ")
    assert " yes. max \\boxed{" in text
    steps = WORLDS["arithmetic"].write(WORLDS["arithmetic"].problems(1, 0, "train")[0], "steps", random.Random(0))
    assert steps.startswith("step 1: ")


def test_a_debate_of_one_round_in_arithmetic_has_111_tokens_for_every_question() -> None:
    """docs/training-settings.md, choice of the recipe."""
    world, rng = WORLDS["arithmetic"], random.Random(0)
    tokenizer = tokenizer_of(world)
    lengths = set()
    for problem in world.problems(200, 0, "train"):
        turns = [Turn(i, 1, world.write(problem, persona, rng)) for i, persona in enumerate(world.personas, 1)]
        trace = DebateTrace.of(problem.question, turns, consensus_text(problem.gold, True))
        lengths.add(len(encode(tokenizer, trace.body)) + 1)  # the end token
    assert lengths == {111}
