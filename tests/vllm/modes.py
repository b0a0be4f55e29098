"""Modes of the engine in which every case must give our engine's tokens, and counters that show their use."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.vllm.cases import NEW_TOKENS, cases

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "0-1"),
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, so that the counters can be read
}


@dataclass(frozen=True)
class Mode:
    """How the cases are run.

    Args:
        engine: arguments of `vllm.LLM`.
        counter: the counter that must exceed zero.
        arrive: cases that arrive at the same time, every few steps; None: all at once.
        rounds: how often all cases are run.
        environment: environment variables.
    """

    engine: Mapping[str, Any]
    counter: str
    arrive: int | None = None
    rounds: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)


EAGER: Mapping[str, Any] = {"enforce_eager": True, "enable_prefix_caching": False}
MODES: Mapping[str, Mode] = {
    "eager": Mode(EAGER, "steps"),
    "compiled": Mode({"enable_prefix_caching": False}, "compiled_steps"),
    "chunked prefill": Mode({**EAGER, "max_num_batched_tokens": 40, "max_num_seqs": 24}, "partial_prefills"),
    "staggered arrivals": Mode(EAGER, "mixed_steps", arrive=5),
    "preemption": Mode({**EAGER, "num_gpu_blocks_override": 28, "max_num_seqs": 24}, "preemptions", arrive=24),
    "prefix cache": Mode({"enforce_eager": True, "enable_prefix_caching": True}, "cached_tokens", rounds=2),
    "compiled, prefix cache, chunked": Mode(
        {"enable_prefix_caching": True, "max_num_batched_tokens": 64, "max_num_seqs": 24}, "compiled_steps", arrive=7
    ),
    "runner V2": Mode(EAGER, "steps", environment={"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}),
}


def start(mode: Mode, checkpoint: Path, vectors: Path) -> Any:
    """The engine of a mode."""
    os.environ.update({**ENVIRONMENT, **mode.environment})
    if "TRITON_INTERPRET" in mode.environment:
        interpret_triton()
        choose_by_torch()
    from vllm import LLM

    return LLM(
        model=str(checkpoint),
        dtype="float32",
        max_model_len=512,
        block_size=32,
        disable_log_stats=False,
        additional_config={"steerkit": {"vectors": str(vectors)}},
        **mode.engine,
    )


def interpret_triton() -> None:
    """Give Triton, whose kernels runner V2 uses, a backend for CPUs: its interpreter needs no compiler."""
    from triton import backends

    class Interpreter(backends.DriverBase):
        @classmethod
        def is_active(cls) -> bool:
            return True

    Interpreter.__abstractmethods__ = frozenset()  # the interpreter asks for no more
    backends.backends.clear()
    backends.backends["cpu"] = backends.Backend(backends.BaseBackend, Interpreter)


def choose_by_torch() -> None:
    """Take the likeliest token by torch: the interpreter needs a quarter of a second for a request's vocabulary.

    All cases are greedy; the logits are those of runner V2.
    """
    from vllm.v1.worker.gpu.sample import sampler

    def likeliest(logits: Any, *_: Any, **__: Any) -> Any:
        return logits.argmax(-1)

    sampler.gumbel_sample = likeliest


def run(llm: Any, mode: Mode, chosen: Sequence[int]) -> list[list[list[int]]]:
    """The new tokens of the chosen cases, round by round."""
    from vllm import SamplingParams

    from steerkit.text.prompt import encode_prompt

    every = cases()
    tokenizer = llm.get_tokenizer()
    prompts = [{"prompt_token_ids": list(encode_prompt(tokenizer, every[i][0]))} for i in chosen]

    def parameters(index: int) -> Any:
        specification = [{**one, "vector": "mood"} for one in every[index][1]]
        extra = {"steerkit": [as_json(one) for one in specification]} if specification else None
        return SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, extra_args=extra)

    rounds = []
    for number in range(mode.rounds):
        if mode.arrive is None:
            outputs = llm.generate(prompts, [parameters(i) for i in chosen], use_tqdm=False)
            rounds.append([list(output.outputs[0].token_ids) for output in outputs])
        else:
            rounds.append(_staggered(llm, prompts, [parameters(i) for i in chosen], mode, number))
    return rounds


def as_json(one: Mapping[str, Any]) -> dict[str, Any]:
    """A steering with lists in place of tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in one.items()}


def _staggered(llm: Any, prompts: Sequence[Any], params: Sequence[Any], mode: Mode, number: int) -> list[list[int]]:
    """Add a few requests every third step, until all are done."""
    engine = llm.llm_engine
    done: dict[str, list[int]] = {}
    waiting, step = list(range(len(prompts))), 0
    assert mode.arrive is not None
    while waiting or engine.has_unfinished_requests():
        if waiting and step % 3 == 0:
            for index in waiting[: mode.arrive]:
                engine.add_request(f"{number}-{index}", prompts[index], params[index])
            del waiting[: mode.arrive]
        for output in engine.step():
            if output.finished:
                done[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
    return [done[f"{number}-{index}"] for index in range(len(prompts))]


def counters(llm: Any) -> dict[str, float]:
    """What the engine and the plugin have counted."""
    core = llm.llm_engine.engine_core.engine_core
    steerer = core.model_executor.driver_worker.worker.model_runner._steerkit
    found = {**steerer.counts}
    metrics: dict[str, Callable[[Any], float]] = {
        "vllm:num_preemptions": lambda one: one.value,
        "vllm:prefix_cache_hits": lambda one: one.value,
    }
    names = {"vllm:num_preemptions": "preemptions", "vllm:prefix_cache_hits": "cached_tokens"}
    for one in llm.get_metrics():
        if one.name in metrics:
            found[names[one.name]] = metrics[one.name](one)
    return found
