"""Persona vectors: a trait from instructions, a layer from validation questions, the effect from test questions.

Texts, sweeps and the judge's answers are in the run folder, so that a killed call resumes; so is the vector, in
`trait.safetensors`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import steerkit as sk
from analysis.published import published
from steerkit.io.json import read_json, write_json
from steerkit.io.run_folder import run_folder
from steerkit.io.tables import write_table
from steerkit.models.blocks import find_blocks
from steerkit.models.identity import describe, fingerprint
from steerkit.scores.judge import Judge
from steerkit.stats.areas import roc_auc
from steerkit.stats.mean import Interval, mean_interval
from steerkit.sweeps.result import SweepResult

TRAIT = Path(__file__).with_name("cheerful_trait.json")
SIDES = ("positive", "negative")
COEFFICIENTS = (-2.0, -1.0, 1.0, 2.0)
Trait = Mapping[str, Any]


def ask(question: str, instruction: str | None = None) -> list[dict[str, str]]:
    """A chat of a question, with the instruction as its system message."""
    system = [] if instruction is None else [{"role": "system", "content": instruction}]
    return [*system, {"role": "user", "content": question}]


def instructed(trait: Trait, part: str) -> list[dict[str, Any]]:
    """Rows of `label`, `question` and `prompt`: each question of a part under its instructions of both sides.

    Every other instruction, the first one included, is for the part `read`. The others are for `test`, so that what is
    tested is not the wording that the vector was read from.
    """
    uses = slice(0, None, 2) if part == "read" else slice(1, None, 2)
    return [
        {"label": side, "question": question, "prompt": ask(question, instruction)}
        for side in SIDES
        for instruction in trait[side][uses]
        for question in trait[part]
    ]


def told_apart(rows: Sequence[Mapping[str, Any]], projections: Sequence[float]) -> Interval:
    """How often a prompt with a positive instruction has a larger projection than one with a negative instruction.

    The area under the ROC curve of each question's prompts, with the interval of its mean over questions.
    """
    table = pd.DataFrame(rows, columns=["label", "question"]).assign(projection=list(projections))
    areas = [roc_auc(part["label"] == "positive", part["projection"]) for _, part in table.groupby("question")]
    return mean_interval(areas)


def measure_persona(
    model: Any,
    tokenizer: Any,
    trait: Trait,
    judge: Judge,
    out: Path,
    *,
    layers: Sequence[int],
    coefficients: Sequence[float] = COEFFICIENTS,
    n_random: int = 19,
    max_new_tokens: int = 48,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Measure one trait.

    Args:
        trait: `positive` and `negative` instructions, and the questions `read`, `validation` and `test`.
        judge: rates the trait in a text.
        out: folder of the run; the vector is written to `trait.safetensors` in it.
        layers: the layers of which the validation questions choose one, by the gain at the largest coefficient.

    Returns:
        Gains on the test questions (score `judge` or `repeated_4grams`, coefficient, over, gain, low, high, p, p_rank,
        n, k, unsteered, `wrong_way`: share of questions whose score falls as the coefficient grows); and facts: n_read
        and n_kept (texts for the vector, and those that follow their instruction), layer, and `monitoring_auc` with
        `monitoring_low` and `monitoring_high`: how well the projection at the end of the prompt tells positive from
        negative instructions, on the test questions and on instructions that the vector was not read from (see
        `told_apart`; None where a side has one instruction).

    Raises:
        ValueError: no text of a side follows its instruction, so that there is no vector: not testable on this model.
    """
    about = {"trait": dict(trait), "model": fingerprint(model), "max_new_tokens": max_new_tokens}
    read = instructed(trait, "read")
    with run_folder(out, about) as folder:
        file = folder / "texts.json"
        if not file.exists():
            prompts = [row["prompt"] for row in read]
            write_json(file, sk.generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens))
    texts = read_json(file)
    middle = sum(judge.scale) / 2
    scored = list(zip(read, texts, judge.scores(texts), strict=True))
    kept = [
        (row, text)
        for row, text, score in scored
        if text and (score > middle if row["label"] == "positive" else score < middle)
    ]
    counts = {side: sum(row["label"] == side for row, _ in kept) for side in SIDES}
    if not all(counts.values()):
        raise ValueError(
            f"expected texts of both sides that follow their instruction; got {counts} of {len(read)}. The trait is "
            "not testable on this model with this judge: use another."
        )
    if not (out / "trait.safetensors").is_file():  # another number of threads would round otherwise
        spans = [sk.SpannedText(text, ((0, len(text)),), (row["label"],), prompt=row["prompt"]) for row, text in kept]
        read_vector = sk.difference_in_means(sk.collect(model, tokenizer, spans, position="mean"))
        read_vector.save(out / "trait.safetensors")
    vectors = {"trait": sk.SteeringVector.load(out / "trait.safetensors")}
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    validation, test = ([ask(question) for question in trait[part]] for part in ("validation", "test"))
    chosen = sk.sweep(
        model,
        tokenizer,
        vectors,
        validation,
        layers=list(layers),
        coefficients=max(coefficients),
        out=out / "chosen",
        **how,
    ).score(judge)
    layer = int(chosen.gain("judge").nlargest(1, "gain")["layer"].item())
    vectors |= sk.controls.random(vectors, n=n_random)
    swept = (
        sk.sweep(
            model, tokenizer, vectors, test, layers=layer, coefficients=list(coefficients), out=out / "test", **how
        )
        .score(judge)
        .score("repeated_4grams")
    )
    gains = pd.concat([_gains(swept, score) for score in ("judge", "repeated_4grams")])
    rows = instructed(trait, "test") if min(len(trait[side]) for side in SIDES) > 1 else []
    area: dict[str, float | None] = {"monitoring_auc": None, "monitoring_low": None, "monitoring_high": None}
    if rows:
        seen = sk.project(model, tokenizer, [row["prompt"] for row in rows], {"trait": vectors["trait"].at(layer)})
        found = told_apart(rows, seen[seen["prompt_end"]].sort_values("text")["after"].tolist())
        area = {"monitoring_auc": found.mean, "monitoring_low": found.low, "monitoring_high": found.high}
    facts = {
        "n_read": len(read), "n_kept": len(kept), "layer": layer, **area,
        "n_unread": swept.meta["judges"]["judge"]["n_unread"], "n_texts": swept.meta["judges"]["judge"]["n_texts"],
    }  # fmt: skip
    return gains.drop(columns="vector").reset_index(drop=True), facts


def _gains(swept: SweepResult, score: str) -> pd.DataFrame:
    """`SweepResult.gains` with the unsteered mean, and for the judge the share of questions that move the wrong way."""
    own = swept.where(swept.table["vector"] == "trait")
    about = {
        "score": score,
        "unsteered": own.table[own.table["coefficient"] == 0][score].mean(),
        "wrong_way": own.wrong_way(score)["share"].item() if score == "judge" else np.nan,
    }
    return swept.gains(score).assign(**about)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis persona", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="folder, GGUF file or hub name; a chat model")
    parser.add_argument("--judge-url", required=True, help="OpenAI-compatible server that rates the texts")
    parser.add_argument("--judge-model", required=True, help="name of its model")
    parser.add_argument("--trait", type=Path, default=TRAIT, help="JSON of a trait; default cheerfulness")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; the same call resumes it")
    parser.add_argument("--results", type=Path, help="folder for the table, such as results/recipes/persona-smollm2")
    parser.add_argument("--every", type=int, default=3, help="try every N-th layer")
    given = parser.parse_args(arguments)
    if given.every < 1:
        parser.error(f"expected a step of at least one layer; got --every {given.every}. Pass e.g. 3.")
    trait = read_json(given.trait)
    expected = ("rubric", *SIDES, "read", "validation", "test")
    if missing := [key for key in expected if not trait.get(key)]:
        parser.error(f"expected a trait with {list(expected)}; missing in {given.trait}: {missing}. Add them.")
    judge = sk.judge(given.judge_url, given.judge_model, trait["rubric"], cache=given.out / "judge.jsonl")
    model, tokenizer = sk.load(given.checkpoint)
    layers = list(range(given.every // 2, len(find_blocks(model)), given.every))
    gains, facts = measure_persona(model, tokenizer, trait, judge, given.out, layers=layers)
    about = {**published(describe(model, tokenizer)), "trait": trait, "judge": judge.about(), **facts}
    write_table((given.results or given.out) / "gains.csv", gains, about)
    print(gains.to_string(index=False), facts, sep="\n\n")
