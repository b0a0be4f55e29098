"""Two processes under torchrun train as one run: one folder, one checkpoint, weights that every rank agrees on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import steerkit as sk
from steerkit import artifacts

pytest.importorskip("trl", reason="the extra `train` is not installed")
ROOT = Path(__file__).parent.parent
WORK = """
import sys, json, torch
from pathlib import Path
from dataclasses import replace
from tests.test_training import grpo, model_and_tokenizer, traces
from training import ranks
from training.checkpoints import add_tags
from training.grpo import train_grpo
from training.families import addition
from training.sft import SFT, train_sft
from steerkit.traces import tags
import steerkit as sk

out = Path(sys.argv[1])
alone = ranks.first_alone(lambda: (out / "alone").mkdir() or "first")
setting = SFT(steps=2, batch=4, micro_batch=2, lora=None, learning_rate=1e-2)
sft = train_sft(*model_and_tokenizer(), traces(), setting, out / "sft")
model, tokenizer = sk.load(sft)
done = train_grpo(model, tokenizer, addition(12, 0, "train"), replace(grpo(), micro_batch=4), out / "grpo")
total = float(sum(weight.detach().double().sum() for weight in model.parameters()))
rank = torch.distributed.get_rank()
(out / f"rank-{rank}.json").write_text(json.dumps({"total": total, "alone": alone, "done": done.exists()}))
"""


def test_two_ranks_train_one_model_in_one_folder(tmp_path) -> None:
    script = tmp_path / "work.py"
    script.write_text(WORK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    first, second = (artifacts.read_json(tmp_path / f"rank-{rank}.json") for rank in (0, 1))
    assert first["total"] == second["total"]
    assert (first["alone"], second["alone"]) == ("first", None)
    assert first["done"] and second["done"]
    log = artifacts.read_rows(tmp_path / "grpo" / "log.jsonl")
    assert [row["step"] for row in log] == [0, 1, 2, 3]
    loaded, _ = sk.load(tmp_path / "grpo" / "checkpoint")
    total = float(sum(weight.detach().double().sum() for weight in loaded.parameters()))
    assert total == pytest.approx(first["total"], rel=1e-9)
    assert all(torch.isfinite(weight).all() for weight in loaded.parameters())
