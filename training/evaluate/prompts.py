"""Prompts of the benchmarks: a plain prompt and three agents, with the form of the answer for each task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from steerkit.text.prompt import PromptLike
from steerkit.text.traces import Turn
from training.debates.debate import Call, Template
from training.debates.personas import CRITIQUE, FORMAT, PLAIN, PROGRAM, STEPS, Cast, Persona, chat_prompt
from training.problems.answers import read_answer
from training.problems.problem import Problem

WORDS = {
    "bbh/formal_fallacies": ("valid", "invalid"),
    "bbh/causal_judgement": ("Yes", "No"),
    "bbh/web_of_lies": ("Yes", "No"),
}
"""The gold answers of a task whose answers are words."""
FORMS = {
    "number": "End with the final answer as \\boxed{number}, without a unit.",
    "option": "End with the letter of the right option as \\boxed{letter}, only the letter.",
}
CODE = Persona(
    PROGRAM.system,
    "Write the solution as code: one variable per intermediate result, each with a // comment. The code is not run. "
    "After the code, work out its result in words.",
)
AGENTS = (STEPS, CRITIQUE, CODE)


def form_of(problem: Problem) -> str:
    """Return the instruction on how to give the answer; it names the allowed words of a task in `WORDS`."""
    if words := WORDS.get(problem.family):
        first, second = (f"\\boxed{{{word}}}" for word in words)
        return f"End with the final answer as {first} or {second}."
    return FORMS.get(problem.kind, FORMAT[problem.kind])


def plain(problem: Problem) -> PromptLike:
    """Return the messages of a single answer: solve the problem step by step, then give the answer."""
    asked = f"Problem: {_question(problem)}\n\nSolve the problem step by step. Then give the answer. {form_of(problem)}"
    return [{"role": "system", "content": PLAIN}, {"role": "user", "content": asked}]


def read_finished(problem: Problem, call: Call, template: Template) -> str | None:
    """Return the answer in the last box that can be read; None for a failed or cut call, and for a word not allowed.

    The words that are allowed are those of the task in `WORDS`.
    """
    if call.text is None or not call.finished:
        return None
    answer = read_answer(call.text, problem.kind, "readable", bool(template.opens_thinking))
    words = WORDS.get(problem.family)
    return None if words and answer not in {word.lower() for word in words} else answer


def _ask(problem: Problem, agent: int, number: int, turns: Sequence[Turn]) -> PromptLike:
    asked = replace(problem, question=_question(problem))
    return chat_prompt(AGENTS[agent - 1], asked, agent, number, turns, form_of(problem))


def _question(problem: Problem) -> str:
    """The question without the word `Question:`, with which some of BBH's begin."""
    return problem.question.removeprefix("Question:").strip()


DEBATERS = Cast("benchmark", AGENTS, _ask)
"""The paper's three ways of solving a problem. An agent that writes code gives its answer after the code."""
