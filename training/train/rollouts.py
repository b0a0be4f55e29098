"""Rollouts: what GRPO's policy writes, by steerkit's own engine where a process has the whole model."""

from __future__ import annotations

from typing import Any

from steerkit.generation.engine import Row
from steerkit.generation.generate import decode
from steerkit.text.prompt import encode_prompt


def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions of one batch, as TRL's `rollout_func`.

    The engine prefills a group's prompt once, lets completions that have ended leave the batch, and finds the nucleus
    without sorting the vocabulary. A completion depends on the weights and on (seed, step, process, its place) alone,
    so that a resumed run goes on with the completions that it would have had. The model is in eval mode meanwhile.

    Args:
        prompts: of this process, each as often as it has completions; strings, continued verbatim.
        trainer: TRL's; its `max_completion_length` is where a completion is cut.

    Returns:
        prompt_ids, completion_ids: lists of ids; a completion holds the token that ended it.
        logprobs: None, so that TRL computes them itself where it needs them.
    """
    at = (trainer.args.seed, "rollout", trainer.state.global_step, trainer.accelerator.process_index)
    rows = [Row(tuple(encode_prompt(trainer.processing_class, prompt))) for prompt in prompts]
    done: dict[int, list[int]] = {}
    batches = decode(
        trainer.model, trainer.processing_class, rows, [(*at, place) for place in range(len(rows))],
        max_new_tokens=trainer.max_completion_length, temperature=trainer.temperature, top_p=trainer.top_p,
    )  # fmt: skip
    for batch in batches:
        for place, found in batch:
            done[place] = [*found.ids, *(() if found.end is None else (found.end,))]
    return {
        "prompt_ids": [list(row.prompt) for row in rows],
        "completion_ids": [done[place] for place in range(len(rows))],
        "logprobs": None,
    }


def sharded(arguments: Any) -> bool:
    """Whether no process has the whole model (FSDP, DeepSpeed's ZeRO 3), so that TRL has to gather it to generate."""
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.integrations.fsdp import is_fsdp_enabled

    return is_deepspeed_zero3_enabled() or is_fsdp_enabled() or bool(arguments.fsdp)
