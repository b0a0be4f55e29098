"""Speed of steered decoding and of capture on an 8B-shaped model, against the plain way and the memory's bandwidth."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

import steerkit as sk
from benchmarks.gpu.measure import bandwidth, interleaved, ratio, seconds
from benchmarks.gpu.sizes import Sizes, random_llama
from steerkit.capture.batches import read_passages, token_batches
from steerkit.capture.pooling import pool_at
from steerkit.generation.engine import Row
from steerkit.generation.generate import decode
from steerkit.models.blocks import find_blocks
from steerkit.text.spans import Passage

Figure = dict[str, Any]


class NoTokenizer:
    """Stands for a tokenizer where prompts are token ids and texts never end."""

    eos_token_id = None


def decoding(sizes: Sizes, device: torch.device) -> list[Figure]:
    """Tokens per second of the engine, steered and not, and of `model.generate`; the bandwidth floor of one step."""
    model = random_llama(sizes.llama, device, sizes.dtype)
    prompts = _prompts(sizes)
    vector = sk.SteeringVector({sizes.layer: torch.randn(model.config.hidden_size)})
    plain = [Row(prompts[i % len(prompts)]) for i in range(sizes.rows)]
    steering = sk.Steering(vector, 1.0)
    steered = [Row(row.prompt, (steering.scaled(0.1 + 0.01 * i),)) for i, row in enumerate(plain)]

    def engine(rows: list[Row], new: int) -> Callable[[], Any]:
        return lambda: list(decode(model, NoTokenizer(), rows, [], max_new_tokens=new, batch_rows=sizes.rows))

    def generate(**options: Any) -> Callable[[], Any]:
        ids = torch.tensor([row.prompt for row in plain], device=device)
        settings = {"max_new_tokens": sizes.new, "min_new_tokens": sizes.new, "do_sample": False, "pad_token_id": 0}
        return lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings, **options)

    tokens = sizes.rows * sizes.new
    ways = {
        "engine, unsteered": engine(plain, sizes.new),
        "engine, steered, a vector per row": engine(steered, sizes.new),
        "generate, dynamic cache": generate(),
    }
    times = interleaved(ways, device, sizes.pairs)
    figures = [_rate(name, tokens, values) for name, values in times.items()]
    unsteered_engine, steered_engine, generated = ways
    figures.append(_ratio("engine steered / unsteered, seconds", times, steered_engine, unsteered_engine))
    figures.append(_ratio("engine steered / generate unsteered, seconds", times, steered_engine, generated))
    prefill = interleaved({"steered": engine(steered, 1), "unsteered": engine(plain, 1)}, device, sizes.pairs)
    figures.append(_ratio("prefill steered / unsteered, seconds", prefill, "steered", "unsteered"))
    bytes_per_second = bandwidth(device, 2**31 if device.type == "cuda" else 2**20)
    floor = _bytes_per_step(model, sizes) / bytes_per_second
    step = statistics.median(times["engine, steered, a vector per row"]) / sizes.new
    figures.append({"figure": "memory bandwidth", "value": bytes_per_second / 1e12, "unit": "TB/s"})
    figures.append({"figure": "floor of a decoding step / measured step", "value": floor / step, "unit": ""})
    return figures


def static_cache(sizes: Sizes, device: torch.device) -> list[Figure]:
    """`model.generate` with a static cache, without and with compilation (CUDA graphs), against the dynamic cache."""
    if device.type != "cuda":
        raise NotImplementedError("CUDA graphs need a GPU")
    model = random_llama(sizes.llama, device, sizes.dtype)
    prompts = _prompts(sizes)
    ids = torch.tensor([prompts[i % len(prompts)] for i in range(sizes.rows)], device=device)
    settings = {"max_new_tokens": sizes.new, "min_new_tokens": sizes.new, "do_sample": False, "pad_token_id": 0}

    def generate(**options: Any) -> Callable[[], Any]:
        return lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings, **options)

    ways = {
        "dynamic cache": generate(),
        "static cache": generate(cache_implementation="static", disable_compile=True),
        "static cache, compiled": generate(cache_implementation="static"),
    }
    compile_seconds = seconds(ways["static cache, compiled"], device)
    times = interleaved(ways, device, sizes.pairs)
    figures = [_rate(name, sizes.rows * sizes.new, values) for name, values in times.items()]
    figures += [_ratio(f"{name} / dynamic cache, seconds", times, name, "dynamic cache") for name in list(ways)[1:]]
    return [*figures, {"figure": "first compiled call", "value": compile_seconds, "unit": "s"}]


def capture(sizes: Sizes, device: torch.device) -> list[Figure]:
    """Capture of texts at one layer against the bare forward of the same batches through the same blocks."""
    model = random_llama(sizes.llama, device, sizes.dtype)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(sizes.width // 2, sizes.width + 1, (sizes.texts,), generator=generator).tolist()
    ids = [tuple(torch.randint(1, sizes.llama["vocab_size"], (n,), generator=generator).tolist()) for n in lengths]
    budget = 16_384 if device.type == "cuda" else 512
    blocks = find_blocks(model)
    passages = [Passage(one, ((0, len(one)),), ("",), str(i)) for i, one in enumerate(ids)]
    pool = pool_at("last", passages)

    def ours() -> None:
        for _, pooled in read_passages(model, blocks, [sizes.layer], passages, pool, budget):
            pooled.cpu()

    def bare() -> None:
        batches = token_batches(lengths, budget)
        with torch.inference_mode():
            for batch in batches:
                width = max(lengths[i] for i in batch)
                padded = torch.zeros(len(batch), width, dtype=torch.long)
                mask = torch.zeros(len(batch), width, dtype=torch.long)
                for row, i in enumerate(batch):
                    padded[row, : lengths[i]] = torch.tensor(ids[i])
                    mask[row, : lengths[i]] = 1
                shallow(input_ids=padded.to(device), attention_mask=mask.to(device), use_cache=False)

    shallow = model.model
    kept = shallow.layers
    times: dict[str, list[float]] = {"capture": [], "bare forward": []}
    first = torch.nn.ModuleList(list(kept)[: sizes.layer + 1])
    for number in range(sizes.pairs + 1):
        took = seconds(ours, device)
        shallow.layers = first
        plain = seconds(bare, device)
        shallow.layers = kept
        if number:
            times["capture"].append(took)
            times["bare forward"].append(plain)
    figures = [_rate(name, sum(lengths), values) for name, values in times.items()]
    return [*figures, _ratio("capture / bare forward, seconds", times, "capture", "bare forward")]


def _prompts(sizes: Sizes) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    high = sizes.llama["vocab_size"]
    return [tuple(torch.randint(1, high, (sizes.width,), generator=generator).tolist()) for _ in range(sizes.prompts)]


def _bytes_per_step(model: Any, sizes: Sizes) -> float:
    """Bytes that a decoding step reads: all weights except the embedding table, and the cache at its mean length."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    table = model.get_input_embeddings().weight
    weights -= table.numel() * table.element_size()
    head = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head * table.element_size()
    return float(weights + per_token * sizes.rows * (sizes.width + sizes.new / 2))


def _rate(name: str, tokens: int, times: list[float]) -> Figure:
    spread = (max(times) - min(times)) / statistics.median(times)
    value = tokens / statistics.median(times)
    return {"figure": name, "value": value, "unit": "tokens/s", "n": len(times), "spread": spread}


def _ratio(name: str, times: dict[str, list[float]], first: str, second: str) -> Figure:
    found = ratio(times[first], times[second])
    return {
        "figure": name,
        "value": found["ratio"],
        "unit": "",
        "low": found["low"],
        "high": found["high"],
        "n": int(found["n"]),
    }
