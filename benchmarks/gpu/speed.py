"""Speed of steered decoding and of capture on an 8B-shaped model, against the plain way and the memory's bandwidth."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import steerkit as sk
from benchmarks.gpu.measure import Figure, Way, bandwidth, interleaved, ratio, seconds
from benchmarks.gpu.sizes import Sizes, random_llama
from steerkit.capture.batches import read_passages, token_batches
from steerkit.capture.pooling import pool_at
from steerkit.generation.engine import Engine, Row
from steerkit.generation.sampling import likeliest
from steerkit.models.blocks import find_blocks
from steerkit.text.spans import Passage

WARM_UPS = 3


def decoding(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """Tokens per second of decoding after the prefill: the engine, steered and not, and `model.generate`.

    Every row is steered by a vector of its own. Also: the prefill of distinct steered prompts, and the share of a
    decoding step that reading weights and cache from memory takes at least.
    """
    model = random_llama(sizes.llama, device, sizes.dtype)
    prompts = _prompts(sizes, sizes.prompts)
    plain = [Row(prompts[i % len(prompts)]) for i in range(sizes.rows)]
    steered = [
        Row(row.prompt, (one,)) for row, one in zip(plain, _steerings(sizes, "from_last_prompt_token"), strict=True)
    ]
    ids = torch.tensor([row.prompt for row in plain], device=device)

    def engine(rows: list[Row]) -> Way:
        def prepare() -> Callable[[], Any]:
            with torch.inference_mode():
                filled = Engine(model, rows, sizes.new)
            return lambda: _decode(filled, sizes.new)

        return prepare

    def generate() -> Callable[[], Any]:
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        settings = {"max_new_tokens": sizes.new, "min_new_tokens": sizes.new, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        return lambda: model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **settings)

    tokens = sizes.rows * sizes.new
    ours, unsteered, theirs = "engine, steered, a vector per row", "engine, unsteered", "generate, dynamic cache"
    times = interleaved({unsteered: engine(plain), ours: engine(steered), theirs: generate}, device, sizes.pairs)
    for name, values in times.items():
        yield _rate(f"decoding after the prefill: {name}", tokens, values)
    yield _ratio("decoding: engine steered / unsteered, seconds", times, ours, unsteered)
    yield _ratio("decoding: engine steered / generate unsteered, seconds", times, ours, theirs)

    distinct = _prompts(sizes, sizes.rows)
    everywhere = [Row(one, (steering,)) for one, steering in zip(distinct, _steerings(sizes, "all"), strict=True)]
    bare = [Row(one) for one in distinct]
    ways = {"steered at all positions": _prefill(model, everywhere), "unsteered": _prefill(model, bare)}
    prefill = interleaved(ways, device, sizes.pairs)
    for name, values in prefill.items():
        yield _rate(f"prefill of {sizes.rows} prompts, {name}", sizes.rows * sizes.width, values)
    yield _ratio("prefill steered / unsteered, seconds", prefill, *ways)
    yield from _floor("a steered step of the engine", statistics.median(times[ours]) / sizes.new, model, sizes, device)


def _decode(engine: Engine, new: int) -> None:
    with torch.inference_mode():
        engine.decode(new, frozenset(), lambda logits, rows, step: likeliest(logits))


def _prefill(model: Any, rows: list[Row]) -> Way:
    def work() -> None:
        with torch.inference_mode():
            Engine(model, rows, 1)

    return lambda: work


def _steerings(sizes: Sizes, positions: str) -> list[sk.Steering]:
    """A steering per row, each with a random vector of its own."""
    generator = torch.Generator().manual_seed(2)
    width = sizes.llama["hidden_size"]
    vectors = [sk.SteeringVector({sizes.layer: torch.randn(width, generator=generator)}) for _ in range(sizes.rows)]
    return [sk.Steering(vector, 0.1, positions=positions) for vector in vectors]


def static_cache(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """Greedy decoding steps over a static cache, recorded once as a CUDA graph and replayed; without steering.

    On a CPU the steps run without a graph.
    """
    model = random_llama(sizes.llama, device, sizes.dtype)
    prompts = _prompts(sizes, sizes.prompts)
    ids = torch.tensor([prompts[i % len(prompts)] for i in range(sizes.rows)], device=device)
    step = Step(model, ids, sizes.new + WARM_UPS + 1)
    with torch.inference_mode():
        truth = model(input_ids=torch.cat([ids, *(step() for _ in range(2))], dim=1), use_cache=False).logits[:, -1]
        off = (step.logits.float() - truth.float()).norm(dim=-1) / truth.float().norm(dim=-1)
    yield {"figure": "static against no cache, largest deviation", "value": float(off.max()), "unit": ""}
    ways: dict[str, Way] = {"static cache, no graph": _repeated(step, step, sizes.new)}
    if device.type == "cuda":
        ways["static cache, CUDA graph"] = _repeated(step, _recorded(step), sizes.new)
    times = interleaved(ways, device, sizes.pairs)
    for name, values in times.items():
        yield _rate(name, sizes.rows * sizes.new, values)
    if device.type == "cuda":
        yield _ratio("CUDA graph / no graph, seconds", times, *reversed(ways))
    name, values = list(times.items())[-1]
    yield from _floor(f"a step ({name})", statistics.median(values) / sizes.new, model, sizes, device)


class Step:
    """One greedy decoding step over a static cache: its inputs and outputs have fixed addresses, as a graph needs.

    Args:
        ids: prompts of one length.
        room: number of new tokens that the cache has room for.
    """

    def __init__(self, model: Any, ids: Tensor, room: int) -> None:
        self.model, self.width = model, ids.shape[1]
        self.cache: Any = StaticCache(config=model.config, max_cache_len=self.width + room)
        self.columns = torch.arange(self.width + room, device=ids.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
            self.token, self.first = logits.argmax(-1), logits.argmax(-1)
            self.position = torch.full_like(self.token[:1], self.width)
            self.logits = logits[:, -1]

    def __call__(self) -> Tensor:
        """Forward the current token; returns it, and writes the next one and its logits."""
        forwarded = self.token.clone()
        mask = (self.columns <= self.position)[None, None]
        logits = self.model(
            input_ids=self.token,
            attention_mask=mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        self.logits.copy_(logits[:, -1])
        self.token.copy_(logits.argmax(-1))
        self.position.add_(1)
        return forwarded

    def restart(self) -> None:
        """Return to the end of the prompts; what the cache holds after them is masked, and then overwritten."""
        with torch.inference_mode():
            self.token.copy_(self.first)
            self.position.fill_(self.width)
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.width)


def _repeated(step: Step, work: Callable[[], Any], times: int) -> Way:
    """Run one step many times from the end of the prompts."""

    def run() -> None:
        with torch.inference_mode():
            for _ in range(times):
                work()

    def prepare() -> Callable[[], Any]:
        step.restart()
        return run

    return prepare


def _recorded(step: Step) -> Callable[[], Any]:
    """Record a step as a CUDA graph, after warm-ups on a stream of their own; returns its replay."""
    step.restart()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            step()
    return graph.replay


def capture(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
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
    for name, values in times.items():
        yield _rate(name, sum(lengths), values)
    yield _ratio("capture / bare forward, seconds", times, "capture", "bare forward")


def _prompts(sizes: Sizes, count: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    high = sizes.llama["vocab_size"]
    return [tuple(torch.randint(1, high, (sizes.width,), generator=generator).tolist()) for _ in range(count)]


def _floor(name: str, step: float, model: Any, sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """Memory bandwidth, and the seconds that reading weights and cache takes at least, against those of a step."""
    bytes_per_second = bandwidth(device, 2**31 if device.type == "cuda" else 2**20)
    least = _bytes_per_step(model, sizes) / bytes_per_second
    yield {"figure": "memory bandwidth", "value": bytes_per_second / 1e12, "unit": "TB/s"}
    yield {"figure": f"floor of {name}", "value": 1e3 * least, "unit": "ms"}
    yield {"figure": f"floor / measured, {name}", "value": least / step, "unit": ""}


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
