"""`python -m benchmarks.changed_texts OLD NEW`: texts of two demo folders that differ, and how near the decision was.

Greedy texts of two versions part where two tokens are almost equally likely. For each such text: its first differing
token, and the difference of the two tokens' logits there, computed in float64 by a plain forward of the new version.
Writes benchmarks/CHANGED_TEXTS.md.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import steerkit as sk
from steerkit.demo.traits import PERSONAS
from steerkit.io.files import write_text
from steerkit.io.json import read_json
from steerkit.sweeps.result import layers_of
from steerkit.text.tokens import encode

PAGE = Path(__file__).with_name("CHANGED_TEXTS.md")
KEYS = ["vector", "layer", "coefficient", "prompt_id"]
BUG = 1e-3
"""Nats; a text that parts at a wider margin was not changed by rounding."""


def vectors_of(folder: Path, persona: str, choice: dict[str, Any], count: int) -> dict[str, sk.SteeringVector]:
    """The vectors of a persona's test sweep, made as the demo makes them."""
    stem = folder / "vectors" / f"{persona}-{choice['source']}"
    vector, shuffled = (
        sk.SteeringVector.load(stem.with_name(f"{stem.name}{kind}.safetensors")).at(choice["layer"])
        for kind in ("", "-shuffled")
    )
    random = sk.controls.random({persona: vector}, n=count, seed=100)
    return {persona: vector, f"{persona}/shuffled": shuffled, **random}


def same_vectors(old: Path, new: Path, persona: str, choice: dict[str, Any], count: int) -> set[str]:
    """The names of the vectors that both versions made alike, up to rounding."""
    before, after = (vectors_of(folder, persona, choice, count) for folder in (old, new))
    close = {
        name: all(
            torch.allclose(v, before[name].layers[layer], rtol=1e-3, atol=1e-4) for layer, v in one.layers.items()
        )
        for name, one in after.items()
    }
    return {name for name, equal in close.items() if equal}


def changed(old: Path, new: Path) -> tuple[pd.DataFrame, int, list[str]]:
    """A row per text that differs, the number of texts compared, and the vectors that differ themselves."""
    summary = read_json(new / "summary.json")
    model, tokenizer = sk.load(summary["checkpoint"])
    model.double()
    rows, compared, others = [], 0, list[str]()
    for persona in PERSONAS:
        choice = summary["choices"][persona]
        tables = [pd.read_parquet(folder / "test" / persona / "table.parquet") for folder in (old, new)]
        count = tables[1]["vector"].str.contains("random").groupby(tables[1]["vector"]).first().sum()
        vectors = vectors_of(new, persona, choice, int(count))
        alike = same_vectors(old, new, persona, choice, int(count))
        others += [name for name in vectors if name not in alike]
        tables[1] = tables[1][tables[1]["vector"].isin(alike)]
        both = tables[1].merge(tables[0][[*KEYS, "text"]], on=KEYS, suffixes=("", "_old"))
        compared += len(both)
        for row in both[both["text"] != both["text_old"]].itertuples():
            before, after = encode(tokenizer, row.text_old), list(row.ids)
            step = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), None)
            if step is None:
                continue
            vector = vectors[str(row.vector)].at(layers_of(row.layer))
            steering = sk.Steering(vector, float(row.coefficient), choice["positions"])
            ids = torch.tensor([[*row.prompt_ids, *after[:step]]])
            with torch.no_grad(), steering.on(model, prompt_length=len(row.prompt_ids)):
                logits = model(input_ids=ids, use_cache=False).logits[0, -1]
            margin = abs(float(logits[before[step]] - logits[after[step]]))
            rows.append(
                {
                    "vector": row.vector, "coefficient": row.coefficient, "prompt": row.prompt_id, "token": step,
                    "before": tokenizer.decode([before[step]]), "after": tokenizer.decode([after[step]]),
                    "margin": margin,
                }
            )  # fmt: skip
    return pd.DataFrame(rows), compared, others


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.changed_texts", description=__doc__)
    parser.add_argument("old", type=Path, help="the demo's folder, written by the older version")
    parser.add_argument("new", type=Path, help="the demo's folder, written by this version")
    given = parser.parse_args()
    table, compared, others = changed(given.old, given.new)
    wide = int((table["margin"] > BUG).sum()) if len(table) else 0
    lines = [
        "# Texts of the demo that changed",
        "",
        f"Written by `python -m benchmarks.changed_texts` on {datetime.date.today().isoformat()}. {len(table)} of "
        f"{compared} texts differ from those of the older version, {wide} of them at a margin above {BUG:g}."
        + f" Left out are texts of vectors that this version makes in another way: {', '.join(others)}."
        * bool(others),
        "",
        "| vector | coefficient | prompt | token | before | after | margin |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table.itertuples():
        lines.append(
            f"| {row.vector} | {row.coefficient:g} | {row.prompt} | {row.token} | `{row.before!r}` | `{row.after!r}` | "
            f"{row.margin:.1e} |"
        )
    write_text(PAGE, "\n".join(lines) + "\n")
    print("\n".join(lines[:4]))


if __name__ == "__main__":
    main()
