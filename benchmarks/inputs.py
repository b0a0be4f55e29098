"""Inputs of the benchmarks: the model that `make setup` installs, and texts and prompts from the demo's questions."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import steerkit as sk
from steerkit.demo.checkpoint import default_checkpoint
from steerkit.demo.questions import Question, answer_pairs, read_questions
from steerkit.demo.traits import PERSONAS
from steerkit.text.traces import DebateTrace, Turn

# Timed only: the means of whole texts are not used as vectors.
warnings.filterwarnings("ignore", "position='mean' includes position 0")


@functools.cache
def model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    return sk.load(default_checkpoint())


@functools.cache
def questions() -> tuple[Question, ...]:
    """The demo's questions with their answers."""
    return tuple(read_questions())


def texts(count: int, low: int = 20, high: int = 60) -> list[str]:
    """Texts of `low` to `high` tokens, cut from the demo's answers, lengths spread evenly."""
    _, tokenizer = model()
    answers = [answer for question in questions() for answer in question.answers.values()]
    ids = tokenizer("\n".join(answers), add_special_tokens=False)["input_ids"]
    pieces = []
    start = 0
    for number in range(count):
        length = low + (number * 37) % (high - low + 1)
        if start + length > len(ids):
            start = number % 17
        pieces.append(tokenizer.decode(ids[start : start + length]))
        start += length
    return pieces


def vector() -> sk.SteeringVector:
    """A difference in means of the first persona, all layers, from 16 contrast pairs."""
    loaded, tokenizer = model()
    persona = next(iter(PERSONAS))
    return sk.difference_in_means(
        sk.collect(loaded, tokenizer, answer_pairs(questions()[:16], persona), position="mean")
    )


def traces(count: int) -> list[DebateTrace]:
    """Two-round debates of three agents with six turns each, whose texts are the demo's answers."""
    debates = []
    for question in questions()[:count]:
        answers = [question.answers[persona] for persona in PERSONAS]
        turns = [Turn(a + 1, r, answers[(a + r - 1) % 3]) for r in (1, 2) for a in range(3)]
        debates.append(DebateTrace.of(question.question, turns, "A majority of agents converged on the solution"))
    return debates
