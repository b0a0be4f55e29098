"""The demo's vectors: for each persona three sources, each with its shuffled-label control."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
from steerkit.io.tables import write_table
from steerkit.models.blocks import find_blocks
from steerkit.probes.probe import probe_layers
from steerkit.text.pairs import write_pairs
from steerkit.vectors.extract import difference_in_means
from steerkit.vectors.vector import SteeringVector

SOURCES = {
    "answers-mean": "contrast of answers, mean over the answer's tokens",
    "answers-last": "contrast of answers, last token of the answer",
    "instructions-last": "contrast of instructions, last token of the prompt",
}


def make_vectors(
    model: Any, tokenizer: Any, questions: Sequence[Question], out: Path, seed: int
) -> dict[tuple[str, str], tuple[SteeringVector, SteeringVector]]:
    """`(persona, source) -> (vector, shuffled-label vector)` at all layers, read from files if they are there.

    The first run also writes the contrast pairs and the tables of the linear probes.
    """
    folder = out / "vectors"
    names = [(persona, source) for persona in PERSONAS for source in SOURCES]
    if not (folder / "complete.json").exists():
        for name, pair in _read_vectors(model, tokenizer, questions, out, seed).items():
            for vector, kind in zip(pair, ("", "-shuffled"), strict=True):
                vector.save(folder / f"{'-'.join(name)}{kind}.safetensors")
        write_json(folder / "complete.json", {"vectors": 2 * len(names)})
    return {
        (persona, source): (
            SteeringVector.load(folder / f"{persona}-{source}.safetensors"),
            SteeringVector.load(folder / f"{persona}-{source}-shuffled.safetensors"),
        )
        for persona, source in names
    }


def _read_vectors(
    model: Any, tokenizer: Any, questions: Sequence[Question], out: Path, seed: int
) -> dict[tuple[str, str], tuple[SteeringVector, SteeringVector]]:
    layers = [EMBED, *range(len(find_blocks(model)))]
    answers = collect_each(
        model, tokenizer, answer_texts(tokenizer, questions), layers=layers, positions=["mean", "last"]
    )
    instructions = collect(model, tokenizer, instruction_texts(tokenizer, questions), layers=layers, position="last")
    read = {"answers-mean": answers["mean"], "answers-last": answers["last"], "instructions-last": instructions}
    for source in ("answers-mean", "instructions-last"):
        probes = probe_layers(read[source], seed=seed)
        path = out / "tables" / f"probes-{source}.csv"
        table = probes.table.assign(weights=read[source].meta["weights"])
        write_table(path, table, {**read[source].meta, **probes.meta})
    for persona in PERSONAS:
        write_pairs(out / "pairs" / f"{persona}-answers.jsonl", answer_pairs(questions, persona))
        write_pairs(out / "pairs" / f"{persona}-instructions.jsonl", instruction_pairs(tokenizer, questions, persona))
    return {
        (persona, source): both(activations, persona, PLAIN, seed)
        for persona in PERSONAS
        for source, activations in read.items()
    }


def both(activations: Activations, positive: str, negative: str, seed: int) -> tuple[SteeringVector, SteeringVector]:
    """The difference in means, and the same with the labels shuffled, rescaled to the norm of the first.

    Shuffling swaps the two labels within a group (a question) with probability one half, in as near to half of the
    groups as their number allows: what is left of a difference is not the trait.
    """
    kept = activations.where(activations.items["label"].isin([positive, negative]))
    groups = sorted(kept.items["group"].unique())
    swapped = set(np.random.default_rng(seed).permutation(groups)[: len(groups) // 2])
    swap = {positive: negative, negative: positive}
    labels = [swap[a] if g in swapped else a for a, g in zip(kept.items["label"], kept.items["group"], strict=True)]
    shuffled = Activations(kept.resid, kept.layers, kept.items.assign(label=labels), kept.meta)
    vector = difference_in_means(kept, positive, negative)
    control = difference_in_means(shuffled, positive, negative)
    return vector, SteeringVector(control.scaled_to(vector).layers, {**vector.meta, "method": "shuffled_labels"})
