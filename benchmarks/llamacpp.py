"""Our engine against llama.cpp on the same GGUF file, float32 weights and cache on both sides, greedy and unsteered.

llama.cpp runs in an environment of its own, which `make .venv-llamacpp/.ready` builds; LLAMACPP_PYTHON names another.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import decoding
from benchmarks.timing import Measured, measured, seconds
from steerkit.demo.checkpoint import default_checkpoint
from steerkit.generation.engine import Row

PYTHON = Path(os.environ.get("LLAMACPP_PYTHON", ".venv-llamacpp/bin/python"))
DENSE = Path("runs/llamacpp/SmolLM2-135M-Instruct.Q4_1.F32.gguf")
PAIRS = 11


class LlamaCpp:
    """llama.cpp in a process of its own; use it inside `with`."""

    def __enter__(self) -> LlamaCpp:
        DENSE.parent.mkdir(parents=True, exist_ok=True)
        worker = Path(__file__).with_name("llamacpp_worker.py")
        self.process = subprocess.Popen(
            [str(PYTHON), str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        about = {"file": str(default_checkpoint()), "dense": str(DENSE), "threads": torch.get_num_threads()}
        self.version = self._ask(about)["version"]
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        with self.process:
            pass

    def write(self, rows: list[Row], new: int) -> tuple[list[list[int]], float]:
        """The greedy tokens of each row, and the seconds that they took."""
        answer = self._ask({"rows": [list(row.prompt) for row in rows], "new": new})
        return answer["written"], answer["seconds"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("expected an answer of llama.cpp's process; it ended. Its error is above.")
        return dict(json.loads(line))


def against_llamacpp() -> Iterator[Measured]:
    """One row, and the 72 rows of the sweep in llama.cpp's best batch."""
    if not PYTHON.exists():
        raise SystemExit(f"expected llama.cpp's environment at {PYTHON}; run make .venv-llamacpp/.ready first.")
    with decoding.endless() as (model, tokenizer), LlamaCpp() as other:
        prompts = decoding.prompt_ids()
        job = f"one row, {decoding.NEW} tokens"
        ours, theirs, equal = [], [], 0
        for number in range(PAIRS + 1):
            row = [Row(prompts[number % len(prompts)])]
            written: list[Any] = []

            def mine(row: list[Row] = row, written: list[Any] = written) -> None:
                written[:] = decoding.run(model, tokenizer, row)

            turns = [lambda: ours.append(seconds(mine)), lambda row=row: theirs.append(other.write(row, decoding.NEW))]
            for turn in turns[:: 1 if number % 2 else -1]:
                turn()
            equal += list(written[0]) == theirs[-1][0][0]
        note = f"{equal} of {PAIRS + 1} texts equal; llama-cpp-python {other.version}"
        yield measured(job, "llama.cpp", ours[1:], [took for _, took in theirs[1:]], ">= 0.95", note)
        rows = [Row(row.prompt) for row in decoding.steered_rows(prompts)]
        sizes = (8, 24, 72)
        best = min(sizes, key=lambda size: batched(other, rows, size)[1])
        ours, took = [], []
        for number in range(PAIRS + 1):
            for side in (True, False)[:: 1 if number % 2 else -1]:
                if side:
                    ours.append(seconds(lambda: decoding.run(model, tokenizer, rows)))
                else:
                    took.append(batched(other, rows, best)[1])
        texts = zip(decoding.run(model, tokenizer, rows), batched(other, rows, best)[0], strict=True)
        note = f"{sum(list(a) == b for a, b in texts)} of {len(rows)} texts equal"
        job = f"{len(rows)} unsteered rows x {decoding.NEW} tokens"
        yield measured(job, f"llama.cpp, best batch ({best} rows)", ours[1:], took[1:], "", note)


def batched(other: LlamaCpp, rows: list[Row], size: int) -> tuple[list[list[int]], float]:
    """llama.cpp's tokens of all rows in batches of this size, and its seconds."""
    done = [other.write(rows[i : i + size], decoding.NEW) for i in range(0, len(rows), size)]
    return [one for written, _ in done for one in written], sum(took for _, took in done)
