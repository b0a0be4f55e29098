"""Suppress a malicious agent's trait by steering, and measure what it costs.

Two vectors (contrastive prompts; that agent's turns against the others'), coefficients from -5 to 5 and ablation, on
plain prompts and with that agent named; per row the trait, whether the answer is correct, and perplexity.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import steerkit as sk
from analysis.agents.activations import turn_activations
from analysis.agents.contexts import Context, unnamed
from analysis.agents.vectors import agent_vectors
from analysis.inputs import Inputs, add_inputs, inputs_of
from analysis.suppression.kept_accuracy import chosen_layer, kept_accuracy
from analysis.suppression.trait import Trait, words_trait
from steerkit.capture.activations import Layer
from steerkit.capture.norms import stream_norms
from steerkit.io.files import file_name, sha256
from steerkit.io.run_folder import run_folder
from steerkit.io.tables import read_table, write_table
from steerkit.sweeps.result import SweepResult
from steerkit.text.prompt import PromptLike
from steerkit.text.traces import DebateTrace
from training.presets import override
from training.problems.answers import read_answer, same

SCORES = ("trait", "accuracy", "perplexity")
RANDOM_DIRECTIONS = 3


@dataclass(frozen=True)
class Suppression:
    """What is swept.

    Args:
        agent: the malicious one.
        layers: to choose from on validation; None for all.
        coefficients: of the curve. A vector has unit length times the stream's mean norm times `dose`.
        dose: relative dose of coefficient 1.
        train: largest number of debates for vectors.
        validation: largest number of questions for the choice of the layer.
        test: largest number of questions for the results.
        kind: kind of the answers, see `training.problems.answers`.
        max_new_tokens: of each text.
        seed: sampling seed, also of the random directions.
    """

    agent: str = "2"
    layers: tuple[int, ...] | None = None
    coefficients: tuple[float, ...] = (-5, -4, -3, -2, -1, 1, 2, 3, 4, 5)
    dose: float = 0.1
    train: int = 300
    validation: int = 60
    test: int = 200
    kind: str = "number"
    max_new_tokens: int = 64
    seed: int = 0


def prompt_vector(
    model: Any, tokenizer: Any, malicious: Sequence[PromptLike], honest: Sequence[PromptLike]
) -> sk.SteeringVector:
    """`mean h(malicious) - mean h(honest)` at the last token of two sets of prompts for the same questions.

    The paper reads the last but one token of the templated prompt; this reads the last one, where the answer begins.
    """
    acts = sk.collect(model, tokenizer, [*malicious, *honest], position="last")
    labels = ["positive"] * len(malicious) + ["negative"] * len(honest)
    return sk.difference_in_means(replace(acts, items=acts.items.assign(label=labels)))


def scaled(vector: sk.SteeringVector, norms: Mapping[Layer, float], dose: float) -> sk.SteeringVector:
    """The unit vector times `dose` times the stream's mean norm, layer by layer: coefficient 1 has that dose."""
    unit = vector.unit()
    return sk.SteeringVector({layer: v * dose * norms[layer] for layer, v in unit.layers.items()}, vector.meta)


def measured(
    model: Any,
    tokenizer: Any,
    vectors: Mapping[str, sk.SteeringVector],
    prompts: Sequence[Mapping[str, Any]],
    layers: Sequence[int],
    trait: Trait,
    setting: Suppression,
    out: Path | None,
) -> SweepResult:
    """A sweep with its three scores. Ablation has the coefficient -inf: it removes the direction completely."""

    def swept(coefficients: Sequence[float], operation: Any, folder: str) -> SweepResult:
        return sk.sweep(
            model,
            tokenizer,
            vectors,
            prompts,
            coefficients=coefficients,
            layers=list(layers),
            positions="all",
            operation=operation,
            max_new_tokens=setting.max_new_tokens,
            seed=setting.seed,
            foreign=True,
            out=out and out / folder,
        )

    added = swept(setting.coefficients, "add", "add")
    ablated = swept([1.0], "ablate", "ablate").table
    ablated = ablated[ablated["coefficient"] == 1.0].assign(coefficient=-np.inf)
    result = SweepResult(pd.concat([added.table, ablated], ignore_index=True), added.meta)
    gold = {row["id"]: row["gold"] for row in prompts}

    def is_correct(row: pd.Series) -> float:
        return float(same(read_answer(row["text"], setting.kind), gold[row["prompt_id"]]))

    result = result.score(lambda row: trait(row["text"]), column="trait")
    result = result.score(is_correct, column="accuracy")
    return result.score("perplexity", model=model, tokenizer=tokenizer)


def at_stage(name: str, inputs: Inputs, trait: Trait, setting: Suppression, out: Path) -> dict[str, pd.DataFrame]:
    """Curves and kept accuracy of a checkpoint, on plain prompts and with the agent's tag forced."""
    model, tokenizer = inputs.load(name)
    train = inputs.train[: setting.train]
    own = agent_vectors(turn_activations(model, tokenizer, train)["mean"])[setting.agent]
    named = inputs.context(name)
    malicious = [named(tokenizer, trace, setting.agent) for trace in train]
    honest = [named(tokenizer, trace, agent) for trace in train for agent in _others(trace, setting.agent)[:1]]
    by_prompt = prompt_vector(model, tokenizer, malicious, honest)
    some = train[:50]
    norms = stream_norms(model, tokenizer, [trace.prompt for trace in some], [trace.body for trace in some])
    vectors = {"agent": scaled(own, norms, setting.dose), "prompts": scaled(by_prompt, norms, setting.dose)}
    controls = {f"random {k}": sk.random_like(vectors["agent"], setting.seed + k) for k in range(RANDOM_DIRECTIONS)}
    layers = setting.layers or tuple(own.layers)
    forced = _prompts(tokenizer, inputs.validation[: setting.validation], named, setting.agent)
    on_validation = measured(model, tokenizer, vectors, forced, layers, trait, setting, None)
    layer = chosen_layer(kept_accuracy(on_validation), layers)
    tables: dict[str, list[pd.DataFrame]] = {"curves": [], "kept": []}
    for short, context in (("plain", unnamed), ("forced", named)):
        prompts = _prompts(tokenizer, inputs.test[: setting.test], context, setting.agent)
        result = measured(model, tokenizer, {**vectors, **controls}, prompts, [layer], trait, setting, out / short)
        for score in SCORES:
            curve = result.curve(score, by=("vector", "role", "layer"))
            tables["curves"].append(curve.assign(score=score, context=short))
        tables["kept"].append(kept_accuracy(result, setting.seed).assign(context=short))
        result.save(out / f"texts-{short}.parquet")
    return {kind: pd.concat(parts, ignore_index=True).assign(stage=name) for kind, parts in tables.items()}


def _others(trace: DebateTrace, agent: str) -> list[str]:
    return sorted({str(turn.agent) for turn in trace.turns} - {agent})


def _prompts(tokenizer: Any, traces: Sequence[DebateTrace], context: Context, agent: str) -> list[dict[str, Any]]:
    return [{"prompt": context(tokenizer, trace, agent), "id": trace.question, "gold": trace.gold} for trace in traces]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis suppression", description=__doc__)
    add_inputs(parser)
    parser.add_argument("--agent", default="2", help="number of the malicious agent")
    parser.add_argument("--words", required=True, help="words that show the trait, separated by commas")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of Suppression, e.g. test=120"
    )
    given = parser.parse_args(arguments)
    inputs = inputs_of(given, parser)
    try:
        setting = override(Suppression(agent=given.agent), given.set)
    except ValueError as error:
        parser.error(str(error))
    trait = words_trait([word for word in given.words.split(",") if word])
    traces = (*inputs.train, *inputs.validation, *inputs.test)
    meta = {
        "setting": asdict(setting),
        "words": given.words,
        "stages": {name: inputs.about(name) for name in inputs.stages},
        "traces": sha256("".join(trace.text for trace in traces)),
    }
    tables: dict[str, list[pd.DataFrame]] = {"curves": [], "kept": []}
    with run_folder(given.out / "suppression", meta) as out:
        for name in inputs.stages:
            folder = out / file_name(name)
            if not (folder / "kept.csv").exists():
                for kind, table in at_stage(name, inputs, trait, setting, folder).items():
                    write_table(folder / f"{kind}.csv", table, meta)
            for kind, parts in tables.items():
                parts.append(read_table(folder / f"{kind}.csv")[0])
    for kind, parts in tables.items():
        write_table(given.out / f"suppression_{kind}.csv", pd.concat(parts, ignore_index=True), meta)
    print(pd.concat(tables["kept"]).round(3).to_string(index=False))
