"""`python -m tests.vllm.demo [FOLDER]`: the demo's run on test through vLLM, beside that of a finished demo.

Texts and verdicts of both are compared; the result goes to `results/serving/demo.json`. In the environment of vLLM.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import steerkit as sk
from steerkit.demo.checkpoint import default_checkpoint
from steerkit.demo.contrasts import make_vectors
from steerkit.demo.questions import PERSONAS, read_questions, split
from steerkit.demo.run import DemoSettings, gain_table, run_test, verdict
from steerkit.demo.selection import choose
from steerkit.io.json import read_json
from steerkit.sweeps.result import SweepResult
from tests.vllm.__main__ import OUT, publish
from tests.vllm.modes import ENVIRONMENT

KEYS = ["vector", "coefficient", "prompt_id"]


def through_vllm(run: Path, out: Path, personas: Sequence[str]) -> dict[str, Any]:
    """Compare personas of the demo in the folder `run` with their run on test through vLLM, whose rows go to `out`.

    p-values are adjusted over these personas, in both engines.
    """
    model, tokenizer = sk.load(default_checkpoint())
    settings = DemoSettings()
    parts = split(read_questions(), {name: getattr(settings, name) for name in ("train", "choose", "dose", "test")})
    vectors = make_vectors(model, tokenizer, parts["train"], run, settings.seed, settings.controls)
    choices, _, norms = choose(model, tokenizer, vectors, parts, settings, run)
    asked = read_json(run / "tables" / "asked.json")
    whole = run_test(model, tokenizer, vectors, choices, parts["test"], norms, settings, run)
    own = SweepResult(whole.table[whole.table["persona"].isin(personas)].reset_index(drop=True), whole.meta)
    choices = {name: choice for name, choice in choices.items() if name in personas}
    options = {"dtype": "float32", "max_model_len": 512, "block_size": 32, "enforce_eager": True}
    with sk.serving.VLLM(default_checkpoint(), **options) as engine:
        began = time.monotonic()
        served = run_test(model, tokenizer, vectors, choices, parts["test"], norms, settings, out, engine)
        seconds = time.monotonic() - began
    both = own.table.merge(served.table, on=KEYS, suffixes=("", "_served"), validate="one_to_one")
    verdicts = [
        {name: verdict(name, gain_table(test, choices), test, choices[name], asked[name]) for name in choices}
        for test in (own, served)
    ]
    return {
        "rows": len(own.table),
        "equal_texts": int((both["text"] == both["text_served"]).sum()),
        "verdicts": [{name: found["steered"] for name, found in one.items()} for one in verdicts],
        "gains_over_zero": [{name: found["gain_over_zero"] for name, found in one.items()} for one in verdicts],
        "seconds": round(seconds, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.vllm.demo", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/demo"), help="folder of a finished demo")
    parser.add_argument("--persona", action="append", choices=tuple(PERSONAS), help="only this one; may be repeated")
    given = parser.parse_args()
    if not (given.run / "summary.json").is_file():
        parser.error(f"expected a finished demo in {given.run}; there is none. Run `steerkit demo --out {given.run}`.")
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"})
    personas = given.persona or list(PERSONAS)
    found = through_vllm(given.run, OUT / "demo" / "-".join(personas), personas)
    publish("demo", found)
    own, served = found["verdicts"]
    print(f"{found['equal_texts']} of {found['rows']} texts are equal; verdicts {own} here, {served} through vLLM")
    return 0 if own == served and found["equal_texts"] >= 0.99 * found["rows"] else 1


if __name__ == "__main__":
    sys.exit(main())
