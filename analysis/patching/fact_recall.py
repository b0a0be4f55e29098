"""Fact recall: where does a model hold the country, and where the capital that it names?

Pairs of prompts differ in the country. The known result (Meng et al. 2022): early layers matter at the country's token,
late layers at the last token.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import steerkit as sk
from analysis.published import published
from steerkit.demo.checkpoint import default_checkpoint
from steerkit.io.tables import write_table

TEMPLATE = "The capital of {} is the city of"
NAMES = ("The", "capital", "of", "country", "is", "the", "city", "last (of)")
SITES = ("resid_post", "attn_out", "mlp_out")
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid", "Japan": "Tokyo", "Russia": "Moscow",
    "China": "Beijing", "Egypt": "Cairo", "Greece": "Athens", "Poland": "Warsaw", "Cuba": "Havana", "Peru": "Lima",
    "Iran": "Tehran", "Norway": "Oslo", "Austria": "Vienna", "Iraq": "Baghdad", "Kenya": "Nairobi", "Ireland": "Dublin",
    "Hungary": "Budapest", "Portugal": "Lisbon",
}  # fmt: skip


def pairs_of(tokenizer: Any) -> list[tuple[str, str]]:
    """Neighbouring countries of the list, of those whose prompt has as many tokens as positions have names."""
    known = [one for one in CAPITALS if len(sk.render(tokenizer, TEMPLATE.format(one)).ids) == len(NAMES)]
    return [(clean, corrupted) for clean, corrupted in zip(known, known[1:] + known[:1], strict=True)]


def effects(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], sites: Sequence[str], mode: Any, method: Any
) -> sk.PatchResult:
    """The effects of all places, for these pairs of countries."""
    return sk.patch(
        model,
        tokenizer,
        [TEMPLATE.format(clean) for clean, _ in pairs],
        [TEMPLATE.format(corrupted) for _, corrupted in pairs],
        [(f" {CAPITALS[clean]}", f" {CAPITALS[corrupted]}") for clean, corrupted in pairs],
        sites=sites,
        positions={name: index for index, name in enumerate(NAMES)},
        mode=mode,
        method=method,
    )


def agreement(exact: pd.DataFrame, fast: pd.DataFrame) -> pd.DataFrame:
    """Per site: the correlation over places of the exact effects with their first-order approximation."""
    keys = ["site", "layer", "position"]
    both = exact[[*keys, "effect"]].merge(fast[[*keys, "effect"]], on=keys, suffixes=("", "_attribution"))
    rows = [
        {
            "site": site,
            "places": len(group),
            "pearson": group["effect"].corr(group["effect_attribution"]),
            "spearman": group["effect"].rank().corr(group["effect_attribution"].rank()),
        }
        for site, group in both.groupby("site", sort=False)
    ]
    return pd.DataFrame(rows)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis fact-recall", description=__doc__)
    parser.add_argument("--checkpoint", help="Hub id, folder or GGUF file. Default: SmolLM2 of the demo.")
    parser.add_argument("--out", type=Path, required=True, help="Folder of the tables.")
    parser.add_argument("--pairs", type=int, help="Number of pairs. Default: all.")
    given = parser.parse_args(list(arguments))
    model, tokenizer = sk.load(given.checkpoint or str(default_checkpoint()))
    pairs = pairs_of(tokenizer)[: given.pairs]
    if len(pairs) < 2:
        raise SystemExit(f"expected two countries of one token at least; this tokenizer has {len(pairs)}.")
    given.out.mkdir(parents=True, exist_ok=True)
    tables, meta = [], {}
    for mode in ("denoising", "noising"):
        found = effects(model, tokenizer, pairs, SITES, mode, "exact")
        tables.append(found.table.assign(mode=mode, method="exact"))
        meta = {**published(found.meta), "pairs": [list(pair) for pair in pairs], "template": TEMPLATE, "mode": "both"}
    fast = effects(model, tokenizer, pairs, SITES, "denoising", "attribution")
    tables.append(fast.table.assign(mode="denoising", method="attribution"))
    table = pd.concat(tables, ignore_index=True).drop(columns=["head", "token"])
    write_table(given.out / "fact_recall.csv", table, meta)
    write_table(given.out / "fact_recall_attribution.csv", agreement(tables[0], tables[2]), meta)
    best = tables[0].sort_values("effect", ascending=False).groupby("site").head(3)
    print(best[["site", "layer", "position", "effect", "effect_low", "effect_high", "n"]].to_string(index=False))
    print(agreement(tables[0], tables[2]).to_string(index=False))
