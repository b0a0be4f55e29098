"""Worker of `benchmarks.compare`: runs jobs on the steerkit of the folder in which it is started.

Reads one JSON request per line and answers each with one JSON line. It uses only public names, which old code has too.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

import steerkit as sk

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print does not mix with the answers
if Path.cwd().resolve() not in Path(sk.__file__).resolve().parents:
    raise SystemExit(f"expected steerkit from {Path.cwd()}; got {sk.__file__}. Start the worker in a checkout.")
setup: dict[str, Any] = json.loads(sys.stdin.readline())
model, tokenizer = sk.load(setup["checkpoint"], **setup.get("load", {}))
layer = setup["layer"]
direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
vector = sk.SteeringVector({layer: direction * setup["norm"] / direction.norm()})


def capture() -> str:
    """The stream of all texts at one layer, as text with few digits."""
    acts = sk.collect(model, tokenizer, setup["texts"], layers=[layer], position="last")
    return str([round(float(row.norm()), 2) for row in acts.resid[:, 0]])


def swept(prompts: list[Any], new: int) -> str:
    """The texts of prompts under all coefficients."""
    result = sk.sweep(
        model,
        tokenizer,
        vector,
        prompts,
        coefficients=setup["coefficients"],
        layers=[layer],
        positions="from_last_prompt_token",
        max_new_tokens=new,
        stream_norms={layer: 1.0},
    )
    rows = result.table.sort_values(["coefficient", "prompt_id"])
    return str(list(zip(rows["coefficient"], rows["text"], strict=True)))


def turns() -> str:
    """The streams at the ends of all turns of whole traces, as text with few digits."""
    texts = [sk.SpannedText(text, tuple(map(tuple, spans))) for text, spans in setup["traces"]]
    acts = sk.collect(model, tokenizer, texts, layers=[layer], position="last")
    return str([round(float(row.norm()), 2) for row in acts.resid[:, 0]])


def beginnings() -> str:
    """The texts of prompts that begin alike."""
    return str(sk.generate(model, tokenizer, setup["worked"], max_new_tokens=8))


CHECKS = ("weights", "tokenizer", "hidden states", "padding", "coefficient 0", "cache", "first new token", "adapter")


def doctor() -> str:
    """The states of the checks that the doctor has had from the beginning."""
    try:
        from steerkit.doctor import report
    except ImportError:
        from steerkit.doctor import examine

        return str([finding.state for finding in examine(model, tokenizer) if finding.check in CHECKS])
    return str([report.CHECKS[name](model, tokenizer)[0] for name in CHECKS])


jobs = {
    "capture": capture,
    "sweep": lambda: swept(setup["prompts"], setup["max_new_tokens"]),
    "turns": turns,
    "prefill": lambda: swept(setup["long_prompts"], 4),
    "beginnings": beginnings,
    "doctor": doctor,
}
for line in sys.stdin:
    started = time.perf_counter()
    output = jobs[json.loads(line)]()
    seconds = time.perf_counter() - started
    answers.write(json.dumps({"seconds": seconds, "output": hashlib.sha256(output.encode()).hexdigest()}) + "\n")
    answers.flush()
