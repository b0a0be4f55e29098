"""Debates of agents that all have one persona: a probe that separates these agents does not read their style."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import steerkit as sk
from analysis.inputs import base_of
from steerkit.io.json import read_json
from steerkit.text.traces import DebateTrace, read_traces
from training.debates.answerers import LocalModel, Sampling
from training.debates.debate import TRACES, Setting, run_debates
from training.debates.personas import Cast, cast_of
from training.problems.families import FAMILIES
from training.toy.worlds import WORLDS


def one_persona(cast: Cast) -> Cast:
    """A cast in which every agent has the first one's persona."""
    return Cast(f"{cast.name}-one-persona", cast.personas[:1] * len(cast.personas), cast.ask_by)


def same_persona(run: str | Path, n: int, out: str | Path) -> list[DebateTrace]:
    """Debates of a run's base model on `n` validation questions, all agents with the first one's persona; resumable."""
    preset = read_json(Path(run) / "config.json")
    if preset["checkpoint"] is None:
        world = WORLDS[preset["family"]]
        cast, family = replace(world, personas=world.personas[:1]).cast(), world.family
    else:
        cast, family = one_persona(cast_of(preset["cast"])), preset["family"]
    sampling = Sampling(**{**preset["debate"]["sampling"], "seed": preset["seed"]})
    setting = Setting(**{**preset["debate"], "sampling": sampling})
    problems = FAMILIES[family](n, preset["seed"], "validation")
    run_debates(problems, LocalModel(*sk.load(base_of(run), dtype=preset.get("dtype"))), cast, setting, out)
    return read_traces(Path(out) / TRACES)
