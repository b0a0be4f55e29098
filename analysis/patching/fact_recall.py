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
from steerkit.io.run_folder import run_folder
from steerkit.io.tables import read_table, write_table
from steerkit.models.identity import describe
from steerkit.patching.result import over_pairs
from steerkit.stats.mean import mean_interval

TEMPLATE = "The capital of {} is the city of"
NAMES = ("The", "capital", "of", "country", "is", "the", "city", "last (of)")
SUBJECT, LAST = NAMES[3], NAMES[-1]
SITES = ("resid_post", "attn_out", "mlp_out")
WAYS: tuple[tuple[Any, Any], ...] = (("denoising", "exact"), ("noising", "exact"), ("denoising", "attribution"))
"""Mode and method of each part of the run."""
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
    """Per site: how the exact effects agree with their first-order approximation, over places from the country on.

    At earlier positions the two prompts are equal, so that both effects are 0 by construction.

    Returns:
        A row per site: places, pearson and spearman (correlations), slope (of the approximation on the exact effects,
        by least squares through 0: 1 where sizes agree).
    """
    keys = ["site", "layer", "position"]
    both = exact[[*keys, "effect"]].merge(fast[[*keys, "effect"]], on=keys, suffixes=("", "_attribution"))
    both = both[both["position"].isin(NAMES[NAMES.index(SUBJECT) :])]
    rows = [
        {
            "site": site,
            "places": len(group),
            "pearson": group["effect"].corr(group["effect_attribution"]),
            "spearman": group["effect"].rank().corr(group["effect_attribution"].rank()),
            "slope": (group["effect"] * group["effect_attribution"]).sum() / (group["effect"] ** 2).sum(),
        }
        for site, group in both.groupby("site", sort=False)
    ]
    return pd.DataFrame(rows)


def depth(pairs: pd.DataFrame) -> pd.DataFrame:
    """Effects by depth at the country's and at the last token: early, middle and late thirds, and the largest layer.

    The interval of `largest` does not cover the choice of the layer, which is made on the same pairs; see `apart`.

    Args:
        pairs: `PatchResult.pairs`.

    Returns:
        One row per site, position and part: site, position, part (`early`, `middle`, `late` third of the layers, or
        `largest`, the layer with the largest mean effect), first and last layer, effect (mean over layers, then over
        pairs), low, high (95 % interval over pairs), n (pairs).
    """
    layers = sorted(pairs["layer"].unique())
    cuts = [round(len(layers) * part / 3) for part in range(4)]
    thirds = {name: layers[a:b] for name, a, b in zip(("early", "middle", "late"), cuts, cuts[1:], strict=False)}
    rows: list[tuple[Any, ...]] = []
    for (site, position), group in pairs.groupby(["site", "position"], sort=False):
        if position not in (SUBJECT, LAST):
            continue
        wide = group.pivot(index="pair", columns="layer", values="effect")
        for part, some in {**thirds, "largest": [wide.mean().idxmax()]}.items():
            found = mean_interval(wide[some].mean(axis=1).to_numpy())
            rows.append((site, position, part, some[0], some[-1], found.mean, found.low, found.high, found.n))
    return pd.DataFrame(rows, columns=["site", "position", "part", "first", "last", "effect", "low", "high", "n"])


def apart(pairs: pd.DataFrame) -> pd.DataFrame:
    """The layer with the largest mean effect in the pairs with odd numbers, and its effect in those with even numbers.

    Neighbouring pairs share a country, so that the halves differ in their pairs but not in their countries.

    Args:
        pairs: `PatchResult.pairs`.

    Returns:
        One row per site and position, of those of `depth`: site, position, layer, effect, low, high (95 % interval over
        the even pairs), n (their number).
    """
    rows: list[tuple[Any, ...]] = []
    some = pairs[pairs["position"].isin((SUBJECT, LAST))]
    for (site, position), group in some.groupby(["site", "position"], sort=False):
        wide = group.pivot(index="pair", columns="layer", values="effect")
        odd = wide.index % 2 == 1
        layer = wide[odd].mean().idxmax()
        found = mean_interval(wide.loc[~odd, layer].to_numpy())
        rows.append((site, position, layer, found.mean, found.low, found.high, found.n))
    return pd.DataFrame(rows, columns=["site", "position", "layer", "effect", "low", "high", "n"])


def run(checkpoint: str, out: Path, results: Path | None, count: int | None) -> None:
    """Patch all places in both modes, and write the tables to `out` (and `results`); a finished part is kept."""
    model, tokenizer = sk.load(checkpoint)
    pairs = pairs_of(tokenizer)[:count]
    if len(pairs) < 2:
        raise SystemExit(
            f"expected two countries at least whose prompt has {len(NAMES)} tokens; this tokenizer has {len(pairs)}. "
            "Choose a checkpoint with one token per country."
        )
    about = published({**describe(model, tokenizer), "template": TEMPLATE, "pairs": [list(pair) for pair in pairs]})
    parts = {}
    with run_folder(out, about) as folder:
        for mode, method in WAYS:
            path = folder / f"pairs-{mode}-{method}.csv"
            if not path.exists():
                write_table(path, effects(model, tokenizer, pairs, SITES, mode, method).pairs, about)
            parts[mode, method] = read_table(path)[0]
        tables = {way: over_pairs(part).drop(columns=["head", "token", "n_missing"]) for way, part in parts.items()}
        exact = [(mode, part) for (mode, method), part in parts.items() if method == "exact"]
        found = {
            "fact_recall": pd.concat(
                [table.assign(mode=mode, method=method) for (mode, method), table in tables.items()], ignore_index=True
            ),
            "fact_recall_depth": pd.concat([depth(part).assign(mode=mode) for mode, part in exact], ignore_index=True),
            "fact_recall_attribution": agreement(tables["denoising", "exact"], tables["denoising", "attribution"]),
        }
        for place in (folder, *([] if results is None else [results])):
            place.mkdir(parents=True, exist_ok=True)
            for name, table in found.items():
                write_table(place / f"{name}.csv", table, about)
    print(found["fact_recall_depth"].to_string(index=False))
    print("layer with the largest effect in odd pairs, and its effect in even pairs:")
    print(pd.concat([apart(part).assign(mode=mode) for mode, part in exact]).to_string(index=False))
    print(found["fact_recall_attribution"].to_string(index=False))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the analysis and write its tables."""
    parser = argparse.ArgumentParser(prog="python -m analysis fact-recall", description=__doc__)
    parser.add_argument("--checkpoint", help="Hub id, folder or GGUF file. Default: SmolLM2 of the demo.")
    parser.add_argument("--out", type=Path, required=True, help="Folder of the run; the same call resumes it.")
    parser.add_argument("--results", type=Path, help="Folder that the tables are also written to.")
    parser.add_argument("--pairs", type=int, help="Number of pairs. Default: all.")
    given = parser.parse_args(arguments)
    if given.pairs is not None and given.pairs < 2:
        parser.error(f"expected --pairs of at least 2; got {given.pairs}. Pass 2 or more.")
    run(given.checkpoint or str(default_checkpoint()), given.out, given.results, given.pairs)
