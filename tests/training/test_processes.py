"""One, two and four processes make the same optimisation steps and the same model; what does not divide is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import steerkit as sk
from steerkit.io.json import read_json
from steerkit.io.rows import read_rows
from training.train.checkpoints import check_batch, in_epochs
from training.train.grpo import GRPO, check_division, check_rollouts

pytest.importorskip("trl", reason="the extra `train` is not installed")
ROOT = Path(__file__).parents[2]
WORLDS = (1, 2, 4)
WORK = """
import os, socket, sys
from dataclasses import replace
from pathlib import Path

import trl
from trl import GRPOTrainer, SFTTrainer  # loaded once, before the processes are forked

import steerkit as sk
from tests.training.test_training import grpo, model_and_tokenizer, traces
from training.problems.families import addition
from training.train.checkpoints import LoRA, add_tags, save
from training.train.grpo import train_grpo
from training.train.sft import SFT, train_sft
from steerkit.text.tags import tags

out = Path(sys.argv[1])

ADAPTED = (1, 2)

def train(folder, world):
    setting = SFT(epochs=1.5, batch=8, micro_batch=8 // world if world < 4 else 1, lora=None, learning_rate=1e-2)
    sft = train_sft(*model_and_tokenizer(), traces(18), setting, folder / "sft")
    several = dict(steps=4, inner=2, prompts=4, generations=4, micro_batch=8 // world, temperature=1.0)
    train_grpo(*sk.load(out / "start"), addition(12, 0, "train"), replace(grpo(), **several), folder / "grpo")
    if world in ADAPTED:
        adapted = replace(setting, lora=LoRA(4, 8))
        train_sft(*model_and_tokenizer(), traces(18), adapted, folder / "sft-lora")
        several |= dict(lora=LoRA(4, 8), loss="dapo", learning_rate=1e-2)
        train_grpo(*sk.load(out / "start"), addition(12, 0, "train"), replace(grpo(), **several), folder / "grpo-lora")

def one(rank, world, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    train(out / str(world), world)

model, tokenizer = model_and_tokenizer()
save(model, add_tags(model, tokenizer, tags()), out / "start")
for world in (1, 2, 4):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (out / str(world)).mkdir()
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                one(rank, world, port)
                code = 0
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children), world
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folders `1`, `2` and `4`: SFT and GRPO by so many processes."""
    out = tmp_path_factory.mktemp("processes")
    script = out / "work.py"
    script.write_text(WORK)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, script, out], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return out


def weights(folder: Path) -> torch.Tensor:
    model, _ = sk.load(folder)
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def test_the_number_of_processes_changes_neither_the_steps_nor_the_model(runs) -> None:
    logs = [read_json(runs / str(world) / "sft" / "log.json") for world in WORLDS]
    assert [log[-1]["step"] for log in logs] == [5, 5, 5]  # ceil(1.5 x 18 / 8), the last of a pass with two rows
    rows = [read_rows(runs / str(world) / "grpo" / "log.jsonl") for world in WORLDS]
    assert [[row["step"] for row in log] for log in rows] == [[0, 2]] * 3
    for name, others in (("reward", rows[1:]), ("length", rows[1:])):
        for log in others:
            assert [row[name] for row in log] == pytest.approx([row[name] for row in rows[0]], rel=1e-6)
    start = weights(runs / "start")
    for stage, worlds in (("sft", WORLDS), ("grpo", WORLDS), ("sft-lora", (1, 2)), ("grpo-lora", (1, 2))):
        one, *several = (weights(runs / str(world) / stage / "checkpoint") for world in worlds)
        moved = (one - start).norm()
        assert moved > 0.01
        for other in several:
            assert (other - one).norm() < 0.01 * moved


def test_an_epoch_s_orders_are_those_that_a_trainer_of_one_process_draws() -> None:
    from torch.utils.data import BatchSampler, RandomSampler

    rows = list(range(11))
    expected: list[int] = []
    for number in range(2):
        sampler = RandomSampler(rows, generator=torch.Generator().manual_seed(5 + number))
        batches = list(BatchSampler(sampler, 4, drop_last=False))
        expected += [index for batch in batches for index in (*batch, *[-1] * (4 - len(batch)))]
    assert in_epochs(rows, 2, 4, 5, -1) == expected
    assert in_epochs(rows, 1.5, 4, 5, -1) == expected[:20]  # ceil(1.5 x 3) steps


@pytest.mark.parametrize(
    ("batch", "micro_batch", "processes", "fix"),
    [
        (16, 5, 1, "Pass micro_batch=4, or a multiple of 5"),
        (16, 4, 8, "Pass micro_batch=2, or a multiple of 32"),
        (16, 3, 3, "Pass 18, or start another number"),
        (16, 0, 2, "Pass micro_batch=1"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_what_would(batch, micro_batch, processes, fix) -> None:
    with pytest.raises(ValueError, match=fix):
        check_batch("batch", batch, micro_batch, processes)


def test_several_processes_refuse_split_groups_and_a_loss_that_depends_on_them() -> None:
    check_division(replace(GRPO(), micro_batch=4), 8)
    with pytest.raises(ValueError, match=r"expected prompts to be a multiple of the 3 processes; got 8. Pass 9"):
        check_division(GRPO(), 3)
    with pytest.raises(ValueError, match=r"grpo\.loss=dapo"):
        check_division(replace(GRPO(), loss="bnpo", micro_batch=4), 2)
    check_division(replace(GRPO(), loss="bnpo"), 1)


def test_completions_by_vllm_are_refused_without_a_gpu(monkeypatch) -> None:
    check_rollouts(GRPO())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="expected a GPU for completions by vLLM"):
        check_rollouts(replace(GRPO(), vllm=True))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_rollouts(replace(GRPO(), vllm=True))
