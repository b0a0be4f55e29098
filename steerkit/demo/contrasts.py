"""The demo's vectors: for each persona one vector per source, each with its shuffled-label controls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steerkit.capture.activations import EMBED, Activations
from steerkit.capture.collect import collect, collect_each
from steerkit.demo.questions import (
    PERSONAS,
    PLAIN,
    Question,
    answer_pairs,
    answer_texts,
    instruction_pairs,
    instruction_texts,
)
from steerkit.io.json import write_json
from steerkit.io.progress import line
from steerkit.io.tables import write_table
from steerkit.models.blocks import find_blocks
from steerkit.probes.probe import probe_layers
from steerkit.text.pairs import write_pairs
from steerkit.vectors import controls
from steerkit.vectors.extract import difference_in_means
from steerkit.vectors.vector import SteeringVector

Controlled = tuple[SteeringVector, list[SteeringVector]]
SOURCES = {
    "answers-mean": "contrast of answers, mean over the answer's tokens",
    "answers-last": "contrast of answers, last token of the answer",
    "instructions-last": "contrast of instructions, last token of the prompt",
}


def make_vectors(
    model: Any, tokenizer: Any, questions: Sequence[Question], out: Path, seed: int, n_shuffled: int
) -> dict[tuple[str, str], Controlled]:
    """`(persona, source) -> (vector, shuffled-label vectors)` at all layers, read from files if they exist.

    The first run also writes the contrast pairs and the tables of the linear probes.
    """
    folder = out / "vectors"
    names = [(persona, source) for persona in PERSONAS for source in SOURCES]
    if not (folder / "complete.json").exists():
        for name, (vector, shuffled) in _extract_vectors(model, tokenizer, questions, out, seed, n_shuffled).items():
            vector.save(folder / f"{'-'.join(name)}.safetensors")
            for number, control in enumerate(shuffled):
                control.save(folder / "shuffled" / f"{'-'.join(name)}-{number}.safetensors")
        write_json(folder / "complete.json", {"vectors": len(names), "shuffled_each": n_shuffled})
    return {
        (persona, source): (
            SteeringVector.load(folder / f"{persona}-{source}.safetensors"),
            [
                SteeringVector.load(folder / "shuffled" / f"{persona}-{source}-{number}.safetensors")
                for number in range(n_shuffled)
            ],
        )
        for persona, source in names
    }


def _extract_vectors(
    model: Any, tokenizer: Any, questions: Sequence[Question], out: Path, seed: int, n_shuffled: int
) -> dict[tuple[str, str], Controlled]:
    layers = [EMBED, *range(len(find_blocks(model)))]
    with line("reading the activations of answers and instructions"):
        answers = collect_each(model, tokenizer, answer_texts(questions), layers=layers, positions=["mean", "last"])
        asked = instruction_texts(tokenizer, questions)
        instructions = collect(model, tokenizer, asked, layers=layers, position="last")
    activations_of = {
        "answers-mean": answers["mean"],
        "answers-last": answers["last"],
        "instructions-last": instructions,
    }
    for source in ("answers-mean", "instructions-last"):
        with line(f"fitting linear probes ({source})"):
            probes = probe_layers(activations_of[source], seed=seed)
        path = out / "tables" / f"probes-{source}.csv"
        table = probes.table.assign(weights=activations_of[source].meta["weights"])
        write_table(path, table, {**activations_of[source].meta, **probes.meta})
    for persona in PERSONAS:
        write_pairs(out / "pairs" / f"{persona}-answers.jsonl", answer_pairs(questions, persona))
        write_pairs(out / "pairs" / f"{persona}-instructions.jsonl", instruction_pairs(tokenizer, questions, persona))
    return {
        (persona, source): vector_and_shuffled(activations, persona, seed, n_shuffled)
        for persona in PERSONAS
        for source, activations in activations_of.items()
    }


def vector_and_shuffled(activations: Activations, persona: str, seed: int, n_shuffled: int) -> Controlled:
    """The difference in means of a persona's texts and the plain ones, and its shuffled-label controls."""
    kept = activations.where(activations.items["label"].isin([persona, PLAIN]))
    vector = difference_in_means(kept, persona, PLAIN)
    return vector, list(controls.shuffled({persona: vector}, kept, n=n_shuffled, seed=seed).values())
