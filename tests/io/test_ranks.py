"""Two processes under torchrun train as one run: one folder, one checkpoint, weights that every rank agrees on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import steerkit as sk
from steerkit.io.json import read_json
from steerkit.io.rows import read_rows
from steerkit.io.tables import read_table

pytest.importorskip("trl", reason="the extra `train` is not installed")
ROOT = Path(__file__).parents[2]
WORK = """
import sys, json, torch
from pathlib import Path
from dataclasses import replace
from tests.training.test_training import grpo, model_and_tokenizer, traces
from steerkit.io import ranks
from training.train.checkpoints import add_tags
from training.train.grpo import train_grpo
from training.problems.families import addition
from training.train.sft import SFT, train_sft
from steerkit.text.tags import tags
import steerkit as sk

out = Path(sys.argv[1])
alone = ranks.in_first_process(lambda: (out / "alone").mkdir() or "first")
setting = SFT(steps=2, batch=4, micro_batch=2, lora=None, learning_rate=1e-2)
sft = train_sft(*model_and_tokenizer(), traces(), setting, out / "sft")
model, tokenizer = sk.load(sft)
done = train_grpo(model, tokenizer, addition(12, 0, "train"), replace(grpo(), micro_batch=4), out / "grpo")
total = float(sum(weight.detach().double().sum() for weight in model.parameters()))
rank = torch.distributed.get_rank()
(out / f"rank-{rank}.json").write_text(json.dumps({"total": total, "alone": alone, "done": done.exists()}))
"""


def run_by(ranks: int, script: Path, out: Path) -> None:
    """Run a script with `out` as its argument: alone, or as several ranks under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks > 1 else ()), str(script), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]


def by_one_and_by_two(source: str, folder: Path) -> tuple[Path, Path]:
    """The output folders of a script that one process ran, and that two ranks ran."""
    script, one, two = folder / "work.py", folder / "one", folder / "two"
    script.write_text(source)
    run_by(2, script, two)
    run_by(1, script, one)
    return one, two


def test_two_ranks_train_one_model_in_one_folder(tmp_path) -> None:
    script = tmp_path / "work.py"
    script.write_text(WORK)
    run_by(2, script, tmp_path)
    first, second = (read_json(tmp_path / f"rank-{rank}.json") for rank in (0, 1))
    assert first["total"] == second["total"]
    assert (first["alone"], second["alone"]) == ("first", None)
    assert first["done"] and second["done"]
    log = read_rows(tmp_path / "grpo" / "log.jsonl")
    assert [row["step"] for row in log] == [0, 1, 2, 3]
    loaded, _ = sk.load(tmp_path / "grpo" / "checkpoint")
    total = float(sum(weight.detach().double().sum() for weight in loaded.parameters()))
    assert total == pytest.approx(first["total"], rel=1e-9)
    assert all(torch.isfinite(weight).all() for weight in loaded.parameters())


SWEEP = """
import sys
import steerkit as sk
import torch
from steerkit.io import ranks
from tests.tiny import tiny_model, tiny_tokenizer

vector = sk.SteeringVector({1: torch.linspace(-6, 6, 32)})
result = sk.sweep(
    tiny_model(), tiny_tokenizer(), vector, ["one", "two three", "four", "five six"], coefficients=[-1, 0, 1],
    max_new_tokens=5, samples=2, out=sys.argv[1],
)
result.save(f"{sys.argv[1]}-seen-by-{ranks.rank_and_world()[0]}.parquet")
"""


def test_a_sweep_by_two_ranks_is_the_sweep_of_one(tmp_path) -> None:
    one, two = by_one_and_by_two(SWEEP, tmp_path)
    whole, shared = (sk.SweepResult.load(out).table for out in (one, two))
    pd.testing.assert_frame_equal(whole, shared, rtol=1e-4)
    assert whole["text"].nunique() > 8
    shares = [len(read_rows(two / name)) for name in ("rows.jsonl", "rows-1.jsonl")]
    assert shares == [12, 12]
    for rank in (0, 1):
        pd.testing.assert_frame_equal(read_table(tmp_path / f"two-seen-by-{rank}.parquet")[0], shared)


DEBATES = """
import json, sys
from dataclasses import asdict
from steerkit.io import ranks
from training.debates.answerers import Reply, Rule
from training.debates.debate import Setting, run_debates
from training.problems.families import addition
from training.debates.personas import cast_of

def answer(request, rng):
    return f"{request.id} so \\\\boxed{{{sum(map(ord, request.id)) % 3}}}"

out = sys.argv[1]
debates = run_debates(addition(7, 0, "train"), Rule(answer), cast_of("standard"), Setting(), out, shared=True)
seen = json.dumps([asdict(debate) for debate in debates], default=lambda function: function.__name__)
open(f"{out}-seen-by-{ranks.rank_and_world()[0]}.json", "w").write(seen)
"""


def test_debates_by_two_ranks_are_the_debates_of_one(tmp_path) -> None:
    one, two = by_one_and_by_two(DEBATES, tmp_path)
    for name in ("debates.jsonl", "traces.jsonl"):
        assert (two / name).read_bytes() == (one / name).read_bytes()
    seen = [
        (tmp_path / name).read_text() for name in ("one-seen-by-0.json", "two-seen-by-0.json", "two-seen-by-1.json")
    ]
    assert len(set(seen)) == 1
    assert (two / "calls-1.jsonl").exists()
