"""Results page of a reproduction: pooled tables per family, and each claim of the paper with a verdict.

Reads the runs and analyses that `python -m analysis reproduce` wrote; writes pooled tables per family and `results.md`.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis.paper.claims import RULES, Claim, Tables, claims
from analysis.paper.main_table import main_table, read_runs, shown
from analysis.paper.pooling import collect_tables
from analysis.paper.reproduce import STARTED
from steerkit.io.files import write_text
from steerkit.io.json import read_json
from steerkit.io.tables import write_table
from steerkit.io.versions import versions
from steerkit.stats.format import interval_text
from training.evaluate.results import markdown

SCORES = {"rouge_l": "ROUGE-L of the first turn", "speaks": "share of texts in which the agent speaks first"}


def gained_unnamed(gain: pd.DataFrame, score: str) -> pd.DataFrame:
    """A score gained at the frozen settings, agents unnamed: a row per checkpoint and agent, a column per control."""
    some = gain[(gain["score"] == score) & ~gain["identity"].astype(bool)]
    texts = [interval_text(row.gain, row.low, row.high, 2, signed=True) for row in some.itertuples()]
    some = some.assign(text=texts)
    wide = some.pivot_table(index=["stage", "agent"], columns="over", values="text", aggfunc="first", sort=False)
    wide = wide.rename(columns=lambda over: f"over {over}")
    zero = some[some["over"] == "coefficient 0"].set_index(["stage", "agent"])["by_seed"]
    return wide.join(zero.rename("by seed, over coefficient 0")).reset_index()


def protocol_table(protocol: pd.DataFrame) -> pd.DataFrame:
    """The paper's protocol: areas of the agents' own directions and of controls, a row per checkpoint and context."""
    some = protocol[protocol["score"] == "rouge_l"]
    some = some.assign(text=[interval_text(row.value, row.low, row.high, 3) for row in some.itertuples()])
    wide = some.pivot_table(
        index=["stage", "context", "grid"], columns="measure", values="text", aggfunc="first", sort=False
    )
    return wide.fillna("").reset_index()


@dataclass(frozen=True)
class Started:
    """When a seed's runs were started, and from which commit.

    Args:
        seed: the training seed.
        time: of the start of its first step, in UTC.
        commit: the project's commit at that time.
    """

    seed: int
    time: str
    commit: str


def rules_commit() -> str:
    """The commit that last changed the rules of the claims; empty outside a git checkout."""
    command = ["git", "log", "-n1", "--format=%h %cI", "--", str(RULES)]
    try:
        found = subprocess.run(command, cwd=RULES.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def page(main: pd.DataFrame, listed: Sequence[Claim], tables: Tables, started: Sequence[Started] = ()) -> str:
    """The text of `results.md`: claims, gains at the frozen settings, the paper's protocol, and the main table."""
    steering, protocol = list[str](), list[str]()
    for family, some in tables.items():
        if "gains" in some:
            for score, name in SCORES.items():
                if score in set(some["gains"]["score"]):
                    steering += [f"**{family}**, {name}:", "", markdown(gained_unnamed(some["gains"], score)), ""]
        if "protocol" in some:
            protocol += [f"**{family}**:", "", markdown(protocol_table(some["protocol"])), ""]
    times = [f"seed {one.seed} at {one.time} (commit {one.commit})" for one in started]
    committed = rules_commit()
    lines = [
        "# Results",
        "",
        f"Written by `python -m analysis results` from {main['seeds'].max()} training seed(s). Intervals are 95 %; "
        "with several training seeds their unit is the seed (Student's t over the seeds' means), with one they are "
        "over its questions and hold for this checkpoint. Settings were chosen on validation questions.",
        "",
        f"The rules are in `analysis/paper/claims.toml`{f', committed as {committed}' if committed else ''}. "
        + (f"Runs were started: {'; '.join(times)}." if times else ""),
        "",
        "## The paper's claims, in this setting",
        "",
        "| claim | in the paper | here | by seed | unit | verdict |",
        "|---|---|---|---|---|---|",
        *(f"| {c.name} | {c.published} | {c.ours} | {c.by_seed} | {c.unit} | **{c.verdict}** |" for c in listed),
        "",
        "## Steering without a name",
        "",
        "Gained by each agent's direction at the setting frozen on validation, sampled, nobody named in the context; "
        "over coefficient 0, and over the mean of the directions of each control.",
        "",
        *steering,
        *(["## The paper's protocol", "", *protocol] if protocol else []),
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
    begun = given.folder / STARTED
    started = [Started(**one) for one in read_json(begun)] if begun.is_file() else []
    text = page(main_table(rows), listed, tables, started)
    for path in filter(None, (out / "results.md", given.page)):
        write_text(path, text)
    print((out / "results.md").read_text())
