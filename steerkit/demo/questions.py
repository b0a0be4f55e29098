"""The demo's data: everyday questions, each with a plain answer and one in the style of each of three personas."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerkit.demo.traits import PERSONAS
from steerkit.text.pairs import ContrastPair
from steerkit.text.prompt import Prompt, render
from steerkit.text.spans import SpannedText
from steerkit.text.tokens import encode

FILE = Path(__file__).with_name("questions.jsonl")
PLAIN = "plain"
SYSTEM = "You are a helpful assistant."
INSTRUCTIONS = {
    "plain": "Answer in one short paragraph.",
    "steps": "Answer as a numbered list of steps.",
    "critique": "Be critical: question your own answer and check it for mistakes.",
    "program": "Write a program in JavaScript that computes the answer, with // comments.",
}


@dataclass(frozen=True)
class Question:
    """One question and its four answers, all with the same result: `plain`, `steps`, `critique`, `program`."""

    id: str
    topic: str
    question: str
    answer: str
    answers: dict[str, str]

    def messages(self, instruction: str = "") -> list[dict[str, str]]:
        """The chat prompt with its system prompt, and optionally an instruction after the question."""
        text = f"{self.question} {instruction}".rstrip()
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def read_questions() -> list[Question]:
    """All questions, ordered by the hash of their ids."""
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    questions = [
        Question(
            row["id"], row["topic"], row["question"], row["answer"], {style: row[style] for style in (PLAIN, *PERSONAS)}
        )
        for row in rows
    ]
    return sorted(questions, key=lambda question: hashlib.sha256(question.id.encode()).digest())


def split(questions: Sequence[Question], sizes: dict[str, int]) -> dict[str, list[Question]]:
    """Split the questions in their order into disjoint parts of given sizes.

    Raises:
        ValueError: there are fewer questions than the sizes add up to.
    """
    if sum(sizes.values()) > len(questions):
        raise ValueError(f"expected sizes that add up to at most {len(questions)} questions; got {sizes}. Reduce them.")
    parts = {}
    start = 0
    for name, size in sizes.items():
        parts[name] = list(questions[start : start + size])
        start += size
    return parts


def answer_texts(questions: Sequence[Question]) -> list[SpannedText]:
    """Each question with each of its answers; the span is the answer, the label its style, the group the question."""
    texts = []
    for question in questions:
        for style, answer in question.answers.items():
            span = (0, len(answer))
            texts.append(SpannedText(answer, (span,), (style,), question.id, prompt=question.messages()))
    return texts


def answer_pairs(questions: Sequence[Question], persona: str) -> list[ContrastPair]:
    """Pairs of answers to the same prompt: in the persona's style (positive) and plain (negative)."""
    return [ContrastPair(tuple(q.messages()), q.answers[persona], q.answers[PLAIN], q.id) for q in questions]


def instruction_texts(tokenizer: Any, questions: Sequence[Question]) -> list[SpannedText]:
    """Each question followed by each instruction; the span is the text after the question, to the prompt's end.

    The last token of the span is the position that decides the first token of the answer.
    """
    texts = []
    for question in questions:
        for style, instruction in INSTRUCTIONS.items():
            prompt = render(tokenizer, question.messages(instruction))
            start = prompt.text.index(question.question) + len(question.question)
            texts.append(SpannedText(prompt, ((start, len(prompt.text)),), (style,), question.id))
    return texts


def instruction_pairs(tokenizer: Any, questions: Sequence[Question], persona: str) -> list[ContrastPair]:
    """Pairs of instructions after the same question: the persona's (positive) and the plain one (negative)."""
    by_style: dict[str, list[SpannedText]] = {}
    for text in instruction_texts(tokenizer, questions):
        by_style.setdefault(text.labels[0], []).append(text)
    return [
        _instruction_pair(tokenizer, positive, negative)
        for positive, negative in zip(by_style[persona], by_style[PLAIN], strict=True)
    ]


def _instruction_pair(tokenizer: Any, positive: SpannedText, negative: SpannedText) -> ContrastPair:
    """Two texts that agree up to their spans, as a pair: the common part is the prompt, the spans the continuations."""
    start = positive.spans[0][0]
    shared, rest = str(positive.text)[:start], str(positive.text)[start:]
    prompt = Prompt(encode(tokenizer, shared), shared, "chat")
    return ContrastPair(prompt, rest, str(negative.text)[negative.spans[0][0] :], positive.group)
