"""The paper's experiment with a malicious agent, with the controls that it lacks.

One vector, from the base's own prompts: mean stream after the malicious agent's system prompt minus that after an
honest one, at the last token, unit length, layer chosen on the base's validation questions. It is added to base and
IMAD with negative and positive coefficients; beside it random directions of the same norm. It acts from the last token
of the prompt on: the first new token, which that one decides, can be a word of the trait.
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
from analysis.agents.contexts import unnamed
from analysis.inputs import BASE, IMAD, Inputs, inputs_of_run
from analysis.suppression.suppress import Measure, asked, other_agents, prompt_vector
from analysis.suppression.trait import words_trait
from steerkit.capture.norms import stream_norms
from steerkit.io.files import file_name, sha256
from steerkit.io.run_folder import run_folder
from steerkit.io.tables import read_table, write_table
from steerkit.stats.controls import against_controls
from steerkit.sweeps.result import SweepResult
from training.settings import override


@dataclass(frozen=True)
class Malicious:
    """What is steered.

    Args:
        agent: the malicious one.
        coefficients: of the unit vector.
        doses: shares of the stream's mean norm, with a sign.
        controls: number of random directions; a rank of 5 % needs 19.
        layers: to choose from; None for all but the last.
        train: largest number of debates for the vector.
        validation: largest number of questions for the choice of the layer.
        test: largest number of questions for the results.
        kind: of the answers.
        max_new_tokens: of each text.
        seed: of the random directions.
    """

    agent: str = "2"
    coefficients: tuple[float, ...] = (-5.0, -4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    doses: tuple[float, ...] = (-0.5, -0.3, -0.1, 0.1, 0.3, 0.5)
    controls: int = 19
    layers: tuple[int, ...] | None = None
    train: int = 300
    validation: int = 40
    test: int = 60
    kind: str = "number"
    max_new_tokens: int = 64
    seed: int = 0


def steered(
    model: Any,
    tokenizer: Any,
    vectors: Mapping[str, sk.SteeringVector],
    prompts: Sequence[Mapping[str, Any]],
    layer: int,
    strengths: Mapping[tuple[str, float], float],
    measure: Measure,
    named: bool,
    setting: Malicious,
    out: Path,
) -> pd.DataFrame:
    """Trait, accuracy and perplexity of every text: columns vector, grid, strength, question and the scores."""
    swept = sk.sweep(
        model,
        tokenizer,
        vectors,
        [{"prompt": row["prompt"], "id": row["id"]} for row in prompts],
        coefficients=[0.0, *strengths.values()],
        layers=[layer],
        positions="from_last_prompt_token",
        max_new_tokens=setting.max_new_tokens,
        seed=setting.seed,
        foreign=True,
        out=out,
    )
    scored = measure.of(SweepResult(swept.table, swept.meta), prompts, named)
    table = measure.with_perplexity(scored, prompts, out / "perplexity.jsonl").table
    kept = table[["vector", "coefficient", "prompt_id", "trait", "accuracy", "perplexity"]]
    kept = kept.rename(columns={"prompt_id": "question"})
    parts = []
    for (grid, strength), coefficient in (*strengths.items(), (("coefficient", 0.0), 0.0), (("dose", 0.0), 0.0)):
        rows = kept[np.isclose(kept["coefficient"], coefficient, rtol=1e-9, atol=0)]
        parts.append(rows.drop(columns="coefficient").assign(grid=grid, strength=strength))
    return pd.concat(parts, ignore_index=True)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means of the vector at every strength, and its difference to random directions.

    Returns:
        A row per stage, context, grid, strength and score: own (mean), zero (mean at strength 0), random (mean of the
        random directions), gain, low, high, p, p_rank, n, k (see `steerkit.stats.controls.against_controls`). The rank
        is one-sided: against larger scores, at negative strengths against smaller ones.
    """
    rows = []
    keys = ["stage", "context", "grid", "strength"]
    for key, part in table.groupby(keys, sort=False):
        stage, context, grid, strength = key
        side = -1.0 if strength < 0 else 1.0
        at_zero = table[
            (table["stage"] == stage)
            & (table["context"] == context)
            & (table["grid"] == grid)
            & (table["strength"] == 0)
        ]
        for score in ("trait", "accuracy", "perplexity"):
            wide = part.pivot_table(index="question", columns="vector", values=score, dropna=False)
            found = against_controls(side * wide["own"], side * wide.drop(columns="own"))
            low, high = sorted((side * found.low, side * found.high))
            found = replace(found, gain=side * found.gain, low=low, high=high)
            means = {"own": wide["own"].mean(), "random": float(wide.drop(columns="own").stack().mean())}
            zero = at_zero.loc[at_zero["vector"] == "own", score].mean()
            rows.append({**dict(zip(keys, key, strict=True)), "score": score, "zero": zero, **means, **asdict(found)})
    return pd.DataFrame(rows)


def best_layer(tried: pd.DataFrame) -> int:
    """The layer with the least trait; of several, the one with the largest accuracy."""
    order = tried.sort_values(["trait", "accuracy"], ascending=[True, False], kind="stable")
    return int(order["layer"].iloc[0])


def run_malicious(inputs: Inputs, words: Sequence[str], setting: Malicious, out: str | Path) -> pd.DataFrame:
    """The experiment on base and IMAD; a finished part is not run again.

    Args:
        inputs: a run's checkpoints and debates.
        words: words that show the trait.
        setting: what is steered.
        out: run folder.

    Returns:
        The table of `summary`; contexts are `plain` prompts and the agent `forced` by its prompt or tag.
    """
    config = {
        "setting": asdict(setting),
        "words": list(words),
        "stages": {name: inputs.about(name) for name in (BASE, IMAD)},
        "traces": sha256("".join(trace.text for trace in (*inputs.train, *inputs.validation, *inputs.test))),
    }
    with run_folder(out, config) as folder:
        base = inputs.load(BASE)
        measure = Measure(words_trait(words), setting.kind, base)
        train = inputs.train[: setting.train]
        malicious = [inputs.base_context(base[1], trace, setting.agent) for trace in train]
        honest = [
            inputs.base_context(base[1], trace, agent)
            for trace in train
            for agent in other_agents(trace, setting.agent)[:1]
        ]
        vector = prompt_vector(*base, malicious, honest).unit()
        named = {"own": vector, **sk.controls.random({"own": vector}, n=setting.controls, seed=setting.seed)}
        path = folder / "layers.csv"
        if not path.exists():
            layers = setting.layers or tuple(int(layer) for layer in vector.layers)[:-1]
            prompts = asked(base[1], inputs.validation[: setting.validation], inputs.base_context, setting.agent)
            tried = []
            for layer in layers:
                at = {("dose", -0.3): -0.3 * _norm(base, train, layer)}
                table = steered(
                    *base, {"own": vector}, prompts, layer, at, measure, True, setting, folder / f"layer-{layer}"
                )
                tried.append({"layer": layer, **table.loc[table["strength"] < 0, ["trait", "accuracy"]].mean()})
            write_table(path, pd.DataFrame(tried), config)
        layer = best_layer(read_table(path)[0])
        parts = []
        for stage in (BASE, IMAD):
            for short in ("plain", "forced"):
                path = folder / f"{file_name(stage)}-{short}.parquet"
                if not path.exists():
                    loaded = inputs.load(stage)
                    context = unnamed if short == "plain" else inputs.context(stage)
                    prompts = asked(loaded[1], inputs.test[: setting.test], context, setting.agent)
                    norm = _norm(loaded, train, layer)
                    strengths = {("coefficient", c): c for c in setting.coefficients}
                    strengths |= {("dose", d): d * norm for d in setting.doses}
                    written = folder / "texts" / f"{file_name(stage)}-{short}"
                    table = steered(
                        *loaded, named, prompts, layer, strengths, measure, short == "forced", setting, written
                    )
                    write_table(path, table, config)
                parts.append(read_table(path)[0].assign(stage=stage, context=short))
        table = summary(pd.concat(parts, ignore_index=True)).assign(layer=layer)
        write_table(folder / "malicious.csv", table, config)
    return table


def _norm(loaded: tuple[Any, Any], traces: Sequence[Any], layer: int) -> float:
    some = traces[:50]
    return stream_norms(*loaded, [trace.prompt for trace in some], [trace.body for trace in some], [layer])[layer]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis malicious", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run of training.imad")
    parser.add_argument("--words", required=True, help="words that show the trait, separated by commas")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of Malicious, e.g. test=40"
    )
    given = parser.parse_args(arguments)
    try:
        setting = override(Malicious(), given.set)
    except ValueError as error:
        parser.error(str(error))
    words = [word for word in given.words.split(",") if word]
    table = run_malicious(inputs_of_run(given.run, only=(BASE, IMAD)), words, setting, given.out)
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
