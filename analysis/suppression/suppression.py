"""`python -m analysis.suppression.suppression`: can a malicious agent's trait be turned off, and what does it cost?

Two vectors (contrastive prompts; that agent's turns against the others'), coefficients from -5 to 5 and ablation, on
plain prompts and with that agent named; per row the trait, whether the answer is right, and perplexity.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import steerkit as sk
from analysis.agents.fidelity import Named, unnamed
from analysis.agents.material import Material, add_material, material_of
from analysis.agents.vectors import agent_vectors, turn_streams
from steerkit.capture.activations import Layer
from steerkit.capture.norms import stream_norms
from steerkit.io.files import file_name, sha256
from steerkit.io.run_folder import run_folder
from steerkit.io.tables import read_table, write_table
from steerkit.sweeps.result import SweepResult
from steerkit.text.prompt import Prompt, render
from steerkit.text.traces import DebateTrace
from training.presets import override
from training.problems.answers import read_answer, same

Trait = Callable[[str], float]
SCORES = ("trait", "accuracy", "perplexity")


@dataclass(frozen=True)
class Suppression:
    """What is swept.

    Args:
        agent: the malicious one.
        layers: to choose from on validation; None for all.
        coefficients: of the curve; the vectors have unit length times the stream's mean norm times `dose`.
        dose: what coefficient 1 is, as a share of the stream's mean norm.
        train, validation, test: at most so many debates or questions.
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


def words_trait(words: Sequence[str]) -> Trait:
    """A trait that a rule detects: 1 where any of the words stands in the text, else 0."""
    if not words:
        raise ValueError("expected one word at least that shows the trait; got none.")
    pattern = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, words)) + r")(?!\w)", re.IGNORECASE)
    return lambda text: float(pattern.search(text) is not None)


def prompt_vector(
    model: Any, tokenizer: Any, malicious: Sequence[Prompt], honest: Sequence[Prompt]
) -> sk.SteeringVector:
    """`mean h(malicious) - mean h(honest)` at the last token of two sets of prompts for the same questions.

    The paper reads the token before the last of the templated prompt; the last one is where the answer begins.
    """
    texts = [render(tokenizer, prompt) for prompt in (*malicious, *honest)]
    acts = sk.collect(model, tokenizer, texts, position="last")
    labels = ["positive"] * len(malicious) + ["negative"] * len(honest)
    return sk.difference_in_means(replace(acts, items=acts.items.assign(label=labels)))


def scaled(vector: sk.SteeringVector, norms: Mapping[Layer, float], dose: float) -> sk.SteeringVector:
    """The unit vector times `dose` times the stream's mean norm, layer by layer: coefficient 1 is that dose."""
    unit = vector.unit()
    return sk.SteeringVector({k: v * dose * norms[k] for k, v in unit.layers.items()}, vector.meta)


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
    """The sweep with its three scores; ablation stands as coefficient -inf, what removes the direction altogether."""
    common: dict[str, Any] = {
        "layers": layers, "positions": "all", "max_new_tokens": setting.max_new_tokens, "seed": setting.seed,
        "foreign": True,
    }  # fmt: skip
    added = sk.sweep(
        model, tokenizer, vectors, prompts, coefficients=setting.coefficients, out=out and out / "add", **common
    )
    ablated = sk.sweep(
        model, tokenizer, vectors, prompts, coefficients=[1.0], operation="ablate", out=out and out / "ablate", **common
    )
    gone = ablated.table[ablated.table["coefficient"] == 1.0].assign(coefficient=-np.inf)
    result = SweepResult(pd.concat([added.table, gone], ignore_index=True), added.meta)
    gold = {row["id"]: row["gold"] for row in prompts}
    result = result.score(lambda row: trait(row["text"]), column="trait")
    result = result.score(
        lambda row: float(same(read_answer(row["text"], setting.kind), gold[row["prompt_id"]])), column="accuracy"
    )
    return result.score("perplexity", model=model, tokenizer=tokenizer)


def kept_accuracy(result: SweepResult, seed: int = 0, draws: int = 2000) -> pd.DataFrame:
    """Accuracy kept, relative to coefficient 0, where the trait is halved: by adding, and by ablation.

    Per vector, layer and operation; of the negative coefficients the mildest that halves it. It is chosen once, on all
    questions; the interval resamples questions. `kept` is NaN where nothing halves the trait, or where nothing was
    right (or nothing showed the trait) to begin with.
    """
    rows = []
    for (vector, layer), part in result.table.groupby(["vector", "layer"], sort=False):
        wide = {
            score: part.pivot_table(index="group", columns="coefficient", values=score, aggfunc="mean")
            for score in ("trait", "accuracy")
        }
        level, right = wide["trait"].mean(), wide["accuracy"]
        for operation, ablated in (("add", False), ("ablate", True)):
            if not (tried := [c for c in level.index if c < 0 and np.isinf(c) == ablated]):
                continue
            mildest = max((c for c in tried if level[0.0] > 0 and level[c] <= level[0.0] / 2), default=np.nan)
            line = {"vector": vector, "layer": layer, "operation": operation, "trait": level[0.0]}
            line |= {"accuracy": right[0.0].mean(), "coefficient": mildest, "kept": np.nan, "low": np.nan}
            line |= {"high": np.nan, "n": len(right)}
            if not np.isnan(mildest) and line["accuracy"] > 0:
                line |= _ratio(right[[mildest, 0.0]].to_numpy(), seed, draws)
            rows.append(line)
    return pd.DataFrame(rows)


def _ratio(pair: np.ndarray, seed: int, draws: int) -> dict[str, float]:
    picked = np.random.default_rng(seed).integers(len(pair), size=(draws, len(pair)))
    many = pair[picked].mean(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.nanpercentile(many[:, 0] / many[:, 1], [2.5, 97.5])
    return {"kept": pair[:, 0].mean() / pair[:, 1].mean(), "low": low, "high": high}


def chosen_layer(level: pd.DataFrame, layers: Sequence[int]) -> int:
    """Where most accuracy is kept; by ablation only if no coefficient halves the trait, else the middle one."""
    for operation in ("add", "ablate"):
        able = level[(level["operation"] == operation) & level["kept"].notna()]
        if len(able):
            return int(able.loc[able["kept"].idxmax(), "layer"])
    return int(layers[len(layers) // 2])


def at_stage(name: str, material: Material, trait: Trait, setting: Suppression, out: Path) -> dict[str, pd.DataFrame]:
    """Curves and the one number of a checkpoint, on plain prompts and with the agent's tag forced."""
    model, tokenizer = material.load(name)
    train = material.train[: setting.train]
    acts = turn_streams(model, tokenizer, train)["mean"]
    own = agent_vectors(acts)[setting.agent]
    named = material.identity(name)
    tagged = [named(trace, setting.agent) for trace in train]
    others = [named(trace, agent) for trace in train for agent in _others(trace, setting.agent)[:1]]
    by_prompt = prompt_vector(model, tokenizer, tagged, others)
    some = train[:50]
    norms = stream_norms(model, tokenizer, [trace.prompt for trace in some], [trace.body for trace in some])
    vectors = {"agent": scaled(own, norms, setting.dose), "prompts": scaled(by_prompt, norms, setting.dose)}
    controls = {f"random {k}": sk.random_like(vectors["agent"], setting.seed + k) for k in range(3)}
    layers = setting.layers or tuple(own.layers)
    forced = _prompts(material.validation[: setting.validation], named, setting.agent)
    tried = measured(model, tokenizer, vectors, forced, layers, trait, setting, None)
    layer = chosen_layer(kept_accuracy(tried), layers)
    found: dict[str, list[pd.DataFrame]] = {"curves": [], "kept": []}
    for where, before in (("plain", unnamed), ("forced", named)):
        prompts = _prompts(material.test[: setting.test], before, setting.agent)
        result = measured(model, tokenizer, {**vectors, **controls}, prompts, [layer], trait, setting, out / where)
        for score in SCORES:
            found["curves"].append(result.curve(score).assign(score=score, context=where))
        found["kept"].append(kept_accuracy(result, setting.seed).assign(context=where))
        result.save(out / f"texts-{where}.parquet")
    return {kind: pd.concat(parts, ignore_index=True).assign(stage=name) for kind, parts in found.items()}


def _others(trace: DebateTrace, agent: str) -> list[str]:
    return sorted({str(turn.agent) for turn in trace.turns} - {agent})


def _prompts(traces: Sequence[DebateTrace], before: Named, agent: str) -> list[dict[str, Any]]:
    return [{"prompt": before(trace, agent), "id": trace.question, "gold": trace.gold} for trace in traces]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis.suppression.suppression", description=__doc__)
    add_material(parser)
    parser.add_argument("--agent", default="2", help="the malicious one")
    parser.add_argument("--words", required=True, help="what shows the trait, separated by commas")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of Suppression: test=120")
    given = parser.parse_args(arguments)
    material = material_of(given, parser)
    try:
        setting = override(Suppression(agent=given.agent), given.set)
    except ValueError as error:
        parser.error(str(error))
    trait = words_trait([word for word in given.words.split(",") if word])
    tables: dict[str, list[pd.DataFrame]] = {}
    traces = (*material.train, *material.validation, *material.test)
    meta = {
        "setting": asdict(setting),
        "words": given.words,
        "stages": {name: material.about(name) for name in material.stages},
    }
    meta["traces"] = sha256("".join(trace.text for trace in traces))
    with run_folder(given.out / "suppression", meta) as out:
        for name in material.stages:
            folder = out / file_name(name)
            if not (folder / "kept.csv").exists():
                for kind, table in at_stage(name, material, trait, setting, folder).items():
                    write_table(folder / f"{kind}.csv", table, meta)
            for kind in ("curves", "kept"):
                tables.setdefault(kind, []).append(read_table(folder / f"{kind}.csv")[0])
    for kind, parts in tables.items():
        write_table(given.out / f"suppression_{kind}.csv", pd.concat(parts, ignore_index=True), meta)
    print(pd.concat(tables["kept"]).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
