"""Seconds and peak memory of training steps with LoRA: SFT on whole debates, GRPO with completions of full length."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.measure import PeakMemory, seconds
from benchmarks.gpu.sizes import Sizes, random_llama
from benchmarks.gpu.texts import byte_tokenizer, debates
from training.memory import MARGIN, generation, training_step
from training.problems.problem import Problem
from training.train.checkpoints import LoRA
from training.train.grpo import GRPO, train_grpo
from training.train.schedules import Anneal
from training.train.sft import SFT, train_sft

Figure = dict[str, Any]
PROMPT = 48
"""Tokens of a prompt of GRPO."""


def training(sizes: Sizes, device: torch.device) -> list[Figure]:
    """One optimisation step of each kind from the same random weights; its peak against `training.memory`.

    Raises:
        NotImplementedError: the packages of the extra `train` are missing.
    """
    try:
        import datasets  # noqa: F401
        import peft  # noqa: F401
        import trl  # noqa: F401
    except ImportError as error:
        raise NotImplementedError(f"needs TRL, peft and datasets: {error}. Carry their wheels.") from error
    figures: list[Figure] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for rows in sizes.sft_rows:
            figures += _sft(sizes, device, rows)
        figures += _grpo(sizes, device)
    return figures


def _sft(sizes: Sizes, device: torch.device, rows: int) -> Iterator[Figure]:
    """One SFT step; the embeddings are trained, as the new tags require."""
    model, tokenizer = random_llama(sizes.llama, device, sizes.dtype), byte_tokenizer()
    config, lora, tokens = model.config, LoRA(), sizes.train_tokens
    traces = debates(tokenizer, [tokens] * rows)
    setting = SFT(steps=1, batch=rows, micro_batch=rows, lora=lora)
    with _scratch() as folder, PeakMemory(device) as peak:
        train_sft(model, tokenizer, traces, setting, Path(folder) / "sft")
        log = json.loads((Path(folder) / "sft" / "log.json").read_text())
    name = f"SFT step, {rows} x {tokens:,} tokens"
    took = next(entry["train_runtime"] for entry in log if "train_runtime" in entry)
    yield {"figure": name, "value": took, "unit": "s", "n": 1}
    autocast = device.type == "cuda"
    step = training_step(config, lora, rows, tokens, train_embeddings=True, dtype=sizes.dtype, autocast=autocast)
    yield from _memory(name, peak.gib, MARGIN * step.total / 2**30)


def _grpo(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """One GRPO step: completions of full length, since a random model does not end, then the backward passes."""
    model, tokenizer = random_llama(sizes.llama, device, sizes.dtype), byte_tokenizer()
    config, lora, new = model.config, LoRA(32, 64, 0.1), sizes.completion
    problems = [
        Problem(str(i), f"{i}".ljust(PROMPT - 11, "x"), "2", "number", "own") for i in range(sizes.grpo_prompts)
    ]
    generations = sizes.completions // sizes.grpo_prompts
    setting = GRPO(
        anneal=Anneal("linear", clip=(new, new)),
        steps=1,
        inner=1,
        prompts=sizes.grpo_prompts,
        generations=generations,
        micro_batch=sizes.grpo_micro_batch,
        lora=lora,
        save_every=9,
    )
    with _scratch() as folder, PeakMemory(device) as peak:
        took = seconds(lambda: train_grpo(model, tokenizer, problems, setting, Path(folder) / "grpo"), device)
        row = json.loads((Path(folder) / "grpo" / "log.jsonl").read_text().splitlines()[0])
    name = f"GRPO step, {sizes.completions} x {new:,} new tokens"
    yield {"figure": f"{name}, and saving", "value": took, "unit": "s", "n": 1}
    yield {"figure": f"{name}: mean length", "value": row["length"], "unit": "tokens", "n": sizes.completions}
    cuda = device.type == "cuda"
    rows, tokens = sizes.grpo_micro_batch, PROMPT + new
    step = training_step(config, lora, rows, tokens, dtype=sizes.dtype, autocast=cuda)
    written = step.weights + generation(config, sizes.completions, PROMPT, new, sizes.dtype, cpu=not cuda)
    yield from _memory(name, peak.gib, MARGIN * max(step.total, written) / 2**30)


def _memory(name: str, measured: float, estimated: float) -> Iterator[Figure]:
    """The measured peak where there is one, and the estimate."""
    yield {"figure": f"{name}: estimated peak", "value": estimated, "unit": "GiB"}
    if measured == measured:  # NaN on a CPU
        yield {"figure": f"{name}: peak", "value": measured, "unit": "GiB", "n": 1}
        yield {"figure": f"{name}: estimate / peak", "value": estimated / measured, "unit": ""}


def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for a checkpoint of the model's size, in memory where there is room."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
