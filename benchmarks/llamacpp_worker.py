"""A process that writes greedy tokens with llama.cpp in an environment of its own: it imports llama_cpp and numpy only.

`python llamacpp_worker.py`: one JSON request per line on stdin, one answer per line on stdout. The first request names
the file; the weights are dequantised to float32 once, the cache is float32 too.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "llamacpp"))
from worker import F32, dequantised


class Writer:
    """A loaded model."""

    def __init__(self, file: Path, threads: int) -> None:
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.threads = threads

    def context(self, tokens: int, rows: int) -> Any:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = tokens, 2048, 512
        parameters.n_seq_max = rows
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.type_k = parameters.type_v = F32
        parameters.kv_unified = True
        return llama_cpp.llama_init_from_model(self.model, parameters)

    def write(self, rows: list[list[int]], new: int) -> tuple[list[list[int]], float]:
        """Greedy tokens of rows in one batch, each distinct prompt forwarded once; and seconds without set-up."""
        prompts = list(dict.fromkeys(map(tuple, rows)))
        context = self.context(sum(map(len, prompts)) + len(rows) * new + 64, len(rows))
        memory = llama_cpp.llama_get_memory(context)
        batch = llama_cpp.llama_batch_init(2048, 0, 1)
        started = time.perf_counter()
        first = {prompt: rows.index(list(prompt)) for prompt in prompts}
        tokens: dict[int, int] = {}
        for prompt in prompts:
            self._decode(
                context, batch, [(token, at, first[prompt]) for at, token in enumerate(prompt)], last_only=True
            )
            tokens[first[prompt]] = self._best(context, len(prompt) - 1)
        for number, row in enumerate(rows):
            source = first[tuple(row)]
            if source != number:
                llama_cpp.llama_memory_seq_cp(memory, source, number, -1, -1)
                tokens[number] = tokens[source]
        written = [[tokens[number]] for number in range(len(rows))]
        for step in range(new - 1):
            self._decode(
                context, batch, [(written[number][-1], len(row) + step, number) for number, row in enumerate(rows)]
            )
            for number in range(len(rows)):
                written[number].append(self._best(context, number))
        seconds = time.perf_counter() - started
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        return written, seconds

    def _decode(self, context: Any, batch: Any, tokens: list[tuple[int, int, int]], last_only: bool = False) -> None:
        batch.n_tokens = len(tokens)
        for i, (token, position, row) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = row
            batch.logits[i] = not last_only or i == len(tokens) - 1
        if code := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {code}")

    def _best(self, context: Any, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())


def main() -> None:
    writer = None
    for line in sys.stdin:
        request = json.loads(line)
        if writer is None:
            writer = Writer(dequantised(Path(request["file"]), Path(request["dense"])), request["threads"])
            print(json.dumps({"version": llama_cpp.__version__}), flush=True)
            continue
        written, seconds = writer.write(request["rows"], request["new"])
        print(json.dumps({"written": written, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
