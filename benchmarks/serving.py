"""vLLM: steered against unsteered, the plugin at rest, sweeps through it, and our own engine against its fastest mode.

Runs in the environment of vLLM (`make bench-vllm`). Every engine of vLLM has a process of its own; two at a time are
alive, and run in turn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.timing import MIN_PAIRS, STORE, Measured, measured
from steerkit.io.json import read_json

FOLDER = Path("runs/vllm-bench")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "OMP_NUM_THREADS": "2",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
MODES: Mapping[str, Mapping[str, Any]] = {
    "eager": {"enforce_eager": True, "enable_prefix_caching": False},
    "eager, prefix cache": {"enforce_eager": True, "enable_prefix_caching": True},
    "compiled": {"enable_prefix_caching": False},
    "compiled, prefix cache": {"enable_prefix_caching": True},
}
ROWS = 72
PAIRS = 48
POINT = 0.98


class Worker:
    """A process that answers each job with its seconds and a hash of its tokens; use it inside `with`."""

    def __init__(self, kind: str, options: Mapping[str, Any] | None = None, plugins: str | None = None) -> None:
        environment = {**os.environ, **ENVIRONMENT}
        if plugins is not None:
            environment["VLLM_PLUGINS"] = plugins
        command = [sys.executable, "-m", "benchmarks.serving", kind, json.dumps(options or {})]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Worker:
        self.ready = self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        with self.process:
            pass

    def run(self, job: str) -> float:
        """The seconds of a job; what it returned is in `found`."""
        assert self.process.stdin is not None
        self.process.stdin.write(job + "\n")
        self.process.stdin.flush()
        self.found: dict[str, Any] = self._answer()
        return float(self.found["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("expected an answer of a worker; it ended. Its error is above.")
        return dict(json.loads(line))


def in_turn(ours: Callable[[], float], theirs: Callable[[], float], pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of both sides in turn, after two uncounted calls each; the order alternates."""
    for _ in range(2):
        ours(), theirs()
    mine, other = list[float](), list[float]()
    for number in range(pairs):
        for side, times in ((ours, mine), (theirs, other))[:: 1 if number % 2 else -1]:
            times.append(side())
    return mine, other


JOB = f"{ROWS} rows x 64 tokens through vLLM"
CACHED = "eager, prefix cache"


def steered() -> Iterator[Measured]:
    """Steered rows against unsteered ones, in every mode."""
    for mode, options in MODES.items():
        with Worker("steering", options) as worker:
            mine, other = in_turn(lambda w=worker: w.run("steered"), lambda w=worker: w.run("plain"), MIN_PAIRS)
            yield measured(f"{JOB}, {mode}, steered", "unsteered", mine, other, ">= 0.93", "")


def sweep() -> Iterator[Measured]:
    """A sweep through vLLM, its files and scores included, against its rows alone, unsteered."""
    with Worker("steering", MODES[CACHED]) as worker:
        mine, other = in_turn(lambda: worker.run("sweep"), lambda: worker.run("plain"), MIN_PAIRS)
    note = "files, table and ROUGE-L included"
    yield measured("sk.sweep through vLLM, the same rows", "unsteered", mine, other, ">= 0.9", note)


def asleep() -> Iterator[Measured]:
    """The plugin installed and not asked for, against no plugin."""
    options = MODES[CACHED]
    with Worker("plain", options) as installed, Worker("plain", options, plugins="") as without:
        mine, other = in_turn(lambda: installed.run("plain"), lambda: without.run("plain"), MIN_PAIRS)
    line = measured(f"{JOB}, plugin installed and not asked for", "without it", mine, other, ">= 0.95")
    yield replace(line, note=f"the ratio itself must be at least {POINT}: {'met' if line.ratio >= POINT else 'missed'}")


def own() -> Iterator[Measured]:
    """Our engine against vLLM's fastest mode, which the job `vllm-steered` has found."""
    lines = read_json(STORE / "vllm-steered.json")["rows"]
    fastest = min(zip(lines, MODES, strict=True), key=lambda pair: pair[0]["ours"])[1]
    with Worker("ours") as engine, Worker("steering", MODES[fastest]) as vllm:
        mine, other = in_turn(lambda: engine.run("steered"), lambda: vllm.run("steered"), MIN_PAIRS)
        same = sum(a == b for a, b in zip(engine.found["texts"], vllm.found["texts"], strict=True))
    note = f"{same} of {ROWS} texts equal"
    yield measured(f"our engine, {ROWS} steered rows x 64 tokens", f"vLLM, {fastest}", mine, other, ">= 1.1", note)


def read() -> Iterator[Measured]:
    """Means of the stream at all layers, read inside vLLM, against those of our engine."""
    with Worker("steering", {**MODES["eager"], "sums": 2}) as vllm, Worker("ours") as engine:
        mine, other = in_turn(lambda: vllm.run("means"), lambda: engine.run("means"), MIN_PAIRS)
        norms = [[float(norm) for norm in side.found["texts"]] for side in (vllm, engine)]
    apart = max(abs(a - b) / b for a, b in zip(*norms, strict=True))
    note = f"norms of the means differ by at most {apart:.0e} of their value"
    job = f"means of {2 * PAIRS} texts at all layers, read inside vLLM"
    yield measured(job, "our engine", mine, other, "", note)


# ------------------------------------------------------------------------------------------------------------- workers


def checkpoint() -> Path:
    """SmolLM2 as a folder, written once."""
    from benchmarks import inputs

    folder = FOLDER / "model"
    if not (folder / "config.json").exists():
        model, tokenizer = inputs.model()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def vllm_jobs(options: Mapping[str, Any], steering: bool) -> dict[str, Callable[[], list[str]]]:
    """The jobs of an engine of vLLM; each returns its texts as text."""
    import steerkit as sk
    from benchmarks import decoding, inputs
    from steerkit.generation.engine import Row
    from steerkit.serving.remote import Sent, name_of, specification

    prompts = decoding.prompt_ids()
    settings = {"dtype": "float32", "max_model_len": 512, "block_size": 32, **options}
    if not steering:
        from vllm import LLM, SamplingParams

        llm: Any = LLM(model=str(checkpoint()), disable_log_stats=True, **settings)
        params = SamplingParams(temperature=0.0, max_tokens=decoding.NEW, ignore_eos=True, detokenize=False)
        inputs_ = [{"prompt_token_ids": list(p)} for p in prompts for _ in decoding.COEFFICIENTS]

        def bare() -> list[str]:
            outputs = llm.generate(inputs_, params, use_tqdm=False)
            return [str(list(one.outputs[0].token_ids)) for one in outputs]

        return {"plain": bare}
    from steerkit.serving.vllm import VLLM

    engine = VLLM(checkpoint(), vectors=FOLDER / f"vectors-{os.getpid()}", **{"sums": 0, **settings})
    rows = decoding.steered_rows(prompts)
    for one in rows:
        engine.put(name_of(one.steerings[0]), sk.SteeringVector(one.steerings[0].vector.layers))
    _, tokenizer = inputs.model()
    vector = inputs.vector().at(decoding.LAYER)

    def run(some: list[Row]) -> list[str]:
        sent = [Sent(r.prompt, decoding.NEW, (), {"steerkit": [specification(s) for s in r.steerings]}) for r in some]
        sent = [one if row.steerings else Sent(one.prompt, one.count) for one, row in zip(sent, some, strict=True)]
        done = dict(engine.complete(sent))
        return [str(list(done[i])) for i in range(len(some))]

    def sweep() -> list[str]:
        from steerkit.scores.text import rouge_l
        from steerkit.serving.remote import Remote

        unending = Remote.ends
        try:
            Remote.ends = lambda self, tokenizer: frozenset()  # type: ignore[method-assign]  every row its 64 tokens
            with tempfile.TemporaryDirectory() as out:
                questions = [
                    {"prompt": one.messages(), "id": str(i), "reference": "A clear answer, step by step."}
                    for i, one in enumerate(inputs.questions()[: decoding.PROMPTS])
                ]
                result = sk.sweep(
                    None,
                    tokenizer,
                    vector,
                    questions,
                    coefficients=decoding.COEFFICIENTS,
                    max_new_tokens=decoding.NEW,
                    stream_norms={decoding.LAYER: 1.0},
                    foreign=True,
                    engine=engine,
                    out=Path(out) / "run",
                )
                rouge_l(result.table["text"].tolist(), result.table["reference"].tolist())
        finally:
            Remote.ends = unending  # type: ignore[method-assign]
        return result.table["text"].tolist()

    return {
        "plain": lambda: run([Row(row.prompt) for row in rows]),
        "steered": lambda: run(rows),
        "sweep": sweep,
        "means": lambda: norms_of(engine.collect_means(tokenizer, contrast(), position="mean")),
    }


def own_jobs() -> dict[str, Callable[[], list[str]]]:
    """The jobs of our engine, in the same environment."""
    from benchmarks import decoding, inputs

    rows = decoding.steered_rows(decoding.prompt_ids())

    def steered() -> list[str]:
        with decoding.endless() as (model, tokenizer):
            return [str(list(ids)) for ids in decoding.run(model, tokenizer, rows)]

    def means() -> list[str]:
        import steerkit as sk

        return norms_of(sk.collect_means(*inputs.model(), contrast(), position="mean"))

    return {"steered": steered, "means": means}


def contrast() -> list[Any]:
    """Contrast pairs of the demo's answers."""
    from benchmarks import inputs
    from steerkit.demo.questions import answer_pairs
    from steerkit.demo.traits import PERSONAS

    return answer_pairs(inputs.questions()[:PAIRS], next(iter(PERSONAS)))


def norms_of(found: Any) -> list[str]:
    """The norm of each mean, as text."""
    return [repr(float(norm)) for norm in found.mean.norm(dim=-1).flatten()]


def work(kind: str, options: Mapping[str, Any]) -> None:
    """Answer jobs until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not mix with the answers
    jobs = own_jobs() if kind == "ours" else vllm_jobs(options, kind == "steering")
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for line in sys.stdin:
        started = time.perf_counter()
        texts = jobs[line.strip()]()
        answers.write(json.dumps({"seconds": time.perf_counter() - started, "texts": texts}) + "\n")
        answers.flush()


if __name__ == "__main__":
    work(sys.argv[1], json.loads(sys.argv[2]))
