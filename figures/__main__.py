"""`python -m figures TABLES`: draw every picture whose tables are in a folder, as PDF and PNG, without torch."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from figures import agents, debate, suppression, tokens, training
from steerkit.io.files import file_name
from steerkit.io.json import read_json
from steerkit.io.tables import read_table
from steerkit.show.plots import save_figure

Picture = tuple[str, Any, Any]
NAMES = "agents.json"
"""File with the name of each agent by its number, where the debates name them."""


def pictures(folder: Path) -> Iterator[Picture]:
    """Name, figure and provenance of each picture whose tables are in a folder."""
    for table, meta in _tables(folder, "main_table"):
        yield "accuracy-tokens", tokens.accuracy_tokens(table), meta
        if (sampled := table[table["decoding"] == "sampled"])["method"].isin(debate.WHAT_HELPS).any():
            yield "accuracy-by-seed", debate.accuracy_by_seed(sampled), meta
    for table, meta in _tables(folder, "protocol"):
        yield "protocol", debate.protocol_areas({folder.name: table}), meta
    for table, meta in _tables(folder, "training"):
        for family, part in table.groupby("family", sort=False):
            yield f"training-{file_name(str(family))}", training.training_curves(part, str(family)), meta
    yield from _agent_pictures(folder)
    for table, meta in _tables(folder, "suppression_curves"):
        for context in dict.fromkeys(table["context"]):
            yield f"suppression-{context}", suppression.suppression_curves(table, context), meta
    yield from _probe_pictures(folder)


def _tables(folder: Path, *names: str) -> list[tuple[Any, ...]]:
    """The tables of these names and the provenance of the first, as one tuple; no tuple where a table is missing."""
    paths = [folder / f"{name}.csv" for name in names]
    if not all(path.is_file() for path in paths):
        return []
    read = [read_table(path) for path in paths]
    return [(*(table for table, _ in read), read[0][1])]


def _agent_pictures(folder: Path) -> Iterator[Picture]:
    """Pictures of the agents' vectors: steering curves, cosines, the plane that they span."""
    names = read_json(folder / NAMES) if (folder / NAMES).is_file() else {}
    for table, meta in _tables(folder, "curves"):
        table = _named(table, names)
        for stage, identity in product(dict.fromkeys(table["stage"]), (False, True)):
            name = f"steering-{file_name(stage)}-{'tag' if identity else 'none'}"
            yield name, agents.steering_curves(table, stage, identity), meta
    for table, choice, meta in _tables(folder, "cosines", "choice"):
        table = _named(table, names)
        for line in choice.drop_duplicates("stage").itertuples():
            yield f"cosines-{file_name(line.stage)}", agents.cosine_map(table, line.stage, line.layer), meta
    for table, meta in _tables(folder, "checkpoint_cosines"):
        yield "cosines-checkpoints", agents.checkpoint_map(table), meta
    for table, meta in _tables(folder, "plane"):
        yield "plane", agents.plane(_named(table, names)), meta


def _named(table: Any, names: Mapping[str, str]) -> Any:
    """A table with the agents' names in place of their numbers; the same table where there are none."""
    if not names:
        return table
    columns = {name: table[name].astype(str) for name in ("agent", "other") if name in table}
    return table.assign(**{name: column.map(names).fillna(column) for name, column in columns.items()})


def _probe_pictures(folder: Path) -> Iterator[Picture]:
    """Pictures of the probes at the last token; intermediate checkpoints of GRPO have no profile of their own."""
    for table, meta in _tables(folder, "separability"):
        last = table["position"] == "last"
        if not last.any():
            continue
        yield "separability", agents.separability(table), meta
        keys = ["stage", "debates", "source", "position"]
        drawn = table[last & ~table["stage"].str.startswith("GRPO step")]
        for key in drawn[keys].drop_duplicates().itertuples(index=False):
            yield "probes-" + "-".join(map(file_name, key)), agents.probe_profile(table, *key), meta


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m figures", description=__doc__)
    parser.add_argument("tables", type=Path, help="folder with the tables of analyses")
    parser.add_argument("--out", type=Path, help="default: TABLES/figures")
    given = parser.parse_args(arguments)
    out = given.out or given.tables / "figures"
    count = 0
    for name, figure, meta in pictures(given.tables):
        save_figure(figure, out / name, meta)
        count += 1
    if not count:
        parser.error(
            f"expected a table of an analysis in {given.tables}; got none. Write one with `python -m analysis`."
        )
    print(f"{count} figures in {out}, as PDF and PNG.")


if __name__ == "__main__":
    main()
