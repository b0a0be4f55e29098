"""Jobs that a killed process has to survive, each a function of its folder, and what they leave there."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import steerkit as sk
from steerkit.io.files import sha256
from steerkit.io.json import canonical_json
from steerkit.io.rows import read_rows
from steerkit.text.tags import tags
from tests.tiny import tiny_model, tiny_tokenizer


@dataclass(frozen=True)
class Job:
    """A job under torture.

    Args:
        name: what it is.
        run: does the work in a folder, or goes on there.
        outcome: what has to be the same as of a run that nobody killed.
        repeated: how many rows stand twice in what was appended.
        flips: of the whole run and a cut one, how many rows have another text for the same prompt: rows that are taken
            up again stand in batches of another shape, which rounds otherwise. None where something else differs.
    """

    name: str
    run: Callable[[Path], object]
    outcome: Callable[[Path], Any]
    repeated: Callable[[Path], int]
    flips: Callable[[Path, Path], int | None] = lambda whole, cut: None


def _sweep(folder: Path) -> object:
    vector = sk.SteeringVector({1: torch.linspace(-6, 6, 32), 2: torch.linspace(4, -4, 32)})
    prompts = [f"prompt number {i} {'and more ' * (i % 4)}" for i in range(24)]
    return sk.sweep(
        tiny_model(), tiny_tokenizer(), vector, prompts, layers=[1, 2], coefficients=[-2, -1, 0, 1, 2], samples=3,
        max_new_tokens=24, batch_rows=32, out=folder,
    )  # fmt: skip


def _grown(folder: Path) -> object:
    """A sweep over doses that grows by doses, prompts and samples."""
    vector = sk.SteeringVector({1: torch.linspace(-6, 6, 32), 2: torch.linspace(4, -4, 32)})
    loaded = tiny_model(), tiny_tokenizer()
    prompts = [f"prompt number {i} {'and more ' * (i % 4)}" for i in range(16)]
    options: dict[str, Any] = {"max_new_tokens": 16, "temperature": 0.7, "batch_rows": 16, "out": folder}
    sk.sweep(*loaded, vector, prompts[:8], layers=1, doses=[-0.5, 0.5], samples=2, **options)
    return sk.sweep(*loaded, vector, prompts, layers=[1, 2], doses=[-0.5, -0.2, 0.5], samples=3, **options)


def _grown_choices(folder: Path) -> object:
    """A sweep of choices that grows by coefficients, prompts and choices."""
    vector = sk.SteeringVector({1: torch.linspace(-6, 6, 32), 2: torch.linspace(4, -4, 32)})
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = [f"prompt number {i} {'and more ' * (i % 4)}" for i in range(24)]
    options: dict[str, Any] = {"layers": [1, 2], "batch_rows": 8, "out": folder}
    with sk.use_kernels(model, "onednn"):  # the same bits in every batch
        sk.sweep(model, tokenizer, vector, prompts[:8], coefficients=[1], choices=[" (A)", "b"], **options)
        more = [" (A)", " (B)", "b", "cd"]
        return sk.sweep(model, tokenizer, vector, prompts, coefficients=[-1, 1, 2], choices=more, **options)


def _table(folder: Path) -> str:
    table = sk.SweepResult.load(folder).table.drop(columns="relative_dose")
    return hashlib.sha256(table.to_csv(index=False).encode()).hexdigest() + f" {len(table)} rows"


JUDGED = pd.DataFrame(
    [
        {"vector": "v", "layer": 1, "coefficient": c, "prompt_id": str(i), "sample": s, "group": str(i), "text": text}
        for c in (0.0, 1.0) for i in range(40) for s in range(3)
        for text in ["".join(random.Random(f"{c} {i} {s // 2}").choices("abcde ", k=60))]
    ]
)  # fmt: skip
"""Texts that a judge rates; every third is the text of another row."""


def _judge(folder: Path) -> object:
    from tests.scripted_server import Call, Scripted, answer

    def rate(call: Call, _: int) -> None:
        time.sleep(0.02)  # a model takes time, so that a kill finds some texts rated and some not
        call.json(answer(str(call.body["messages"][0]["content"].count("e"))))

    with Scripted(rate) as server:
        judge = sk.judge(server.url, "m", "Count the e's.", (0, 100), cache=folder / "answers.jsonl", api_key_env=None)
        judged = sk.SweepResult(JUDGED).score(judge)
    judged.save(folder / "judged.csv")
    return judged


def _debates(folder: Path) -> object:
    from training.debates.answerers import LocalModel, Sampling
    from training.debates.debate import Setting, run_debates
    from training.debates.personas import cast_of
    from training.problems.families import addition

    model = LocalModel(tiny_model(context=2048), tiny_tokenizer(), batch_rows=16)
    setting = Setting(early_stop=False, sampling=Sampling(1.0, 1.0, 24))
    return run_debates(addition(24, 0, "train"), model, cast_of("diverse"), setting, folder)


def _grpo(folder: Path) -> object:
    from tests.training.test_training import grpo, model_and_tokenizer
    from training.problems.families import addition
    from training.train.checkpoints import add_tags
    from training.train.grpo import train_grpo

    model, tokenizer = model_and_tokenizer()
    return train_grpo(model, add_tags(model, tokenizer, tags()), addition(12, 0, "train"), grpo(), folder)


def _policy(folder: Path) -> str:
    weights = sk.load(folder / "checkpoint")[0].state_dict()
    digest = hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()
    log = read_rows(folder / "log.jsonl")
    return f"{digest} {sha256(canonical_json(log))} {len(log)} steps"


def _doubled(name: str, key: str) -> Callable[[Path], int]:
    def count(folder: Path) -> int:
        rows = [str(row[key]) for row in read_rows(folder / name)]
        return len(rows) - len(set(rows))

    return count


def _flips(name: str) -> Callable[[Path, Path], int | None]:
    def count(whole: Path, cut: Path) -> int | None:
        sides = [{str(row["key"]): row for row in read_rows(folder / name)} for folder in (whole, cut)]
        if sides[0].keys() != sides[1].keys():
            return None
        pairs = [(row, sides[1][key]) for key, row in sides[0].items() if row != sides[1][key]]
        return sum(a.get("prompt_sha256") == b.get("prompt_sha256") for a, b in pairs) or None

    return count


def _debated(folder: Path) -> str:
    return sha256(folder / "debates.jsonl")


JOBS = (
    Job("sweep", _sweep, _table, _doubled("rows.jsonl", "key"), _flips("rows.jsonl")),
    Job("grown sweep", _grown, _table, _doubled("rows.jsonl", "key"), _flips("rows.jsonl")),
    Job("grown sweep of choices", _grown_choices, _table, _doubled("rows.jsonl", "key")),
    Job("debates", _debates, _debated, _doubled("calls.jsonl", "key"), _flips("calls.jsonl")),
    Job("judge", _judge, lambda folder: sha256(folder / "judged.csv"), _doubled("answers.jsonl", "key")),
    Job("GRPO", _grpo, _policy, _doubled("log.jsonl", "step")),
)
