"""How often the shape of a batch changes a text of the real model: sums rounded in another order."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import steerkit as sk
from steerkit.demo.checkpoint import default_checkpoint
from tests.torture.killed import Line

TOPICS = ("the sea", "a train", "bread", "the moon", "old songs", "rain", "a clock", "mountains")
SIZES = (1, 3, 8, 64)


def flips(samples: int = 4, new: int = 32) -> Iterator[Line]:
    """Compare sampled rows in batches of each size with one row at a time, in float32 and bfloat16.

    A differing text counts as one flip: its first differing token. Later tokens depend on that one.
    """
    for dtype in ("float32", "bfloat16"):
        model, tokenizer = sk.load(default_checkpoint(), dtype=dtype)
        vector = sk.random_like(sk.SteeringVector({14: torch.ones(model.config.hidden_size)}), seed=0)
        prompts = [{"id": str(i), "prompt": f"Tell me about {topic}."} for i, topic in enumerate(TOPICS)]
        tables = {
            size: sk.sweep(
                model, tokenizer, vector, prompts, coefficients=[-1.0, 0.0, 1.0], samples=samples, max_new_tokens=new,
                batch_rows=size, seed=0,
            ).table
            for size in SIZES
        }  # fmt: skip
        alone = tables.pop(1)
        tokens = sum(int(table["n_tokens"].sum()) for table in tables.values())
        differ = sum(int((table["text"] != alone["text"]).sum()) for table in tables.values())
        rows = sum(map(len, tables.values()))
        yield Line(
            f"sampled texts of SmolLM2-135M in {dtype}, batches of {', '.join(map(str, tables))} and of one row",
            rows, rows - differ,
            f"{differ} texts differ: {1e6 * differ / tokens:.0f} first differences per million of {tokens} tokens; "
            f"{'required: 0' if dtype == 'float32' else 'no requirement'}",
            measured=dtype == "bfloat16",
        )  # fmt: skip
