"""Steer each agent by its own direction: tables of curves, gains, cosines and reliability, in one folder.

For every checkpoint: vectors per agent from training debates, a setting chosen on validation debates, and on test
debates the gains of that setting over coefficient 0 and over controls, with the agent's tag in the context and without.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.agents.activations import activations_of
from analysis.agents.agreement import known_texts
from analysis.agents.checkpoint_differences import areas, differences, gained
from analysis.agents.choose import Grid, choose, tried_vectors
from analysis.agents.contexts import by_tag, unnamed
from analysis.agents.continuations import continuations
from analysis.agents.curves import curves, gains
from analysis.agents.fidelity import fidelity
from analysis.agents.geometry import agent_cosines, checkpoint_cosines, plane
from analysis.agents.reliability import reliability
from analysis.agents.vectors import agent_controls, published_vectors
from analysis.inputs import Inputs, inputs_of
from analysis.stored import stored_vectors
from steerkit.io.files import file_name, sha256
from steerkit.io.run_folder import run_folder
from steerkit.io.tables import read_table, write_table
from steerkit.sweeps.result import SweepResult
from training.settings import override

SCORES = ("rouge_l", "speaks", "style", "fidelity")
KINDS = ("tried", "choice", "curves", "gains", "cosines", "plane", "reliability")
"""The tables of each checkpoint."""


def at_stage(name: str, inputs: Inputs, grid: Grid, out: Path) -> dict[str, pd.DataFrame]:
    """All tables of one checkpoint, by kind."""
    model, tokenizer = inputs.load(name)
    train, validation, test = (
        inputs.train[: grid.train],
        inputs.validation[: grid.validation],
        inputs.test[: grid.test],
    )
    named = inputs.context(name)
    activations = activations_of(model, tokenizer, train, grid.sources, named, inputs.read)
    choice, tried = choose(model, tokenizer, activations, validation, grid, inputs.openings, out / "tried")
    acts = activations[choice.source, choice.position]
    own = tried_vectors(activations, choice.source, choice.position, out / "tried")
    tables = {"tried": tried, "reliability": reliability(acts, [choice.layer], seed=grid.seed)}
    on_test = activations_of(model, tokenizer, test, (choice.source,), named, inputs.read)
    tables["plane"] = plane(own, on_test[choice.source, choice.position], choice.layer)
    tables["cosines"] = agent_cosines(own)
    controls = stored_vectors(out / "controls", lambda: agent_controls(acts, own, grid.controls, grid.seed))
    some = agent_controls(acts, own, min(grid.bands, grid.controls), grid.seed)
    all_vectors = {**own, **controls}
    curve_vectors = {**own, **{name: controls[name] for name in some}}
    coefficients = (*grid.negative, *grid.coefficients)
    parts: dict[str, list[pd.DataFrame]] = {"curves": [], "gains": []}
    for context, short in ((unnamed, "none"), (named, "tag")):
        sampled = (curve_vectors, all_vectors) if not grid.few_controls or context is unnamed else (own, own)
        scored = (curve_vectors, all_vectors) if not grid.few_controls else (own, own)
        of_curve, of_gain = (
            (vectors, [choice.layer], at, context, choice.extent, out / f"fidelity-{short}.jsonl")
            for vectors, at in zip(scored, (coefficients, [choice.coefficient]), strict=True)
        )
        written = tuple(
            continuations(
                model,
                tokenizer,
                test,
                vectors,
                [choice.layer],
                at,
                context,
                choice.extent,
                grid.max_new_tokens,
                grid.seed,
                out / folder,
                inputs.openings,
                grid.rouge_tokenizer,
            )
            for vectors, at, folder in (
                (sampled[0], coefficients, short),
                (sampled[1], [choice.coefficient], f"{short}-frozen"),
            )
        )
        results: dict[str, Any] = {"rouge_l": written}
        if inputs.openings or context is unnamed:  # a text after the agent's tag begins without one
            results["speaks"] = written
        if inputs.openings:
            results["style"] = written
        # Where training put tags before every text, one that follows the bare problem at once is unlike any.
        if not (named is by_tag and context is unnamed):
            results["fidelity"] = tuple(fidelity(model, tokenizer, test, *steered) for steered in (of_curve, of_gain))
        for score, (curve, frozen) in results.items():
            about = {"score": score, "identity": context is not unnamed, "stage": name}
            about |= {"source": choice.source, "position": choice.position, "extent": choice.extent}
            parts["curves"].append(curves(curve, score).assign(**about))
            parts["gains"].append(gains(frozen, score, choice.coefficient).assign(**about))
            curve.save(out / f"{score}-{short}.parquet")
            frozen.save(out / f"{score}-{short}-frozen.parquet")
    tables |= {kind: pd.concat(each, ignore_index=True) for kind, each in parts.items()}
    table = written[0].table
    at_choice = table[table["vector"].isin(own) & (table["coefficient"] == choice.coefficient)]
    line = {**asdict(choice), "relative_dose": float(at_choice["relative_dose"].mean())}
    tables["choice"] = pd.DataFrame([{**line, "settings_tried": int(tried["screened"].sum()) // len(own)}])
    for agent, vector in own.items():
        vector.save(out / f"agent-{agent}.safetensors")
    return {kind: table.assign(stage=name) for kind, table in tables.items()}


def checkpoint_tables(folders: Mapping[str, Path]) -> dict[str, list[pd.DataFrame]]:
    """Each later checkpoint minus the first one: areas, and gains at the least coefficient above 0.

    See `analysis.agents.checkpoint_differences`.
    """
    first, *later = folders
    parts: dict[str, list[pd.DataFrame]] = {"stage_differences": [], "low_dose": []}
    for score in SCORES:
        for short in ("none", "tag"):
            files = {name: path / f"{score}-{short}.parquet" for name, path in folders.items()}
            results = {name: SweepResult.load(file) for name, file in files.items() if file.is_file()}
            if first not in results:
                continue
            table = results[first].table
            agents = sorted(set(table["agent"]))
            least = min(c for c in table["coefficient"].unique() if c > 0)
            measures = {
                "stage_differences": partial(areas, score=score),
                "low_dose": partial(gained, score=score, coefficient=least),
            }
            for name, (kind, measure) in product([one for one in later if one in results], measures.items()):
                about = {"score": score, "identity": short == "tag", "stage": name, "minus": first}
                found = differences(results[first], results[name], measure, agents)
                parts[kind].append(found.assign(**about, coefficient=least))
    return {kind: each or [pd.DataFrame()] for kind, each in parts.items()}


def configuration(inputs: Inputs, grid: Grid) -> dict[str, Any]:
    """What determines the tables of all checkpoints: the configuration of their folder."""
    return _shared_configuration(inputs, grid) | {"stages": {name: inputs.about(name) for name in inputs.stages}}


def _shared_configuration(inputs: Inputs, grid: Grid) -> dict[str, Any]:
    """What determines the tables, without the checkpoints."""
    traces = (*inputs.train, *inputs.validation, *inputs.test)
    return {"grid": asdict(grid), "traces": sha256("".join(trace.text for trace in traces)), **inputs.reading()}


def analyse(inputs: Inputs, grid: Grid, out: str | Path, only: Sequence[str] = ()) -> dict[str, pd.DataFrame]:
    """Tables of all checkpoints, written as `out/KIND.csv`; a finished checkpoint is not analysed again.

    Args:
        inputs: checkpoints and debates.
        grid: what is tried.
        out: a run folder.
        only: analyse these checkpoints, each in its own folder, and write no common tables. Several processes can share
            an analysis in this way.

    Returns:
        The common tables by kind; empty with `only`.

    Raises:
        ValueError: a checkpoint's name that is not among those of the inputs.
        ConfigurationChanged, RunFolderBusy: see `steerkit.io.run_folder`.
    """
    out = Path(out)
    if unknown := [name for name in only if name not in inputs.stages]:
        raise ValueError(f"expected checkpoints among {list(inputs.stages)}; got {unknown}. Pass names of that list.")
    config = _shared_configuration(inputs, grid)
    folders = {name: out / "stages" / file_name(name) for name in inputs.stages}
    for name in only or inputs.stages:
        own = config | {"stages": {name: inputs.about(name)}}
        with run_folder(folders[name], own) as folder:
            if not all((folder / f"{kind}.csv").exists() for kind in KINDS):
                for kind, table in at_stage(name, inputs, grid, folder).items():
                    write_table(folder / f"{kind}.csv", table, own)
    if only:
        return {}
    config = configuration(inputs, grid)
    with run_folder(out, config):
        parts = {kind: [read_table(folder / f"{kind}.csv")[0] for folder in folders.values()] for kind in KINDS}
        parts |= checkpoint_tables(folders)
        published = {name: published_vectors(inputs, name, grid.train, path) for name, path in folders.items()}
        parts["checkpoint_cosines"] = [checkpoint_cosines(published)]
        tables = {kind: pd.concat(each, ignore_index=True) for kind, each in parts.items()}
        tables["known_texts"] = known_texts(inputs.test, inputs.openings, grid.rouge_tokenizer)
        for kind, table in tables.items():
            write_table(out / f"{kind}.csv", table, config)
    return tables


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the analysis, besides its inputs."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a setting, e.g. layers=[8,14]"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="analyse this checkpoint; write no common tables"
    )


def run_options(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Analyse the checkpoints of a run, or those of --stage, as the command line says."""
    try:
        grid = override(Grid(), given.set)
    except ValueError as error:
        parser.error(str(error))
    tables = analyse(inputs_of(given, parser, given.only), grid, given.out, given.only)
    if given.only:
        return
    print(tables["choice"].to_string(index=False))
    print(tables["gains"].round(3).to_string(index=False))
