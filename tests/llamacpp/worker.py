"""Run llama.cpp over token ids, in an environment of its own: imports llama_cpp and numpy only.

`python worker.py job.json`: reads the job and writes its results beside it. The weights are float32 on both sides:
llama.cpp's own tool writes the file's weights, dequantised, to another file. The cache is float32 too.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

F32 = 0

_SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)  # a name keeps the callback alive
llama_cpp.llama_log_set(_SILENT, None)


def dequantised(source: Path, target: Path) -> Path:
    """The same model with float32 weights."""
    if not target.is_file():
        part = target.with_suffix(".part")
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.allow_requantize = F32, True
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(parameters))
        if code:
            raise RuntimeError(f"expected llama.cpp to dequantise {source}; it returned {code}")
        part.rename(target)
    return target


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def continued(model: Any, ids: list[int], new: int, top: int) -> dict[str, Any]:
    """Greedy tokens after the ids, and the likeliest tokens after each token with their log-probabilities."""
    model.reset()
    model.eval(ids)
    written: list[int] = []
    margins: list[float] = []
    for _ in range(new):
        best = np.sort(model.scores[model.n_tokens - 1])[-2:]
        margins.append(float(best[1] - best[0]))
        written.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(written[-1:])
    logs = log_softmax(model.scores[: model.n_tokens])
    order = np.argsort(-logs, axis=-1)[:, :top]
    return {
        "ids": ids,
        "written": written,
        "margins": margins,
        "top": order.tolist(),
        "logs": np.take_along_axis(logs, order, axis=-1).tolist(),
    }


def main(path: Path) -> None:
    job = json.loads(path.read_text(encoding="utf-8"))
    source = Path(job["file"])
    file = dequantised(source, path.with_name(f"{source.stem}.F32.gguf"))
    model = llama_cpp.Llama(
        model_path=str(file),
        n_ctx=job["context"],
        n_batch=job["context"],
        n_threads=job["threads"],
        n_threads_batch=job["threads"],
        logits_all=True,
        type_k=F32,
        type_v=F32,
        flash_attn=False,
        verbose=False,
    )
    rows = []
    for row in job["rows"]:
        own = model.tokenize(row["text"].encode(), add_bos=False, special=True)
        rows.append({**continued(model, row["ids"], job["new"], job["top"]), "own_ids": own})
    result = {"rows": rows, "version": llama_cpp.__version__}
    path.with_suffix(".result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
