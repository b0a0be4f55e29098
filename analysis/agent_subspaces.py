"""`python -m analysis.agent_subspaces`: does each agent survive as a direction that steers? Tables, one folder.

For every checkpoint: vectors per agent from training debates, a setting chosen on validation debates, and on test
debates the gains of that setting over coefficient 0 and over controls, with the agent's tag in the context and without.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import steerkit as sk
from analysis.directions import Source, agent_vectors, controls, turn_streams
from analysis.fidelity import Named, fidelity, first_texts, unnamed
from analysis.material import Material, add_material, material_of
from analysis.reliability import reliability
from analysis.stages import areas, differences
from steerkit import artifacts, scoring
from steerkit.activations import Activations
from steerkit.folders import run_folder
from steerkit.results import SweepResult
from steerkit.traces import DebateTrace, without_tags
from training.presets import changed

SCORES = ("rouge_l", "fidelity")
PLACE = ["source", "position", "layer"]


@dataclass(frozen=True)
class Grid:
    """What is tried, and on how much.

    Args:
        sources: what is read, see `analysis.directions.turn_streams`.
        positions: read positions, see `analysis.directions`.
        layers: None for all.
        coefficients: of the choice on validation, and of the curves.
        negative: further coefficients of the curves.
        train, validation, test: at most so many debates.
        controls: directions of each kind.
        max_new_tokens: of the continuations.
    """

    sources: tuple[Source, ...] = ("trace", "plain")
    positions: tuple[str, ...] = ("last", "mean", "first", "tag")
    layers: tuple[int, ...] | None = None
    coefficients: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
    negative: tuple[float, ...] = (-2.0, -1.0)
    train: int = 400
    validation: int = 32
    test: int = 40
    controls: int = 2
    max_new_tokens: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Choice:
    """The setting that is frozen on validation: one for all agents."""

    source: str
    position: str
    layer: int
    coefficient: float


def directions_of(model: Any, tokenizer: Any, traces: Sequence[DebateTrace], grid: Grid) -> dict[tuple[str, str], Any]:
    """(source, position) -> the turns' streams."""
    found: dict[tuple[str, str], Activations] = {}
    for source in grid.sources:
        for position, acts in turn_streams(model, tokenizer, traces, source).items():
            if position in grid.positions:
                found[source, position] = acts
    return found


def choose(
    model: Any,
    tokenizer: Any,
    streams: Mapping[tuple[str, str], Activations],
    traces: Sequence[DebateTrace],
    grid: Grid,
) -> tuple[Choice, pd.DataFrame]:
    """The setting whose worst agent gains most fidelity over coefficient 0 without identity, and all that was tried.

    Everything is tried on a quarter of the debates, and the better quarter of the places (source, position, layer) on
    all of them; the choice is among those. In the table, `screened` tells the first from the second.
    """

    def trial(held: Sequence[DebateTrace], places: Mapping[tuple[str, str], tuple[int, ...]]) -> pd.DataFrame:
        tried = []
        for (source, position), layers in places.items():
            vectors = agent_vectors(streams[source, position])
            result = fidelity(model, tokenizer, held, vectors, layers, grid.coefficients)
            for agent in vectors:
                own = _only(result, agent, [agent])
                tried.append(own.gain("fidelity").assign(agent=agent, source=source, position=position))
        return pd.concat(tried, ignore_index=True).drop(columns="vector")

    every = {key: grid.layers or tuple(int(layer) for layer in acts.layers) for key, acts in streams.items()}
    few = trial(traces[: max(4, len(traces) // 4)], every)
    worst = few.groupby([*PLACE, "coefficient"], sort=False)["gain"].min()
    ranked = worst.groupby(PLACE, sort=False).max().sort_values(ascending=False)
    better: dict[tuple[str, str], tuple[int, ...]] = {}
    for source, position, layer in ranked.index[: max(1, len(ranked) // 4)]:
        better[source, position] = (*better.get((source, position), ()), int(layer))
    many = trial(traces, better)
    source, position, layer, coefficient = many.groupby([*PLACE, "coefficient"], sort=False)["gain"].min().idxmax()
    table = pd.concat([few.assign(screened=True), many.assign(screened=False)], ignore_index=True)
    return Choice(source, position, int(layer), float(coefficient)), table


def _only(result: SweepResult, agent: str, vectors: Sequence[str]) -> SweepResult:
    """The rows in which some vectors push towards one agent."""
    table = result.table
    return SweepResult(table[(table["agent"] == agent) & table["vector"].isin(vectors)], result.meta)


def continuations(
    model: Any,
    tokenizer: Any,
    traces: Sequence[DebateTrace],
    vectors: Mapping[str, sk.SteeringVector],
    layer: int,
    grid: Grid,
    before: Named,
    out: Path,
) -> SweepResult:
    """Greedy steered continuations without their tags, scored by ROUGE-L against each agent's own first text.

    Without identity all agents share a context: it is continued once, and held against each agent's text.
    """
    said = {trace.question: first_texts(trace) for trace in traces}
    identity = before is not unnamed
    if identity:
        prompts = [
            {"prompt": before(trace, agent), "id": f"{trace.question}/{agent}", "group": trace.question}
            for trace in traces
            for agent in said[trace.question]
        ]
    else:
        prompts = [{"prompt": trace.prompt, "id": trace.question} for trace in traces]
    result = sk.sweep(
        model, tokenizer, vectors, prompts, coefficients=[*grid.negative, 0.0, *grid.coefficients], layers=[layer],
        positions="all", max_new_tokens=grid.max_new_tokens, seed=grid.seed, foreign=True, out=out,
    )  # fmt: skip
    table = result.table
    if identity:
        table = table.assign(agent=[key.rpartition("/")[2] for key in table["prompt_id"]])
    else:
        agents = sorted({agent for texts in said.values() for agent in texts})
        table = pd.concat([table.assign(agent=agent) for agent in agents], ignore_index=True)
        table["prompt_id"] = table["prompt_id"] + "/" + table["agent"]
    references = [said[group].get(agent, "") for group, agent in zip(table["group"], table["agent"], strict=True)]
    said_without = [without_tags(text) for text in table["text"]]
    scored = SweepResult(table.assign(text=said_without, reference=references), {**result.meta, "identity": identity})
    return scored.score("rouge_l")


def curves(result: SweepResult, score: str, agents: Sequence[str], controls: Sequence[str]) -> pd.DataFrame:
    """Mean, interval and area per agent and kind of direction: own, other agents', random, matched, shuffled."""
    parts = []
    for agent in agents:
        kinds = {"own": [agent], "other agents": [name for name in agents if name != agent]}
        kinds |= {kind: [n for n in controls if n.startswith(kind)] for kind in ("random", "matched", "shuffled")}
        for kind, names in kinds.items():
            some = _only(result, agent, names)
            pooled = SweepResult(some.table.assign(vector=kind), some.meta)
            curve = pooled.curve(score).assign(agent=agent)
            area = pooled.curve_auc(score, normalize=True).iloc[0]
            parts.append(curve.assign(area=area["curve_auc"], area_low=area["low"], area_high=area["high"]))
    return pd.concat(parts, ignore_index=True).rename(columns={"vector": "kind"})


def gains(
    result: SweepResult, score: str, agents: Sequence[str], controls: Sequence[str], coefficient: float
) -> pd.DataFrame:
    """At the frozen coefficient each agent's gain over coefficient 0 and each kind of control; Holm over agents."""
    parts = []
    over = {"coefficient 0": None} | {
        kind: [n for n in controls if n.startswith(kind)] for kind in ("random", "matched", "shuffled")
    }
    for kind, names in over.items():
        lines = []
        for agent in agents:
            some = _only(result, agent, [agent, *(names or [])])
            table = some.gain(score, over=names, vectors=[agent])
            lines.append(table[table["coefficient"] == coefficient].assign(agent=agent, over=kind))
        block = pd.concat(lines, ignore_index=True)
        parts.append(block.assign(p_holm=scoring.holm(block["p"])))
    return pd.concat(parts, ignore_index=True).drop(columns="vector")


def plane(vectors: Mapping[str, sk.SteeringVector], acts: Activations, layer: int) -> pd.DataFrame:
    """Turns, less their mean, and the vectors in the plane that the vectors span: stage by stage, what a picture shows.

    Columns: kind (`turn` or `vector`), agent, x, y, n (questions). The axes are orthonormal, so lengths are the
    stream's; the first lies where the vectors are longest.
    """
    agents = sorted(vectors)
    rows = torch.stack([vectors[agent].layers[layer] for agent in agents]).double()
    axes = torch.linalg.svd(rows, full_matrices=False).Vh[:2]
    stream = acts.at(layer).double()
    n = acts.items["group"].nunique()
    found = [("vector", agent, *map(float, axes @ row), n) for agent, row in zip(agents, rows, strict=True)]
    places = (stream - stream.mean(0)) @ axes.T
    found += [("turn", label, *point, n) for label, point in zip(acts.items["label"], places.tolist(), strict=True)]
    return pd.DataFrame(found, columns=["kind", "agent", "x", "y", "n"])


def at_stage(name: str, checkpoint: str | Path, material: Material, grid: Grid, out: Path) -> dict[str, pd.DataFrame]:
    """All tables of one checkpoint."""
    model, tokenizer = sk.load(checkpoint)
    train, validation, test = material.train[: grid.train], material.validation[: grid.validation], material.test
    test = test[: grid.test]
    streams = directions_of(model, tokenizer, train, grid)
    choice, tried = choose(model, tokenizer, streams, validation, grid)
    acts = streams[choice.source, choice.position]
    own = agent_vectors(acts)
    against = controls(acts, own, grid.controls, grid.seed)
    agents, names = sorted(own), list(against)
    norms = sum(float(own[a].layers[choice.layer].norm()) for a in agents) / len(agents)
    found = {"tried": tried, "reliability": reliability(acts, [choice.layer], seed=grid.seed)}
    held = turn_streams(model, tokenizer, test, choice.source)[choice.position]  # type: ignore[arg-type]
    found["plane"] = plane(own, held, choice.layer)
    found["cosines"] = pd.DataFrame(
        [
            (layer, a, b, own[a].cosine(own[b])[layer])
            for layer in own[agents[0]].layers
            for a in agents
            for b in agents
        ],
        columns=["layer", "agent", "other", "cosine"],
    )
    every: dict[str, list[pd.DataFrame]] = {"curves": [], "gains": []}
    for before, short in ((unnamed, "none"), (material.identity(name), "tag")):
        vectors = {**own, **against}
        rouge = continuations(model, tokenizer, test, vectors, choice.layer, grid, before, out / short)
        doses = (*grid.negative, *grid.coefficients)
        faith = fidelity(model, tokenizer, test, vectors, [choice.layer], doses, before)
        for score, result in zip(SCORES, (rouge, faith), strict=True):
            about = {"score": score, "identity": before is not unnamed, "stage": name}
            about |= {"source": choice.source, "position": choice.position}
            every["curves"].append(curves(result, score, agents, names).assign(**about))
            every["gains"].append(gains(result, score, agents, names, choice.coefficient).assign(**about))
        rouge.save(out / f"rouge_l-{short}.parquet")
        faith.save(out / f"fidelity-{short}.parquet")
    found |= {kind: pd.concat(parts, ignore_index=True) for kind, parts in every.items()}
    found["choice"] = pd.DataFrame(
        [{**asdict(choice), "norm": norms, "settings_tried": int(tried["screened"].sum()) // len(agents)}]
    )
    for agent, vector in own.items():
        vector.save(out / f"agent-{agent}.safetensors")
    return {kind: table.assign(stage=name) for kind, table in found.items()}


def between(folders: Mapping[str, Path]) -> list[pd.DataFrame]:
    """Each later checkpoint's areas minus the first one's, see `analysis.stages.differences`."""
    first, *later = folders
    found = []
    for score in SCORES:
        for short in ("none", "tag"):
            results = {name: SweepResult.load(path / f"{score}-{short}.parquet") for name, path in folders.items()}
            agents = sorted(set(results[first].table["agent"]))
            for name in later:
                about = {"score": score, "identity": short == "tag", "stage": name, "minus": first}
                found.append(
                    differences(results[first], results[name], partial(areas, score=score), agents).assign(**about)
                )
    return found or [pd.DataFrame()]


def analyse(material: Material, grid: Grid, out: str | Path) -> dict[str, pd.DataFrame]:
    """Tables of all checkpoints, written as `out/KIND.csv`; a checkpoint that is done is not analysed again."""
    out = Path(out)
    config: dict[str, Any] = {"stages": {n: str(p) for n, p in material.stages.items()}, "grid": asdict(grid)}
    config["traces"] = artifacts.sha256(
        "".join(t.text for t in (*material.train, *material.validation, *material.test))
    )
    tables: dict[str, list[pd.DataFrame]] = {}
    folders: dict[str, Path] = {}
    with run_folder(out, config):
        for name, checkpoint in material.stages.items():
            folder = out / "stages" / artifacts.file_name(name)
            kinds = ("tried", "choice", "curves", "gains", "cosines", "plane", "reliability")
            if not all((folder / f"{kind}.csv").exists() for kind in kinds):
                for kind, table in at_stage(name, checkpoint, material, grid, folder).items():
                    artifacts.write_table(folder / f"{kind}.csv", table, config)
            for kind in kinds:
                tables.setdefault(kind, []).append(artifacts.read_table(folder / f"{kind}.csv")[0])
            folders[name] = folder
        tables["stage_differences"] = between(folders)
        whole = {kind: pd.concat(parts, ignore_index=True) for kind, parts in tables.items()}
        for kind, table in whole.items():
            artifacts.write_table(out / f"{kind}.csv", table, config)
    return whole


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis.agent_subspaces", description=__doc__)
    add_material(parser)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of Grid: layers=[8,14]")
    given = parser.parse_args(arguments)
    try:
        grid = changed(Grid(), given.set)
    except ValueError as error:
        parser.error(str(error))
    tables = analyse(material_of(given, parser), grid, given.out)
    print(tables["choice"].to_string(index=False))
    print(tables["gains"].round(3).to_string(index=False))


if __name__ == "__main__":
    main()
