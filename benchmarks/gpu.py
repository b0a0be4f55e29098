"""Steered decoding on a GPU: `python benchmarks/gpu.py`, under eight minutes; writes runs/bench/gpu.json.

The model is random, in the shape of an 8B Llama, in bfloat16: speed does not depend on the values of the weights. The
floor is set by the memory's bandwidth: every step reads all weights once, and the whole cache.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

from steerkit.generation.engine import Row  # noqa: E402
from steerkit.generation.generate import decode  # noqa: E402
from steerkit.steering.steering import Steering  # noqa: E402
from steerkit.vectors.vector import SteeringVector  # noqa: E402

BATCH, WIDTH, NEW, LAYER, REPEATS = 72, 128, 128, 15, 3


def build() -> Any:
    """A random Llama of 8 billion weights on the GPU."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


class NoEnd:
    """A tokenizer that never ends a text."""

    eos_token_id = None


def timed(work: Callable[[], Any]) -> list[float]:
    """Seconds of each run after one uncounted run."""
    seconds = []
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def bandwidth() -> float:
    """Bytes per second of a large copy, counting reads and writes."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / min(timed(lambda: target.copy_(source)))


def bytes_per_step(model: Any) -> float:
    """Bytes that one decoding step reads: all weights but the embedding table, and the cache at its mean length."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    weights -= model.get_input_embeddings().weight.numel() * 2
    head = config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head * 2 * BATCH * (WIDTH + NEW / 2)
    return weights + cache


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("expected a GPU; torch finds none. Run it on a machine with a GPU.")
    torch.manual_seed(0)
    model = build()
    width = model.config.hidden_size
    prompts = [tuple(torch.randint(1, 100_000, (WIDTH,)).tolist()) for _ in range(8)]
    vector = SteeringVector({LAYER: torch.randn(width)})
    steering = Steering(vector, positions="from_last_prompt_token")
    bare = [Row(prompts[i % 8]) for i in range(BATCH)]
    steered = [Row(prompts[i % 8], (steering.scaled(0.1 + 0.01 * i),)) for i in range(BATCH)]

    def ours(rows: list[Row]) -> Callable[[], Any]:
        return lambda: list(decode(model, NoEnd(), rows, [], max_new_tokens=NEW, batch_rows=BATCH))

    def theirs(**options: Any) -> Callable[[], Any]:
        ids = torch.tensor([row.prompt for row in bare], device="cuda")
        return lambda: model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            **options,
        )

    tokens = BATCH * NEW
    floor = BATCH * bandwidth() / bytes_per_step(model)
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "batch": BATCH}
    ways = {
        "engine, unsteered": ours(bare),
        "engine, steered": ours(steered),
        "generate, unsteered, dynamic cache": theirs(),
        "generate, unsteered, static cache, compiled": theirs(cache_implementation="static"),
    }
    for name, work in ways.items():
        seconds = timed(work)
        results[name + ", tokens/s"] = round(tokens / statistics.median(seconds))
        results[name + ", spread"] = round((max(seconds) - min(seconds)) / statistics.median(seconds), 3)
        print(name, results[name + ", tokens/s"], flush=True)
    results["floor by bandwidth, tokens/s"] = round(floor)
    pairs = [(min(timed(ours(steered))), min(timed(ours(bare)))) for _ in range(2)]
    results["steered / unsteered, seconds"] = round(statistics.mean(a / b for a, b in pairs), 4)
    results["floor / engine steered"] = round(floor / results["engine, steered, tokens/s"], 3)
    folder = ROOT / "runs" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
