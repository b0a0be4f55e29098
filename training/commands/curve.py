"""Tabulate loss and accuracy over the steps of SFT: `curve/curve.csv`.

The steps are those that `sft` kept (`--set 'sft.keep_at=[25,50,100]'`), and the last one. Each model answers the test
problems once per decoding seed of the preset; the table has a row per step and family of problems. The loss is the mean
of the last ten steps. A finished step is read from disk; processes of torchrun share the questions.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steerkit.io.json import read_json
from steerkit.io.ranks import in_first_process, is_first
from steerkit.io.tables import write_table
from training.commands.evaluate import Evaluation, Job
from training.commands.options import (
    Stages,
    add_judge,
    add_settings,
    checkpoint_of,
    judge_of,
    one_line_errors,
    problems_of,
    settings_of,
    stage_command,
    stage_parser,
)
from training.debates.answerers import LocalModel, loaded
from training.evaluate.results import summary
from training.toy.worlds import bare
from training.train.sft import STEPS


def main(arguments: list[str] | None = None) -> None:
    parser = stage_parser("curve", __doc__)
    add_settings(parser)
    add_judge(parser, "judges answers to open questions")
    parser.add_argument("--problems", metavar="FILE", help="problems (default: the test problems of the run)")
    parser.add_argument("--checkpoint", help="model that was fine-tuned (default: the preset's)")
    parser.add_argument("--name", default="sft", help="folder of the stage sft in the run (default: sft)")
    given = parser.parse_args(arguments)
    folder = given.run / ("curve" if given.name == "sft" else f"curve-{given.name}")
    with one_line_errors("curve"):
        preset = settings_of(given)
        stages = Stages(given.run)
        checkpoint, kept = stages.checkpoint(given.name), stages.folder / given.name / STEPS
        models = {int(path.name): path for path in kept.glob("*") if path.name.isdecimal()}
        if not checkpoint.exists() or not models:
            options = ("--run", given.run, "--name", given.name, "--set", "sft.keep_at=[25,50]")
            raise FileNotFoundError(
                f"expected a finished stage sft with models in {kept}; got {len(models)}. Run "
                f"`{stage_command('sft', *options)}`, with the steps to keep."
            )
        problems = problems_of(given, "test")
        log = [row for row in read_json(checkpoint.with_name("log.json")) if "loss" in row or "train_loss" in row]
        models[log[-1]["step"]] = checkpoint
        judge = judge_of(given, problems)
        about = None if judge is None else judge.about()
        evaluation = Evaluation(problems, preset, given.seed, folder, judge, about)
        base = checkpoint_of(given, preset)

        tables = []
        for step, path in sorted(models.items()):
            load = partial(_load, path, base, preset.dtype)
            job = Job((f"step {step}",), load, evaluation.one_answer(bare), checkpoint=path)
            parts = pd.concat(evaluation.rows(job), ignore_index=True).assign(decoding="", seed=0)
            of_step = summary(parts).drop(columns=["method", "decoding", "seed", "mean_agents"])
            of_step.insert(0, "step", step)
            of_step.insert(2, "loss", loss_at(log, step))  # after the family
            tables.append(of_step)
        table = pd.concat(tables, ignore_index=True)
        in_first_process(lambda: write_table(folder / "curve.csv", table, {"seed": given.seed, "stage": given.name}))
    if is_first():
        print(table.round(3).to_string(index=False))
        print(f"Table in {folder / 'curve.csv'}.")


def loss_at(log: Sequence[Mapping[str, Any]], step: int) -> float:
    """Return the mean loss of the ten steps up to a step, or the first logged one if none of them is logged."""
    losses = [(row["step"], row["loss"]) for row in log if "loss" in row]
    recent = [loss for logged, loss in losses if step - 10 < logged <= step]
    return float(np.mean(recent or [loss for _, loss in losses[:1]] or [np.nan]))


def _load(path: Path, base: str | Path, dtype: str | None) -> LocalModel:
    """The model of a step: an adapter beside its base, or all weights."""
    if not (path / "adapter_config.json").is_file():
        return LocalModel(*loaded(path, dtype=dtype))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tokenizer.*")  # the adapter's has the tags
        return LocalModel(*loaded(base, adapter=path, dtype=dtype))
