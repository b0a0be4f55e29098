"""`python -m analysis.probes.separability`: can a linear probe tell the agents apart, at which layer, and by what?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import steerkit as sk
from analysis.agents.material import add_material, material_of
from analysis.agents.vectors import Source, turn_streams
from analysis.probes.same_persona import same_persona
from steerkit.io.files import file_name, sha256
from steerkit.io.run_folder import run_folder
from steerkit.io.tables import read_table, write_table
from steerkit.text.traces import DebateTrace

POSITIONS = ("last", "mean", "tag")
SOURCES: tuple[Source, ...] = ("trace", "untagged", "plain")


def separability(
    model: Any, tokenizer: Any, traces: Mapping[str, Sequence[DebateTrace]], folds: int = 5, seed: int = 0
) -> pd.DataFrame:
    """`steerkit.probe_layers` of the agents' names on the turns' streams, questions never straddling a fold.

    Args:
        model, tokenizer: whose stream is read.
        traces: by kind of debate: `personas`, and where there is one `same persona`, in which style tells nothing.

    Returns a row per debates, source (`trace`: whole traces; `untagged`: the same
    without tags; `plain`: each turn alone), position, layer,
    features and labels, with the columns of `ProbeResult.table`: accuracy with its interval over questions, shuffled
    labels and the length/position control among the rows. `majority` is the share of the largest class.
    """
    parts = []
    for debates, held in traces.items():
        for source in SOURCES:
            streams = turn_streams(model, tokenizer, held, source, embed=True)
            for position, acts in streams.items():
                if position not in POSITIONS:
                    continue
                first = acts.items.groupby(["group", "label"]).cumcount() == 0  # round 1: nobody has read anybody
                result = sk.probe_layers(acts.where(first.to_numpy()), folds=folds, seed=seed)
                about = {"debates": debates, "source": source, "position": position}
                parts.append(result.table.assign(**about, majority=result.meta["majority_accuracy"]))
    return pd.concat(parts, ignore_index=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis.probes.separability", description=__doc__)
    add_material(parser)
    parser.add_argument(
        "--same-persona",
        type=Path,
        metavar="TRACES",
        help="debates of agents with one persona; default with --run: held anew",
    )
    parser.add_argument("--n", type=int, default=150, help="at most so many debates of each kind")
    given = parser.parse_args(arguments)
    material = material_of(given, parser)
    traces: dict[str, Sequence[DebateTrace]] = {"personas": material.train[: given.n]}
    if given.same_persona:
        traces["same persona"] = sk.read_traces(given.same_persona)[: given.n]
    elif given.run:
        traces["same persona"] = same_persona(given.run, given.n, given.out / "same-persona")
    text = "".join(trace.text for held in traces.values() for trace in held)
    config = {"stages": {name: material.about(name) for name in material.stages}, "traces": sha256(text)}
    parts = []
    with run_folder(given.out / "separability", config) as folder:
        for stage in material.stages:
            path = folder / f"{file_name(stage)}.csv"
            if not path.exists():
                write_table(path, separability(*material.load(stage), traces), config)
            parts.append(read_table(path)[0].assign(stage=stage))
    table = pd.concat(parts, ignore_index=True)
    write_table(given.out / "separability.csv", table, config)
    best = table[table["layer"].astype(str) == "nested"]
    print(best.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
