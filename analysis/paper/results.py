"""`python -m analysis.paper.results FOLDER`: tables of a reproduction, seeds pooled, and each claim with a verdict.

Reads what `analysis.paper.reproduce` left, writes pooled tables per family and `results.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.agents.stages import Measure, areas, differences, gained
from analysis.agents.subspaces import SCORES, curves, gains
from analysis.paper.claims import SHOWN, Claim, Tables, claims, turned_up
from analysis.paper.main_table import main_table, read_runs, shown
from analysis.paper.pooling import FROZEN, at_frozen, pooled
from analysis.suppression.suppression import kept_accuracy
from steerkit.io.files import file_name, write_text
from steerkit.io.tables import read_table, write_table
from steerkit.io.versions import versions
from steerkit.sweeps.result import SweepResult
from training.evaluate.results import markdown

SHOWN_OF_ONE_SEED = ("cosines", "plane", "choice", "reliability")


def seeds_of(folder: Path) -> dict[int, Path]:
    """The analysed seeds of a family, by number."""
    return {int(path.name.removeprefix("seed-")): path for path in sorted(folder.glob("seed-*"))}


def pool_agents(folder: Path) -> dict[str, pd.DataFrame]:
    """Curves, gains at the frozen setting, and differences between checkpoints over all seeds of a family."""
    seeds = seeds_of(folder)
    choices = {seed: read_table(path / "choice.csv")[0].set_index("stage") for seed, path in seeds.items()}
    stages = list(next(iter(choices.values())).index)
    found: dict[str, list[pd.DataFrame]] = {"curves": [], "gains": [], "low_dose": [], "stage_differences": []}
    for score in SCORES:
        for short in ("none", "tag"):
            about: dict[str, Any] = {"score": score, "identity": short == "tag"}
            whole: dict[str, SweepResult] = {}
            for stage in stages:
                name = f"stages/{file_name(stage)}/{score}-{short}"
                each, ones = (
                    {seed: SweepResult.load(path / f"{name}{end}.parquet") for seed, path in seeds.items()}
                    for end in ("", "-frozen")
                )
                whole[stage] = pooled(each)
                table = whole[stage].table
                agents = sorted(table["agent"].unique())
                names = [name for name in table["vector"].unique() if name not in agents]
                one_layer = SweepResult(table.assign(layer="chosen"), whole[stage].meta)
                found["curves"].append(curves(one_layer, score, agents, names).assign(stage=stage, **about))
                frozen = pooled(
                    {seed: at_frozen(one, choices[seed].loc[stage, "coefficient"]) for seed, one in ones.items()}
                )
                against = [name for name in frozen.table["vector"].unique() if name not in agents]
                found["gains"].append(gains(frozen, score, agents, against, FROZEN).assign(stage=stage, **about))
            first, *later = stages
            least = min(c for c in whole[first].table["coefficient"].unique() if c > 0)
            measures = {
                "stage_differences": partial(areas, score=score),
                "low_dose": partial(gained, score=score, coefficient=least),
            }
            for stage, (kind, measure) in product(later, measures.items()):
                pair = (whole[first], whole[stage])
                more = differences(*pair, measure, agents).assign(by_seed=seed_by_seed(*pair, measure, agents))
                found[kind].append(more.assign(stage=stage, minus=first, coefficient=least, **about))
    tables = {kind: pd.concat(parts, ignore_index=True) for kind, parts in found.items()}
    one = next(iter(seeds.values()))
    for kind in SHOWN_OF_ONE_SEED:
        tables[kind] = read_table(one / f"{kind}.csv")[0]
    cosines = pd.concat([read_table(path / "checkpoint_cosines.csv")[0] for path in seeds.values()])
    keys = ["agent", "layer", "stage", "other"]
    tables["checkpoint_cosines"] = cosines.groupby(keys, sort=False)["cosine"].mean().reset_index()
    alone = [turned_up(read_table(path / "gains.csv")[0].astype({"agent": str})) for path in seeds.values()]
    keys = ["score", "identity", "stage", "agent"]
    up = sum(one.astype(int) for one in alone).rename("seeds_up").reset_index().assign(seeds=len(seeds))
    tables["gains"] = tables["gains"].astype({"agent": str}).merge(up, on=keys, how="left", validate="many_to_one")
    tables["choice"] = pd.concat([c.reset_index().assign(seed=seed) for seed, c in choices.items()], ignore_index=True)
    return tables


def seed_by_seed(first: SweepResult, second: SweepResult, measure: Measure, agents: Sequence[str]) -> str:
    """The mean difference over all agents of each seed, in the order of their numbers."""
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
    """Curves over all seeds, and the accuracy that is kept over those `showing` the trait, where there are any.

    Each seed's vectors act at its own chosen layer.
    """
    seeds = seeds_of(folder)
    stages = list(dict.fromkeys(read_table(next(iter(seeds.values())) / "suppression_kept.csv")[0]["stage"]))
    found: dict[str, list[pd.DataFrame]] = {"suppression_curves": [], "suppression_kept": []}
    for stage in stages:
        for context in ("plain", "forced"):
            name = f"suppression/{file_name(stage)}/texts-{context}.parquet"
            each = {seed: SweepResult.load(path / name) for seed, path in seeds.items()}
            whole = one_layer(each)
            for score in ("trait", "accuracy", "perplexity"):
                curve = whole.curve(score).assign(score=score, context=context, stage=stage)
                found["suppression_curves"].append(curve)
            showing = {s: r for s, r in each.items() if shown_at_zero(r) >= SHOWN}
            kept = kept_accuracy(one_layer(showing or each))
            about = {"context": context, "stage": stage, "showing": len(showing), "seeds": len(each)}
            found["suppression_kept"].append(kept.assign(**about))
    return {kind: pd.concat(parts, ignore_index=True) for kind, parts in found.items()}


def one_layer(each: Mapping[int, SweepResult]) -> SweepResult:
    """All seeds as one, every seed's layer called `chosen`."""
    return pooled({s: SweepResult(r.table.assign(layer="chosen"), r.meta) for s, r in each.items()})


def shown_at_zero(result: SweepResult) -> float:
    """The share of unsteered texts that show the trait."""
    return float(result.table.loc[result.table["coefficient"] == 0, "trait"].mean())


def collect_tables(folder: Path) -> dict[str, dict[str, pd.DataFrame]]:
    """All pooled tables, by family."""
    tables: dict[str, dict[str, pd.DataFrame]] = {}
    for family in sorted(path for path in (folder / "analysis").iterdir() if path.is_dir()):
        found: dict[str, pd.DataFrame] = {}
        some = next(iter(seeds_of(family).values()))
        if (some / "choice.csv").is_file():
            found |= pool_agents(family)
        if (some / "separability.csv").is_file():
            found["separability"] = pool_probes(family)
        if (some / "suppression_kept.csv").is_file():
            found |= pool_suppression(family)
        tables[family.name] = found
    return tables


def gained_unnamed(gain: pd.DataFrame) -> pd.DataFrame:
    """ROUGE-L gained at the frozen settings, nobody named: a line per checkpoint and agent, a column per control."""
    some = gain[(gain["score"] == "rouge_l") & ~gain["identity"]]
    texts = [f"{r.gain:+.2f} [{r.low:+.2f}, {r.high:+.2f}]" for r in some.itertuples()]
    alone = [f"{r.seeds_up} of {r.seeds}" for r in some.itertuples()]
    some, keys = some.assign(text=texts, alone=alone), ["stage", "agent", "alone"]
    wide = some.pivot_table(index=keys, columns="over", values="text", aggfunc="first", sort=False)
    wide = wide.rename(columns=lambda over: f"over {over}").reset_index()
    last = wide.pop("alone").rename("seeds by themselves")
    return wide.join(last) if gain["seeds"].max() > 1 else wide


def page(main: pd.DataFrame, found: Sequence[Claim], seeds: int, tables: Tables) -> str:
    """results.md."""
    steering = [
        line
        for family, some in tables.items()
        if "gains" in some
        for line in (f"**{family}**, n = {some['gains']['n'].max()}:", "", markdown(gained_unnamed(some["gains"])), "")
    ]
    lines = [
        "# Results",
        "",
        f"Written by `python -m analysis.paper.results` from {seeds} seed{'s' if seeds > 1 else ''}. Intervals are "
        "95 % bootstraps over questions, seeds pooled; what was chosen was chosen on other questions. A claim "
        "**holds** "
        "where its interval lies on its side, **does not hold** where it lies on the other, and is **open** between, "
        "or where no more than half of the seeds show the trait that it is about.",
        "",
        "## The paper's claims, in this setting",
        "",
        "| claim | in the paper | here | n | verdict |",
        "|---|---|---|---|---|",
        *(f"| {c.name} | {c.published} | {c.ours} | {c.n} | **{c.verdict}** |" for c in found),
        "",
        "## Steering without a name",
        "",
        "ROUGE-L to the agent's own text, gained by its direction at the setting frozen on validation, sampled, nobody "
        "named in the context; over coefficient 0 and over the directions of each control, paired by question."
        + " The last column counts the seeds whose own intervals over coefficient 0 and over random lie above 0, by "
        "Holm's p over the agents too." * (seeds > 1),
        "",
        *steering,
        "## Accuracy and tokens",
        "",
        markdown(shown(main)),
        "",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis.paper.results", description=__doc__)
    parser.add_argument("folder", type=Path, help="what analysis.paper.reproduce wrote")
    parser.add_argument("--out", type=Path, help="default: FOLDER/tables")
    parser.add_argument("--page", type=Path, help="write results.md here, too")
    given = parser.parse_args(arguments)
    out = given.out or given.folder / "tables"
    runs = sorted(path.parent for path in given.folder.glob("*/seed-*/questions.parquet"))
    rows = read_runs(runs)
    tables = collect_tables(given.folder)
    meta = {"runs": [str(run) for run in runs], "versions": versions()}
    for family, some in tables.items():
        for name, table in some.items():
            write_table(out / family / f"{name}.csv", table, meta)
    found = claims(rows, tables)
    write_table(out / "claims.csv", pd.DataFrame([vars(claim) for claim in found]), meta)
    text = page(main_table(rows), found, rows["seed"].nunique(), tables)
    for path in filter(None, (out / "results.md", given.page)):
        write_text(path, text)
    print((out / "results.md").read_text())


if __name__ == "__main__":
    main()
