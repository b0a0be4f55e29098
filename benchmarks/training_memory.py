"""Peak memory of training steps and of generation on a CPU against `training.memory`.

`python -m benchmarks.training_memory`: each case runs in a new process with random weights. Measured is the growth of
the process's peak over its size after imports and a small training: once with freed memory returned to the system at
once, so that the peak is what is in use, and once as training does it (`keep_freed_memory`). Writes
results/speed/training-memory.json and benchmarks/TRAINING_MEMORY.md.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steerkit.io.json import read_json, write_json
from steerkit.io.versions import versions
from steerkit.models import products
from steerkit.models.kernels import missing
from training.memory import KEPT, MARGIN, blank, generation, rollouts, training_step
from training.train.checkpoints import LoRA
from training.train.schedules import Anneal

ROOT = Path(__file__).parents[1]
PAGE, ROWS = Path(__file__).with_name("TRAINING_MEMORY.md"), ROOT / "results" / "speed" / "training-memory.json"
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """What is run.

    Args:
        name: what it is, for the table.
        stage: "sft", "grpo" or "generate".
        model: configuration of a Llama.
        rows: texts at once.
        tokens: tokens of a text, prompt included.
        lora: the adapter.
        checkpointing: keep only the inputs of the blocks.
    """

    name: str
    stage: str
    model: dict[str, int | bool]
    rows: int
    tokens: int
    lora: LoRA | None = None
    checkpointing: bool = False


def llama(width: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    """Configuration of a Llama."""
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": 256,
    }


CASES = (
    Case("SFT, all weights", "sft", llama(256, 704, 6, 4, 2, 4096, True), rows=8, tokens=768),
    Case(
        "SFT, LoRA and trained embeddings",
        "sft",
        llama(384, 1024, 8, 6, 2, 32_768, False),
        rows=4,
        tokens=768,
        lora=LoRA(16, 16, 0.1),
    ),
    Case("GRPO, LoRA", "grpo", llama(320, 1280, 8, 5, 5, 8192, True), rows=8, tokens=320, lora=LoRA(16, 32, 0.0)),
    Case("SFT, LoRA, deep", "sft", llama(192, 512, 16, 3, 1, 2048, True), rows=6, tokens=640, lora=LoRA(8, 8, 0.0)),
    Case("GRPO, all weights", "grpo", llama(256, 768, 6, 4, 1, 4096, False), rows=6, tokens=288),
    Case(
        "SFT, LoRA, checkpointing",
        "sft",
        llama(256, 704, 12, 4, 2, 8192, False),
        rows=4,
        tokens=896,
        lora=LoRA(16, 16, 0.0),
        checkpointing=True,
    ),
    Case(
        "SFT, all weights, checkpointing",
        "sft",
        llama(320, 960, 10, 5, 1, 3072, True),
        rows=6,
        tokens=512,
        checkpointing=True,
    ),
    Case("generation of 256 rows", "generate", llama(256, 512, 6, 4, 4, 16_384, True), rows=256, tokens=192),
)
"""Shapes that differ in width, inner width, depth, heads and vocabulary."""
CHOSEN_ON = (*CASES[:3], CASES[5])
"""Cases that had been measured when `training.memory` and its margin were chosen; the others check them."""
PROMPT = 64
"""Tokens of a prompt in the cases "grpo" and "generate"."""


def estimated(case: Case) -> int:
    """Bytes that `training.memory` computes."""
    from transformers import LlamaConfig

    config = LlamaConfig(**case.model)
    weights = 4 * blank(config).num_parameters()  # type: ignore[operator]
    packed = weights if missing() is None else 0
    new = case.tokens - PROMPT
    if case.stage == "generate":
        return int(weights + packed + generation(config, case.rows, PROMPT, new))
    step = training_step(
        config,
        case.lora,
        case.rows,
        case.tokens,
        train_embeddings=case.stage == "sft",
        checkpointing=case.checkpointing,
    )
    if case.stage == "sft":
        return step.total
    return packed + max(step.total, rollouts(config, case.lora, step, case.rows, PROMPT, new))


def measured(case: Case, kept: bool) -> int:
    """Bytes by which the peak of a new process grows; `kept`: freed memory stays with the process, as in training."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        "MALLOC_TRIM_THRESHOLD_": "1048576",
        "MALLOC_ARENA_MAX": "1",
    }
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.training_memory", str(CASES.index(case)), str(kept)]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def run(case: Case, folder: Path) -> None:
    """Two optimisation steps, or one batch of texts."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import steerkit as sk
    from benchmarks.gpu.texts import byte_tokenizer, debates
    from training.problems.problem import Problem
    from training.train.grpo import GRPO, train_grpo
    from training.train.sft import SFT, train_sft

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    model = AutoModelForCausalLM.from_config(LlamaConfig(**case.model), dtype=torch.float32).eval()
    if case.stage == "generate":
        prompts = [f"{i:08d}".ljust(PROMPT, "x") for i in range(case.rows)]
        sk.generate(model, tokenizer, prompts, max_new_tokens=case.tokens - PROMPT, batch_rows=case.rows)
    elif case.stage == "sft":
        lengths = [case.tokens - 20 * (i == 1) for i in range(2 * case.rows)]  # one text is padded
        traces = debates(tokenizer, lengths)
        size = {"batch": 2 * case.rows, "micro_batch": case.rows, "checkpointing": case.checkpointing}
        setting = SFT(steps=2, lora=case.lora, **size)
        train_sft(model, tokenizer, traces, setting, folder / "sft")
    else:
        question = "x" * (PROMPT - len("Problem: \n\n"))
        problems = [Problem(str(i), question, "2", "number", "own") for i in range(2)]
        new = case.tokens - PROMPT
        setting = GRPO(
            anneal=Anneal("linear", clip=(new, new)), steps=2, inner=1, prompts=2, generations=case.rows, save_every=9,
            micro_batch=case.rows, lora=case.lora, temperature=1.0, top_p=1.0, beta=0.02 if case.lora else 0.0,
        )  # fmt: skip
        train_grpo(model, tokenizer, problems, setting, folder / "grpo")


def grown(case: Case, kept: bool) -> int:
    """Run a small case, then the case, and return the growth of this process's peak."""
    if not kept:
        products.keep_freed_memory = lambda: False  # type: ignore[assignment]
    small = replace(case, model=llama(32, 64, 2, 2, 2, 512, True), rows=2, tokens=160)
    with tempfile.TemporaryDirectory() as folder:
        run(small, Path(folder) / "small")
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = field("VmRSS")
        run(case, Path(folder) / "case")
    return field("VmHWM") - before


def field(name: str) -> int:
    """A size in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def page(rows: list[dict[str, Any]]) -> str:
    """The table."""
    known = versions()
    others = len(rows) > sum(row["case"] in [case.name for case in CHOSEN_ON] for row in rows)
    most = max(row["process"] / row["estimated"] for row in rows)
    checks = "the others check them" if others else "no other case has been measured yet"
    lines = [
        "# Memory of training on a CPU, measured and estimated",
        "",
        f"Generated by `python -m benchmarks.training_memory`: torch {known['torch']}, transformers "
        f"{known['transformers']}, float32, random weights. `in use` is the growth of the process's peak in two "
        "optimisation steps (of two micro-batches each), or in one batch of texts, where freed memory returns to the "
        "system at once. The estimate is that of `training.memory` and 10 % for the allocator, as in `python -m "
        "training.imad PRESET --dry-run`: it is about the memory in use. The formulas and the 10 % were chosen when "
        f"the cases marked * had been measured; {checks}.",
        "",
        "Training on a CPU keeps freed memory for the next step, which is faster. `process` is the growth of the peak "
        "then: this is what the machine needs. It is larger than the estimate where freed blocks do not fit the next "
        f"ones, by up to {most:.2f} times here; `--dry-run` names {KEPT:g} times. `make gpu` measures the memory that "
        "torch allocates on a GPU (parts `sft-4`, `sft-1`, `grpo`).",
        "",
        "| case | parameters | texts x tokens | in use, MiB | estimated MiB | estimate / in use | process, MiB | "
        "process / estimate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mark = " *" if row["case"] in [case.name for case in CHOSEN_ON] else ""
        sizes = f"{row['measured'] / MIB:.0f} | {row['estimated'] / MIB:.0f} | {row['estimated'] / row['measured']:.2f}"
        lines.append(
            f"| {row['case']}{mark} | {row['parameters']:,} | {row['rows']} x {row['tokens']} | {sizes} | "
            f"{row['process'] / MIB:.0f} | {row['process'] / row['estimated']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the cases that are not in the file of rows, and write the page."""
    from transformers import LlamaConfig

    done = {row["case"]: row for row in read_json(ROWS)["rows"]} if ROWS.exists() else {}
    for case in CASES:
        parameters = blank(LlamaConfig(**case.model)).num_parameters()  # type: ignore[operator]
        row = {"case": case.name, "parameters": parameters, "rows": case.rows, "tokens": case.tokens}
        old = done.get(case.name, {})
        if any(old.get(name) != value for name, value in row.items()):
            old = {"measured": measured(case, False), "process": measured(case, True)}
        done[case.name] = {**old, **row, "estimated": round(MARGIN * estimated(case))}
        print(done[case.name], flush=True)
        rows = [done[one.name] for one in CASES if one.name in done]
        write_json(ROWS, {"rows": rows, "versions": versions()})
        PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(grown(CASES[int(sys.argv[1])], sys.argv[2] == "True")))
    else:
        main()
