"""Compare greedy tokens and log-probabilities with llama.cpp on the same GGUF files; writes docs/llamacpp.md.

`make test-llamacpp` builds llama.cpp's environment and runs this. Checkpoints that are not on this machine are left
out with a line; `python -m tests.real.checkpoints` fetches them.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import steerkit as sk
from steerkit.io.markdown import markdown_table
from steerkit.io.versions import versions
from steerkit.models.ends import ends_of
from steerkit.text.prompt import Prompt, render
from tests.families import CHINESE, RUSSIAN
from tests.real.checkpoints import CHECKPOINTS, path_of

PAGE = Path("docs/llamacpp.md")
FOLDER = Path("runs/llamacpp")
PYTHON = Path(os.environ.get("LLAMACPP_PYTHON", ".venv-llamacpp/bin/python"))
LIMITS = {"smollm2": 1e-4, "qwen": 1e-4, "gemma": 1e-3}  # nats, beyond our own rounding; Gemma's streams reach 1e5
MARGIN = 1e-2  # nats; nearer tokens may change places
NEW, TOP, CONTEXT = 24, 20, 640
PROMPTS = (
    "The capital of France is",
    " leading blank, then a word",
    "  two blanks at the start",
    "Umlaute: \u00e4 \u00f6 \u00fc \u00df und caf\u00e9",
    f"{CHINESE}\u3002",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3067\u3059\u3002",
    RUSSIAN,
    "\u0645\u0631\u062d\u0628\u0627",
    "\U0001f680\U0001f469\u200d\U0001f680 to the moon",
    "a\n\nb\n",
    "\n\nAfter two lines",
    "12*13 = 156, 7/2 =",
    "def add(a, b):\n    return",
    "SELECT name FROM users WHERE id =",
    "<b>bold</b> and",
    "Once upon a time, there was a",
    "x",
    "\ttab first",
    "The tides rise and fall twice a day, since the moon pulls at the sea. " * 24,
    "Q: What is the largest planet?\nA:",
)


def compared(name: str, file: Path) -> dict[str, Any]:
    """The figures of one checkpoint."""
    model, tokenizer = sk.load(file)
    prompts: list[Any] = list(PROMPTS)
    if tokenizer.chat_template:
        prompts[-1] = [{"role": "user", "content": "What is the largest planet?"}]
    rendered = [render(tokenizer, prompt) for prompt in prompts]
    job = FOLDER / f"{name}.json"
    rows = [{"text": prompt.text, "ids": list(prompt.ids)} for prompt in rendered]
    settings = {"new": NEW, "top": TOP, "context": CONTEXT, "threads": 2}
    job.write_text(json.dumps({"file": str(file.resolve()), "rows": rows, **settings}), encoding="utf-8")
    subprocess.run([str(PYTHON), str(Path(__file__).with_name("worker.py")), str(job)], check=True)
    theirs = json.loads(job.with_suffix(".result.json").read_text(encoding="utf-8"))
    ends = ends_of(model, tokenizer)
    tokens, equal, near, unlike = 0, 0, 0, 0
    for prompt, row in zip(rendered, theirs["rows"], strict=True):
        own = list(prompt.ids[prompt.n_added :])
        unlike += row["own_ids"] != own
        (ours,) = sk.generate(model, tokenizer, [Prompt(prompt.ids, "")], max_new_tokens=NEW, return_details=True)
        for step, (mine, other) in enumerate(zip(ours.ids, row["written"], strict=False)):
            tokens += 1
            if mine == other:
                equal += 1
                if mine in ends:
                    break
                continue
            near += row["margins"][step] <= MARGIN
            tokens -= row["margins"][step] <= MARGIN
            break
    single = [top_logs(model, row) for row in theirs["rows"]]
    model.double()
    double = [top_logs(model, row) for row in theirs["rows"]]
    outside = [torch.tensor(row["logs"], dtype=torch.float64) for row in theirs["rows"]]
    differences = [(a - b).abs() for a, b in zip(single, outside, strict=True)]
    roundings = [(a - b).abs() for a, b in zip(single, double, strict=True)]
    beyond = max(float((d - r).max()) for d, r in zip(differences, roundings, strict=True))
    passed = beyond <= LIMITS[name] and equal == tokens
    return {
        "checkpoint": CHECKPOINTS[name].file,
        "result": "passed" if passed else "failed",
        "prompts": len(prompts),
        "positions": sum(map(len, single)),
        "largest difference": f"{max(float(d.max()) for d in differences):.1e}",
        "positions above 1e-4": sum(int((d.max(-1).values > 1e-4).sum()) for d in differences),
        "our float32 - float64": f"{max(float(r.max()) for r in roundings):.1e}",
        "beyond our rounding": f"{beyond:.1e}",
        "limit": f"{LIMITS[name]:.0e}",
        "greedy tokens equal": f"{equal} of {tokens}",
        "texts cut at a near tie": near,
        "texts with other ids": unlike,
        "llama.cpp": theirs["version"],
    }


def top_logs(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """Our log-probabilities of llama.cpp's likeliest tokens after each token of a row."""
    with torch.inference_mode():
        ids = torch.tensor([[*row["ids"], *row["written"]]])
        logs = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    return logs.gather(-1, torch.tensor(row["top"]))


def transposed(rows: Sequence[Mapping[str, object]]) -> str:
    """A column per checkpoint, whose name is in the first key; a row per further key."""
    first, *further = rows[0]
    heads = (first, *(str(row[first]) for row in rows))
    return markdown_table(heads, [(key, *(str(row[key]) for row in rows)) for key in further])


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in CHECKPOINTS:
        file = path_of(name)
        if file is None:
            print(f"{name}: left out, the file is not here; python -m tests.real.checkpoints {name} fetches it")
            continue
        started = time.monotonic()
        rows.append(compared(name, file))
        print(name, rows[-1], f"{time.monotonic() - started:.0f} s", flush=True)
    if not rows:
        return 2
    known = versions()
    lines = [
        "# llama.cpp as an outside reference",
        "",
        f"Generated by `make test-llamacpp` on {datetime.date.today().isoformat()}, torch {known['torch']}, "
        f"transformers {known['transformers']}. Both sides compute in float32 with the dequantised weights of the same "
        "GGUF file and a float32 cache. All differences are in nats.",
        "",
        f"Each of {len(PROMPTS)} prompts is continued by {NEW} greedy tokens. Two things are compared:",
        "",
        f"- the log-probabilities of llama.cpp's {TOP} likeliest next tokens, after every token of prompt and "
        "continuation;",
        "- the greedy tokens. At a near tie (llama.cpp's two likeliest tokens are at most 1e-2 nats apart) both sides "
        "may choose different tokens. The rest of that text is then not compared.",
        "",
        "A few positions amplify float32's rounding. `our float32 - float64` is the largest difference between "
        "steerkit's runs in the two precisions: its own rounding error. `beyond our rounding` is the largest "
        "difference to llama.cpp after steerkit's own rounding error at the same position and token is subtracted. It "
        "must be at most `limit`. The limit of Gemma is larger, because its residual stream reaches 1e5.",
        "",
        "llama.cpp is built from source without `GGML_GELU_FP16`. With that option, which is the default, its GELU "
        "(Gemma) is read from a table of float16 numbers. The table rounds its input, so two inputs that differ in the "
        "last bit can get clearly different outputs.",
        "",
        transposed(rows),
        "",
        "`texts with other ids`: number of prompts that llama.cpp's own tokenizer splits into other tokens. Both sides "
        "are compared on steerkit's ids.",
    ]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(any(row["result"] != "passed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
