"""Results page of a reproduction: pooled tables per family, and each claim of the paper with a verdict.

Reads the runs and analyses that `python -m analysis reproduce` wrote; writes pooled tables per family and `results.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.paper.claims import Claim, Tables, claims
from analysis.paper.main_table import main_table, read_runs, shown
from analysis.paper.pooling import collect_tables
from steerkit.io.files import write_text
from steerkit.io.tables import write_table
from steerkit.io.versions import versions
from steerkit.stats.format import interval_text
from training.evaluate.results import markdown


def gained_unnamed(gain: pd.DataFrame) -> pd.DataFrame:
    """ROUGE-L gained at the frozen settings, agents unnamed: a row per checkpoint and agent, a column per control."""
    some = gain[(gain["score"] == "rouge_l") & ~gain["identity"]]
    texts = [interval_text(row.gain, row.low, row.high, 2, signed=True) for row in some.itertuples()]
    seeds_up = [f"{row.seeds_up} of {row.seeds}" for row in some.itertuples()]
    some = some.assign(text=texts, by_seed=seeds_up)
    keys = ["stage", "agent", "by_seed"]
    wide = some.pivot_table(index=keys, columns="over", values="text", aggfunc="first", sort=False)
    wide = wide.rename(columns=lambda over: f"over {over}").reset_index()
    last = wide.pop("by_seed").rename("seeds by themselves")
    return wide.join(last) if gain["seeds"].max() > 1 else wide


def page(main: pd.DataFrame, listed: Sequence[Claim], seeds: int, tables: Tables) -> str:
    """The text of `results.md`: claims, gains at the frozen settings, and the main table."""
    steering = [
        line
        for family, some in tables.items()
        if "gains" in some
        for line in (f"**{family}**, n = {some['gains']['n'].max()}:", "", markdown(gained_unnamed(some["gains"])), "")
    ]
    lines = [
        "# Results",
        "",
        f"Written by `python -m analysis results` from {seeds} seed{'s' if seeds > 1 else ''}. Intervals are "
        "95 % bootstraps over questions, seeds pooled; what was chosen was chosen on other questions. A claim "
        "**holds** "
        "where its interval lies on its side, **does not hold** where it lies on the other, and is **open** between, "
        "or where no more than half of the seeds show the trait that it is about.",
        "",
        "## The paper's claims, in this setting",
        "",
        "| claim | in the paper | here | n | verdict |",
        "|---|---|---|---|---|",
        *(f"| {c.name} | {c.published} | {c.ours} | {c.n} | **{c.verdict}** |" for c in listed),
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
    parser = argparse.ArgumentParser(prog="python -m analysis results", description=__doc__)
    parser.add_argument("folder", type=Path, help="output folder of `python -m analysis reproduce`")
    parser.add_argument("--out", type=Path, help="default: FOLDER/tables")
    parser.add_argument("--page", type=Path, help="write results.md also to this path")
    given = parser.parse_args(arguments)
    out = given.out or given.folder / "tables"
    runs = sorted(path.parent for path in given.folder.glob("*/seed-*/questions.parquet"))
    rows = read_runs(runs)
    tables = collect_tables(given.folder)
    meta = {"runs": [str(run) for run in runs], "versions": versions()}
    for family, of_family in tables.items():
        for name, table in of_family.items():
            write_table(out / family / f"{name}.csv", table, meta)
    listed = claims(rows, tables)
    write_table(out / "claims.csv", pd.DataFrame([vars(claim) for claim in listed]), meta)
    text = page(main_table(rows), listed, rows["seed"].nunique(), tables)
    for path in filter(None, (out / "results.md", given.page)):
        write_text(path, text)
    print((out / "results.md").read_text())
