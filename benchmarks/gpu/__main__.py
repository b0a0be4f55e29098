"""`python3 -m benchmarks.gpu [--device cpu] [--parts NAME,NAME] [--out FOLDER]`: run the parts, write their figures.

Needs torch and transformers, and no network. A part that fails or does not fit into the time is reported and the others
go on. Results: FOLDER/gpu.json and FOLDER/gpu.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.equivalence import equivalences
from benchmarks.gpu.recipe import recipe
from benchmarks.gpu.sizes import Sizes, sizes_for
from benchmarks.gpu.speed import capture, decoding, static_cache
from benchmarks.gpu.training import training
from steerkit.io.signals import restore_interrupt

Part = Callable[[Sizes, torch.device], list[dict[str, Any]]]
PARTS: dict[str, Part] = {
    "equivalence": equivalences,
    "decoding": decoding,
    "capture": capture,
    "static-cache": static_cache,
    "training": training,
    "recipe": recipe,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen parts; returns 1 if one failed."""
    restore_interrupt()
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with small sizes.")
    parser.add_argument("--parts", default=",".join(PARTS), help="Parts to run, with commas.")
    parser.add_argument("--budget", type=float, default=330.0, help="Seconds after which no further part starts.")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="Folder of gpu.json and gpu.md.")
    parser.add_argument("--checkpoint", type=Path, help="Folder or GGUF file of SmolLM2 for the part recipe.")
    parser.add_argument("--debates", type=Path, help="traces.jsonl for the part recipe (default: debate first).")
    given = parser.parse_args(arguments)
    chosen = given.parts.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"expected parts among {list(PARTS)}; got {unknown}.")
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("expected a GPU; torch sees none. Pass --device cpu to run small sizes on the CPU.")
    known = {"checkpoint": given.checkpoint, "debates": given.debates, "folder": given.out / "recipe"}
    sizes = replace(sizes_for(device), **known)
    start = time.monotonic()
    results = {"machine": machine(device), "parts": {}}
    for name, part in PARTS.items():
        elapsed = time.monotonic() - start
        if name not in chosen:
            results["parts"][name] = {"state": "skipped", "reason": "not chosen"}
        elif elapsed > given.budget:
            results["parts"][name] = {"state": "skipped", "reason": f"no time left after {elapsed:.0f} s"}
        else:
            results["parts"][name] = run(part, device, sizes)
        write(results, given.out)
        print(name, json.dumps({k: v for k, v in results["parts"][name].items() if k != "figures"}), flush=True)
    print(markdown(results))
    return int(any(part["state"] == "failed" for part in results["parts"].values()))


def run(part: Part, device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """One part's figures and seconds; a failure with its reason."""
    start = time.monotonic()
    try:
        figures = part(sizes, device)
        outcome: dict[str, Any] = {"state": "ran", "figures": figures}
    except NotImplementedError as error:
        outcome = {"state": "skipped", "reason": str(error)}
    except Exception as error:  # reported, so that the other parts run
        traceback.print_exc(file=sys.stderr)
        outcome = {"state": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {**outcome, "seconds": round(time.monotonic() - start, 1)}


def machine(device: torch.device) -> dict[str, str]:
    """The device and the versions that figures depend on."""
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, small sizes: no figures to publish"
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


def write(results: dict[str, Any], folder: Path) -> None:
    """Write the results so far as JSON and Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(results, indent=1))
    (folder / "gpu.md").write_text(markdown(results))


def markdown(results: dict[str, Any]) -> str:
    """A table of all figures; parts that did not run with their reason."""
    about = results["machine"]
    lines = [f"# GPU: {about['device']}", "", f"torch {about['torch']}, transformers {about['transformers']}.", ""]
    for name, part in results["parts"].items():
        took = f" ({part['seconds']} s)" if "seconds" in part else ""
        lines += [f"## {name}: {part['state']}{took}", ""]
        if "reason" in part:
            lines += [part["reason"], ""]
        if part.get("figures"):
            lines += ["| figure | value | 95 % interval | n |", "|---|---|---|---|"]
            for row in part["figures"]:
                interval = f"[{row['low']:.4g}, {row['high']:.4g}]" if "low" in row else ""
                limit = f" (limit {row['limit']:g})" if "limit" in row else ""
                value = f"{row['value']:.4g} {row['unit']}{limit}".strip()
                lines.append(f"| {row['figure']} | {value} | {interval} | {row.get('n', '')} |")
            lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
