"""Training steps: SFT and GRPO of this project against TRL as it comes, in the same dtype and lengths."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks import inputs
from benchmarks.timing import Measured, compare
from steerkit.models.products import fast_products
from training.train.log_probs import fast_log_probs
from training.train.rollouts import rollouts

BATCH, LENGTH, NEW = 8, 192, 96
LEARNING_RATE = 1e-6


def sft() -> Iterator[Measured]:
    """One optimisation step of 8 texts of 192 tokens, all weights trained, optimiser included."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, step = _sft_trainer(folder)

        def ours() -> None:
            with fast_products(trainer.model), fast_log_probs():
                step()

        job = f"SFT step, {BATCH} texts x {LENGTH} tokens, all weights, float32"
        yield compare(job, "TRL as it comes, no checkpointing", ours, step, 11, ">= 1.4")


def sft_bfloat16() -> Iterator[Measured]:
    """The same step with products in bfloat16 (`SFT.bf16`), against float32, both ours."""
    with tempfile.TemporaryDirectory() as folder:
        sides = []
        for half in (True, False):
            trainer, step = _sft_trainer(folder, bf16=half)

            def ours(trainer: Any = trainer, step: Any = step) -> None:
                with fast_products(trainer.model), fast_log_probs():
                    step()

            sides.append(ours)
        job = f"SFT step, {BATCH} texts x {LENGTH} tokens, all weights, in bfloat16"
        yield compare(job, "the same in float32", *sides, 11)


def _sft_trainer(folder: str, **options: Any) -> tuple[Any, Any]:
    """TRL's trainer on a copy of the model, and one of its optimisation steps."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = inputs.model()
    ids = [tokenizer(text)["input_ids"][:LENGTH] for text in inputs.texts(BATCH, LENGTH + 8, LENGTH + 8)]
    rows = [{"input_ids": one, "labels": one} for one in ids]
    config = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        max_length=None,
        gradient_checkpointing=False,
        **{**ON_CPU, **options},
    )
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = padded.eos_token
    trainer = SFTTrainer(
        copy.deepcopy(model), args=config, train_dataset=Dataset.from_list(rows), processing_class=padded
    )
    return trainer, step_of(trainer, next(iter(trainer.get_train_dataloader())))


def grpo() -> Iterator[Measured]:
    """One optimisation step on 4 x 4 sampled completions of 96 tokens, rollouts included."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = inputs.model()
    prompts = [f"Problem: What is {number}?\n\n" for number in ("53 + 35", "18 + 67", "40 + 29", "77 + 14")]

    written: dict[str, list[int]] = {}

    def trainer_of(folder: str, side: str, **options: Any) -> Any:
        def rewarded(completion_ids: list[list[int]], **_: Any) -> list[float]:
            written.setdefault(side, []).extend(map(len, completion_ids))
            return [float(ids[0] % 7) for ids in completion_ids]

        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=16,
            num_generations=4,
            max_completion_length=NEW,
            learning_rate=LEARNING_RATE,
            temperature=0.7,
            top_p=0.9,
            gradient_checkpointing=False,
            max_steps=1000,
            **ON_CPU,
        )
        policy = copy.deepcopy(model)
        padded = copy.deepcopy(tokenizer)
        padded.pad_token = padded.eos_token
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return GRPOTrainer(
                policy,
                reward_funcs=rewarded,
                args=config,
                train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
                processing_class=padded,
                **options,
            )

    with tempfile.TemporaryDirectory() as folder:
        other, mine = trainer_of(folder, "theirs"), trainer_of(folder, "ours", rollout_func=rollouts)
        batch = next(iter(other.get_train_dataloader()))
        their_step, our_step = step_of(other, batch), step_of(mine, batch)

        def ours() -> None:
            with fast_products(mine.model), fast_log_probs():
                our_step()

        job = f"GRPO step, 4 x 4 completions of at most {NEW} tokens, rollouts included, all weights, float32"
        line = compare(job, "TRL as it comes", ours, their_step, 11, ">= 2.5")
        lengths = ", ".join(f"{side} {sum(some) / len(some):.0f}" for side, some in sorted(written.items()))
        yield replace(line, note=f"mean tokens of a completion: {lengths}")


ON_CPU: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}


def step_of(trainer: Any, batch: Any) -> Any:
    """One optimisation step of a trainer on a batch, as its training loop makes it."""
    trainer.create_optimizer_and_scheduler(num_training_steps=10**6)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps

    def step() -> None:
        count = (batch["labels"] != -100).sum() if "labels" in batch else None
        trainer.training_step(trainer.model, copy.copy(batch), count)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.state.global_step += 1

    return step
