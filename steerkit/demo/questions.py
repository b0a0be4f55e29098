"""The demo's data: everyday questions, each answered plainly and in the manner of three personas."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerkit.text.pairs import ContrastPair
from steerkit.text.prompt import Rendered, render
from steerkit.text.spans import SpannedText

FILE = Path(__file__).with_name("questions.jsonl")
PERSONAS = {"steps": "numbered steps", "critique": "self-critique", "program": "program of thought"}
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
        """The chat prompt, with its system prompt stated, and an instruction after the question if wanted."""
        text = f"{self.question} {instruction}".rstrip()
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def read_questions() -> list[Question]:
    """All questions, in an order that is shuffled by their ids and the same everywhere."""
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    questions = [
        Question(row["id"], row["topic"], row["question"], row["answer"], {k: row[k] for k in (PLAIN, *PERSONAS)})
        for row in rows
    ]
    return sorted(questions, key=lambda q: hashlib.sha256(q.id.encode()).digest())


def split(questions: Sequence[Question], sizes: dict[str, int]) -> dict[str, list[Question]]:
    """Disjoint parts of the questions by name and size, in order.

    Raises:
        ValueError: there are fewer questions than the sizes add up to.
    """
    if sum(sizes.values()) > len(questions):
        raise ValueError(f"expected sizes that add up to at most {len(questions)} questions; got {sizes}.")
    parts, at = {}, 0
    for name, size in sizes.items():
        parts[name] = list(questions[at : at + size])
        at += size
    return parts


def answer_texts(tokenizer: Any, questions: Sequence[Question]) -> list[SpannedText]:
    """Each question with each of its answers; the span is the answer, the label its manner, the group the question."""
    texts = []
    for question in questions:
        prompt = render(tokenizer, question.messages())
        for manner, answer in question.answers.items():
            span = (len(prompt), len(prompt) + len(answer))
            texts.append(SpannedText(Rendered(prompt + answer), (span,), (manner,), question.id))
    return texts


def answer_pairs(questions: Sequence[Question], persona: str) -> list[ContrastPair]:
    """Contrast of answers: the same prompt, answered in the persona's manner (positive) and plainly (negative)."""
    return [ContrastPair(tuple(q.messages()), q.answers[persona], q.answers[PLAIN], q.id) for q in questions]


def instruction_texts(tokenizer: Any, questions: Sequence[Question]) -> list[SpannedText]:
    """Each question followed by each instruction; the span is what stands after the question, to the prompt's end.

    Its last token is where the model begins to answer: the position that decides how.
    """
    texts = []
    for question in questions:
        for manner, instruction in INSTRUCTIONS.items():
            text = render(tokenizer, question.messages(instruction))
            start = text.index(question.question) + len(question.question)
            texts.append(SpannedText(Rendered(text), ((start, len(text)),), (manner,), question.id))
    return texts


def instruction_pairs(tokenizer: Any, questions: Sequence[Question], persona: str) -> list[ContrastPair]:
    """Contrast of instructions: the same question, followed by the persona's instruction or the plain one."""
    by_manner: dict[str, list[SpannedText]] = {}
    for text in instruction_texts(tokenizer, questions):
        by_manner.setdefault(text.labels[0], []).append(text)
    return [
        ContrastPair(Rendered(p.text[: p.spans[0][0]]), p.text[p.spans[0][0] :], n.text[n.spans[0][0] :], p.group)
        for p, n in zip(by_manner[persona], by_manner[PLAIN], strict=True)
    ]
