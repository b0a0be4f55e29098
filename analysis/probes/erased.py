"""Erased identity: what is left of the agents when LEACE has erased which of them speaks, on held-out debates.

Separability: the accuracy of a probe of the agents' names, before and after the erasure, on questions that neither the
erasure nor the probe was fitted on; beside it the erasure of shuffled names, which has the same rank.

Steering: an agent's vector is added at the layer and coefficient chosen on validation debates, and the identity is
erased after every later block, where the vector's effect must pass through. At the layer of the vector itself the
erasure removes the vector by construction. The same is done for an agent that its tag names, erased after every block.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import steerkit as sk
from analysis.agents.activations import turn_activations
from analysis.agents.choose import Choice, Grid, choose
from analysis.agents.contexts import Context, first_texts, unnamed
from analysis.agents.continuations import TEMPERATURE, TOP_P
from analysis.agents.speaker import first_turn
from analysis.agents.vectors import agent_vectors
from analysis.inputs import IMAD, SFT, Inputs, inputs_of_run
from analysis.published import published
from steerkit.capture.activations import Activations
from steerkit.io.files import sha256
from steerkit.io.json import read_json
from steerkit.io.run_folder import run_folder
from steerkit.io.tables import read_table, write_table
from steerkit.scores.text import rouge_l
from steerkit.stats.mean import mean_interval
from steerkit.stats.paired import ratio
from steerkit.text.traces import DebateTrace
from steerkit.vectors.controls import shuffle_labels
from training.presets import override

POSITIONS = ("tag", "first", "mean", "last")
SHUFFLED = "shuffled"
TAG, VECTOR = "tag", "vector"


@dataclass(frozen=True)
class Setting:
    """How much is read and written.

    Args:
        train: largest number of debates for vectors, erasures and probes.
        validation: of debates on which layer and coefficient are chosen.
        test: of debates on which results are reported.
        coefficients: that are tried.
        shuffles: number of erasures of shuffled names.
        shrinkage: of the covariance, see `sk.leace`.
        max_new_tokens: of each continuation.
        seed: of sampling, folds and shuffles.
    """

    train: int = 400
    validation: int = 24
    test: int = 64
    coefficients: tuple[float, ...] = (1.0, 2.0, 4.0)
    shuffles: int = 5
    shrinkage: float = 0.0
    max_new_tokens: int = 64
    seed: int = 0


def first_round(acts: Mapping[str, Activations]) -> dict[str, Activations]:
    """The turns of round 1 alone: in later rounds an agent has read the others."""
    return {
        position: one.where((one.items.groupby(["group", "label"]).cumcount() == 0).to_numpy())
        for position, one in acts.items()
        if position in POSITIONS
    }


def joined(acts: Mapping[str, Activations]) -> Activations:
    """The items of all read positions, as one: an erasure acts at all of them."""
    several = list(acts.values())
    items = pd.concat([one.items for one in several], ignore_index=True)
    return replace(several[0], resid=torch.cat([one.resid for one in several]), items=items)


def separability(acts: Mapping[str, Activations], setting: Setting) -> pd.DataFrame:
    """The rows of `sk.probe_erased` for the agents' names, by read position."""
    return pd.concat(
        [
            sk.probe_erased(one, shrinkage=setting.shrinkage, seed=setting.seed).assign(position=position)
            for position, one in acts.items()
        ],
        ignore_index=True,
    )


@contextlib.contextmanager
def erased(model: Any, eraser: Any, layers: Sequence[int]) -> Iterator[None]:
    """Erase after these blocks inside the `with`; without an eraser nothing is changed."""
    with contextlib.ExitStack() as stack:
        if eraser is not None:
            for layer in layers:
                stack.enter_context(sk.erase(eraser, layer, positions="all", foreign=True).on(model))
        yield


def texts(
    model: Any,
    tokenizer: Any,
    inputs: Inputs,
    stage: str,
    acts: Mapping[str, Activations],
    choice: Choice,
    setting: Setting,
) -> pd.DataFrame:
    """Continuations of the test debates with each agent's identity from its tag or its vector, erased or not.

    Returns:
        One row per question, agent, identity, given and erasure, with the text of the first turn and `rouge_l` to the
        agent's own first text. `identity` is `tag` or `vector`. `given` is True where the tag or the vector names the
        agent, and False where none does. `erasure` is `none`, `agents`, or `shuffled 0` and so on.
    """
    names = joined(acts)
    erasers: dict[str, Any] = {"none": None, "agents": sk.leace(names, shrinkage=setting.shrinkage)}
    for number in range(setting.shuffles):
        mixed = shuffle_labels(names, setting.seed + number)
        erasers[f"{SHUFFLED} {number}"] = sk.leace(mixed, shrinkage=setting.shrinkage)
    every = [int(layer) for layer in names.layers]
    later = [layer for layer in every if layer > choice.layer]
    vectors = agent_vectors(acts[choice.position])
    traces, rows = inputs.test[: setting.test], []
    contexts: Mapping[tuple[str, bool], tuple[Context, Sequence[int]]] = {
        (TAG, True): (inputs.context(stage), every), (TAG, False): (unnamed, every),
        (VECTOR, True): (unnamed, later), (VECTOR, False): (unnamed, later),
    }  # fmt: skip
    for name, eraser in erasers.items():
        for (identity, named), (context, layers) in contexts.items():
            asked = [(trace, agent) for trace in traces for agent in first_texts(trace)]
            steering = [
                sk.Steering(vectors[agent].at(choice.layer), choice.coefficient, choice.extent, foreign=True)
                if identity == VECTOR and named else None
                for _, agent in asked
            ]  # fmt: skip
            with erased(model, eraser, layers):
                written = sk.generate(
                    model, tokenizer, [context(tokenizer, trace, agent) for trace, agent in asked], steering=steering,
                    max_new_tokens=setting.max_new_tokens, temperature=TEMPERATURE, top_p=TOP_P, seed=setting.seed,
                )  # fmt: skip
            turns = [first_turn(text, inputs.openings).text for text in written]
            scores = rouge_l(turns, [first_texts(trace)[agent] for trace, agent in asked])
            rows += [
                {"question": trace.question, "agent": agent, "identity": identity, "given": named, "erasure": name,
                 "text": turn, "rouge_l": score}
                for (trace, agent), turn, score in zip(asked, turns, scores, strict=True)
            ]  # fmt: skip
    return pd.DataFrame(rows)


def survival(rows: pd.DataFrame) -> pd.DataFrame:
    """What an identity adds to ROUGE-L, with and without erasure; units are questions, means over agents.

    Returns:
        One row per identity (`tag`, `vector`) and quantity: mean, low, high (95 % over questions), n (questions), k
        (erasures). With R(given, erasure) the mean ROUGE-L of a question, the quantities are

            gain                  = R(True, none) - R(False, none)
            gain, agents erased   = R(True, agents) - R(False, agents)
            gain, shuffled erased = the same for shuffled names, mean over the shuffles
            survives              = gain, agents erased / gain, a ratio of means (`steerkit.stats.paired.ratio`)
            survives shuffled     = gain, shuffled erased / gain
            cost                  = R(False, agents) - R(False, none)
            cost shuffled         = the same for shuffled names
    """
    wide = rows.pivot_table(index="question", columns=["identity", "given", "erasure"], values="rouge_l")
    shuffled = sorted({name for *_, name in wide.columns if name.startswith(SHUFFLED)})

    def gain(identity: str, names: Sequence[str]) -> pd.Series:
        return sum(wide[identity, True, name] - wide[identity, False, name] for name in names) / len(names)

    found = []
    for identity in (TAG, VECTOR):
        plain, own, mixed = (gain(identity, names) for names in (["none"], ["agents"], shuffled))
        before = wide[identity, False, "none"]
        cost = wide[identity, False, "agents"] - before
        other = sum(wide[identity, False, name] for name in shuffled) / len(shuffled) - before
        means = {
            "gain": (plain, 0), "gain, agents erased": (own, 1), "gain, shuffled erased": (mixed, len(shuffled)),
            "cost": (cost, 1), "cost shuffled": (other, len(shuffled)),
        }  # fmt: skip
        for quantity, (values, k) in means.items():
            mean = mean_interval(values.to_numpy())
            found.append((identity, quantity, mean.mean, mean.low, mean.high, mean.n, k))
        for quantity, values, k in (("survives", own, 1), ("survives shuffled", mixed, len(shuffled))):
            share = ratio(values.to_numpy(), plain.to_numpy())
            found.append((identity, quantity, share.value, share.low, share.high, share.n, k))
    return pd.DataFrame(found, columns=["identity", "quantity", "mean", "low", "high", "n", "k"])


def at_stage(inputs: Inputs, stage: str, setting: Setting) -> dict[str, pd.DataFrame]:
    """The tables of one checkpoint: separability, choice, and the texts."""
    model, tokenizer = inputs.load(stage)
    train: Sequence[DebateTrace] = inputs.train[: setting.train]
    acts = first_round(turn_activations(model, tokenizer, train, "trace"))
    layers = [int(layer) for layer in acts["mean"].layers]
    grid = Grid(
        layers=tuple(layers[:-1]), extents=("all", "from_last_prompt_token:4"), coefficients=setting.coefficients,
        max_new_tokens=setting.max_new_tokens, seed=setting.seed,
    )  # fmt: skip
    by_place = {("trace", position): one for position, one in acts.items()}
    validation = inputs.validation[: setting.validation]
    choice, _ = choose(model, tokenizer, by_place, validation, grid, inputs.openings)
    return {
        "separability": separability(acts, setting),
        "choice": pd.DataFrame([asdict(choice)]),
        "texts": texts(model, tokenizer, inputs, stage, acts, choice, setting),
    }


def run(folder: Path, out: Path, setting: Setting) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """All tables of SFT and IMAD, by name, and their provenance; a finished checkpoint is kept."""
    inputs, config = inputs_of_run(folder, only=(SFT, IMAD)), read_json(folder / "config.json")
    about = {
        "family": config["family"],
        "seed": config["seed"],
        "setting": asdict(setting),
        "traces": sha256("".join(trace.text for trace in (*inputs.train, *inputs.validation, *inputs.test))),
        "stages": {name: inputs.about(name) for name in (SFT, IMAD)},
    }
    parts: dict[str, list[pd.DataFrame]] = {"separability": [], "choice": [], "survival": []}
    with run_folder(out, about) as kept:
        for stage in (SFT, IMAD):
            paths = {name: kept / f"{stage}-{name}.csv" for name in ("separability", "choice", "texts")}
            if not all(path.exists() for path in paths.values()):
                tables = at_stage(inputs, stage, setting)
                for name, path in paths.items():
                    write_table(path, tables[name], about)
            read = {name: read_table(path)[0] for name, path in paths.items()}
            read["survival"] = survival(read["texts"])
            for name, several in parts.items():
                several.append(read[name].assign(stage=stage))
    return {name: pd.concat(several, ignore_index=True) for name, several in parts.items()}, about


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the analysis and write its tables."""
    parser = argparse.ArgumentParser(prog="python -m analysis erasure", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run of training.imad")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; the same call resumes it")
    parser.add_argument("--results", type=Path, help="folder that the tables are also written to")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field, e.g. test=32")
    given = parser.parse_args(arguments)
    try:
        setting = override(Setting(), given.set)
    except ValueError as error:
        parser.error(str(error))
    tables, about = run(given.run, given.out, setting)
    for folder in (given.out, *([] if given.results is None else [given.results])):
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            write_table(folder / f"erasure_{name}.csv", table, published(about))
    shown = tables["separability"].pivot_table(
        index=["stage", "position", "layer"], columns="features", values="accuracy"
    )
    print(shown.round(3), tables["choice"].to_string(index=False), sep="\n")
    print(tables["survival"].round(3).to_string(index=False))
