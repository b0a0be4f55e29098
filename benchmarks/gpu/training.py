"""Seconds and peak memory of training steps with LoRA: SFT on whole debates, GRPO with completions of full length."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import TrainerCallback, trainer

from benchmarks.gpu.measure import Figure, PeakMemory, synchronize
from benchmarks.gpu.sizes import Sizes, random_llama
from benchmarks.gpu.texts import byte_tokenizer, debates
from training.memory import MARGIN, rollouts, training_step
from training.problems.problem import Problem
from training.train import grpo, sft
from training.train.checkpoints import LoRA
from training.train.schedules import Anneal

PROMPT = 48
"""Tokens of a prompt of GRPO."""
CHECKPOINTING = True
"""The presets of large models have gradient checkpointing. The SFT step on one debate runs without it."""
STEPS = 3
"""SFT steps; the last one is reported, since the first ones allocate memory and choose kernels."""


def sft_step(rows: int, sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """An SFT step on `rows` debates; the embeddings are trained, as the new tags require.

    Raises:
        NotImplementedError: the packages of the extra `train` are missing.
    """
    _check_packages()
    model, tokenizer = random_llama(sizes.llama, device, sizes.dtype), byte_tokenizer()
    config, lora, tokens = model.config, LoRA(), sizes.train_tokens
    traces = debates(tokenizer, [tokens] * rows)
    checkpointing = CHECKPOINTING and rows > 1
    setting = sft.SFT(steps=STEPS, batch=rows, micro_batch=rows, lora=lora, checkpointing=checkpointing)
    with _timed(sft, device) as (folder, times), PeakMemory(device) as peak:
        sft.train_sft(model, tokenizer, traces, setting, folder / "sft")
    name = f"SFT step{', checkpointing' * checkpointing}, {rows} x {tokens:,} tokens"
    yield {"figure": f"{name}: the last of {STEPS}", "value": times[-1], "unit": "s", "n": 1}
    yield {"figure": f"{name}: the first", "value": times[0], "unit": "s", "n": 1}
    autocast = device.type == "cuda"
    options = {"dtype": sizes.dtype, "autocast": autocast, "checkpointing": checkpointing}
    step = training_step(config, lora, rows, tokens, train_embeddings=True, **options)
    yield from _memory(name, peak, MARGIN * step.total / 2**30)


def grpo_step(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """Completions of full length, since a random model does not end, and two optimisation steps on them.

    Raises:
        NotImplementedError: the packages of the extra `train` are missing.
    """
    _check_packages()
    model, tokenizer = random_llama(sizes.llama, device, sizes.dtype), byte_tokenizer()
    config, lora, new = model.config, LoRA(32, 64, 0.1), sizes.completion
    problems = [
        Problem(str(i), f"{i}".ljust(PROMPT - 11, "x"), "2", "number", "own") for i in range(sizes.grpo_prompts)
    ]
    generations = sizes.completions // sizes.grpo_prompts
    setting = grpo.GRPO(
        anneal=Anneal("linear", clip=(new, new)),
        steps=2,
        inner=2,
        prompts=sizes.grpo_prompts,
        generations=generations,
        micro_batch=sizes.grpo_micro_batch,
        lora=lora,
        checkpointing=CHECKPOINTING,
        save_every=2,
    )
    with _timed(grpo, device) as (folder, times), _timed_rollouts(device) as written, PeakMemory(device) as peak:
        grpo.train_grpo(model, tokenizer, problems, setting, folder / "grpo")
        row = json.loads((folder / "grpo" / "log.jsonl").read_text().splitlines()[0])
    name = f"GRPO{', checkpointing' * CHECKPOINTING}, {sizes.completions} x {new:,} new tokens"
    yield {"figure": f"{name}: completions", "value": written[0], "unit": "s", "n": 1}
    rest = times[0] - written[0]
    yield {"figure": f"{name}: rest of the first step (rewards, old log-probabilities)", "value": rest, "unit": "s"}
    yield {"figure": f"{name}: second step on the same completions", "value": times[1], "unit": "s", "n": 1}
    yield {"figure": f"{name}: mean length", "value": row["length"], "unit": "tokens", "n": sizes.completions}
    cuda = device.type == "cuda"
    rows, tokens = sizes.grpo_micro_batch, PROMPT + new
    options = {"dtype": sizes.dtype, "autocast": cuda, "checkpointing": CHECKPOINTING}
    step = training_step(config, lora, rows, tokens, **options)
    writing = rollouts(config, lora, step, sizes.completions, PROMPT, new, sizes.dtype, cpu=not cuda)
    yield from _memory(name, peak, MARGIN * max(step.total, writing) / 2**30)


def _check_packages() -> None:
    try:
        import datasets  # noqa: F401
        import peft  # noqa: F401
        import trl  # noqa: F401
    except ImportError as error:
        raise NotImplementedError(f"needs TRL, peft and datasets: {error}. Carry their wheels.") from error


class _Timer(TrainerCallback):
    """Callback that appends the seconds of each optimisation step, the device's queue emptied before and after."""

    def __init__(self, times: list[float], device: torch.device) -> None:
        self.times, self.device = times, device

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        synchronize(self.device)
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronize(self.device)
        self.times.append(time.perf_counter() - self.start)


@contextlib.contextmanager
def _timed(stage: Any, device: torch.device) -> Iterator[tuple[Path, list[float]]]:
    """A folder for one training, and the seconds of its steps; no checkpoint is saved, which would take 16 GB."""
    times: list[float] = []
    callbacks = [*trainer.DEFAULT_CALLBACKS, _Timer(times, device)]
    with (
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(trainer, "DEFAULT_CALLBACKS", callbacks),
        mock.patch.object(stage, "save", lambda model, tokenizer, folder, dtype: folder),
    ):
        warnings.simplefilter("ignore")
        yield Path(folder), times


@contextlib.contextmanager
def _timed_rollouts(device: torch.device) -> Iterator[list[float]]:
    """The seconds of each call that generates completions."""
    times: list[float] = []
    original = grpo.rollouts

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        synchronize(device)
        start = time.perf_counter()
        made = original(prompts, trainer)
        synchronize(device)
        times.append(time.perf_counter() - start)
        return made

    with mock.patch.object(grpo, "rollouts", rollouts):
        yield times


def _memory(name: str, peak: PeakMemory, estimated: float) -> Iterator[Figure]:
    """The measured peak where there is one, and the estimate."""
    yield {"figure": f"{name}: estimated peak", "value": estimated, "unit": "GiB"}
    if peak.gib == peak.gib:  # NaN on a CPU
        yield {"figure": f"{name}: allocated before the training", "value": peak.before, "unit": "GiB", "n": 1}
        yield {"figure": f"{name}: peak", "value": peak.gib, "unit": "GiB", "n": 1}
        yield {"figure": f"{name}: estimate / peak", "value": estimated / peak.gib, "unit": ""}
