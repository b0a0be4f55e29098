"""GRPO's completions: the engine against HF `generate` on a left-padded batch, as TRL calls it, same adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import inputs
from benchmarks.timing import Measured, compare
from steerkit.text.prompt import encode_prompt
from steerkit.text.tokens import pad
from training.train.checkpoints import LoRA, with_adapter
from training.train.rollouts import rollouts

GROUPS, GENERATIONS, NEW = 4, 8, 96


def written() -> Iterator[Measured]:
    """Sampled completions of four prompts, eight each, under a LoRA adapter."""
    model, tokenizer = inputs.model()
    policy = with_adapter(copy.deepcopy(model), LoRA(32, 64, 0.0), train_embeddings=False)
    prompts = [f"Problem: What is {number}?\n\n" for number in ("53 + 35", "18 + 67", "40 + 29", "77 + 14")]
    rows = [prompt for prompt in prompts for _ in range(GENERATIONS)]
    trainer: Any = SimpleNamespace(
        model=policy,
        processing_class=tokenizer,
        args=SimpleNamespace(seed=0),
        state=SimpleNamespace(global_step=0),
        accelerator=SimpleNamespace(process_index=0),
        max_completion_length=NEW,
        temperature=0.7,
        top_p=0.9,
    )
    ids, mask, _ = pad([encode_prompt(tokenizer, row) for row in rows], "left")
    ends = [tokenizer.eos_token_id]

    def ours() -> None:
        rollouts(rows, trainer)

    def theirs() -> None:
        with torch.no_grad():
            policy.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=NEW,
                do_sample=True,
                temperature=0.7,
                top_p=0.9,
                top_k=0,
                pad_token_id=0,
                eos_token_id=ends,
            )

    job = f"{GROUPS} x {GENERATIONS} sampled completions of at most {NEW} tokens under a LoRA adapter"
    yield compare(job, "HF generate, as TRL calls it", ours, theirs, pairs=5)
