"""`python -m analysis.agents.subspaces`: does each agent survive as a direction that steers? Tables, one folder.

For every checkpoint: vectors per agent from training debates, a setting chosen on validation debates, and on test
debates the gains of that setting over coefficient 0 and over controls, with the agent's tag in the context and without.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import steerkit as sk
from analysis.agents.choose import Grid, choose, only
from analysis.agents.contexts import continuations
from analysis.agents.fidelity import fidelity, unnamed
from analysis.agents.material import Material, add_material, material_of
from analysis.agents.reliability import reliability
from analysis.agents.stages import areas, checkpoint_cosines, differences, published_vectors
from analysis.agents.vectors import agent_vectors, controls, streams_of
from steerkit.capture.activations import Activations
from steerkit.io.files import file_name, sha256
from steerkit.io.run_folder import run_folder
from steerkit.io.tables import read_table, write_table
from steerkit.stats.multiple import holm
from steerkit.sweeps.result import SweepResult
from training.presets import override

SCORES = ("rouge_l", "fidelity")


def curves(result: SweepResult, score: str, agents: Sequence[str], controls: Sequence[str]) -> pd.DataFrame:
    """Mean, interval and area per agent and kind of direction: own, other agents', random, matched, shuffled."""
    parts = []
    for agent in agents:
        kinds = {"own": [agent], "other agents": [name for name in agents if name != agent]}
        kinds |= {kind: [n for n in controls if n.startswith(kind)] for kind in ("random", "matched", "shuffled")}
        for kind, names in kinds.items():
            some = only(result, agent, names)
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
            some = only(result, agent, [agent, *(names or [])])
            table = some.gain(score, over=names, vectors=[agent])
            lines.append(table[table["coefficient"] == coefficient].assign(agent=agent, over=kind))
        block = pd.concat(lines, ignore_index=True)
        parts.append(block.assign(p_holm=holm(block["p"])))
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


def at_stage(name: str, material: Material, grid: Grid, out: Path) -> dict[str, pd.DataFrame]:
    """All tables of one checkpoint."""
    model, tokenizer = material.load(name)
    train, validation, test = material.train[: grid.train], material.validation[: grid.validation], material.test
    test, named = test[: grid.test], material.identity(name)
    streams = streams_of(model, tokenizer, train, grid.sources, named)
    choice, tried = choose(model, tokenizer, streams, validation, grid)
    acts = streams[choice.source, choice.position]
    own = agent_vectors(acts)
    against = controls(acts, own, grid.controls, grid.seed)
    agents, names = sorted(own), list(against)
    found = {"tried": tried, "reliability": reliability(acts, [choice.layer], seed=grid.seed)}
    held = streams_of(model, tokenizer, test, (choice.source,), named)[choice.source, choice.position]
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
    doses = (*grid.negative, *grid.coefficients)
    bands = [name for name in names if int(name.split()[1]) < grid.bands]
    for before, short in ((unnamed, "none"), (named, "tag")):
        drawn = {**own, **{band: against[band] for band in bands}}, [choice.layer], doses, before, choice.extent
        frozen = {**own, **against}, [choice.layer], [choice.coefficient], before, choice.extent
        length = grid.max_new_tokens, grid.seed
        rouge = continuations(model, tokenizer, test, *drawn, *length, out / short)
        at_one = continuations(model, tokenizer, test, *frozen, *length, out / f"{short}-frozen")
        faith, faith_at_one = (fidelity(model, tokenizer, test, *pushed) for pushed in (drawn, frozen))
        for score, result, one in zip(SCORES, (rouge, faith), (at_one, faith_at_one), strict=True):
            about = {"score": score, "identity": before is not unnamed, "stage": name}
            about |= {"source": choice.source, "position": choice.position, "extent": choice.extent}
            every["curves"].append(curves(result, score, agents, bands).assign(**about))
            every["gains"].append(gains(one, score, agents, names, choice.coefficient).assign(**about))
            result.save(out / f"{score}-{short}.parquet")
            one.save(out / f"{score}-{short}-frozen.parquet")
    found |= {kind: pd.concat(parts, ignore_index=True) for kind, parts in every.items()}
    pushes = rouge.table[rouge.table["vector"].isin(agents) & (rouge.table["coefficient"] == choice.coefficient)]
    line = {**asdict(choice), "relative_dose": float(pushes["relative_dose"].mean())}
    found["choice"] = pd.DataFrame([{**line, "settings_tried": int(tried["screened"].sum()) // len(agents)}])
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


def analyse(material: Material, grid: Grid, out: str | Path, only: Sequence[str] = ()) -> dict[str, pd.DataFrame]:
    """Tables of all checkpoints, written as `out/KIND.csv`; a checkpoint that is done is not analysed again.

    Args:
        only: analyse these checkpoints, each in its own folder, and write no tables of all: several processes can share
            an analysis so.

    Raises:
        ValueError: a checkpoint's name that is not among the material's.
        ConfigurationChanged, RunFolderBusy: see `steerkit.io.run_folder`.
    """
    out = Path(out)
    if unknown := [name for name in only if name not in material.stages]:
        raise ValueError(f"expected checkpoints among {list(material.stages)}; got {unknown}. Choose among these.")
    config: dict[str, Any] = {"grid": asdict(grid)}
    config["traces"] = sha256("".join(t.text for t in (*material.train, *material.validation, *material.test)))
    tables: dict[str, list[pd.DataFrame]] = {}
    folders = {name: out / "stages" / file_name(name) for name in material.stages}
    kinds = ("tried", "choice", "curves", "gains", "cosines", "plane", "reliability")
    for name in only or material.stages:
        own = config | {"stages": {name: material.about(name)}}
        with run_folder(folders[name], own) as folder:
            if not all((folder / f"{kind}.csv").exists() for kind in kinds):
                for kind, table in at_stage(name, material, grid, folder).items():
                    write_table(folder / f"{kind}.csv", table, own)
    if only:
        return {}
    config["stages"] = {name: material.about(name) for name in material.stages}
    with run_folder(out, config):
        for folder in folders.values():
            for kind in kinds:
                tables.setdefault(kind, []).append(read_table(folder / f"{kind}.csv")[0])
        tables["stage_differences"] = between(folders)
        published = {name: published_vectors(material, name, grid.train, path) for name, path in folders.items()}
        tables["checkpoint_cosines"] = [checkpoint_cosines(published)]
        whole = {kind: pd.concat(parts, ignore_index=True) for kind, parts in tables.items()}
        for kind, table in whole.items():
            write_table(out / f"{kind}.csv", table, config)
    return whole


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis.agents.subspaces", description=__doc__)
    add_material(parser)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of Grid: layers=[8,14]")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="this checkpoint, and no tables of all"
    )
    given = parser.parse_args(arguments)
    try:
        grid = override(Grid(), given.set)
    except ValueError as error:
        parser.error(str(error))
    tables = analyse(material_of(given, parser, given.only), grid, given.out, given.only)
    if given.only:
        return
    print(tables["choice"].to_string(index=False))
    print(tables["gains"].round(3).to_string(index=False))


if __name__ == "__main__":
    main()
