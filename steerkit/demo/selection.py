"""The demo's choices on validation questions: first source, layer and positions, then the coefficient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steerkit.capture.activations import Layer
from steerkit.demo.questions import Question
from steerkit.demo.traits import PERSONAS, TRAITS, has_answer
from steerkit.io.json import write_json
from steerkit.io.tables import write_table
from steerkit.sweeps.result import SweepResult
from steerkit.sweeps.sweep import sweep
from steerkit.vectors import controls
from steerkit.vectors.vector import SteeringVector

EVERY, FIRST_FOUR = "from_last_prompt_token", "from_last_prompt_token:4"
DEPTHS = {
    "answers-mean": (0.35, 0.5, 0.65),
    "answers-last": (0.35, 0.5, 0.65),
    "instructions-last": (0.6, 0.67, 0.74, 0.8),
}
EXTENTS = {"answers-mean": (EVERY,), "answers-last": (EVERY,), "instructions-last": (EVERY, FIRST_FOUR)}
MAX_REPETITION_RISE = 0.10
MAX_PERPLEXITY_RATIO = 2.0
Vectors = Mapping[tuple[str, str], tuple[SteeringVector, list[SteeringVector]]]


@dataclass(frozen=True)
class Choice:
    """The settings chosen on validation for one persona.

    Args:
        persona: name of the persona.
        source: contrast and read position, a key of `SOURCES`.
        layer: layer where the vector is read and added.
        positions: steered positions.
        coefficient: multiplies the difference in means as extracted.
        fluent: whether any coefficient kept the text fluent (`near_unsteered`); if not, the smallest is chosen.
        tried: number of settings compared.
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
        {
            "id": q.id,
            "prompt": q.messages(),
            "topic": q.topic,
            "answer": q.answer,
            **{f"answer_{k}": v for k, v in q.answers.items()},
        }
        for q in questions
    ]


def scored(result: SweepResult, model: Any, tokenizer: Any, perplexity: bool = True) -> SweepResult:
    """Add trait, right answer, ROUGE-L against the persona's own answer, repetition, distance and perplexity.

    A vector's name begins with its persona; an unsteered row is scored for the persona of the vector that lists it.
    Perplexity costs a forward per row, so only the first control of each kind has it; others are NaN.
    """
    persona = result.table["vector"].str.partition("/")[0]
    references = [row[f"answer_{name}"] for name, (_, row) in zip(persona, result.table.iterrows(), strict=True)]
    table = result.table.assign(persona=persona, reference=references)
    result = SweepResult(table.drop(columns=[c for c in table if c.startswith("answer_")]), result.meta)
    result = result.score(lambda row: TRAITS[row["persona"]](row["text"]), column="trait")
    result = result.score(lambda row: has_answer(row["text"], row["answer"]), column="right")
    for name in ("rouge_l", "rouge_l_symbols", "distance", "repeated_4grams", "distinct_2"):
        result = result.score(name)
    if not perplexity:
        return result
    with_perplexity = ~result.table["vector"].isin(_further_controls(result))
    part = SweepResult(result.table[with_perplexity], result.meta).score("perplexity", model=model, tokenizer=tokenizer)
    return SweepResult(result.table.assign(perplexity=part.table["perplexity"]), result.meta)


def _further_controls(result: SweepResult) -> set[str]:
    """The names of all controls but the first of each kind and vector."""
    kinds: dict[tuple[str, str | None], list[str]] = {}
    for name, (role, control_of) in result.roles().items():
        if role != "vector":
            kinds.setdefault((role, control_of), []).append(name)
    return {name for names in kinds.values() for name in names[1:]}


def near_unsteered(table: pd.DataFrame) -> pd.Series:
    """Whether repetition and perplexity stay near the unsteered text, per coefficient of one vector's rows.

    The share of repeated 4-grams may rise by 0.10; the geometric mean of the perplexity may double.
    """
    repetition = table.groupby("coefficient")["repeated_4grams"].mean()
    is_fluent = repetition <= repetition[0.0] + MAX_REPETITION_RISE
    if "perplexity" in table:
        log_perplexity = np.log(table["perplexity"]).groupby(table["coefficient"]).mean()
        is_fluent &= log_perplexity <= log_perplexity[0.0] + np.log(MAX_PERPLEXITY_RATIO)
    return is_fluent & repetition.notna()


def choose(
    model: Any, tokenizer: Any, vectors: Vectors, parts: Mapping[str, Sequence[Question]], settings: Any, out: Path
) -> tuple[dict[str, Choice], SweepResult, dict[str, dict[Layer, float]]]:
    """Choose all settings on validation; returns the choices, the scored dose sweep and the norms of the stream."""
    settings_of, norms = _choose_sources(model, tokenizer, vectors, parts["choose"], settings, out)
    vectors_at: dict[str, dict[str, SteeringVector]] = {}
    for persona, (source, layer, positions, _) in settings_of.items():
        vector, shuffled = (vectors[persona, source][0].at(layer), vectors[persona, source][1][0].at(layer))
        named = {persona: vector, **controls.random({persona: vector}, n=1), f"{persona}/shuffled-0": shuffled}
        vectors_at.setdefault(positions, {}).update(named)
    tables = []
    for number, (positions, named) in enumerate(sorted(vectors_at.items())):
        result = sweep(
            model,
            tokenizer,
            named,
            prompt_rows(parts["dose"]),
            coefficients=settings.coefficients,
            positions=positions,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            stream_norms=norms[positions],
            out=out / "validation" / f"dose-{number}",
        )
        tables.append(result)
    dose = SweepResult.merge(tables)
    path = out / "tables" / "validation.parquet"
    dose = SweepResult.load(path) if path.exists() else scored(dose, model, tokenizer)
    dose.save(path)
    choices = {persona: _choose_dose(persona, chosen, dose) for persona, chosen in settings_of.items()}
    write_json(out / "choice.json", {name: asdict(choice) for name, choice in choices.items()})
    return choices, dose, norms


def _choose_sources(
    model: Any, tokenizer: Any, vectors: Vectors, questions: Sequence[Question], settings: Any, out: Path
) -> tuple[dict[str, tuple[str, int, str, int]], dict[str, dict[Layer, float]]]:
    """Choose source, layer and positions per persona: the highest mean trait among settings without repetition.

    Returns:
        `persona -> (source, layer, positions, number of settings compared)`, and `positions -> layer -> norm` of the
        stream.
    """
    depth = len(next(iter(vectors.values()))[0].layers)
    tables, norms = [], dict[str, dict[Layer, float]]()
    for positions in (EVERY, FIRST_FOUR):
        named = {
            f"{persona}/{source}/{layer}": vector.at(layer)
            for (persona, source), (vector, _) in vectors.items()
            if positions in EXTENTS[source]
            for layer in sorted({round(share * depth) for share in DEPTHS[source]})
        }
        result = sweep(
            model,
            tokenizer,
            named,
            prompt_rows(questions),
            coefficients=settings.first_coefficients,
            positions=positions,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            out=out / "validation" / f"place-{'all' if positions == EVERY else 'first'}",
        )
        norms[positions] = {int(layer): norm for layer, norm in result.meta["stream_norms"].items()}
        tables.append(scored(result, model, tokenizer, perplexity=False).table)
    table = pd.concat(tables, ignore_index=True)
    write_table(out / "tables" / "places.parquet", table, {"kind": "validation, places"})
    rows = []
    for (positions, name), part in table.groupby(["positions", "vector"], sort=False):
        is_fluent = near_unsteered(part)
        for coefficient, group in part[part["coefficient"] != 0].groupby("coefficient"):
            persona, source, layer = name.split("/")
            rows.append(
                (
                    persona,
                    source,
                    int(layer),
                    positions,
                    coefficient,
                    group["trait"].mean(),
                    bool(is_fluent[coefficient]),
                )
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


def _choose_dose(persona: str, chosen: tuple[str, int, str, int], dose: SweepResult) -> Choice:
    """Choose the coefficient above 0 with the highest mean trait among the fluent ones; on a tie the smallest."""
    source, layer, positions, tried = chosen
    mine = dose.table[dose.table["vector"] == persona]
    is_fluent = near_unsteered(mine)
    trait = mine.groupby("coefficient")["trait"].mean()
    allowed = [c for c in trait.index if c > 0 and is_fluent[c]]
    fluent = bool(allowed)
    best = min(allowed, key=lambda c: (-trait[c], c)) if fluent else min(c for c in trait.index if c > 0)
    return Choice(persona, source, layer, positions, float(best), fluent, tried + len(trait) - 1)
