"""Erased identity: what is left of the agents when LEACE has erased which of them speaks, on held-out debates.

Agents are read where their texts are decided and written: at the last token before a turn of round 1 (`asked`: the
trace up to and including the agent's tag), and at the first and the last token of the turn. Erasures act there, from
the last token of the prompt on.

Separability: the accuracy of a probe of the agents' names, before and after the erasure, on questions that neither the
erasure nor the probe was fitted on; beside it the erasure of shuffled names, which has the same rank. `erased` is
fitted at one position, `erased together` is the erasure of all positions that the texts are written under.

Steering: an agent's vector is added at one layer, and the names are erased after every later block. The added vector is
still in the stream there. So an erasure can remove the vector itself, whatever the model computed from it. Two
measurements show this. The control `injected` removes the agents' vectors after the same blocks. The table of changes
has the share of each vector that an erasure leaves.

Names: the same is measured for an agent that is named by the trace up to its tag, or by its tag alone. Here the names
are erased after every block; block 0 still reads the tag's embedding. All erasures have two controls of equal rank:
erasures of shuffled names, and the directions of largest variance within an agent.
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
from analysis.agents.activations import activations_of, turn_activations
from analysis.agents.choose import Choice, Grid, choose, tried_vectors
from analysis.agents.contexts import Context, by_tag, first_texts, tag_alone, unnamed
from analysis.agents.continuations import TEMPERATURE, TOP_P
from analysis.agents.speaker import first_turn
from analysis.agents.vectors import within_labels
from analysis.inputs import IMAD, SFT, Inputs, inputs_of_run
from analysis.published import published
from analysis.stored import stored_parts
from steerkit.capture.activations import Activations
from steerkit.io.files import sha256
from steerkit.io.json import read_json
from steerkit.io.run_folder import run_folder
from steerkit.io.tables import read_table, write_table
from steerkit.probes.erasure import Eraser, Erasure
from steerkit.scores.text import rouge_l
from steerkit.stats.mean import mean_interval
from steerkit.stats.paired import ratio
from steerkit.text.traces import DebateTrace
from steerkit.vectors.controls import shuffle_labels
from training.settings import override

POSITIONS = ("asked", "first", "last")
"""Where agents are read and erasures are fitted."""
AGENTS, SHUFFLED, VARIANCE, INJECTED = "agents", "shuffled", "variance", "injected"
TRACE, TAG, VECTOR = "trace", "tag", "vector"
IDENTITIES = (TRACE, TAG, VECTOR)
"""What names an agent: the trace up to its tag, its tag alone, or its vector."""
EXTENT, ERASED = "from_last_prompt_token:4", "from_last_prompt_token"
"""Where a vector is added, and where names are erased: at the positions that erasures are fitted on."""
ERASURES = ("none", AGENTS, SHUFFLED, VARIANCE, INJECTED)
LEAST_GAIN = 0.1
"""An identity that adds less ROUGE-L has nothing to lose: no surviving share is given."""


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
    }


def joined(acts: Mapping[str, Activations]) -> Activations:
    """The items of several read positions as one, for one erasure that acts at all of them.

    The mean of each position is moved to the mean of all, and the column `class` names position and agent: an erasure
    of these classes makes the agents' means equal at every single position, and leaves the positions' means in place
    where they differ from each other outside its directions.
    """
    several = list(acts.items())
    means = [one.resid.mean(0, keepdim=True) for _, one in several]
    middle = torch.stack(means).mean(0)
    resid = torch.cat([one.resid - mean + middle for (_, one), mean in zip(several, means, strict=True)])
    items = [
        one.items.assign(**{"class": [f"{position} {label}" for label in one.items["label"]]})
        for position, one in several
    ]
    return replace(several[0][1], resid=resid, items=pd.concat(items, ignore_index=True))


def erasers_of(acts: Mapping[str, Activations], setting: Setting) -> dict[str, Eraser]:
    """The erasure of the agents' names, and those of the controls that have its rank.

    Returns:
        `agents`; `shuffled 0` and so on: names shuffled within each question, balanced, so that nothing is left of the
        agents' means; `variance`: the directions of largest variance around the means of position and agent.
    """
    names = joined(acts)
    own = sk.leace(names, "class", setting.shrinkage)
    found = {AGENTS: own}
    for number in range(setting.shuffles):
        seed = setting.seed + number
        mixed = {position: shuffle_labels(one, seed, balanced=True) for position, one in acts.items()}
        found[f"{SHUFFLED} {number}"] = sk.leace(joined(mixed), "class", setting.shrinkage)
    within, largest = within_labels(names, "class"), {}
    for layer in names.layers:
        x = within.at(layer).double()
        _, _, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        kept = directions[: own.at(layer).left.shape[0]]
        largest[layer] = Erasure(x.mean(0), kept.T.contiguous(), kept)
    return found | {VARIANCE: replace(own, layers=largest, meta={**own.meta, "label": VARIANCE})}


def injected(vectors: Mapping[str, sk.SteeringVector], layer: int, of: Eraser) -> Eraser:
    """The map that removes the span of the agents' vectors of one layer, at every layer of another eraser."""
    several = torch.stack([vector.layers[layer] for vector in vectors.values()]).double()
    _, size, directions = torch.linalg.svd(several, full_matrices=False)
    kept = directions[size > 1e-6 * size.max()]  # the agents' vectors sum to 0
    layers = {at: Erasure(erasure.mean, kept.T.contiguous(), kept) for at, erasure in of.layers.items()}
    return replace(of, layers=layers, meta={**of.meta, "label": INJECTED})


def changes(
    acts: Mapping[str, Activations], erasers: Mapping[str, Eraser], vectors: Mapping[str, sk.SteeringVector], layer: int
) -> pd.DataFrame:
    """How much each erasure changes.

    Returns:
        One row per erasure, layer and what is changed (`of`): a read position, with `share` the mean of
        `|x - erased x| / |x|`; or `vector 1` and so on (the agents' vectors of `layer`), with `share` = `|what is left
        of v| / |v|`.
    """
    rows = []
    for name, eraser in erasers.items():
        for at, erasure in eraser.layers.items():
            for position, one in acts.items():
                x = one.at(at).double()
                rows.append((name, at, position, float(((x - erasure(x)).norm(dim=1) / x.norm(dim=1)).mean())))
            for agent, vector in vectors.items():
                v = vector.layers[layer].double()
                left = v - v @ erasure.right @ erasure.left
                rows.append((name, at, f"{VECTOR} {agent}", float(left.norm() / v.norm())))
    return pd.DataFrame(rows, columns=["erasure", "layer", "of", "share"])


def separability(acts: Mapping[str, Activations], setting: Setting) -> pd.DataFrame:
    """Accuracy of a probe of the agents' names by read position, layer and features.

    Returns:
        The rows of `sk.probe_erased`; and with the features `erased together` and `erased_shuffled together` the same
        probe on half of the questions, under the erasures of all positions that were fitted on the other half.
    """
    alone = [
        sk.probe_erased(one, shrinkage=setting.shrinkage, seed=setting.seed).assign(position=position)
        for position, one in acts.items()
    ]
    questions = next(iter(acts.values())).items["group"]
    fitted = set(questions.drop_duplicates().iloc[::2])

    def half(which: bool) -> dict[str, Activations]:
        return {name: one.where((one.items["group"].isin(fitted) == which).to_numpy()) for name, one in acts.items()}

    erasers = erasers_of(half(True), replace(setting, shuffles=1))
    together = []
    for position, one in half(False).items():
        for features, name in (("erased together", AGENTS), ("erased_shuffled together", f"{SHUFFLED} 0")):
            table = sk.probe_layers(erasers[name].apply(one), seed=setting.seed).table
            some = table[(table["features"] == "resid") & (table["labels"] == "true") & (table["layer"] != "nested")]
            together.append(some.assign(position=position, features=features))
    kept = ["layer", "features", "accuracy", "accuracy_low", "accuracy_high", "majority", "n", "n_groups", "position"]
    return pd.concat([*alone, *together], ignore_index=True)[kept]


@contextlib.contextmanager
def erased(model: Any, eraser: Any, layers: Sequence[int]) -> Iterator[None]:
    """Erase after these blocks inside the `with`; without an eraser nothing is changed."""
    with contextlib.ExitStack() as stack:
        if eraser is not None:
            for layer in layers:
                steering = sk.erase(eraser, layer, positions=ERASED, foreign=True)
                stack.enter_context(steering.on(model))
        yield


def texts(
    model: Any,
    tokenizer: Any,
    inputs: Inputs,
    erasers: Mapping[str, Eraser],
    vectors: Mapping[str, sk.SteeringVector],
    choice: Choice,
    setting: Setting,
    log: Path | None = None,
) -> pd.DataFrame:
    """Continuations of the test debates with each agent's identity from its tag or its vector, erased or not.

    Texts of equal contexts, steering and erasure are written once: where no agent is named, for several identities.

    Args:
        log: JSON-lines file of the texts, which a killed call resumes from; None keeps nothing.

    Returns:
        One row per question, agent, identity, given and erasure, with the text of the first turn and `rouge_l` to the
        agent's own first text. `identity` is one of `IDENTITIES`. `given` is True where it names the agent, and False
        where nothing does. `erasure` is `none`, or the name of an eraser; `injected` is tried for the identity `vector`
        alone.
    """
    every = [int(layer) for layer in erasers[AGENTS].layers]
    later = [layer for layer in every if layer > choice.layer]
    asked = [(trace, agent) for trace in inputs.test[: setting.test] for agent in first_texts(trace)]
    contexts: Mapping[str, Context] = {TRACE: by_tag, TAG: tag_alone, VECTOR: unnamed}
    cells = [
        (name, identity, named)
        for name in ("none", *erasers)
        for identity in IDENTITIES
        for named in (True, False)
        if name != INJECTED or identity == VECTOR
    ]

    def layers_of(name: str, identity: str) -> list[int]:
        return [] if name == "none" else later if identity == VECTOR else every

    def written(index: int) -> list[str]:
        name, identity, named = cells[index]
        context = contexts[identity] if named else unnamed
        steering = [
            sk.Steering(vectors[agent].at(choice.layer), choice.coefficient, choice.extent, foreign=True)
            if identity == VECTOR and named else None
            for _, agent in asked
        ]  # fmt: skip
        with erased(model, erasers.get(name), layers_of(name, identity)):
            return sk.generate(
                model, tokenizer, [context(tokenizer, trace, agent) for trace, agent in asked], steering=steering,
                max_new_tokens=setting.max_new_tokens, temperature=TEMPERATURE, top_p=TOP_P, seed=setting.seed,
            )  # fmt: skip

    keys = [[name, layers_of(name, identity), identity if named else ""] for name, identity, named in cells]
    rows: list[dict[str, Any]] = []
    for (name, identity, named), part in zip(cells, stored_parts(log, keys, written), strict=True):
        turns = [first_turn(text, inputs.openings).text for text in part]
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
        One row per identity, erasure (`none`, `agents`, `shuffled`: the mean over the shuffles,
        `variance`, `injected`) and quantity: mean, low, high (95 % over questions), n (questions), k (erasures). With
        R(given, erasure) the mean ROUGE-L of a question, the quantities are

            gain     = R(True, erasure) - R(False, erasure)
            survives = gain / gain with `none`, a ratio of means (`steerkit.stats.paired.ratio`); NaN where that gain
                       is below `LEAST_GAIN`
            cost     = R(False, erasure) - R(False, none)
    """
    wide = rows.pivot_table(index="question", columns=["identity", "given", "erasure"], values="rouge_l")
    found = []
    for identity in [one for one in IDENTITIES if one in wide.columns.get_level_values("identity")]:
        there = sorted({name for one, _, name in wide.columns if one == identity})
        groups = {name: [one for one in there if one.partition(" ")[0] == name] for name in ERASURES}
        before = wide[identity, False, "none"]
        plain = wide[identity, True, "none"] - before
        for erasure, names in groups.items():
            if not names:
                continue
            unnamed_ = sum(wide[identity, False, name] for name in names) / len(names)
            gain = sum(wide[identity, True, name] for name in names) / len(names) - unnamed_
            means = {"gain": gain} if erasure == "none" else {"gain": gain, "cost": unnamed_ - before}
            for quantity, values in means.items():
                mean = mean_interval(values.to_numpy())
                found.append((identity, erasure, quantity, mean.mean, mean.low, mean.high, mean.n, len(names)))
            if erasure != "none":
                value = low = high = float("nan")
                if plain.mean() >= LEAST_GAIN:
                    share = ratio(gain.to_numpy(), plain.to_numpy())
                    value, low, high = share.value, share.low, share.high
                found.append((identity, erasure, "survives", value, low, high, len(wide), len(names)))
    return pd.DataFrame(found, columns=["identity", "erasure", "quantity", "mean", "low", "high", "n", "k"])


def at_stage(inputs: Inputs, stage: str, setting: Setting, out: Path) -> dict[str, pd.DataFrame]:
    """The tables of one checkpoint: separability, choice, changes, and the texts.

    The folder keeps the sweeps of the choice and the texts, which a killed call resumes from.
    """
    model, tokenizer = inputs.load(stage)
    train: Sequence[DebateTrace] = inputs.train[: setting.train]
    turns = first_round(turn_activations(model, tokenizer, train, "trace"))
    asked = activations_of(model, tokenizer, train, ["asked"], by_tag)
    acts = {position: asked["asked", "last"] if position == "asked" else turns[position] for position in POSITIONS}
    layers = [int(layer) for layer in turns["last"].layers]
    grid = Grid(
        layers=tuple(layers[:-1]), extents=(EXTENT,), coefficients=setting.coefficients,
        max_new_tokens=setting.max_new_tokens, seed=setting.seed,
    )  # fmt: skip
    by_place = {("trace", position): one for position, one in turns.items()}
    validation = inputs.validation[: setting.validation]
    choice, _ = choose(model, tokenizer, by_place, validation, grid, inputs.openings, out)
    vectors = tried_vectors(by_place, "trace", choice.position, out)
    erasers = erasers_of(acts, setting)
    erasers[INJECTED] = injected(vectors, choice.layer, erasers[AGENTS])
    return {
        "separability": separability(acts, setting),
        "choice": pd.DataFrame([asdict(choice)]),
        "changes": changes(acts, erasers, vectors, choice.layer),
        "texts": texts(model, tokenizer, inputs, erasers, vectors, choice, setting, out / "texts.jsonl"),
    }


def run(folder: Path, out: Path, setting: Setting) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """All tables of SFT and IMAD, by name, and their provenance; finished parts are kept."""
    inputs, config = inputs_of_run(folder, only=(SFT, IMAD)), read_json(folder / "config.json")
    about = {
        "family": config["family"],
        "seed": config["seed"],
        "setting": asdict(setting),
        "traces": sha256("".join(trace.text for trace in (*inputs.train, *inputs.validation, *inputs.test))),
        "stages": {name: inputs.about(name) for name in (SFT, IMAD)},
    }
    parts: dict[str, list[pd.DataFrame]] = {"separability": [], "choice": [], "changes": [], "survival": []}
    with run_folder(out, about) as kept:
        for stage in (SFT, IMAD):
            paths = {name: kept / f"{stage}-{name}.csv" for name in ("separability", "choice", "changes", "texts")}
            if not all(path.exists() for path in paths.values()):
                tables = at_stage(inputs, stage, setting, kept / stage)
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
