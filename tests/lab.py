"""`make test-lab`: every command of the training pages on a real checkpoint, with a real server as teacher and judge.

Each command runs in a process of its own, in small sizes, and reads the files of those before it. The same call resumes
after the last command that ended well. It writes `results/lab/commands.csv`: seconds, and the last line of the output.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd

import steerkit as sk
from analysis.published import published
from steerkit.io.tables import read_table, write_table
from steerkit.models.identity import describe
from tests.training.test_documented_stages import URL, documented
from tests.transformers_server import serving

ROOT = Path(__file__).parents[1]
LAB = ROOT / "results" / "lab" / "commands.csv"
SIZES = {
    "debates": ("debates=12", "debate.sampling.max_new_tokens=96"),
    "sft": ("sft.steps=4", "sft.batch=2", "sft.micro_batch=2", "sft.keep_at=[2]"),
    "grpo": (
        "grpo.epochs=null", "grpo.steps=2", "grpo.inner=1", "grpo.prompts=2", "grpo.generations=4",
        "grpo.micro_batch=4", "grpo.anneal.clip=[96,64]", "debates=8",
    ),
    "evolve": (
        "grpo.epochs=null", "grpo.steps=2", "grpo.inner=1", "grpo.prompts=2", "grpo.generations=4",
        "grpo.micro_batch=4", "grpo.anneal.clip=[96,64]", "debates=8", "debate.sampling.max_new_tokens=96",
    ),
    "curve": ("decodings=1", "sampling.max_new_tokens=96"),
    "evaluate": ("decodings=1", "sampling.max_new_tokens=96", "debate.sampling.max_new_tokens=96"),
}  # fmt: skip
HUB = {
    "openai/gsm8k": "gsm8k/test.jsonl",
    "TIGER-Lab/MMLU-Pro": "mmlu_pro/test_sample.jsonl",
    "lukaemon/bbh": "bbh",
}
"""Hub ids of the pages -> local files: there is no hub here."""


def prepare(checkpoint: str, folder: Path, data: Path) -> dict[str, Any]:
    """Write what the pages name into a folder: the checkpoint, problems, debates, open questions; return its meta."""
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = sk.load(checkpoint)
    meta = published(describe(model, tokenizer))
    if not (folder / "MODEL").is_dir():
        model.generation_config.do_sample = True  # else `transformers serve` decodes greedily
        model.save_pretrained(folder / "MODEL")
        tokenizer.save_pretrained(folder / "MODEL")
    sums = [{"question": f"What is {n} + {n + 3}?", "gold": 2 * n + 3} for n in range(2, 34)]
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    who = [f"Give one piece of advice on how to {what}." for what in ADVICE]
    (folder / "questions.json").write_text(json.dumps(who))
    turns = [[rf"It is \boxed{{{n}}}.", rf"I say \boxed{{{n}}}."] for n in range(12)]
    held = [{"question": f"What is {n} + 0?", "rounds": [said, said]} for n, said in enumerate(turns)]
    (folder / "my-debates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    if data.is_dir():
        (folder / "data").mkdir(exist_ok=True)
        rows = (data / "gsm8k" / "test.jsonl").read_text().splitlines()[:40]
        (folder / "data" / "gsm8k.jsonl").write_text("\n".join(rows) + "\n")
    return meta


ADVICE = (
    "sleep well", "learn a language", "keep a garden", "save money", "write a letter", "cook rice", "run a meeting",
    "choose a book", "clean a bicycle", "plan a journey", "teach a child to swim", "store apples",
)  # fmt: skip


def sized(call: list[str], url: str, model: Path, data: Path) -> list[str]:
    """A documented command with small sizes, the address of the server, and local files for hub ids."""
    settings = [part for setting in SIZES.get(call[0], ()) for part in ("--set", setting)]
    settings += ["--held", "8"] if call[0] == "evolve" else []
    for hub, place in HUB.items():
        call = [part.replace(hub, str(data / place)) for part in call]
    call = ["50" if part == "1000" else part for part in call]
    asked = [str(model) if before.startswith(URL) else part for before, part in zip(["", *call], call, strict=False)]
    return [part.replace(URL, url) for part in asked] + settings


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__)
    parser.add_argument("checkpoint", help="folder, GGUF file or hub name")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "lab", help="folder of the runs")
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with gsm8k, mmlu_pro, bbh"
    )
    given = parser.parse_args(arguments)
    folder, data = given.out.resolve(), given.data.resolve()
    meta = prepare(given.checkpoint, folder, data)
    table = folder / "commands.csv"
    done = read_table(table)[0].to_dict("records") if table.is_file() else []
    needs = ("data/", *HUB)
    calls = [call for call in documented() if call[0] != "benchmark"]
    if not data.is_dir():
        left_out = [call for call in calls if any(name in str(call) for name in needs)]
        print(f"{len(left_out)} commands need the benchmarks' files, which are not in {data}; pass --data.")
        calls = [call for call in calls if call not in left_out]
    with serving(folder / "MODEL") as url:
        for call in calls[len(done) :]:
            command, started = sized(call, url, folder / "MODEL", data), time.monotonic()
            print("python -m training", *call, flush=True)
            ended = subprocess.run(
                [sys.executable, "-m", "training", *command], cwd=folder, capture_output=True, text=True, check=False,
                env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            if ended.returncode:
                print(ended.stdout[-2000:], ended.stderr[-4000:], sep="\n")
                return 1
            last = ([line for line in ended.stdout.splitlines() if line.strip()] or [""])[-1]
            seconds = round(time.monotonic() - started, 1)
            row = {"command": " ".join(["python -m training", *call]), "seconds": seconds, "last_line": last}
            done.append(row)
            print(f"  {seconds} s: {last}", flush=True)
            write_table(
                table, pd.DataFrame(done), {**meta, "sizes": {key: list(value) for key, value in SIZES.items()}}
            )
    write_table(LAB, *read_table(table))
    print(f"{len(done)} commands ran; wrote {LAB}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
