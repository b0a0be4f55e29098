"""Tables of several training seeds pooled into one; questions of different seeds count as different questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.agents.checkpoint_differences import Measure, areas, differences, gained
from analysis.agents.curves import curves, gains
from analysis.agents.steer import SCORES
from analysis.paper.claims import SHOWN, turned_up
from analysis.suppression.kept_accuracy import kept_accuracy
from analysis.suppression.suppress import SCORES as SUPPRESSION_SCORES
from steerkit.io.files import file_name
from steerkit.io.tables import read_table
from steerkit.sweeps.result import SweepResult

FROZEN = 1.0
"""The coefficient that the frozen one of every seed is called in pooled tables."""
SHOWN_OF_ONE_SEED = ("cosines", "plane", "choice", "reliability")


def pooled(results: Mapping[int, SweepResult]) -> SweepResult:
    """The rows of all seeds; the seed is part of each question's id."""
    parts = [
        result.table.assign(
            group=f"{seed}/" + result.table["group"],
            prompt_id=f"{seed}/" + result.table["prompt_id"].astype(str),
            seed=seed,
        )
        for seed, result in results.items()
    ]
    first = next(iter(results.values()))
    return SweepResult(pd.concat(parts, ignore_index=True), first.meta)


def at_frozen(result: SweepResult, coefficient: float) -> SweepResult:
    """Coefficient 0 and the one frozen on validation, as coefficient `FROZEN` at the layer `frozen`.

    Each seed has its own frozen coefficient and layer; under these names they can be pooled.
    """
    table = result.table[result.table["coefficient"].isin([0.0, coefficient])]
    renamed = table["coefficient"].where(table["coefficient"] == 0, FROZEN)
    return SweepResult(table.assign(coefficient=renamed, layer="frozen"), result.meta)


def one_layer(results: Mapping[int, SweepResult]) -> SweepResult:
    """The rows of all seeds, with the layer of every seed called `chosen`."""
    return pooled({s: SweepResult(r.table.assign(layer="chosen"), r.meta) for s, r in results.items()})


def seeds_of(folder: Path) -> dict[int, Path]:
    """The analysed seeds of a family, by number."""
    return {int(path.name.removeprefix("seed-")): path for path in sorted(folder.glob("seed-*"))}


def collect_tables(folder: Path) -> dict[str, dict[str, pd.DataFrame]]:
    """All pooled tables of a reproduction, by family and name."""
    tables: dict[str, dict[str, pd.DataFrame]] = {}
    for family in sorted(path for path in (folder / "analysis").iterdir() if path.is_dir()):
        of_family: dict[str, pd.DataFrame] = {}
        one_seed = next(iter(seeds_of(family).values()))
        if (one_seed / "choice.csv").is_file():
            of_family |= pool_agents(family)
        if (one_seed / "separability.csv").is_file():
            of_family["separability"] = pool_probes(family)
        if (one_seed / "suppression_kept.csv").is_file():
            of_family |= pool_suppression(family)
        tables[family.name] = of_family
    return tables


def pool_agents(folder: Path) -> dict[str, pd.DataFrame]:
    """Curves, gains at the frozen setting, and differences between checkpoints, over all seeds of a family."""
    seeds = seeds_of(folder)
    choices = {seed: read_table(path / "choice.csv")[0].set_index("stage") for seed, path in seeds.items()}
    stages = list(next(iter(choices.values())).index)
    parts: dict[str, list[pd.DataFrame]] = {"curves": [], "gains": [], "low_dose": [], "stage_differences": []}
    for score, short in product(SCORES, ("none", "tag")):
        about: dict[str, Any] = {"score": score, "identity": short == "tag"}
        whole: dict[str, SweepResult] = {}
        for stage in stages:
            name = f"stages/{file_name(stage)}/{score}-{short}"
            curve, frozen = (
                {seed: SweepResult.load(path / f"{name}{end}.parquet") for seed, path in seeds.items()}
                for end in ("", "-frozen")
            )
            whole[stage] = pooled(curve)
            parts["curves"].append(curves(one_layer(curve), score).assign(stage=stage, **about))
            renamed = {seed: at_frozen(one, choices[seed].loc[stage, "coefficient"]) for seed, one in frozen.items()}
            parts["gains"].append(gains(pooled(renamed), score, FROZEN).assign(stage=stage, **about))
        for kind, table in _stage_differences(whole, score):
            parts[kind].append(table.assign(**about))
    tables = {kind: pd.concat(each, ignore_index=True) for kind, each in parts.items()}
    one = next(iter(seeds.values()))
    for kind in SHOWN_OF_ONE_SEED:
        tables[kind] = read_table(one / f"{kind}.csv")[0]
    cosines = pd.concat([read_table(path / "checkpoint_cosines.csv")[0] for path in seeds.values()])
    keys = ["agent", "layer", "stage", "other"]
    tables["checkpoint_cosines"] = cosines.groupby(keys, sort=False)["cosine"].mean().reset_index()
    tables["gains"] = _with_seeds_up(tables["gains"], seeds)
    each_choice = [choice.reset_index().assign(seed=seed) for seed, choice in choices.items()]
    tables["choice"] = pd.concat(each_choice, ignore_index=True)
    return tables


def _stage_differences(whole: Mapping[str, SweepResult], score: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Differences of areas, and of gains at the least coefficient, of each later checkpoint minus the first one."""
    first, *later = whole
    agents = sorted(whole[first].table["agent"].unique())
    least = min(c for c in whole[first].table["coefficient"].unique() if c > 0)
    measures: dict[str, Measure] = {
        "stage_differences": partial(areas, score=score),
        "low_dose": partial(gained, score=score, coefficient=least),
    }
    for stage, (kind, measure) in product(later, measures.items()):
        pair = (whole[first], whole[stage])
        table = differences(*pair, measure, agents).assign(by_seed=seed_by_seed(*pair, measure, agents))
        yield kind, table.assign(stage=stage, minus=first, coefficient=least)


def _with_seeds_up(pooled_gains: pd.DataFrame, seeds: Mapping[int, Path]) -> pd.DataFrame:
    """The pooled gains with the number of seeds whose own gains turn the agent up (`claims.turned_up`)."""
    each = [turned_up(read_table(path / "gains.csv")[0].astype({"agent": str})) for path in seeds.values()]
    up = sum(one.astype(int) for one in each).rename("seeds_up").reset_index().assign(seeds=len(seeds))
    keys = ["score", "identity", "stage", "agent"]
    return pooled_gains.astype({"agent": str}).merge(up, on=keys, how="left", validate="many_to_one")


def seed_by_seed(first: SweepResult, second: SweepResult, measure: Measure, agents: Sequence[str]) -> str:
    """The mean difference over all agents for each seed, in the order of the seeds."""
    gap = pd.concat([measure(second, agent) - measure(first, agent) for agent in agents], axis=1).mean(axis=1)
    means = gap.groupby(gap.index.str.partition("/").get_level_values(0).astype(int)).mean()
    return ", ".join(f"{mean:+.3f}" for mean in means)


def pool_probes(folder: Path) -> pd.DataFrame:
    """Probe tables: mean over seeds of accuracies and of the ends of their intervals."""
    parts = [read_table(path / "separability.csv")[0].assign(seed=s) for s, path in seeds_of(folder).items()]
    table = pd.concat(parts, ignore_index=True)
    keys = ["stage", "debates", "source", "position", "layer", "features", "labels"]
    means = ["accuracy", "accuracy_low", "accuracy_high", "majority"]
    sums = ["n", "n_groups"]
    grouped = table.groupby(keys, sort=False, dropna=False)
    return grouped[means].mean().join(grouped[sums].sum()).join(grouped["seed"].nunique().rename("seeds")).reset_index()


def pool_suppression(folder: Path) -> dict[str, pd.DataFrame]:
    """Curves over all seeds, and kept accuracy over the seeds that show the trait (all, where none does).

    Each seed's vectors are steered at its own chosen layer. The columns `showing` and `seeds` count the seeds.
    """
    seeds = seeds_of(folder)
    stages = list(dict.fromkeys(read_table(next(iter(seeds.values())) / "suppression_kept.csv")[0]["stage"]))
    parts: dict[str, list[pd.DataFrame]] = {"suppression_curves": [], "suppression_kept": []}
    for stage, context in product(stages, ("plain", "forced")):
        name = f"suppression/{file_name(stage)}/texts-{context}.parquet"
        each = {seed: SweepResult.load(path / name) for seed, path in seeds.items()}
        whole = one_layer(each)
        for score in SUPPRESSION_SCORES:
            curve = whole.curve(score, by=("vector", "role", "layer"))
            parts["suppression_curves"].append(curve.assign(score=score, context=context, stage=stage))
        showing = {seed: result for seed, result in each.items() if shown_at_zero(result) >= SHOWN}
        about = {"context": context, "stage": stage, "showing": len(showing), "seeds": len(each)}
        parts["suppression_kept"].append(kept_accuracy(one_layer(showing or each)).assign(**about))
    return {kind: pd.concat(each_part, ignore_index=True) for kind, each_part in parts.items()}


def shown_at_zero(result: SweepResult) -> float:
    """The share of unsteered texts that show the trait."""
    return float(result.table.loc[result.table["coefficient"] == 0, "trait"].mean())
