"""Capture: speed against the floor, the peers and one forward per turn, and memory at ten times the texts."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import steerkit as sk
from benchmarks import inputs
from benchmarks.timing import Measured, compare, measured, seconds
from steerkit.capture.batches import token_batches
from steerkit.text.prompt import encode_prompt
from steerkit.text.spans import SpannedText
from steerkit.text.tokens import pad

MIDDLE, LAST, TEXTS = 15, 29, 96


class _StopForward(Exception):
    """Ends a forward after the layer that is read."""


def _batches(ids: Sequence[Sequence[int]], rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of similar length, right-padded, `rows` at a time: `(ids, mask)`."""
    order = token_batches(list(map(len, ids)), 10**9, rows)
    return [pad([ids[i] for i in batch], "right")[:2] for batch in order]


def _best(work: Callable[[int], Callable[[], Any]], sizes: Sequence[int] = (8, 16, 32)) -> tuple[int, Any]:
    """The fastest batch size for `work(size)`, each timed once after one uncounted call."""
    seconds_of = {}
    for size in sizes:
        run = work(size)
        run()
        seconds_of[size] = seconds(run)
    best = min(seconds_of, key=lambda size: seconds_of[size])
    return best, work(best)


def floor(layer: int, kernels: Any) -> Callable[[int], Callable[[], None]]:
    """The base model's forward over the texts in length-sorted batches, ended after the layer; nothing is read."""
    model, tokenizer = inputs.model()
    ids = [encode_prompt(tokenizer, text) for text in inputs.texts(TEXTS)]

    def at(rows: int) -> Callable[[], None]:
        def stop(*_: Any) -> None:
            raise _StopForward

        def run() -> None:
            handle = model.model.layers[layer].register_forward_hook(stop)
            with sk.use_kernels(model, kernels), torch.inference_mode():
                for batch, mask in _batches(ids, rows):
                    try:
                        model.model(input_ids=batch, attention_mask=mask, use_cache=False)
                    except _StopForward:
                        continue
            handle.remove()

        return run

    return at


def ours(layer: int, position: str) -> Callable[[], Any]:
    """`sk.collect_means` on the same texts."""
    model, tokenizer = inputs.model()
    texts = inputs.texts(TEXTS)
    return lambda: sk.collect_means(model, tokenizer, texts, layers=layer, position=position)


def steering_vectors(layer: int) -> Callable[[int], Callable[[], Any]]:
    """steering-vectors: `train_steering_vector` on the same texts as 48 pairs, sorted by length to reduce padding."""
    from steering_vectors import train_steering_vector

    model, tokenizer = inputs.model()
    padding = copy.deepcopy(tokenizer)
    padding.pad_token = padding.eos_token
    texts = sorted(inputs.texts(TEXTS), key=lambda text: len(tokenizer(text)["input_ids"]))
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    return lambda size: lambda: train_steering_vector(model, padding, pairs, layers=[layer], batch_size=size // 2)


def nnsight(layer: int) -> Callable[[int], Callable[[], Any]]:
    """nnsight: a trace with `tracer.stop()`, length-sorted batches, means computed inside the trace."""
    from nnsight import TransformersModel

    model, tokenizer = inputs.model()
    model = copy.deepcopy(model)  # its wrapper stays on the modules and would slow down our side, too
    wrapped = TransformersModel(model, tokenizer=tokenizer, task="text-generation")
    texts = inputs.texts(TEXTS)

    def run(size: int) -> torch.Tensor:
        total = torch.zeros(model.config.hidden_size)
        ids = [encode_prompt(tokenizer, text) for text in texts]
        for batch, mask in _batches(ids, size):
            weights = mask / mask.sum(1, keepdim=True)
            with torch.inference_mode(), wrapped.trace({"input_ids": batch, "attention_mask": mask}) as tracer:
                stream = wrapped.model.layers[layer].output
                pooled = torch.einsum("btd,bt->d", stream, weights).save()
                tracer.stop()
            total += pooled
        return total / len(ids)

    return lambda size: lambda: run(size)


def transformer_lens(layer: int) -> Callable[[int], Callable[[], Any]]:
    """transformer-lens: the bridge with `stop_at_layer`, length-sorted batches, means computed inside the hook."""
    from transformer_lens.model_bridge import TransformerBridge

    model, tokenizer = inputs.model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge = TransformerBridge.boot_transformers(
            "SmolLM2-135M-Instruct", hf_model=copy.deepcopy(model), tokenizer=tokenizer, device="cpu"
        )
    texts = inputs.texts(TEXTS)

    def run(size: int) -> torch.Tensor:
        total = torch.zeros(model.config.hidden_size)
        ids = [encode_prompt(tokenizer, text) for text in texts]
        for batch, mask in _batches(ids, size):
            weights = mask / mask.sum(1, keepdim=True)

            def read(stream: torch.Tensor, weights: torch.Tensor = weights, **_: Any) -> None:
                total.add_(torch.einsum("btd,bt->d", stream, weights))

            with torch.inference_mode():
                bridge.run_with_hooks(
                    batch,
                    attention_mask=mask,
                    fwd_hooks=[(f"blocks.{layer}.hook_resid_post", read)],
                    **({"stop_at_layer": layer + 1} if layer < LAST else {"return_type": None}),
                )
        return total / len(ids)

    return lambda size: lambda: run(size)


def against_peers() -> Iterator[Measured]:
    """Means of the texts' streams at two layers, against the floor and each peer."""
    for layer in (MIDDLE, LAST):
        job = f"means of {TEXTS} texts, layer {layer} of 30"
        size, least = _best(floor(layer, None))
        yield compare(
            job,
            f"the floor: forward only, ended at the layer, best batch ({size} rows)",
            ours(layer, "mean"),
            least,
            11,
            "<= 1.08",
            "ratio = ours / floor",
            inverse=True,
        )
        mean = ours(layer, "mean")().mean[0, 0].float()
        for name, peer, position in (
            ("steering-vectors", steering_vectors, "last"),
            ("nnsight", nnsight, "mean"),
            ("transformer-lens", transformer_lens, "mean"),
        ):
            size, run = _best(peer(layer))
            if position == "mean":
                torch.testing.assert_close(run(), mean, rtol=1e-3, atol=1e-3 * float(mean.norm()))
            yield compare(job, f"{name}, best batch ({size} rows)", ours(layer, position), run, 11, ">= 1.0")


def against_plain() -> Iterator[Measured]:
    """Means of the texts' streams at two layers, against the plain forward as torch runs it, ended at the layer."""
    for layer in (MIDDLE, LAST):
        size, plain = _best(floor(layer, "torch"))
        job, against = (
            f"means of {TEXTS} texts, layer {layer} of 30",
            f"plain forward with torch's kernels ({size} rows)",
        )
        yield compare(job, against, ours(layer, "mean"), plain, 11, ">= 1.9")
    model, tokenizer = inputs.model()
    texts = inputs.texts(TEXTS)

    def all_layers() -> None:
        sk.collect_means(model, tokenizer, texts, position="mean")

    yield compare(f"means of {TEXTS} texts, all 30 layers", "layer 29 alone", all_layers, ours(LAST, "mean"), 11)


def turns() -> Iterator[Measured]:
    """All six turns of a trace in one forward, against one forward per turn over the text up to the end of the turn."""
    model, tokenizer = inputs.model()
    whole = [trace.spans() for trace in inputs.traces(3)]
    single = [  # with the earlier turns' spans, so that the tokens are those of the whole; only the last span is used
        SpannedText(
            str(text.text)[:stop], text.spans[: turn + 1], text.labels[: turn + 1], text.group, text.cut, text.prompt
        )
        for text in whole
        for turn, (_, stop) in enumerate(text.spans)
    ]
    last = torch.tensor([len(text.spans) for text in single]).cumsum(0) - 1

    def one() -> torch.Tensor:
        return sk.collect(model, tokenizer, whole, layers=MIDDLE).resid

    def each() -> torch.Tensor:
        return torch.cat([sk.collect(model, tokenizer, [text], layers=MIDDLE).resid[-1:] for text in single])

    def batched() -> torch.Tensor:
        return sk.collect(model, tokenizer, single, layers=MIDDLE).resid[last]

    left, right = one(), batched()
    error = float(((left - right).norm(dim=-1) / right.norm(dim=-1)).max())
    tokens = [len(tokenizer(text.text)["input_ids"]) for text in whole]
    note = f"3 traces of {min(tokens)}-{max(tokens)} tokens; vectors equal to {error:.0e} relative"
    job = "six turns of a two-round trace"
    yield compare(job, "one forward per turn, batched", one, batched, 11, ">= 2.5", note)
    yield compare(job, "one forward per turn, one at a time", one, each, 11, ">= 2.5", note)


MEMORY = """
import sys, torch
from benchmarks import inputs
import steerkit as sk
model, tokenizer = inputs.model()
count = int(sys.argv[1])
texts = inputs.texts(count, 8, 12)
sk.collect_means(model, tokenizer, texts[:200], position="mean")
def field(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) / 1024
open("/proc/self/clear_refs", "w").write("5")
before = field("VmRSS")
sk.collect_means(model, tokenizer, texts, position="mean")
print(before, field("VmHWM"))
"""


def memory(small: int = 1000, large: int = 10_000) -> Iterator[Measured]:
    """Peak memory of `collect_means` over all layers above the loaded model, each size in its own process."""
    peaks = {}
    for count in (small, large):
        # freed memory is returned at once; otherwise the C library's cache would be measured
        frugal = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        command = [sys.executable, "-c", MEMORY, str(count)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, env=frugal)
        before, peak = map(float, shown.stdout.split()[-2:])
        peaks[count] = (before, peak)
    above = {count: peak - before for count, (before, peak) in peaks.items()}
    yield measured(
        f"means, all layers, {small} -> {large} texts: peak memory above the loaded model",
        "itself",
        [above[large]],
        [above[small]],
        "<= 1.1",
        f"the processes' peaks: {peaks[small][1]:.0f} -> {peaks[large][1]:.0f} MiB",
        inverse=True,
        unit="MiB",
    )
