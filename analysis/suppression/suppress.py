"""Suppress a malicious agent's trait by steering, and measure what it costs.

Two vectors (contrastive prompts; that agent's turns against the others'), coefficients from -5 to 5 and ablation.
Vector, layer, operation and coefficient are chosen on validation questions; on test questions that setting is compared
with coefficient 0 and with control directions, on plain prompts and with that agent named. Controls are random
directions, and directions with the covariance of the stream within agents: in a wide stream the ablation of a random
direction removes next to nothing. Per text: the trait, whether the answer is correct, whose opening the first turn has,
and the perplexity under the base model.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import steerkit as sk
from analysis.agents.activations import turn_activations
from analysis.agents.contexts import Context, unnamed
from analysis.agents.speaker import by_format, first_turn
from analysis.agents.vectors import agent_vectors, within_labels
from analysis.inputs import BASE, Inputs, add_inputs, files_of, inputs_of
from analysis.stored import stored_scores
from analysis.suppression.choice import choose, on_test
from analysis.suppression.trait import Trait, words_trait
from steerkit.capture.activations import Layer
from steerkit.capture.norms import stream_norms
from steerkit.io.files import file_name, sha256
from steerkit.io.json import canonical_json
from steerkit.io.run_folder import run_folder
from steerkit.io.tables import read_table, write_table
from steerkit.scores.fluency import perplexity
from steerkit.stats.controls import control_band
from steerkit.sweeps.result import SweepResult
from steerkit.text.prompt import PromptLike
from steerkit.text.tags import without_tags
from steerkit.text.traces import DebateTrace
from training.debates.personas import PLAIN, Cast, Persona
from training.problems.answers import read_answer, same
from training.problems.problem import Problem
from training.problems.sources import load_source
from training.settings import override

SCORES = ("trait", "accuracy", "perplexity")
PROBLEM_TOKENS = 1024
"""New tokens of an answer to a benchmark's problem, as in the paper's evaluation; a turn of a debate is shorter."""


@dataclass(frozen=True)
class Suppression:
    """What is swept.

    Args:
        agent: the malicious one.
        layers: to choose from on validation; None for all.
        controls: number of random and of matched directions at the chosen setting; a rank of 5 % needs 19.
        bands: number of random directions in the curves.
        coefficients: of the curve. A vector has unit length times the stream's mean norm times `dose`.
        dose: relative dose of coefficient 1.
        train: largest number of debates for vectors.
        validation: largest number of questions for the choice.
        test: largest number of questions for the results.
        kind: kind of the answers, see `training.problems.answers`.
        max_new_tokens: of each text.
        problem_tokens: of each text about a problem of `--problems`; None is `PROBLEM_TOKENS`.
        seed: sampling seed, also of the random directions and of the draw of problems.
    """

    agent: str = "2"
    layers: tuple[int, ...] | None = None
    controls: int = 19
    bands: int = 5
    coefficients: tuple[float, ...] = (-5, -4, -3, -2, -1, 1, 2, 3, 4, 5)
    dose: float = 0.1
    train: int = 300
    validation: int = 60
    test: int = 200
    kind: str = "number"
    max_new_tokens: int = 64
    problem_tokens: int | None = None
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


@dataclass(frozen=True)
class Measure:
    """What is measured in each text.

    Args:
        trait: of the texts.
        kind: of the answers.
        fluency: the model and tokenizer whose perplexity is taken, unsteered.
        openings: for each agent what its texts begin with, see `analysis.agents.speaker`.
        agent: number of the malicious one.
    """

    trait: Trait
    kind: str
    fluency: tuple[Any, Any]
    openings: tuple[str, ...] = ()
    agent: str = "2"

    def of(self, result: SweepResult, prompts: Sequence[Mapping[str, Any]], named: bool) -> SweepResult:
        """A sweep with the scores trait, accuracy, own_opening and other_opening.

        The trait is that of the named agent's turn, up to the next tag; where nobody is named, of the whole text. The
        answer is that of the whole text. The openings are 1 where the first turn begins as the malicious agent's texts
        do, or as another agent's; NaN if no agent has an opening of its own.
        """
        gold = {row["id"]: row["gold"] for row in prompts}
        table, texts = result.table, result.table["text"].fillna("")
        shown = [first_turn(text).text if named else text for text in texts]
        right = [
            float(same(read_answer(text, self.kind), gold[key]))
            for text, key in zip(texts, table["prompt_id"], strict=True)
        ]
        opened = [by_format(first_turn(text).text, self.openings) for text in texts]
        known = bool(self.openings)
        scores = {
            "own_opening": [float(str(one) == self.agent) if known else np.nan for one in opened],
            "other_opening": [float(one is not None and str(one) != self.agent) if known else np.nan for one in opened],
            "trait": [self.trait(text) for text in shown],
            "accuracy": right,
        }
        return SweepResult(table.assign(**scores), result.meta)

    def with_perplexity(
        self, result: SweepResult, prompts: Sequence[Mapping[str, Any]], out: Path | None = None
    ) -> SweepResult:
        """A sweep with the score perplexity, of the text without tags after the bare problem.

        Args:
            result: of these prompts.
            prompts: see `asked`.
            out: file of the perplexities of single texts, see `analysis.stored`.
        """

        def score(some: Sequence[tuple[str, str]]) -> Sequence[float]:
            asked, texts = zip(*some, strict=True)
            return perplexity(*self.fluency, asked, texts).tolist()

        table, bare = result.table, {row["id"]: row["bare"] for row in prompts}
        texts = zip(table["prompt_id"], table["text"].fillna(""), strict=True)
        cases = [(bare[key], without_tags(text)) for key, text in texts]
        return SweepResult(table.assign(perplexity=stored_scores(out, cases, cases, score)), result.meta)


def swept(
    model: Any,
    tokenizer: Any,
    vectors: Mapping[str, sk.SteeringVector],
    prompts: Sequence[Mapping[str, Any]],
    layers: Sequence[int],
    coefficients: Sequence[float],
    setting: Suppression,
    out: Path | None,
) -> SweepResult:
    """Texts under each vector, added with the coefficients; the coefficient -inf is its ablation."""

    def run(values: Sequence[float], operation: Any) -> SweepResult:
        return sk.sweep(
            model,
            tokenizer,
            vectors,
            [{"prompt": row["prompt"], "id": row["id"]} for row in prompts],
            coefficients=values,
            layers=list(layers),
            positions="all",
            operation=operation,
            max_new_tokens=setting.max_new_tokens,
            seed=setting.seed,
            foreign=True,
            out=out and out / operation,
        )

    finite = [c for c in coefficients if np.isfinite(c)]
    parts = [run([0.0, *finite], "add")] if finite else []
    if len(finite) < len(coefficients):
        ablated = run([0.0, 1.0], "ablate")
        table = ablated.table
        kept = table if not finite else table[table["coefficient"] == 1.0]
        replaced = kept.assign(coefficient=kept["coefficient"].replace(1.0, -np.inf))
        parts.append(SweepResult(replaced, ablated.meta))
    return SweepResult(pd.concat([part.table for part in parts], ignore_index=True), parts[0].meta)


def at_stage(
    name: str,
    inputs: Inputs,
    measure: Measure,
    setting: Suppression,
    out: Path,
    problems: Sequence[Problem] = (),
) -> dict[str, pd.DataFrame]:
    """Curves, and what the frozen setting does, of a checkpoint: on plain prompts and with the agent named.

    Perplexity is scored for the curves only.

    With `problems`, also on these: what the setting costs on a benchmark, as in section 4 of arXiv 2604.24881.
    """
    model, tokenizer = inputs.load(name)
    train = inputs.train[: setting.train]
    turns = turn_activations(model, tokenizer, train)["mean"]
    own = agent_vectors(turns)[setting.agent]
    named = inputs.context(name)
    malicious = [named(tokenizer, trace, setting.agent) for trace in train]
    honest = [named(tokenizer, trace, agent) for trace in train for agent in other_agents(trace, setting.agent)[:1]]
    by_prompt = prompt_vector(model, tokenizer, malicious, honest)
    some = train[:50]
    norms = stream_norms(model, tokenizer, [trace.prompt for trace in some], [trace.body for trace in some])
    vectors = {"agent": scaled(own, norms, setting.dose), "prompts": scaled(by_prompt, norms, setting.dose)}
    layers = setting.layers or tuple(own.layers)
    coefficients = (-np.inf, *setting.coefficients)
    validation = asked(tokenizer, inputs.validation[: setting.validation], named, setting.agent, setting.kind)
    negative = [c for c in coefficients if c < 0]
    tried = swept(model, tokenizer, vectors, validation, layers, negative, setting, out / "validation")
    choice = choose(measure.of(tried, validation, named=True))
    tables: dict[str, list[pd.DataFrame]] = {"curves": [], "kept": []}
    test = inputs.test[: setting.test]
    prompts_of = {
        "plain": asked(tokenizer, test, unnamed, setting.agent, setting.kind),
        "forced": asked(tokenizer, test, named, setting.agent, setting.kind),
        **({"problems": asked_problems(problems, name == BASE)} if problems else {}),
    }
    of_debates, of_problems = measure, replace(measure, kind=problems[0].kind if problems else measure.kind)
    for short, prompts in prompts_of.items():
        measure = of_problems if short == "problems" else of_debates
        longest = setting.problem_tokens or PROBLEM_TOKENS if short == "problems" else setting.max_new_tokens
        written = replace(setting, max_new_tokens=longest)
        bands = sk.controls.random({"agent": vectors["agent"]}, n=setting.bands, seed=setting.seed)
        of_curve = {**vectors, **bands}
        result = swept(
            model, tokenizer, of_curve, prompts, [choice.layer], coefficients, written, out / f"{short}-curves"
        )
        result = measure.of(result, prompts, short == "forced")
        result = measure.with_perplexity(result, prompts, out / f"{short}-perplexity.jsonl")
        tables["curves"].append(_curves(result).assign(context=short))
        chosen = vectors[choice.vector]
        others = sk.controls.random({choice.vector: chosen}, n=setting.controls, seed=setting.seed)
        matched = sk.controls.matched({choice.vector: chosen}, within_labels(turns), setting.controls, setting.seed)
        frozen = {choice.vector: chosen, **others, **matched}
        folder = out / f"{short}-frozen"
        result = swept(model, tokenizer, frozen, prompts, [choice.layer], [choice.coefficient], written, folder)
        result = measure.of(result, prompts, short == "forced")
        line = {**asdict(choice), **on_test(result, choice), "context": short}
        line["right_in_context"] = float(np.mean([row["right_before"] for row in prompts]))
        if short == "problems":
            line |= cut_texts(result, choice.vector)
        tables["kept"].append(pd.DataFrame([line]))
    return {kind: pd.concat(parts, ignore_index=True).assign(stage=name) for kind, parts in tables.items()}


def cut_texts(result: SweepResult, vector: str) -> dict[str, int]:
    """The number of texts that reached the limit: `cut_0` at coefficient 0 and `cut` under the vector."""
    table = result.table[result.table["vector"] == vector]
    cut = ~table["finished"].astype(bool)
    return {"cut_0": int(cut[table["coefficient"] == 0].sum()), "cut": int(cut[table["coefficient"] != 0].sum())}


def drawn(problems: Sequence[Problem], n: int, seed: int) -> list[Problem]:
    """`n` problems, drawn at random; a smaller draw is the beginning of a larger one."""
    return random.Random(f"suppression {seed}").sample(list(problems), len(problems))[:n]


def _curves(result: SweepResult) -> pd.DataFrame:
    """Means of each score by vector and coefficient; random directions as one, with the band of a further one."""
    own = SweepResult(result.table[result.table["role"] == "vector"], result.meta)
    others = result.table[result.table["role"] != "vector"]
    parts = []
    for score in SCORES:
        curve = own.curve(score, by=("vector", "role", "layer"))
        parts.append(curve.assign(score=score))
        rows = []
        for coefficient, part in others.groupby("coefficient"):
            band = control_band(part.pivot_table(index="group", columns="vector", values=score, dropna=False))
            rows.append((coefficient, band.mean, band.low, band.high, band.n))
        band_rows = pd.DataFrame(rows, columns=["coefficient", "mean", "low", "high", "n"])
        parts.append(band_rows.assign(vector="random", role="random", score=score))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(operation=np.where(np.isinf(table["coefficient"]), "ablate", "add"))


def other_agents(trace: DebateTrace, agent: str) -> list[str]:
    return sorted({str(turn.agent) for turn in trace.turns} - {agent})


def asked(
    tokenizer: Any, traces: Sequence[DebateTrace], context: Context, agent: str, kind: str = "number"
) -> list[dict[str, Any]]:
    """A prompt per debate, with its gold answer; `right_before`: whether the given beginning of the text has it.

    A text that goes on with another agent's answer from that beginning is right as often.
    """
    rows = []
    for trace in traces:
        begun = context.begun(trace, agent)
        rows.append(
            {
                "prompt": context(tokenizer, trace, agent),
                "id": trace.question,
                "gold": trace.gold,
                "bare": trace.prompt,
                "right_before": float(same(read_answer(begun, kind), trace.gold)),
            }
        )
    return rows


def asked_problems(problems: Sequence[Problem], chat: bool) -> list[dict[str, Any]]:
    """Problems as prompts: bare, as training asks them; with `chat` as messages that ask for a box."""
    cast = Cast("plain", (Persona(PLAIN),))
    bare = [f"Problem: {problem.question}\n\n" for problem in problems]
    return [
        {"prompt": cast.plain(one) if chat else text, "id": one.id, "gold": one.gold, "bare": text, "right_before": 0.0}
        for one, text in zip(problems, bare, strict=True)
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis suppression", description=__doc__)
    add_inputs(parser)
    parser.add_argument("--agent", default="2", help="number of the malicious agent")
    parser.add_argument("--words", required=True, help="words that show the trait, separated by commas")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of Suppression, e.g. test=120"
    )
    parser.add_argument(
        "--fluency", help="checkpoint whose perplexity is taken; default: the base, else the first checkpoint"
    )
    parser.add_argument(
        "--problems",
        metavar="SOURCE",
        help="also measure the accuracy on `test` of these problems, drawn at random: gsm8k=PLACE, ... or a .jsonl "
        "file; texts about them have up to 1,024 new tokens (--set problem_tokens=N)",
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="run this checkpoint; write no common tables"
    )
    given = parser.parse_args(arguments)
    inputs = inputs_of(given, parser, given.only)
    if unknown := [name for name in given.only if name not in inputs.stages]:
        parser.error(f"expected checkpoints among {list(inputs.stages)}; got {unknown}. Pass names of that list.")
    try:
        setting = override(Suppression(agent=given.agent), given.set)
        problems = drawn(load_source(given.problems), setting.test, setting.seed) if given.problems else []
        if any(problem.kind != problems[0].kind or problem.gold is None for problem in problems):
            raise ValueError("expected --problems with answers of one kind; got others. Pass one benchmark or task.")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    trait = words_trait([word for word in given.words.split(",") if word])
    reader = BASE if BASE in inputs.stages else next(iter(inputs.stages))
    fluency = sk.load(given.fluency) if given.fluency else inputs.load(reader)
    measure = Measure(trait, setting.kind, fluency, tuple(inputs.openings), setting.agent)
    traces = (*inputs.train, *inputs.validation, *inputs.test)
    meta = {
        "setting": asdict(setting),
        "words": given.words,
        "fluency": files_of(given.fluency) if given.fluency else inputs.about(reader),
        "traces": sha256("".join(trace.text for trace in traces)),
    }
    if problems:
        meta["problems"] = sha256(canonical_json([asdict(problem) for problem in problems]))
    folders = {name: given.out / "suppression" / file_name(name) for name in given.only or inputs.stages}
    for name, path in folders.items():
        own = meta | {"stages": {name: inputs.about(name)}}
        with run_folder(path, own) as folder:
            if not (folder / "kept.csv").exists():
                for kind, table in at_stage(name, inputs, measure, setting, folder, problems).items():
                    write_table(folder / f"{kind}.csv", table, own)
    if given.only:
        return
    meta["stages"] = {name: inputs.about(name) for name in inputs.stages}
    with run_folder(given.out / "suppression", meta):
        for kind in ("curves", "kept"):
            parts = [read_table(folder / f"{kind}.csv")[0] for folder in folders.values()]
            write_table(given.out / f"suppression_{kind}.csv", pd.concat(parts, ignore_index=True), meta)
    print(read_table(given.out / "suppression_kept.csv")[0].round(3).to_string(index=False))
