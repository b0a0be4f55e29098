"""Separability of the agents: held-out accuracy of linear probes of the agents' names, by layer."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import steerkit as sk
from analysis.agents.activations import Source, turn_activations
from analysis.inputs import Inputs, add_inputs, inputs_of
from analysis.probes.same_persona import same_persona
from steerkit.io.files import file_name, sha256
from steerkit.io.run_folder import run_folder
from steerkit.io.tables import read_table, write_table
from steerkit.text.traces import DebateTrace

POSITIONS = ("last", "mean", "tag")
SOURCES: tuple[Source, ...] = ("trace", "untagged", "plain")


def separability(
    model: Any,
    tokenizer: Any,
    traces: Mapping[str, Sequence[DebateTrace]],
    folds: int = 5,
    seed: int = 0,
    layers: Sequence[int] | None = None,
) -> pd.DataFrame:
    """`steerkit.probe_layers` of the agents' names on the streams of round 1; a question stays in one fold.

    Args:
        model: the checkpoint that reads the debates.
        tokenizer: its tokenizer.
        traces: debates by name: `personas`, and `same persona` where there are some, in which style carries no
            information about the agent.
        folds: of the cross-validation.
        seed: of the folds and of the shuffled labels.
        layers: that are read, besides the input of block 0; None for all.

    Returns:
        The rows of `ProbeResult.table` (accuracy with its interval over questions, shuffled labels, and the control by
        length and position) per debates, source (see `analysis.agents.activations`) and position; `majority` is the
        share of the largest class.
    """
    parts = []
    for name, debates in traces.items():
        for source in SOURCES:
            for position, acts in turn_activations(model, tokenizer, debates, source, True, layers).items():
                if position not in POSITIONS:
                    continue
                # only round 1: in later rounds an agent has read the others
                first = acts.items.groupby(["group", "label"]).cumcount() == 0
                result = sk.probe_layers(acts.where(first.to_numpy()), folds=folds, seed=seed)
                about = {"debates": name, "source": source, "position": position}
                parts.append(result.table.assign(**about, majority=result.meta["majority_accuracy"]))
    return pd.concat(parts, ignore_index=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis separability", description=__doc__)
    add_inputs(parser)
    parser.add_argument(
        "--same-persona",
        type=Path,
        metavar="TRACES",
        help="debates of agents with one persona; default with --run: generate new ones",
    )
    parser.add_argument("--n", type=int, default=150, help="largest number of debates of each kind")
    given = parser.parse_args(arguments)
    inputs = inputs_of(given, parser)
    traces: dict[str, Sequence[DebateTrace]] = {"personas": inputs.train[: given.n]}
    if given.same_persona:
        traces["same persona"] = sk.read_traces(given.same_persona)[: given.n]
    elif given.run:
        traces["same persona"] = same_persona(given.run, given.n, given.out / "same-persona")
    table = probe_checkpoints(inputs, traces, given.out)
    nested = table[table["layer"].astype(str) == "nested"]
    print(nested.round(3).to_string(index=False))


def probe_checkpoints(
    inputs: Inputs,
    traces: Mapping[str, Sequence[DebateTrace]],
    out: Path,
    layers: Sequence[int] | None = None,
) -> pd.DataFrame:
    """The rows of `separability` of every checkpoint, written as `out/separability.csv`; resumable.

    Args:
        inputs: the checkpoints.
        traces: debates by name, see `separability`.
        out: folder of the tables; `out/separability` is a run folder.
        layers: see `separability`.
    """
    text = "".join(trace.text for debates in traces.values() for trace in debates)
    config: dict[str, Any] = {name: inputs.about(name) for name in inputs.stages}
    config = {"stages": config, "traces": sha256(text), **inputs.reading()}
    config |= {} if layers is None else {"layers": list(layers)}
    parts = []
    with run_folder(out / "separability", config) as folder:
        for stage in inputs.stages:
            path = folder / f"{file_name(stage)}.csv"
            if not path.exists():
                write_table(path, separability(*inputs.load(stage), traces, layers=layers), config)
            parts.append(read_table(path)[0].assign(stage=stage))
    table = pd.concat(parts, ignore_index=True)
    write_table(out / "separability.csv", table, config)
    return table
