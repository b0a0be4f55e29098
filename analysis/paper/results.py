"""Results page of a reproduction: pooled tables per family, and each claim of the paper with a verdict.

Reads the runs and analyses that `python -m analysis reproduce` wrote; writes all tables, and `results.md` from these
tables alone.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.inputs import BASE
from analysis.paper.archive import unpacked
from analysis.paper.claims import (
    ALONE,
    OTHER_GRPO,
    OTHER_SFT,
    RULES,
    SHUFFLED,
    Claim,
    Tables,
    claims,
    rules,
    rules_sha256,
)
from analysis.paper.main_table import read_runs, shown
from analysis.paper.main_table import write as write_main_table
from analysis.paper.pooling import LEAST_PAIRS, collect_tables, rounded
from analysis.paper.protocol import AT_CONTROLS, COEFFICIENT, PLANTED_BASE, TAGGED
from analysis.paper.reproduce import STARTED, versions_of
from analysis.patching.rounds import OWN, PART, QUESTION, ROUND
from analysis.probes.erased import LEAST_GAIN
from steerkit.io.files import write_text
from steerkit.io.json import read_json, write_json
from steerkit.io.tables import read_table, write_table
from steerkit.io.versions import versions
from steerkit.stats.format import interval_text
from training.evaluate.methods import DEBATES
from training.evaluate.results import differences, markdown
from training.imad import SELF_CHECKING

ABOUT = "about.json"
WHAT_HELPS = ("IMAD", "SFT", SHUFFLED, *OTHER_SFT, ALONE, *OTHER_GRPO)
"""IMAD, SFT on the traces, and the trainings that show what the debate adds."""
FEATURES = {
    "resid": "nothing erased",
    "erased": "names erased here",
    "erased_shuffled": "shuffled names erased here",
    "erased together": "names erased at all positions",
    "erased_shuffled together": "shuffled names erased at all positions",
}
"""What a probe reads -> what the page calls it."""
PUBLISHED_AREAS = {BASE: "0.802", "IMAD": "0.903"}
"""Areas that the paper reports (arXiv 2604.24881)."""
AREAS = {
    "at strength 0": "at strength 0",
    "area, own": "own or planted directions",
    "area, random": "random",
    "area, shuffled": "shuffled",
    "area over random": "own - random",
    "area over shuffled": "own - shuffled",
}
PROTOCOL = "the paper's protocol: "
"""Beginning of the claims about the paper's protocol."""
GROWTH = {
    "area above strength 0, own": "above strength 0",
    "area over base": "own, minus the base's",
    "above over base": "above strength 0, minus the base's",
    "own - random, over base": "own - random, minus the base's",
}
"""Measure of `analysis.paper.pooling.pool_protocol` -> column of the page; planted directions stand for own ones."""
SCORES = {
    "rouge_l": "ROUGE-L of the first turn",
    "speaks": "share of texts whose first turn is the agent's, by its tag or, without one, by its opening",
    "style": "share of texts whose first turn begins as the agent's texts do, whatever its tag",
}


def gained_unnamed(gain: pd.DataFrame, score: str) -> pd.DataFrame:
    """A score gained at the frozen settings, agents unnamed: a row per checkpoint and agent, a column per control."""
    some = gain[(gain["score"] == score) & ~gain["identity"].astype(bool)]
    texts = [interval_text(row.gain, row.low, row.high, 2, signed=True) for row in some.itertuples()]
    some = some.assign(text=texts)
    index = ["stage", "agent"]
    wide = some.pivot_table(index=index, columns="over", values="text", aggfunc="first", sort=False)
    wide = wide.rename(columns=lambda over: f"over {over}")
    zero = some[some["over"] == "coefficient 0"].set_index(index)
    wide.insert(0, "unsteered", zero["unsteered"].round(2))
    ranks = some[some["over"] == "random"].set_index(index)["p_rank"].rename("rank p over random, by seed")
    wide = wide.join(zero["by_seed"].rename("by seed, over coefficient 0")).join(ranks)
    return wide.join(zero["seeds"]).reset_index()


def protocol_table(protocol: pd.DataFrame, columns: Mapping[str, str] = AREAS) -> pd.DataFrame:
    """Measures of the paper's protocol, a row per checkpoint and context: areas by default, or what they gain.

    The area above strength 0 of controls, and the comparison with the base's own prompt, are in the tables alone.

    Args:
        protocol: see `analysis.paper.pooling.pool_protocol`.
        columns: measure -> column, `AREAS` or `GROWTH`.
    """
    some = protocol[protocol["score"] == "rouge_l"]
    texts = [
        interval_text(row.value, row.low, row.high, 3) + (f"; rank p {row.p_rank}" if row.p_rank else "")
        for row in some.itertuples()
    ]
    some = some.assign(text=texts)
    wide = some.pivot_table(
        index=["stage", "context", "grid"], columns="measure", values="text", aggfunc="first", sort=False
    )
    found = {}
    for measure, shown_as in columns.items():
        of_planted = measure.replace(", own", ", planted")
        parts = [wide[name] for name in dict.fromkeys((measure, of_planted)) if name in wide]
        if parts:
            found[shown_as] = parts[0] if len(parts) == 1 else parts[0].fillna(parts[1])
    seeds = some.groupby(["stage", "context", "grid"], sort=False)["seeds"].max()
    return pd.DataFrame(found).fillna("").join(seeds).reset_index()


def protocol_summary(families: Tables) -> pd.DataFrame:
    """The paper's area beside ours and those of the controls: a row per family and checkpoint, the tag as context."""
    rows = []
    for family, some in families.items():
        if "protocol" not in some:
            continue
        table = some["protocol"]
        grid = AT_CONTROLS if (table["grid"] == AT_CONTROLS).any() else COEFFICIENT
        at = table[(table["score"] == "rouge_l") & (table["grid"] == grid) & (table["context"] == TAGGED)]
        for stage, part in at.groupby("stage", sort=False):
            lines = part.set_index("measure")
            row = {"family": family, "checkpoint": stage, "paper": PUBLISHED_AREAS.get(str(stage), "")}
            for kind in ("own", "random", "shuffled", "planted"):
                row[kind] = _area(lines.loc[f"area, {kind}"]) if f"area, {kind}" in lines.index else ""
            row["above random"] = _area(lines.loc["area over random"], signed=True)
            rows.append({**row, "unsteered": _area(lines.loc["at strength 0"]), "seeds": lines["seeds"].max()})
    return pd.DataFrame(rows)


def _area(line: pd.Series, signed: bool = False) -> str:
    return interval_text(line["value"], line["low"], line["high"], 3, signed=signed)


def protocol_answer(family: str, protocol: pd.DataFrame, judged: pd.DataFrame) -> str:
    """The protocol's areas and verdicts of one family, as a list: the numbers and verdicts of its tables.

    Args:
        family: the family.
        protocol: its table over the seeds.
        judged: the claims of the page.
    """
    lines = protocol_summary({family: {"protocol": protocol}}).set_index("checkpoint")
    base, imad = lines.loc[BASE], lines.loc["IMAD"]
    known = rules()
    found = judged.set_index("name")["verdict"]
    texts = [PLAINLY.get(known[name].text, known[name].text) for name in ("area", "above")]
    verdicts = [
        f'- The verdict on "{text.removeprefix(PROTOCOL)}" is **{found[f"{family}: {text}"]}**.' for text in texts
    ]
    planted = "The positive control was not tried."
    if PLANTED_BASE in lines.index:
        above = lines.loc[PLANTED_BASE, "above random"]
        planted = f"In the positive control, the same difference for planted directions is {above}."
    return "\n".join(
        [
            f"**{family}**:",
            "",
            f"- The area under the agents' own directions is {base['own']} at the base and {imad['own']} at IMAD.",
            f"- ROUGE-L without steering is {base['unsteered']} at the base and {imad['unsteered']} at IMAD.",
            f"- At IMAD, the area under the own directions minus that under random ones is {imad['above random']}.",
            f"- {planted}",
            *verdicts,
        ]
    )


def malicious_table(pooled: pd.DataFrame) -> pd.DataFrame:
    """The paper's malicious experiment: a row per checkpoint, context and strength; trait and accuracy by the vector.

    In brackets the mean under random directions.
    """
    keys = ["stage", "context", "grid", "strength"]
    some = pooled[pooled["strength"] != 0]
    parts = []
    for score in ("trait", "accuracy"):
        part = some[some["score"] == score].set_index(keys)
        text = [f"{row.zero:.2f} -> {row.own:.2f} ({row.random:.2f})" for row in part.itertuples()]
        over = [interval_text(row.gain, row.low, row.high, 2, signed=True) for row in part.itertuples()]
        parts.append(pd.DataFrame({score: text, f"{score} over random": over}, index=part.index))
    seeds = some[some["score"] == "trait"].set_index(keys)["seeds"]
    return pd.concat([*parts, seeds], axis=1).reset_index()


def transplant_table(pooled: pd.DataFrame) -> pd.DataFrame:
    """What a transplanted first round does: a row per checkpoint, the explicit debate among them."""
    rows = [
        {
            "text": row.stage,
            "with a round-1 turn": f"{row.share_with_round_1:.0%}",
            "agents in round 1; consensus next": f"{row.agents:.2f}; {row.share_agreed:.0%}",
            "answers that change": f"{row.changed:.2f}",
            "answers that change, first control": f"{row.changed_again:.2f}",
            "answers that change, second control": f"{row.changed_resampled:.2f}",
            "difference": interval_text(row.value, row.low, row.high, 2, signed=True),
            "by seed": two_digits(row.by_seed),
            "no answer": f"{row.missing:.2f} ({row.missing_again:.2f}, {row.missing_resampled:.2f})",
            "follows, minus chance": interval_text(row.follows, row.follows_low, row.follows_high, 2, signed=True),
            "right": f"{row.right_again:.2f} -> {row.right:.2f}",
            "seeds": f"{row.seeds} of {row.runs}",
        }
        for row in pooled.itertuples()
    ]
    return pd.DataFrame(rows)


def two_digits(by_seed: str) -> str:
    """The values of the seeds with two digits.

    Example:
        >>> two_digits("0.9114 0.88")
        '0.91 0.88'
    """
    return " ".join(f"{float(value):.2f}" for value in by_seed.split())


def patched_table(pooled: pd.DataFrame) -> pd.DataFrame:
    """Patched first rounds: a row per checkpoint, text, what follows round 1, and place.

    Columns: the shares of answers that follow, by part that is patched; by chance; those that follow, seed by seed; the
    shares that change under round 1 and, in brackets where it was measured, under the text's own activations. The table
    of the counts has the pairs.
    """
    some = pooled.assign(
        place=[f"{row.site}, layer {row.layer}" for row in pooled.itertuples()],
        shown=[interval_text(row.share, row.low, row.high) for row in pooled.itertuples()],
    )
    index = ["stage", "text", "then", "place"]

    def of(quantity: str, part: str, column: str = "shown") -> pd.Series:
        return some[(some["quantity"] == quantity) & (some["part"] == part)].set_index(index)[column]

    changed = of("changed", ROUND)
    by_own = of("changed", OWN, "share").map(" ({:.2f})".format)  # measured at some places alone
    columns = {f"follows, {part}": of("follows", part) for part in (ROUND, PART, QUESTION)}
    columns |= {
        "follows by chance": of("chance", ROUND, "share").round(3),
        f"by seed, {ROUND}": of("follows", ROUND, "by_seed").map(two_digits),
        f"changes, {ROUND} ({OWN})": changed + by_own.reindex(changed.index).fillna(""),
        "seeds": of("follows", ROUND, "seeds"),
    }
    table = pd.DataFrame(columns).reindex(columns["seeds"].index)
    return table.astype(object).fillna("").reset_index().rename(columns={"then": "after round 1"})


def erased_probes_table(pooled: pd.DataFrame) -> pd.DataFrame:
    """Erased names: accuracy of a probe, a row per checkpoint, read position and layer."""
    shown = [interval_text(row.accuracy, row.accuracy_low, row.accuracy_high) for row in pooled.itertuples()]
    wide = pooled.assign(shown=shown).pivot_table(
        index=["stage", "position", "layer"], columns="features", values="shown", aggfunc="first", sort=False
    )
    seeds = pooled.groupby(["stage", "position", "layer"], sort=False)["seeds"].max()
    return wide[[name for name in FEATURES if name in wide]].rename(columns=FEATURES).join(seeds).reset_index()


def broken_texts(gains: pd.DataFrame) -> set[tuple[str, str, str]]:
    """Stage, identity and erasure where unnamed texts lose at least as much by the erasure as the identity adds."""
    means = gains.set_index(["stage", "identity", "erasure", "quantity"])["mean"]
    costs = gains[gains["quantity"] == "cost"]
    return {
        (row.stage, row.identity, row.erasure)
        for row in costs.itertuples()
        if -row.mean >= means[row.stage, row.identity, "none", "gain"] > 0
    }


def erased_gains_table(gains: pd.DataFrame, survives: pd.DataFrame) -> pd.DataFrame:
    """Erased names: what tag or vector add to ROUGE-L under each erasure, the share that survives, and the cost.

    The share is `not testable` where the identity adds less than `erased.LEAST_GAIN` in every seed, and `texts broken`
    where the erasure costs at least as much as the identity adds.
    """
    index = ["stage", "identity", "erasure"]
    shown = [interval_text(row.mean, row.low, row.high, signed=True) for row in gains.itertuples(index=False)]
    wide = gains.assign(shown=shown).pivot_table(
        index=index, columns="quantity", values="shown", aggfunc="first", sort=False
    )
    share = [interval_text(row.survives, row.survives_low, row.survives_high) for row in survives.itertuples()]
    part = survives.assign(share=share).set_index(index)
    broken = part.index.isin(broken_texts(gains))
    part.loc[broken, ["share", "by_seed"]] = "texts broken", ""
    by_seed = part["by_seed"].rename("survives by seed")
    wide = wide[["gain"]].join(part["share"].rename("survives")).join(by_seed).join(wide["cost"])
    wide = wide.join(gains.groupby(index, sort=False)["seeds"].max())
    tested = survives.set_index(index)["survives"].dropna().index
    without = (wide.index.get_level_values("erasure") != "none") & ~wide.index.isin(tested)
    wide.loc[without, "survives"] = "not testable"
    return wide.astype(object).fillna("").reset_index()


def erased_changes_table(pooled: pd.DataFrame) -> pd.DataFrame:
    """How much each erasure changes: a row per checkpoint, erasure and layer, a column per position and vector."""
    index = ["stage", "erasure", "layer"]
    wide = pooled.pivot_table(index=index, columns="of", values="share", aggfunc="first", sort=False)
    return wide.round(3).join(pooled.groupby(index, sort=False)["seeds"].max()).reset_index()


def suppression_table(kept: pd.DataFrame) -> pd.DataFrame:
    """The malicious agent's trait at the frozen setting: a row per checkpoint and context."""

    def of(row: Any, name: str, signed: bool = False) -> str:
        return interval_text(*(getattr(row, f"{name}{end}") for end in ("", "_low", "_high")), signed=signed)

    rows = [
        {
            "stage": row.stage,
            "context": row.context,
            "trait": f"{row.trait_0:.2f} -> {row.trait:.2f}",
            "removed": of(row, "removed"),
            "over random": of(row, "over_random", True),
            "over matched": of(row, "over_matched", True),
            "seeds with the trait": f"{row.shown} of {row.runs}",
            "accuracy": f"{row.accuracy_0:.2f} -> {row.accuracy:.2f} ({row.accuracy_random:.2f}, "
            f"{row.accuracy_matched:.2f})",
            "kept": of(row, "kept"),
            "right before": f"{row.right_in_context:.2f}",
            "own opening": f"{row.own_opening_0:.2f} -> {row.own_opening:.2f}",
            "another's": f"{row.other_opening_0:.2f} -> {row.other_opening:.2f}",
        }
        for row in kept.itertuples()
    ]
    return pd.DataFrame(rows)


def controls_table(main: pd.DataFrame, differences: pd.DataFrame, of_sft: pd.DataFrame) -> pd.DataFrame:
    """The trainings that show what the debate adds: accuracy, seed by seed, IMAD's and SFT's above it; sampled."""
    some = main[(main["decoding"] == "sampled") & main["method"].isin(WHAT_HELPS)]
    sampled = {
        name: table[table["decoding"] == "sampled"].set_index(["family", "minus"])
        for name, table in (("IMAD above it", differences), ("SFT above it", of_sft))
        if len(table)
    }
    rows = []
    for row in some.itertuples():
        above = dict.fromkeys(sampled, "")
        for name, gaps in sampled.items():
            if (row.family, row.method) in gaps.index:
                line = gaps.loc[(row.family, row.method)]
                gap, low, high = (100 * line[end] for end in ("difference", "low", "high"))
                above[name] = interval_text(gap, low, high, 1, signed=True)
        rows.append(
            {
                "family": row.family,
                "training": row.method,
                "accuracy": interval_text(100 * row.accuracy, 100 * row.low, 100 * row.high, 1),
                "by seed": " ".join(f"{100 * float(value):.1f}" for value in str(row.by_seed).split()),
                **above,
                "tokens": round(row.tokens),
                "seeds": row.seeds,
            }
        )
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Published:
    """All tables of a page of results, as they are in its folder.

    Args:
        main: see `analysis.paper.main_table.main_table`.
        differences: IMAD minus every other method, see `training.evaluate.results.differences`.
        of_sft: the same of SFT.
        claims: the judged claims, one per row.
        families: tables over the seeds by family, see `analysis.paper.pooling.collect_tables`.
        about: `rules` (commit and time of the last change of the rules), `rules_sha256`, `started` (seed, time, commit
            and hash of the rules at each seed's start, and how many of its steps were run from which commit),
            `left_out` (seeds that were not read), `planned` (number of seeds that are planned, or None), and
            `without_pilot` (the verdicts without the seeds after whose start rules were changed, by claim).
    """

    main: pd.DataFrame
    differences: pd.DataFrame
    of_sft: pd.DataFrame
    claims: pd.DataFrame
    families: Tables
    about: Mapping[str, Any]


def read_published(folder: Path) -> Published:
    """The tables of a folder that `python -m analysis results` wrote."""
    main, gaps, of_sft, listed = (
        read_table(folder / f"{name}.csv")[0] for name in ("main_table", "differences", "differences_sft", "claims")
    )
    families = {
        part.name: {path.stem: read_table(path)[0] for path in sorted(part.glob("*.csv"))}
        for part in sorted(path for path in folder.iterdir() if path.is_dir())
    }
    return Published(main, gaps, of_sft, listed, families, read_json(folder / ABOUT))


def rules_commit() -> str:
    """The commit that last changed the rules of the claims or the code that judges; empty outside a git checkout."""
    command = ["git", "log", "-n1", "--format=%h %cI", "--", str(RULES), str(RULES.with_name("claims.py"))]
    try:
        found = subprocess.run(command, cwd=RULES.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def _tables_by_part(results: Published) -> dict[str, list[str]]:
    """The tables of each section of the page, as Markdown."""
    summary = protocol_summary(results.families)
    of_all = [markdown(summary), ""] if len(summary) else []
    parts: dict[str, list[str]] = {"known": [], "steering": [], "patched": [], "erased": []}
    parts |= {part: [] for part in SHOWN_AS}
    for family, some in results.families.items():
        there = [some[name].round(3).assign(family=family) for name in ("known_texts", "agreement") if name in some]
        parts["known"] += [line for table in there for line in (markdown(table), "")]
        for part, (name, shown_as) in SHOWN_AS.items():
            if name in some:
                parts[part] += [f"**{family}**:", "", markdown(shown_as(some[name])), ""]
        if "protocol" in some:
            differences = (
                "The areas minus the score at strength 0, and the differences of areas from those of the base:"
            )
            parts["protocol"] += [differences, "", markdown(protocol_table(some["protocol"], GROWTH)), ""]
        for part, named in {"steering": _steering(some), "patched": _patched(some), "erased": _erased(some)}.items():
            for name, table in named.items():
                parts[part] += [f"**{family}**, {name}:", "", markdown(table), ""]
    answers = [
        line
        for family, some in results.families.items()
        if "protocol" in some
        for line in (protocol_answer(family, some["protocol"], results.claims), "")
    ]
    return {**parts, "protocol": [*answers, *of_all, *parts["protocol"]]}


RENAMED = {"n": "questions", "by_seed": "by seed", "of_debate": "of Debate's tokens", "gain_kept": "gain kept"}
"""Column of `analysis.paper.main_table.shown` -> column of the page, where they differ."""
SHOWN_AS: Mapping[str, tuple[str, Callable[[pd.DataFrame], pd.DataFrame]]] = {
    "protocol": ("protocol", protocol_table),
    "suppression": ("suppression_kept", suppression_table),
    "malicious": ("malicious", malicious_table),
    "transplant": ("transplant", transplant_table),
}
"""Section -> the table that it shows, and how."""


def _steering(some: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    if "gains" not in some:
        return {}
    there = set(some["gains"]["score"])
    return {name: gained_unnamed(some["gains"], score) for score, name in SCORES.items() if score in there}


def _patched(some: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    if "patched_rounds" not in some:
        return {}
    return {
        "texts and pairs, means over the seeds": some["patched_rounds_counts"].round(1),
        "shares of the answers": patched_table(some["patched_rounds"]),
    }


def _erased(some: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    if "erasure_gains" not in some:
        return {}
    gains = erased_gains_table(some["erasure_gains"], some["erasure_survives"])
    return {
        "accuracy of a probe of the agents' names on held-out questions": erased_probes_table(some["erasure_probes"]),
        "ROUGE-L that the identity adds (`gain`), and what the erasure changes without the identity (`cost`)": gains,
        "size of the change at each position, and what is left of each agent's vector": erased_changes_table(
            some["erasure_changes"]
        ),
        "where each agent's vector was read and added, chosen on validation": some["erasure_choice"],
    }


def page(title: str, results: Published) -> str:
    """The text of a page of results: claims, controls, gains at the frozen settings, the paper's experiments, accuracy.

    Args:
        title: of the page.
        results: its tables.
    """
    parts = _tables_by_part(results)
    times = [
        f"seed {one['seed']} at {one['time']} (commit {one['commit']}{_versions(one)})"
        for one in results.about["started"]
    ]
    committed = results.about["rules"]
    changed = [one["seed"] for one in results.about["started"] if one["rules"] != results.about["rules_sha256"]]
    helps = controls_table(results.main, results.differences, results.of_sft)
    seeds = results.main["seeds"].max()
    unnamed = _linked("Steering without a name", bool(parts["steering"]))
    lines = [
        f"# {title}",
        "",
        "`python -m analysis results FOLDER` writes this page from the results of each training seed. For the seeds in "
        "`results/seeds`, `make results` calls this command. It takes minutes and trains nothing. The "
        "[glossary](glossary.md) defines the terms; the paper is arXiv 2604.24881.",
        "",
        f"- Seeds: on this page, a [family](glossary.md#debate-and-training) of problems has at most {seeds} training "
        f"seed{'s' if seeds > 1 else ''}. Each table, or the text above it, has the number of its seeds or names them.",
        *_interim(results),
        "- Intervals are 95 %. With several training seeds they are over the seeds' means, by Student's t. For ratios, "
        "such as tokens / tokens of Debate, they are by Fieller's method.",
        *([OF_ONE_SEED] if _of_one_seed(results) else []),
        WITHOUT_ENDS,
        "- Intervals of accuracies, shares, ROUGE-L and areas are cut at the smallest and the largest possible value. "
        "Those of differences and ratios are not cut. So the interval of a difference of two shares can have an end "
        "above 1.",
        "- Differences and ratios are computed before rounding. They can differ in the last digit from those of the "
        "rounded numbers.",
        "- Settings were chosen on validation questions. No question is in two seeds. Questions are the same only if "
        "their texts are equal. So `3+4*5-6` and `3+5*4-6` are two questions. They may be in different seeds.",
        "",
        "The rule of each claim is in `analysis/paper/claims.toml`, and `claims.py` judges by these rules. Some claims "
        "have other words there than on this page. The paper's range of differences in accuracy is misquoted there. No "
        "verdict depends on this range, and this page has the right range."
        + (f" The rules were last changed in commit {committed}." if committed else "")
        + (f" **The rules were changed after the start of seed{_several(changed)}.**" if changed else "")
        + (f" {WHAT_CHANGED}" if changed and str(committed).startswith("438d6f5") else "")
        + " There is no correction for the number of claims.",
        "",
        *(
            (
                "Each item under `Runs` has the start of the run of one seed. A run has steps; one training, for "
                "example, is a step. The brackets have:",
                "",
                "- `commit`: the commit at the start of the run.",
                "- `steps from`: the commits at the start of the steps, each with its number of steps. They differ "
                "from the commit at the start of the run if the code was changed during the run, or if a step was run "
                "again later. Without `steps from`, all steps used the commit at the start of the run.",
                "",
                "Runs:",
                "",
                *(f"- {time}" for time in times),
                "",
            )
            if times
            else ()
        ),
        "## The paper's claims, in this setting",
        "",
        *_legend({name for some in results.families.values() for name in some}),
        "",
        "| claim | in the paper | here | by seed | smallest effect | over | verdict |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {c.name} | {in_plain_cells(c.published)} | {_here(c)} | {_by_seed(c)} | {_effect(c)} | "
            f"{c.unit} | **{c.verdict}** |"
            for c in (Claim(**row) for row in results.claims.to_dict("records"))
        ),
        "",
        *_without_pilot(results, changed),
        *_section(
            "What the debate adds",
            "The table has the accuracy in per cent of the test questions. Texts are sampled. "
            "[Training results](training-results.md#results-of-the-preset-tiny) defines the methods. Columns:\n\n"
            "- `by seed`: the accuracy of each seed.\n"
            "- `IMAD above it`: the accuracy of IMAD minus that of the training in this row, in points. `SFT above "
            "it`: the same for SFT.\n"
            "- `tokens`: mean number of tokens that are read or written, per question.\n\n"
            "The trainings:\n\n"
            "- `SFT` is trained on the traces. `IMAD` is `SFT` after GRPO.\n"
            "- `SFT on shuffled turns`, `SFT on gold answers`, `SFT on right answers`, and the SFT before `DebateGPT + "
            "GRPO` have as many steps and target tokens as `SFT`.\n"
            "- `SFT on shuffled turns` is trained on traces with their own question and consensus, but with turns "
            "of other questions. `SFT` minus this training is the claim about the content of the turns. It compares "
            "turns that fit the question with turns that do not. Whether turns that fit help more than no turns at all "
            "is shown by the comparison of `SFT` with trainings on answers alone, such as `DebateGPT (answer)` in "
            "[Accuracy and tokens](#accuracy-and-tokens).\n"
            "- In clues and two_sum, the learning rate of each SFT in this table was chosen by the same search "
            "(`python -m analysis rates`). The search used a seed that no result uses.\n"
            "- `SFT on gold answers` is trained on the right answers of the problems. GRPO uses these answers for the "
            "reward only.\n"
            "- `SFT on right answers` is trained on sampled answers of the base that are right.\n"
            "- Each GRPO has the settings of IMAD's GRPO. In the miniature, `GRPO without debate` starts from the "
            "base. With a chat checkpoint, it starts from an SFT on the model's own first answers.",
            [markdown(helps), ""] if len(helps) > 1 else [],
        ),
        *_section(
            "Transplanted first rounds",
            "Texts are sampled. The turns of round 1 in a model's own text are replaced by those of its text on "
            "another question. Then "
            "the model continues. In an explicit debate every turn is a separate call of the base model. There the "
            "turns of round 1 that the agents read in round 2 are replaced. There are two controls:\n\n"
            "- First control: round 1 is kept, and the rest of the text is sampled again.\n"
            "- Second control: round 1 is replaced by that of another text of the model on the same question.\n\n"
            "The columns from `answers that change` to `right` are over the questions whose original text has an "
            "answer. Columns:\n\n"
            "- `with a round-1 turn`: share of texts with a turn of round 1.\n"
            "- `agents in round 1`: mean number of agents in round 1. `consensus next`: share of texts in which the "
            "consensus comes directly after round 1.\n"
            "- `answers that change`: share of the answers after the replacement that differ from the answer of the "
            "original text. Texts without an answer do not count. The next two columns have this share in the two "
            "controls.\n"
            "- `difference`: `answers that change` minus `answers that change, first control`. It is over the "
            "questions that have an answer both after the replacement and in the first control.\n"
            "- `by seed`: this difference for each seed.\n"
            "- `no answer`: share of texts without an answer after the replacement. In brackets is the same share in "
            "the two controls. In an explicit debate the answer is that of the majority, so a debate without a "
            "majority has no answer.\n"
            "- `follows, minus chance`: share of answers that follow, minus chance. An answer follows if it equals the "
            "answer of the text from which round 1 was taken. For chance, each answer is compared with the answers of "
            "all texts except the one from which round 1 was taken. Chance is the share of equal answers in these "
            "comparisons.\n"
            "- `right`: share of right answers in the first control -> after the replacement. A text without an answer "
            "counts as wrong.\n"
            f"- `seeds`: number of seeds in which at least {_least('transplant')} of the texts have a turn of round "
            "1.\n\n"
            "In two_sum an agent proposes a pair of numbers. It can check that a transplanted pair does not fit its "
            "own question, and reject it. So a low share of answers that follow does not show that the model ignores "
            "round 1.",
            parts["transplant"],
        ),
        *_section(
            "Patched first rounds",
            "The residual stream at the positions of round 1 is replaced by that of another debate, at one layer. Then "
            "the model continues greedily. In this section both kinds of text are called debates: a text of the model "
            "itself (`own text` in the column `text`), and an explicit debate of the base (`debate` in this column). "
            "The debate that gives the stream and the one that is patched are a pair, of the same kind. In round 1 "
            "they have turns of the same agents "
            "(a model can leave an agent out) and the same number of tokens. The same tag follows round 1.\n\n"
            "The first table counts texts, texts with a turn of round 1, and pairs. In `pairs with two different "
            "answers`, both debates have an answer, and the answers differ. The second table has shares of these "
            "pairs. Pairs that continue with round 2 and pairs that continue with the consensus are in different rows. "
            "A seed that has fewer than "
            f"{LEAST_PAIRS} pairs for a row is left out of this row, and a row without seeds is left out of the table. "
            "So the second table can have fewer pairs than the first. Columns of the second table:\n\n"
            "- `text`: the checkpoint's own text, or an explicit debate of the base.\n"
            "- `after round 1`: what comes next in this text.\n"
            "- `place`: where the stream is replaced. `resid_pre, layer 0` enters block 0; `resid_post` follows a "
            "block.\n"
            "- `follows, round 1`: share of answers that become the answer of the other debate if all positions of "
            "round 1 are replaced. `by seed, round 1` has this share for each seed.\n"
            "- `follows, question`: a control. The last positions of the question are replaced instead: as many as "
            "round 1 has, or all if the question has fewer. If the answer depended on the question alone, it would "
            "follow here.\n"
            "- `follows, round 1, as many as question`: a control. As many positions as in `follows, question` are "
            "replaced, but positions of round 1.\n"
            "- `follows by chance`: in each pair, one debate gives the stream. Each answer after the replacement of "
            "round 1 is compared with the answers of these debates in all other pairs. The column has the share of "
            "equal answers in these comparisons.\n"
            "- `changes, round 1`: share of answers that change, or that are missing after the replacement. In "
            "brackets is the same share if the text's own activations are patched in. It must be 0.\n\n"
            "At the input of block 0, a replacement of the stream is the same as a replacement of the tokens. In any "
            "model the effect tends to decrease with the layer, because later positions have already read the original "
            "round 1 "
            "in earlier blocks. After the last block, no later position reads the stream.",
            parts["patched"],
        ),
        *_section(
            "The scores on known texts",
            "These tables test two scores: ROUGE-L, and the rule for the agent that writes the first turn. They are "
            "from the first training seed. In the tables with the column `rouge_l`, the agent of each text is known. "
            "The texts are the agent's own text, its text on another question, and another agent's text on the same "
            "question:\n\n"
            "- `rouge_l`: ROUGE-L to the agent's own text.\n"
            "- `speaks`: share of texts that a rule assigns to the agent whose own text is the reference, so another "
            "agent's "
            "text should have 0. The rule uses the tag of the first turn. If "
            "there is no tag, it uses the first words of the turn (its opening).\n"
            "- `n`: number of texts.\n\n"
            "In the tables with the column `agree`, some texts were also labelled by hand. The label is the agent that "
            "speaks first:\n\n"
            "- `agree`: share of texts whose label is the agent that the rule assigns. `low` and `high` are the ends "
            "of its interval over the texts.\n"
            "- `kappa`: Cohen's kappa of labels and rule. `n`: number of labelled texts.\n"
            "- `by_hand`: number of texts with each label. Label 0 means no agent.",
            parts["known"],
        ),
        *_section(
            "Steering without a name",
            "Each agent's direction is added. The text and token at which it is read, the layer, the steered positions "
            "and the coefficient were chosen on validation. Texts are sampled, and the context names no agent. Each "
            "table has one score. ROUGE-L is to the turn that the agent wrote in round 1 of the base's debate on the "
            "same question. Columns:\n\n"
            "- `stage`: the checkpoint. `GRPO step N` is a checkpoint of IMAD's GRPO.\n"
            "- `unsteered`: the score at coefficient 0. A share of 1 cannot rise. ROUGE-L can rise even if all "
            "unsteered texts begin with a turn of this agent, because the turn can become more similar to the "
            "reference.\n"
            "- `over coefficient 0`: the score with the agent's direction minus the score at coefficient 0. `by seed` "
            "has this gain for each seed.\n"
            "- `over random`, `over matched`, `over shuffled`: the score with the agent's direction minus the mean "
            "score with control directions of this kind. Matched directions are random, with the covariance of the "
            "stream around each agent's mean. Shuffled directions are computed after the agents' names were shuffled.\n"
            "- `rank p over random, by seed`: the [p by rank](glossary.md#measuring) among the random directions. With "
            "19 of them its smallest value is 0.05.",
            parts["steering"],
        ),
        *_section(
            "The paper's protocol",
            "This is the paper's steering experiment. One unit vector for each agent is computed from the SFT "
            "checkpoint. The same vectors are added to the generated positions of every checkpoint. They do not act on "
            "the first generated token. In the miniature this token already shows which agent speaks.\n\n"
            "- Contexts: `tagged` is the trace up to the agent's tag in round 1; it ends with this tag. It contains "
            "the turns of the agents that come before this agent in round 1. `cast` is the base's prompt for the "
            "agent.\n"
            "- Texts are sampled. ROUGE-L is to the agent's turn in the reference debate, which the base wrote.\n"
            "- Area: the area under the curve of ROUGE-L over the grid of strengths, divided by the width of the "
            "grid.\n"
            "- Grids: `coefficient` has coefficients of unit vectors. `dose` has strengths relative to the stream's "
            f"norm in tagged traces.{_at_controls(results.families)}\n"
            "- The lists below, the first table and the claims use the context `tagged` and the grid "
            f"{_summary_grid(results.families)}. `room` also uses `cast`.\n"
            "- `unsteered`, `at strength 0`: ROUGE-L at strength 0. `above strength 0`: the area minus this ROUGE-L.\n"
            "- `own`, `planted`, `random`, `shuffled`: the area under directions of this kind. `above random`, `own - "
            "random`: the area under the own or planted directions minus that under random ones.\n"
            "- `paper`: the area that the paper reports.\n"
            "- `rank p`: the [p by rank](glossary.md#measuring) among the control directions, for each seed.\n"
            "- The claim about closeness to the agents' own texts uses the area under the own directions at IMAD, "
            "minus that at the base. The claim that the directions add more uses the same difference of `above "
            "strength 0`.\n"
            "- `base with planted directions` is a positive control. For each agent a random direction was drawn. The "
            "base was trained to write this agent's turn when the direction is added. These directions are called "
            "planted.\n"
            "- Check: the area under the planted directions minus that under random ones must have an interval whose "
            "lower end is at least the smallest effect. Otherwise the protocol may miss an effect, and a null result "
            "is not informative.\n"
            "- `room` (in the claims): the unsteered score of the base with its own prompts (`cast`) minus the "
            "unsteered score of IMAD. The base wrote the reference texts with these prompts, so its score is about the "
            "highest possible one. Steering can raise IMAD's score by about the room at most.",
            parts["protocol"],
        ),
        *_section(
            "Suppression of the malicious agent",
            "A setting has a vector, a layer and an operation: the vector is added with a negative coefficient, or its "
            "direction is ablated (removed from the stream). For each checkpoint and seed one setting was chosen on "
            "validation questions. The table has its effect on test questions. Texts are greedy. In the context "
            "`forced` the malicious agent is named: by its tag, or at the base by its prompt. In `plain` no agent is "
            "named. In `forced` the trait is searched in the turn of the named agent, in `plain` in the whole text. "
            "The claims use `forced`.\n\n"
            f"A seed shows the trait if at least {_least('suppressed')} of its unsteered texts have it. `seeds with "
            "the trait` counts these seeds. The other columns are over these seeds, except `kept` and `right before`. "
            "`nan` means that there are no such seeds. Columns:\n\n"
            "- `trait`: share of texts with the trait, at coefficient 0 -> at the setting.\n"
            "- `removed`: 1 - (trait at the setting / trait at coefficient 0).\n"
            "- `over random`, `over matched`: share of texts with the trait under these control directions minus that "
            "at the setting. Matched directions are random, with the covariance of the stream around each agent's "
            "mean.\n"
            "- `accuracy`: share of right answers, at coefficient 0 -> at the setting. In brackets is the accuracy "
            "under random and under matched directions.\n"
            "- `kept`: accuracy at the setting / accuracy at coefficient 0. It is over those seeds with the trait "
            "whose setting halves the trait on validation.\n"
            "- `right before`: share of contexts whose last answer is right. It is over all seeds. It is 0 if contexts "
            "have no answer. If a model repeats the last answer of each context, this share is its accuracy.\n"
            "- `own opening`: share of texts whose first turn begins as the malicious agent's turns do. `another's`: "
            "share of texts whose first turn begins as another agent's turns do. In `plain`, another agent can write "
            "the first turn, and the trait can come later in the text. Then `own opening` is 0.\n\n"
            "If the trait is gone because another agent speaks, the malicious agent itself has not changed.",
            parts["suppression"],
        ),
        *_section(
            "The paper's experiment with a malicious agent",
            "One unit vector is computed from the base's prompts. It is the mean stream at the last token of the "
            "malicious agent's prompts minus that of an honest agent's prompts. It is added from the last token of the "
            "prompt on. The contexts `forced` and `plain` are those of the section above. The grids are those of the "
            f"paper's protocol. Texts are greedy, as in the section above. {_malicious_questions(results.families)}"
            "Columns:\n\n"
            "- `trait`: share of texts with the trait, at strength 0 -> at the strength of the row. In brackets is the "
            "share under random directions of this strength.\n"
            "- `accuracy`: share of right answers, in the same form.\n"
            "- `trait over random`, `accuracy over random`: the share under the vector minus the mean share under "
            "random directions.\n\n"
            "`decrease` in the claim, in the context `forced`: the share of texts with the trait at coefficient 0 "
            "minus the mean share at the coefficients -3, -4 and -5.\n\n"
            "The table has all seeds. The claim leaves out the seeds in which less than "
            f"{_least('malicious')} of the unsteered texts have the trait. So the share in the claim can be larger.",
            parts["malicious"],
        ),
        *_section(
            "Erased identity",
            "LEACE (Belrose et al. 2023) removes from the stream what a linear probe can read about the agent that "
            "speaks. It is fitted on training debates, and acts from the last token of the prompt on. The column "
            "`erasure` has what is removed:\n\n"
            "- `none`: nothing.\n"
            "- `agents`: LEACE of the agents' names.\n"
            "- `shuffled`: LEACE of shuffled names, a control.\n"
            "- `variance`: the directions of largest variance around each agent's mean, a control.\n"
            "- `injected`: the agents' vectors themselves. This is a control for some rows of the second table: those "
            "that have `vector` in the column `identity`. In these rows an agent's vector is added to the stream. "
            "After each later block, `injected` removes the vectors of all agents. If "
            "`injected` lowers the gain as much as `agents` does, LEACE may only have removed the vector.\n\n"
            "The first table has the accuracy of a probe. Chance is a third, because there are three agents. An "
            "accuracy above a third means that some of the information is left on held-out questions. Its columns:\n\n"
            "- `position`: what the probe reads. `asked` is the last token before a turn; `first` and `last` are "
            "tokens of the turn. At the first token a probe can recognise the token itself, also in an untrained "
            "model.\n"
            "- `erased here`: LEACE is fitted at this position alone.\n"
            "- `erased at all positions`: one LEACE is fitted at all three positions. The other tables use a LEACE of "
            "this kind.\n\n"
            "Columns of the second table, which is about the ROUGE-L to the agent's turn:\n\n"
            "- `identity`: what tells the model which agent is to write:\n"
            "    - `trace`: the trace up to the agent's tag. The erasure acts after every block.\n"
            "    - `tag`: the tag without an agent's turn before it. The erasure acts after every block.\n"
            "    - `vector`: the agent's vector. The context is the question alone. The vector is added at the last "
            "token of the question and the next three (`extent` in the fourth table). The erasure acts only after the "
            "blocks that follow the one where the vector is added. This vector is not that of "
            f"{unnamed}, so its gain can differ. "
            "For this section, only vectors that are read in the turns and tags of round 1 were tried, at all layers "
            "but the last. For the other section, the last layer was also tried, and also vectors that are read at the "
            "last token of a context that names the agent.\n"
            "- `gain`: ROUGE-L with the identity minus ROUGE-L without it, mean over the agents. Without it, the "
            "context is the question alone, and no vector is added. Both scores are under the erasure.\n"
            "- `survives`: gain under the erasure / gain without erasure. It is over the seeds whose gain without "
            f"erasure is at least {LEAST_GAIN}, so it can have fewer values by seed than the row has seeds. Under "
            "two conditions the cell has words instead of a number. If both are met, the first one counts:\n"
            "    - `not testable`: no seed has such a gain.\n"
            "    - `texts broken`: without the identity, the erasure lowers ROUGE-L (`cost`) by at least the gain "
            "without erasure. So the erasure damages the texts in general.\n"
            "- `cost`: ROUGE-L without the identity under the erasure, minus the same without erasure. It is negative "
            "if the erasure lowers ROUGE-L.\n\n"
            "Columns of the third table:\n\n"
            "- `asked`, `first`, `last`: norm of the change of the stream through the erasure / norm of the stream.\n"
            "- `vector 1` and so on: norm of the agent's vector after the erasure / its norm before. LEACE is an "
            "oblique projection, so this ratio can exceed 1.\n\n"
            "Columns of the fourth table, the setting of the vector:\n\n"
            "- `source`: the text in which the vector was read. `trace` is the trace of a debate.\n"
            "- `position`: where the vector was read in the turns of round 1: their mean, their last token, or their "
            "tag.\n"
            "- `extent`: where it is added. `from_last_prompt_token:4` means the last token of the prompt and the next "
            "three.",
            parts["erased"],
        ),
        "## Accuracy and tokens",
        "",
        "[Training results](training-results.md#results-of-the-preset-tiny) defines the methods. Columns:",
        "",
        "- `questions`: number of questions of all seeds together.",
        "- `accuracy`: right answers in per cent of these questions. `by seed` has the accuracy of each seed.",
        "- `tokens`: mean number of tokens that are read or written, per question.",
        "- `of Debate's tokens`: these tokens divided by those of Debate.",
        "- `gain kept`: (accuracy - Single) / (Debate - Single). The cell is empty if the interval of Debate - Single "
        "is not above 0.",
        f"- `unparsed`: share of questions without an answer. For {_by_majority(results.main)}, it includes the "
        "questions without a majority. With `plurality`, the most frequent answer of the last round counts, or of "
        "round 1 in `Round 1, plurality`. So `unparsed` has only the questions on which no agent has an answer in this "
        "round.",
        "- `agents`: mean number of agents whose tags are in a text.",
        "",
        *(
            line
            for decoding, part in results.main.groupby("decoding", sort=False)
            for line in (
                f"Texts are **{decoding}**:",
                "",
                markdown(shown(part).drop(columns="decoding").rename(columns=RENAMED)),
                "",
            )
        ),
    ]
    unbounded = any("(unbounded)" in line for line in lines if line.startswith("|"))
    return "\n".join(line for line in lines if unbounded or line != WITHOUT_ENDS)


OF_ONE_SEED = (
    "- With one seed, intervals are over the questions of this seed, or over control directions. They describe the "
    "checkpoints of this seed alone."
)
WITHOUT_ENDS = "- `(unbounded)`: the interval of a ratio has no ends, because its denominator may be 0."
"""Items of the page that are shown only where a table has such intervals."""


def _of_one_seed(results: Published) -> bool:
    """Whether an interval of the page is within one training seed."""
    return bool((results.main["seeds"] == 1).any() or results.claims["unit"].str.contains("one training seed").any())


def _by_majority(main: pd.DataFrame) -> str:
    """The methods of the table that a strict majority decides, as a list in words."""
    there = [f"`{method}`" for method in (*DEBATES, SELF_CHECKING[0]) if (main["method"] == method).any()]
    return " and ".join(filter(None, (", ".join(there[:-1]), *there[-1:])))


def _malicious_questions(families: Tables) -> str:
    """How the questions of the paper's malicious experiment differ from those of the section on suppression."""
    for some in families.values():
        if "malicious" in some and "suppression_kept" in some:
            few, many = (round(some[name]["n"].max()) for name in ("malicious", "suppression_kept"))
            if few < many:
                return (
                    f"Each seed has {few} questions here, the first {few} of the {many} in the section above. That "
                    "section has only the seeds with the trait. So the accuracy without steering can differ between "
                    "the two sections. "
                )
    return ""


def _by_seed(claim: Claim) -> str:
    """The values of a claim's seeds, in per cent where the claim's measurement is."""
    percent = "] % " in claim.ours.partition(";")[0]
    return " ".join(f"{100 * float(value):.1f}" for value in claim.by_seed.split()) if percent else claim.by_seed


UNITS = {"tokens": "%", "accuracy": "points", "debate": "points", "order": "points"}
"""Rule -> unit of its measure; the other measures are numbers without a unit."""


def _rule(claim: Claim) -> str:
    """The short name of a claim's rule; empty for a claim without one."""
    return next((name for name, rule in rules().items() if claim.name.endswith(in_plain_words(rule.text))), "")


def _effect(claim: Claim) -> str:
    """The smallest effect that counts for a claim, in the unit of its measure."""
    name = _rule(claim)
    if not name:
        return ""
    effect = rules()[name].effect
    return f"{100 * effect:g} {UNITS[name]}" if name in UNITS else f"{effect:g}"


def _least(name: str) -> str:
    """The least share of a seed's texts that must have what a claim is about, in per cent."""
    return f"{100 * rules()[name].least:g} %"


def _at_controls(families: Tables) -> str:
    """The grid `controls`, where a table has it."""
    there = any((some["protocol"]["grid"] == AT_CONTROLS).any() for some in families.values() if "protocol" in some)
    return f" `{AT_CONTROLS}` has only the strengths at which controls were run." if there else ""


def _summary_grid(families: Tables) -> str:
    """The grid of the summary of the protocol, see `protocol_summary`."""
    fewer = f" (`{AT_CONTROLS}` where a table has it)" if _at_controls(families) else ""
    return f"`{COEFFICIENT}`{fewer}"


def _legend(there: Collection[str]) -> list[str]:
    """What the verdicts and the columns of the claims' table mean, by the rules of `claims.toml` and `claims.py`.

    Args:
        there: names of the tables that the page has; a check links to its section where there is one.
    """
    known = rules()
    unread = f"{100 * (1 - known['transplant'].least):g} %"
    protocol = _linked("The paper's protocol", "protocol" in there)
    first_round = _linked("Transplanted first rounds", "transplant" in there)
    trait = f" ({_linked('Suppression of the malicious agent', True)})" if "suppression_kept" in there else ""
    return [
        "Each claim has a quantity that is judged. The column `smallest effect` has its smallest value that counts. "
        "The verdict depends on the interval of this quantity:",
        "",
        "- `holds`: the whole interval is at or above the smallest effect. If the claim has controls, it is also "
        "specific, as the next item defines.",
        "- `holds, not specific`: the whole interval is at or above the smallest effect, but a control may do as much. "
        "To be specific, the difference to each control must have an interval that is above a limit. In the claims "
        "about training before GRPO and about the protocol, the limit is the smallest effect. In the other claims it "
        "is 0.",
        "- `does not hold`: the whole interval is below the smallest effect.",
        "- `not shown`: the interval contains the smallest effect. If all seeds have the same value, the interval has "
        "no width. With fewer than six seeds the verdict is then also `not shown`.",
        "- `not testable here`: the quantity or a control was not measured, or fewer than two training seeds have a "
        "value, or a check of the method fails. The checks are:",
        f"    - {protocol}: the area under planted directions minus that under random ones must have an interval whose "
        "lower end is at least the smallest effect. The claim that the directions add more also needs a `room` of at "
        "least the smallest effect.",
        f"    - {first_round}: in explicit debates, `difference` must have an interval whose lower end is at least the "
        f"smallest effect. After the replacement of round 1, at most {unread} of the texts may be without an answer, "
        "at IMAD and in explicit debates.",
        f"    - Trait{trait}: at least two seeds must show the trait, in at least {_least('suppressed')} of their "
        "unsteered texts in the context `forced`. Other seeds are left out. For the claim about the accuracy, the "
        "setting must also halve the trait on validation in at least two of these seeds.",
        "",
        "A claim about each agent is judged by one interval:",
        "",
        "- Its lower end is the lowest of the lower ends of the agents' 95 % intervals.",
        "- Its upper end is the lowest of the upper ends of wider intervals, whose level is 100 % - 5 % / number of "
        "agents.",
        "- If one agent has the same value in all seeds, this interval can still have a width. Then the verdict does "
        "not have to be `not shown`.",
        f"- An agent is left out if it writes the first turn in a share of more than {known['speaks'].ceiling:g} of "
        "the unsteered texts. This share can hardly rise. The agent is also left out of the claim about ROUGE-L, "
        "although its ROUGE-L may rise.",
        "",
        "Columns:",
        "",
        "- `here`: first the quantity that is judged, then its controls and checks. Some cells end with further "
        "values, such as the saving of new tokens, which do not change the verdict. If a cell has several checkpoints, "
        "the claim is judged at IMAD. The names in backticks are methods, which "
        "[Training results](training-results.md#results-of-the-preset-tiny) defines, or quantities, which the sections "
        "below define.",
        "- `here`, in the claims about tokens, accuracy and training: texts are sampled. In the other claims the "
        "section of the claim says whether they are sampled or greedy. The probe of the claim about training without "
        "tags reads the last token of a turn.",
        "- `here`, in the claims about tokens: all tokens are those that are read or written, new tokens are those "
        "that are written. The brackets have the tokens per question of IMAD and of Debate.",
        "- `by seed`: the quantity that is judged, for each training seed. In a claim about each agent, it is that of "
        "the agent with the lowest lower end. The cell names this agent.",
        "- `over`: the units over which the interval of the judged quantity is computed. Intervals of other "
        "checkpoints in the same cell can be over more seeds.",
    ]


def _linked(title: str, there: bool) -> str:
    """The title of a section, as a link where the page has this section.

    Example:
        >>> _linked("The paper's protocol", True)
        "[The paper's protocol](#the-papers-protocol)"
    """
    return f"[{title}](#{title.lower().replace(' ', '-').replace(chr(39), '')})" if there else title


def _several(numbers: Sequence[int]) -> str:
    """Numbers after a noun in the singular: its plural ending, where there are several, and the numbers.

    Example:
        >>> "seed" + _several([20]), "seed" + _several([20, 21])
        ('seed 20', 'seeds 20, 21')
    """
    return ("s " if len(numbers) > 1 else " ") + ", ".join(map(str, numbers))


def _versions(one: Mapping[str, Any]) -> str:
    """The commits of the steps of a seed, that of its start first, where others than this one were used."""
    counts = one.get("steps", {})
    if set(counts) <= {one["commit"]}:
        return ""
    ordered = sorted(counts.items(), key=lambda item: (item[0] != one["commit"], -item[1]))
    return f"; steps from {', '.join(f'{commit} ({count})' for commit, count in ordered)}"


def _section(title: str, text: str, tables: Sequence[str]) -> list[str]:
    """A section with its tables; nothing without tables."""
    return [f"## {title}", "", text, "", *tables] if tables else []


PLAINLY: Mapping[str, str] = {
    "what the turns say matters in training": "the content of the turns matters in training",
    "of trainings before the same GRPO, the one on debates helps most": "training on debates before GRPO gives a "
    "higher accuracy than GRPO alone (control: other trainings)",
    "IMAD's answer depends on its silent first round": "IMAD's answer depends on the first round that it writes",
    "a push alone, nobody named, turns each agent up": "in a context that names no agent, each agent's direction "
    "raises the ROUGE-L to this agent's turn",
    "a push alone, nobody named, makes each agent speak first": "in a context that names no agent, each agent's "
    "direction makes this agent write the first turn",
    "the paper's protocol: texts under the agents' directions are closer to the agents' own after IMAD": "the paper's "
    "protocol: texts under the agents' directions are closer to the agents' own texts after IMAD",
    "the paper's experiment: the base's vector turns IMAD's malicious agent off": "the paper's experiment: the base's "
    "vector removes the malicious trait from IMAD's texts",
    "IMAD's malicious agent can be turned off by the setting that does it best": "the setting chosen on validation "
    "removes the malicious trait from IMAD's texts",
    "turning it off leaves accuracy as it was": "the removal of the trait keeps the accuracy",
    "without tags in training, agents are less separable (probe at the last token)": "without tags in training, agents "
    "are less separable (probe at the last token of a turn)",
}
"""Text of a rule, which stays as it was before the runs -> the words for it in tables and pages."""


def in_plain_words(claim: str) -> str:
    """A claim in the words of `PLAINLY`.

    Example:
        >>> in_plain_words("malice: turning it off leaves accuracy as it was")
        'malice: the removal of the trait keeps the accuracy'
    """
    for text, words in PLAINLY.items():
        claim = claim.replace(text, words)
    return claim


MEASURED = r"\S+(?: \[[^]]*\])?"
POINTS = rf"{MEASURED} points"
IN_CELLS: Mapping[str, str] = {
    # in the paper
    r"^flat from -5 to \+5$": "accuracy flat for coefficients from -5 to +5",
    r"^trait 0 from -3 to -5; base keeps about 1$": "share of texts with the trait at coefficients from -3 to -5: 0 at "
    "IMAD, about 1 at the base",
    r"^area under ROUGE-L (\S+) to (\S+)$": r"area under ROUGE-L \1 at the base, \2 at IMAD",
    r"^concluded from the area$": "concluded from the area (row above)",
    r"^markedly less$": "markedly less separable",
    # misquoted in claims.toml, which no verdict reads; it stays as it was registered
    r"^-6\.2 to \+19\.0 points, better in 6 of 9$": "-4.8 to +19.0 points, better in 5 of 9 comparisons",
    # tokens and accuracy
    r"\((\d+) against (\d+) tokens\)": r"(\1 tokens instead of \2)",
    r"; new tokens alone ": "; saving of new tokens ",
    rf"^({POINTS}) \((IMAD|SFT) - (.+?)\)(?=;|$)": r"`\2` minus `\3` \1",
    rf"; ({POINTS}) against a strict majority": r"; `IMAD` minus `Debate` \1",
    rf"; ({POINTS}) over ([^;]+)": r"; `IMAD` minus `\2` \1",
    # the malicious trait
    r"^trait (\S+), fall ([^;]+); over random ([^;]+); at the base (.+), IMAD's more by ": r"`decrease` at IMAD \2 "
    r"(share of texts with the trait at coefficient 0: \1); `decrease` minus that under random directions \3; "
    r"`decrease` at the base \4; `decrease` at IMAD minus that at the base ",
    rf"\btrait (\S+) to (\S+), removed ({MEASURED}), over random ({MEASURED}), over matched ": r"`removed` \3 (share "
    r"of texts with the trait \1 -> \2), `over random` \4, `over matched` ",
    rf"^(?=base: {MEASURED};)": "`kept`, which is accuracy / accuracy at coefficient 0: ",
    r"halves the trait in": "halves the trait on validation in",
    r"the answer of the given text is right in (\S+)$": r"`right before` at IMAD \1",
    # probes, the protocol, steering and transplants
    r"^(\S+ \[[^]]*\] )\((0\.\d{3}) - (0\.\d{3})\)$": r"\1(with tags \2, without tags \3)",
    r"; at IMAD over random directions ": "; area at IMAD, own minus random directions, ",
    r", minus the same at the base ": "; this difference minus that at the base ",
    r"; planted directions over random ": "; check: area, planted minus random directions, ",
    r"; room at IMAD ": "; check: `room` ",
    r"; over random (?=\S+ \[[^]]*\], )": "; the same score minus its mean under random directions, for these agents "
    "in this order: ",
    r"(agent \S+) speaks first in (\S+) unsteered, left out": r"\1 is left out: it speaks first in a share of \2 of "
    "the unsteered texts",
    r"; follows, minus chance: ": "; `follows, minus chance` ",
    r"(\d+%) of the texts have a round-1 turn, at least (\d+%) in (\d+ of \d+) training seeds": r"\1 of the texts "
    r"have a turn of round 1 (in \3 seeds at least \2)",
    r"; in explicit debates (?=\S+ \[)": "; check: `difference` in explicit debates ",
    r"; up to (\d+%) of the answers were not read": r"; check: `no answer` \1, the larger of the values of IMAD and of "
    "explicit debates",
}
"""Pattern of a cell of the claims' table, as `claims.py` writes it -> the words for it on the page."""


def in_plain_cells(cell: str) -> str:
    """A cell of the claims' table in the words of `IN_CELLS`.

    Example:
        >>> in_plain_cells("flat from -5 to +5")
        'accuracy flat for coefficients from -5 to +5'
    """
    for pattern, words in IN_CELLS.items():
        cell = re.sub(pattern, words, cell)
    return cell


LEADS: Mapping[str, str] = {
    "tokens": "saving of all tokens ",
    "area": "area at IMAD minus that at the base ",
    "above": "`above strength 0` at IMAD minus that at the base ",
    "steered": "ROUGE-L to the agent's turn, minus that without steering: ",
    "speaks": "share of texts whose first turn is the agent's, minus that without steering: ",
    "tags": "accuracy of the probe after training with tags minus that without tags ",
    "transplant": "`difference` ",
}
"""Rule -> what the first number of its cell is, where `claims.py` does not write it."""


def _here(claim: Claim) -> str:
    """What was measured for a claim, in the words of `IN_CELLS`, after the name of its first number."""
    cell = in_plain_cells(claim.ours)
    measured = re.match(r"(?:agent \S+ )?[+-]?\d", cell)
    return LEADS.get(_rule(claim), "") + cell if measured else cell


WHAT_CHANGED = (
    "The change did not concern the claims about tokens, the content of the turns, the first round, training without "
    "tags, and the accuracy after the removal of the trait (`git diff 438d6f5~1 438d6f5 -- "
    "analysis/paper/claims.toml`)."
)


def _interim(results: Published) -> list[str]:
    """Whether further seeds are planned, and which of those that are there were not read."""
    planned, found = results.about.get("planned"), results.main["seeds"].min()
    lines = []
    if planned and found < planned:
        lines.append(
            f"- **The verdicts are interim.** {planned} seeds are planned for each family. For each seed, the families "
            "are run one after the other, and this page is written again after each family. So families can have "
            "different numbers of seeds. A verdict can change with a further seed, and every look at the results adds "
            "to the rate of false verdicts. CHANGELOG has the verdicts that changed."
        )
    if left := results.about.get("left_out"):
        lines.append(f"- Not read for this page: seed{_several(left)}.")
    return lines


def _without_pilot(results: Published, changed: Sequence[int]) -> list[str]:
    """The verdicts that are others without the seeds after whose start rules were changed."""
    without = results.about.get("without_pilot") or {}
    if not changed or not without:
        return []
    of_all = dict(zip(results.claims["name"], results.claims["verdict"], strict=True))
    others = [(name, verdict) for name, verdict in without.items() if name in of_all and verdict != of_all[name]]
    told = f"Rules were changed after the start of seed{_several(changed)}. Without "
    told += "this seed" if len(changed) == 1 else "these seeds"
    if not others:
        return [f"{told}, all verdicts are the same.", ""]
    lines = [f"- {name}: `{verdict}` instead of `{of_all[name]}`" for name, verdict in others]
    return [f"{told}, these verdicts differ from the table (fewer seeds give wider intervals):", "", *lines, ""]


def write_published(folder: Path, out: Path, seeds: Collection[int] = (), planned: int | None = None) -> Published:
    """Write the tables of a reproduction into a folder, with six significant digits, and return them as read back.

    Args:
        folder: output folder of `python -m analysis reproduce`.
        out: the folder of the tables.
        seeds: training seeds; default: all that are there.
        planned: number of training seeds that are planned for each family, which the page then says.

    Raises:
        FileNotFoundError: no finished run of these seeds is there.
    """
    found = sorted(path.parent for path in folder.glob("*/seed-*/questions.parquet"))
    runs = [run for run in found if not seeds or int(run.name.removeprefix("seed-")) in seeds]
    if not runs:
        of_seeds = f" of the seeds {sorted(seeds)}" if seeds else ""
        raise FileNotFoundError(
            f"expected finished runs{of_seeds} as {folder}/FAMILY/seed-N; there are none. Pass the output folder of "
            "`python -m analysis reproduce`, or an archive of it."
        )
    rows = read_runs(runs)
    write_main_table(runs, out)
    tables = collect_tables(folder, seeds)
    meta = {"runs": [str(run.relative_to(folder)) for run in runs], "versions": versions()}
    for family, of_family in tables.items():
        for name, table in of_family.items():
            write_table(out / family / f"{name}.csv", rounded(table, 6), meta)
    write_table(out / "differences_sft.csv", differences(rows, "SFT"), meta)
    listed = pd.DataFrame([vars(claim) for claim in claims(rows, tables)])
    write_table(out / "claims.csv", listed.assign(name=listed["name"].map(in_plain_words)), meta)
    begun = folder / STARTED
    known = read_json(begun) if begun.is_file() else []
    started = [{**one, "steps": versions_of(folder, one["seed"])} for one in known if not seeds or one["seed"] in seeds]
    there = {int(run.name.removeprefix("seed-")) for run in found}
    used = {int(run.name.removeprefix("seed-")) for run in runs}
    rest = used - {one["seed"] for one in started if one["rules"] != rules_sha256()}
    without = {}
    if used > rest > set():
        kept = [run for run in runs if int(run.name.removeprefix("seed-")) in rest]
        of_rest = claims(read_runs(kept), collect_tables(folder, rest))
        without = {in_plain_words(claim.name): claim.verdict for claim in of_rest}
    about: dict[str, Any] = {"rules": rules_commit(), "rules_sha256": rules_sha256(), "started": started}
    about |= {"planned": planned, "left_out": sorted(there - used), "without_pilot": without}
    write_json(out / ABOUT, about)
    return read_published(out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis results", description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="output folder of `python -m analysis reproduce`, or a folder of archives of it"
    )
    parser.add_argument("--out", type=Path, help="default: FOLDER/tables")
    parser.add_argument(
        "--seed", type=int, action="append", default=[], help="only this training seed; may be repeated"
    )
    parser.add_argument("--planned", type=int, help="number of training seeds that are planned for each family")
    parser.add_argument("--page", type=Path, help="write results.md also to this path")
    parser.add_argument("--title", default="Results", help="of the page")
    given = parser.parse_args(arguments)
    out = given.out or given.folder / "tables"
    with unpacked(given.folder) as folder:
        text = page(given.title, write_published(folder, out, given.seed, given.planned))
    for path in filter(None, (out / "results.md", given.page)):
        write_text(path, text)
        print(f"Wrote {path}; tables in {out}.")
