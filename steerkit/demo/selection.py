"""The demo's choices, made on validation questions alone: source, layer and extent first, then the coefficient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steerkit.capture.activations import Layer
from steerkit.demo.questions import PERSONAS, Question
from steerkit.demo.traits import TRAITS
from steerkit.io.json import write_json
from steerkit.io.tables import write_table
from steerkit.sweeps.result import SweepResult
from steerkit.sweeps.sweep import sweep
from steerkit.vectors import controls
from steerkit.vectors.controls import with_role
from steerkit.vectors.vector import SteeringVector

EVERY, FIRST_FOUR = "from_last_prompt_token", "from_last_prompt_token:4"
DEPTHS = {
    "answers-mean": (0.35, 0.5, 0.65),
    "answers-last": (0.35, 0.5, 0.65),
    "instructions-last": (0.6, 0.67, 0.74, 0.8),
}
EXTENTS = {"answers-mean": (EVERY,), "answers-last": (EVERY,), "instructions-last": (EVERY, FIRST_FOUR)}
REPETITION_ROOM, PERPLEXITY_ROOM = 0.10, 2.0
MORE_RANDOM = r"/random-[1-9]"
Vectors = Mapping[tuple[str, str], tuple[SteeringVector, SteeringVector]]


@dataclass(frozen=True)
class Choice:
    """What was frozen on validation for one persona.

    Args:
        persona: whose.
        source: contrast and read position, a key of `SOURCES`.
        layer: where the vector is read and added.
        positions: which positions are steered.
        coefficient: how strongly; multiplies the raw difference in means.
        fluent: whether any coefficient kept the text near the unsteered one; if not, the smallest was taken.
        tried: how many settings were compared.
    """

    persona: str
    source: str
    layer: int
    positions: str
    coefficient: float
    fluent: bool
    tried: int


def prompt_rows(questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Sweep rows of the questions, with every manner's answer as a column."""
    return [
        {"id": q.id, "prompt": q.messages(), "topic": q.topic, **{f"answer_{k}": v for k, v in q.answers.items()}}
        for q in questions
    ]


def scored(result: SweepResult, model: Any, tokenizer: Any, perplexity: bool = True) -> SweepResult:
    """The rows with trait, ROUGE-L against the persona's own answer, repetition and distance, and perplexity.

    A vector's name begins with its persona; an unsteered row is scored as the persona under whose vector it stands.
    Perplexity costs a forward per row: of several random directions only the first has it, the others are NaN.
    """
    persona = result.table["vector"].str.partition("/")[0]
    references = [row[f"answer_{name}"] for name, (_, row) in zip(persona, result.table.iterrows(), strict=True)]
    table = result.table.assign(persona=persona, reference=references)
    result = SweepResult(table.drop(columns=[c for c in table if c.startswith("answer_")]), result.meta)
    result = result.score(lambda row: TRAITS[row["persona"]](row["text"]), column="trait")
    for name in ("rouge_l", "rouge_l_symbols", "distance", "repeated_4grams", "distinct_2"):
        result = result.score(name)
    if not perplexity:
        return result
    of = ~result.table["vector"].str.contains(MORE_RANDOM)
    part = SweepResult(result.table[of], result.meta).score("perplexity", model=model, tokenizer=tokenizer)
    return SweepResult(result.table.assign(perplexity=part.table["perplexity"]), result.meta)


def near_unsteered(table: pd.DataFrame) -> pd.Series:
    """Whether repetition and perplexity stay near the unsteered text, per coefficient of one vector's rows.

    Repetition (share of repeated 4-grams) may rise by 0.10; the geometric mean of the perplexity may double.
    """
    by = table.groupby("coefficient")
    repetition = by["repeated_4grams"].mean()
    fine = repetition <= repetition[0.0] + REPETITION_ROOM
    if "perplexity" in table:
        log = np.log(table["perplexity"]).groupby(table["coefficient"]).mean()
        fine &= log <= log[0.0] + np.log(PERPLEXITY_ROOM)
    return fine & repetition.notna()


def choose(
    model: Any, tokenizer: Any, vectors: Vectors, parts: Mapping[str, Sequence[Question]], settings: Any, out: Path
) -> tuple[dict[str, Choice], SweepResult, dict[Layer, float]]:
    """Freeze everything on validation; returns the choices, the scored dose sweep, and the stream's norms."""
    places, norms = _choose_places(model, tokenizer, vectors, parts["choose"], settings, out)
    parts_of: dict[str, dict[str, SteeringVector]] = {}
    for persona, (source, layer, positions, _) in places.items():
        vector, shuffled = (v.at(layer) for v in vectors[persona, source])
        named = {persona: vector, **controls.random({persona: vector}, n=1)}
        named[f"{persona}/shuffled"] = with_role(shuffled, "shuffled", of=persona)
        parts_of.setdefault(positions, {}).update(named)
    tables = []
    for number, (positions, named) in enumerate(sorted(parts_of.items())):
        result = sweep(
            model, tokenizer, named, prompt_rows(parts["dose"]), coefficients=settings.coefficients,
            positions=positions, max_new_tokens=settings.max_new_tokens, seed=settings.seed, stream_norms=norms,
            out=out / "validation" / f"dose-{number}",
        )  # fmt: skip
        tables.append(result)
    dose = SweepResult(pd.concat([r.table for r in tables], ignore_index=True), tables[0].meta)
    path = out / "tables" / "validation.parquet"
    dose = SweepResult.load(path) if path.exists() else scored(dose, model, tokenizer)
    dose.save(path)
    choices = {persona: _choose_dose(persona, place, dose) for persona, place in places.items()}
    write_json(out / "choice.json", {name: asdict(choice) for name, choice in choices.items()})
    return choices, dose, norms


def _choose_places(
    model: Any, tokenizer: Any, vectors: Vectors, questions: Sequence[Question], settings: Any, out: Path
) -> tuple[dict[str, tuple[str, int, str, int]], dict[Layer, float]]:
    """Per persona source, layer and extent: the highest mean trait among settings that do not repeat themselves."""
    depth = len(next(iter(vectors.values()))[0].layers)
    tables, norms = [], dict[Layer, float]()
    for positions in (EVERY, FIRST_FOUR):
        named = {
            f"{persona}/{source}/{layer}": vector.at(layer)
            for (persona, source), (vector, _) in vectors.items()
            if positions in EXTENTS[source]
            for layer in sorted({round(share * depth) for share in DEPTHS[source]})
        }
        result = sweep(
            model, tokenizer, named, prompt_rows(questions), coefficients=settings.first_coefficients,
            positions=positions, max_new_tokens=settings.max_new_tokens, seed=settings.seed,
            out=out / "validation" / f"place-{'all' if positions == EVERY else 'first'}",
        )  # fmt: skip
        norms |= {int(layer): norm for layer, norm in result.meta["stream_norms"].items()}
        tables.append(scored(result, model, tokenizer, perplexity=False).table)
    table = pd.concat(tables, ignore_index=True)
    write_table(out / "tables" / "places.parquet", table, {"kind": "validation, places"})
    rows = []
    for (positions, name), part in table.groupby(["positions", "vector"], sort=False):
        fine = near_unsteered(part)
        for coefficient, group in part[part["coefficient"] != 0].groupby("coefficient"):
            persona, source, layer = name.split("/")
            rows.append(
                (persona, source, int(layer), positions, coefficient, group["trait"].mean(), bool(fine[coefficient]))
            )
    grid = pd.DataFrame(rows, columns=["persona", "source", "layer", "positions", "coefficient", "trait", "fluent"])
    about = {"kind": "validation, places", "n_prompts": len(questions)}
    write_table(out / "tables" / "places.csv", grid.assign(weights=table["weights"].iloc[0]), about)
    best = {}
    for persona in PERSONAS:
        mine = grid[grid["persona"] == persona]
        ranked = mine.sort_values(["fluent", "trait", "coefficient"], ascending=[False, False, True], kind="stable")
        top = ranked.iloc[0]
        best[persona] = (str(top["source"]), int(top["layer"]), str(top["positions"]), len(mine))
    return best, norms


def _choose_dose(persona: str, place: tuple[str, int, str, int], dose: SweepResult) -> Choice:
    """The coefficient with the highest mean trait among the fluent ones, the smallest on a tie; 0 is no choice."""
    source, layer, positions, tried = place
    mine = dose.table[dose.table["vector"] == persona]
    fine = near_unsteered(mine)
    trait = mine.groupby("coefficient")["trait"].mean()
    allowed = [c for c in trait.index if c > 0 and fine[c]]
    fluent = bool(allowed)
    best = min(allowed, key=lambda c: (-trait[c], c)) if fluent else min(c for c in trait.index if c > 0)
    return Choice(persona, source, layer, positions, float(best), fluent, tried + len(trait) - 1)
