"""`python -m figures TABLES`: every picture whose table is in a folder, as PDF and PNG. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from figures import agents, suppression, tokens, training
from steerkit.io.files import file_name
from steerkit.io.tables import read_table
from steerkit.show.plots import save_figure

Picture = tuple[str, Any, Any]


def pictures(folder: Path) -> Iterator[Picture]:
    """Name, figure and provenance of each picture that the tables in a folder give."""

    def table(name: str) -> tuple[pd.DataFrame, Any] | None:
        path = folder / name
        return read_table(path) if path.is_file() else None

    if found := table("main_table.csv"):
        yield "accuracy-tokens", tokens.accuracy_tokens(found[0]), found[1]
    if found := table("training.csv"):
        for family, part in found[0].groupby("family", sort=False):
            yield f"training-{file_name(str(family))}", training.training_curves(part, str(family)), found[1]
    if found := table("curves.csv"):
        for stage in dict.fromkeys(found[0]["stage"]):
            for identity in (False, True):
                name = f"steering-{file_name(stage)}-{'tag' if identity else 'none'}"
                yield name, agents.steering_curves(found[0], stage, identity), found[1]
    if (found := table("cosines.csv")) and (choice := table("choice.csv")):
        for line in choice[0].itertuples():
            yield f"cosines-{file_name(line.stage)}", agents.cosine_map(found[0], line.stage, line.layer), found[1]
    if found := table("checkpoint_cosines.csv"):
        yield "cosines-checkpoints", agents.checkpoint_map(found[0]), found[1]
    if found := table("plane.csv"):
        yield "plane", agents.plane(found[0]), found[1]
    if found := table("suppression_curves.csv"):
        for context in dict.fromkeys(found[0]["context"]):
            yield f"suppression-{context}", suppression.suppression_curves(found[0], context), found[1]
    if (found := table("separability.csv")) and (found[0]["position"] == "last").any():
        yield "separability", agents.separability(found[0]), found[1]
        keys = ["stage", "debates", "source", "position"]
        drawn = ~found[0]["stage"].str.startswith("GRPO step") & (found[0]["position"] == "last")
        for key in found[0][drawn][keys].drop_duplicates().itertuples(index=False):
            yield "probes-" + "-".join(map(file_name, key)), agents.probe_profile(found[0], *key), found[1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m figures", description=__doc__)
    parser.add_argument("tables", type=Path, help="a folder with tables of the analyses")
    parser.add_argument("--out", type=Path, help="default: TABLES/figures")
    given = parser.parse_args(arguments)
    out = given.out or given.tables / "figures"
    count = 0
    for name, figure, meta in pictures(given.tables):
        save_figure(figure, out / name, meta)
        count += 1
    if not count:
        parser.error(
            f"expected a table of an analysis in {given.tables}; there is none. Run one of `python -m analysis.*`."
        )
    print(f"{count} figures in {out}, as PDF and PNG.")


if __name__ == "__main__":
    main()
