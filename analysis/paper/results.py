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
from analysis.paper.pooling import collect_tables, rounded
from analysis.paper.protocol import AT_CONTROLS, COEFFICIENT, PLANTED_BASE, TAGGED
from analysis.paper.reproduce import STARTED, versions_of
from analysis.patching.rounds import OWN, PART, QUESTION, ROUND
from analysis.probes.erased import LEAST_GAIN
from steerkit.io.files import write_text
from steerkit.io.json import read_json, write_json
from steerkit.io.tables import read_table, write_table
from steerkit.io.versions import versions
from steerkit.stats.format import interval_text
from training.evaluate.results import differences, markdown

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
    """What the protocol says about one family, in a paragraph: the figures and verdicts of its tables.

    Args:
        family: the family.
        protocol: its table over the seeds.
        judged: the claims of the page.
    """
    lines = protocol_summary({family: {"protocol": protocol}}).set_index("checkpoint")
    base, imad = lines.loc[BASE], lines.loc["IMAD"]
    known = rules()
    found = judged.set_index("name")["verdict"]
    verdicts = "; ".join(
        f"{known[name].text}: **{found[f'{family}: {known[name].text}']}**" for name in ("area", "above")
    )
    planted = lines.loc[PLANTED_BASE, "above random"] if PLANTED_BASE in lines.index else "not tried"
    return (
        f"**{family}**: the area under the agents' own directions is {base['own']} at the base and {imad['own']} at "
        f"IMAD; ROUGE-L without steering is {base['unsteered']} and {imad['unsteered']}. At IMAD the area under the "
        f"own directions minus that under random ones is {imad['above random']}. The check of the protocol, planted "
        f"directions minus random ones: {planted}. Verdicts: {verdicts}."
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
            "after the own prefix again": f"{row.changed_again:.2f}",
            "after another round 1 of the question": f"{row.changed_resampled:.2f}",
            "difference": interval_text(row.value, row.low, row.high, 2, signed=True),
            "by seed": two_digits(row.by_seed),
            "not read": f"{row.missing:.2f} ({row.missing_again:.2f}, {row.missing_resampled:.2f})",
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
        about: `rules` (commit and time of the last change of the rules), `rules_sha256`, and `started` (seed, time,
            commit and hash of the rules at each seed's start, and how many of its steps were run from which commit).
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
        "ROUGE-L that the identity adds (`gain`), and what the erasure costs if no agent is named": gains,
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
    lines = [
        f"# {title}",
        "",
        "`python -m analysis results` writes this page from the results of each training seed. For the seeds in "
        "`results/seeds`, `make results` repeats it in minutes and trains nothing. The [glossary](glossary.md) defines "
        "the terms; the paper is arXiv 2604.24881.",
        "",
        f"- Seeds: this page uses at most {seeds} training seed{'s' if seeds > 1 else ''}. Each table has the number "
        "of its seeds, or it names them, or the text above it does.",
        "- Intervals are 95 %. With several training seeds they are over the seeds' means: Student's t, and Fieller's "
        "method for ratios, such as tokens. With one seed they are over its questions, or over control directions, and "
        "describe this checkpoint alone. `(unbounded)`: the interval of a ratio has no ends, because its denominator "
        "is not different from 0.",
        "- Intervals of accuracies, shares, ROUGE-L and areas are cut at the smallest and the largest possible value. "
        "Those of differences and ratios are not cut: the interval of a difference of two shares can have ends above "
        "1.",
        "- Differences and ratios are computed before rounding. They can differ in the last digit from those of the "
        "rounded numbers.",
        "- Settings were chosen on validation questions. No question is in two seeds. Questions are compared as texts: "
        "the same numbers in another order (`3+4*5-6`, `3+5*4-6`) are another question, and may be in another seed.",
        "",
        "The rule of each claim is in `analysis/paper/claims.toml`; some claims have other words there than on this "
        "page. `claims.py` judges by these rules"
        + (f". They were last changed in commit {committed}. " if committed else ". ")
        + (f"**The rules were changed after the start of the seeds {changed}.** " if changed else "")
        + "There is no correction for the number of claims.",
        "",
        *(
            (
                "Start of the run of each seed. In brackets: the commit at the start; after `steps from`, the commits "
                "that the steps of the run (such as one training) used, each with the number of its steps.",
                "",
                *(f"- {time}" for time in times),
                "",
            )
            if times
            else ()
        ),
        "## The paper's claims, in this setting",
        "",
        *_legend(),
        "",
        "| claim | in the paper | here | by seed | smallest effect | over | verdict |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {c.name} | {in_plain_cells(c.published)} | {in_plain_cells(c.ours)} | {_by_seed(c)} | {_effect(c)} | "
            f"{c.unit} | **{c.verdict}** |"
            for c in (Claim(**row) for row in results.claims.to_dict("records"))
        ),
        "",
        *_section(
            "What the debate adds",
            "Accuracy in per cent of the test questions; texts are sampled. "
            "[Training](training.md#results-of-the-preset-tiny) defines the methods. SFT on shuffled turns, on gold "
            "and on right answers, and the SFT before DebateGPT + GRPO have as many steps and target tokens as SFT on "
            "the traces. In clues and two_sum, the learning rates of these SFTs and of the SFT before IMAD were chosen "
            "by the same search (`python -m analysis rates`), on a seed that no result uses. SFT on gold answers is "
            "trained on the right answers of the problems; GRPO uses these for the reward only. SFT on right answers "
            "is trained on sampled answers of the base that are right. Each GRPO has IMAD's settings. GRPO without "
            "debate starts from the base in the miniature. With a chat checkpoint it starts from an SFT on the "
            "model's own first answers. `IMAD above it`, `SFT above it`: accuracy of IMAD, or of SFT, minus that of "
            "this training, in points.",
            [markdown(helps), ""] if len(helps) > 1 else [],
        ),
        *_section(
            "Transplanted first rounds",
            "The turns of round 1 in a model's own text are replaced by those of its text on another question, and the "
            "model continues. There are two controls. In the first, its own text is cut after round 1, and the model "
            "continues it once more. In the second, round 1 is that of another of its texts on the same question. In "
            "an explicit debate (separate calls of the base model) the round-1 texts that the agents read are "
            "replaced in the same way. The table counts the questions whose original text has an answer.\n\n"
            "- `answers that change`: share of answers that differ from that of the original text; after it, the same "
            "share in the first control (`after the own prefix again`) and in the second one;\n"
            "- `difference`: answers that change, minus those that change in the first control, over the questions "
            "that have both answers; `by seed` has this difference;\n"
            "- `not read`: share of texts without an answer (in an explicit debate also without a majority); in "
            "brackets, the same share in each control;\n"
            "- `follows, minus chance`: an answer follows if it equals the answer of the text on the other question. "
            "Chance is the share of answers that equal the answer of the text on a third question;\n"
            "- `right`: share of right answers in the first control -> after the replacement; an answer that was not "
            "read counts as wrong;\n"
            "- `consensus next`: share of texts in which the consensus comes directly after round 1;\n"
            f"- `seeds`: seeds in which at least {_least('transplant')} of the texts have a turn of round 1.\n\n"
            "In two_sum an agent proposes a pair of numbers, and can check that a transplanted pair does not fit its "
            "own question. So few answers that follow do not show that round 1 is not read.",
            parts["transplant"],
        ),
        *_section(
            "Patched first rounds",
            "The stream at the positions of round 1 is replaced by that of another debate, at one layer, and the model "
            "continues greedily. Both debates have the same agents in round 1, as many tokens in it, and the same tag "
            "after it. The shares count pairs in which both debates have an answer and the answers differ.\n\n"
            "- `text`: the checkpoint's own text, or an explicit debate of the base; `after round 1`: what comes next "
            "in this text;\n"
            "- `follows`: share of answers that become that of the other debate; `follows by chance`: that of a third "
            "debate;\n"
            "- `question`: a control that patches positions of the question instead: as many as round 1 has, or all if "
            "the question has fewer. If the answer depended on the question alone, it would follow here;\n"
            "- `round 1, as many as question`: a control that patches only so many positions of round 1;\n"
            "- `changes`: share of answers that change or can no longer be read; in brackets, the same share if the "
            "text's own activations are patched in, which must be 0.\n\n"
            "To patch the input of block 0 is to replace the tokens. In any model the effect decreases with the layer: "
            "earlier blocks have read the own text, and no block reads the output of the last one.",
            parts["patched"],
        ),
        *_section(
            "The scores on known texts",
            "These tables are from the first training seed. `rouge_l` is ROUGE-L to an agent's own text. `speaks` is "
            "the share of texts that are this agent's by a rule: by the tag of the first turn or, without a tag, by "
            "its opening. The texts are the agent's own text, its text on another question, and another agent's text "
            "on the same question. Some texts were also labelled by hand with the agent that speaks first: `agree` is "
            "the share of labels that equal the rule's (interval: `low`, `high`), `kappa` is Cohen's, and `by_hand` "
            "is the number of texts with each label (0: no agent).",
            parts["known"],
        ),
        *_section(
            "Steering without a name",
            "The tables have the gain of each agent's direction at the setting chosen on validation: the score with "
            "the direction minus the score at coefficient 0, or minus the mean score of each kind of control "
            "directions. These are random; matched (random, with the covariance of the stream around each agent's "
            "mean); shuffled (from shuffled agent names). Texts are sampled, and the context names no agent. "
            "`unsteered` is the score at coefficient 0. If the unsteered texts are already this agent's, the score "
            "cannot rise. `rank p` is the [p by rank](glossary.md#measuring) among the random directions; with 19 of "
            "them its smallest value is 0.05. `GRPO step N` is a checkpoint of IMAD's GRPO.",
            parts["steering"],
        ),
        *_section(
            "The paper's protocol",
            "Unit vectors are computed once, from the SFT checkpoint, and are added to the generated positions of "
            "every checkpoint. The context is the trace up to the agent's tag (`tagged`), or the base's prompt for "
            "the agent (`cast`). The vector does not act on the first generated token, and in the miniature this token "
            "already shows which agent speaks.\n\n"
            "- The area is that under ROUGE-L over the grid of strengths, divided by the grid's width. `unsteered` and "
            "`at strength 0` are ROUGE-L at strength 0. The claims are about the own directions, IMAD minus base: the "
            "first about the area, the second about the area minus ROUGE-L at strength 0.\n"
            "- Grids: `coefficient`: coefficients of unit vectors; `dose`: strengths relative to the stream's norm in "
            f"tagged traces{_at_controls(results.families)}.\n"
            "- `base with planted directions` is a positive control. It was trained to write an agent's turn when a "
            "random direction, planted for this agent, is added. Its area under the planted directions minus that "
            "under random ones must have an interval whose lower end is at least the smallest effect. Otherwise the "
            "protocol may miss an effect, and a null result is not informative.\n"
            "- `room` (in the claims) is the unsteered score of the base with its own prompts (`cast`) minus the "
            "unsteered score of IMAD. The base wrote the reference texts with these prompts, so its score is about the "
            "highest possible, and steering can raise IMAD's score by about the room at most.",
            parts["protocol"],
        ),
        *_section(
            "Suppression of the malicious agent",
            "The setting was chosen on validation among vectors, layers, coefficients and ablation. In the context "
            "`forced` the malicious agent is named: by its tag, or at the base by its prompt. In `plain` no agent is "
            "named. The trait is searched in the turn of the named agent; in `plain`, in the whole text. A seed shows "
            f"the trait if at least {_least('suppressed')} of its unsteered texts have it. All columns except `right "
            "before` are over these seeds; `nan`: there are none.\n\n"
            "- `trait`, `accuracy`: share of texts with the trait and of right answers, at coefficient 0 -> at the "
            "setting; in brackets the accuracy under random directions, and under those with the covariance of the "
            "stream around each agent's mean (`matched`);\n"
            "- `removed`: 1 - trait / trait at coefficient 0; `over random`, `over matched`: trait under these "
            "directions minus trait at the setting;\n"
            "- `kept`: accuracy / accuracy at coefficient 0, over the seeds whose setting halves the trait on "
            "validation;\n"
            "- `right before`: share of contexts whose last answer is right; 0 if contexts have no answer. A model "
            "that repeats this answer has this accuracy;\n"
            "- `own opening`, `another's`: share of texts whose first turn begins as the malicious agent's turns do, "
            "or as another agent's. In `plain` another agent can write the first turn, and the trait comes later in "
            "the text: then `own opening` is 0.\n\n"
            "If the trait is gone because another agent speaks, the malicious agent itself has not changed.",
            parts["suppression"],
        ),
        *_section(
            "The paper's experiment with a malicious agent",
            "One unit vector is computed from the base's prompts: the mean stream at the last token of the malicious "
            "agent's prompts minus that of an honest agent's. It is added from the last token of the prompt on. Texts "
            "are greedy. The table has the share of texts with the trait and that of right answers, each at strength 0 "
            "-> at the strength of the row; in brackets, at this strength of random directions. It has all seeds. The "
            f"claim leaves out the seeds in which less than {_least('malicious')} of the unsteered texts have the "
            "trait, so the share in the claim can be larger.",
            parts["malicious"],
        ),
        *_section(
            "Erased identity",
            "LEACE (Belrose et al. 2023) removes from the stream what a linear probe can read about the agent that "
            "speaks. It is fitted on training debates, and acts from the last token of the prompt on. The agent is "
            "given to the model in one of three ways (`identity`): by the trace up to its tag (`trace`), by the tag "
            "alone (`tag`), or by an added vector (`vector`). With the trace or the tag, LEACE acts after every block. "
            "With a vector, it acts only after the blocks that follow the one where the vector is added.\n\n"
            "- `erasure`: `none`; `agents` is LEACE of the agents' names. There are three controls: `shuffled` is "
            "LEACE of shuffled names; `variance` removes the directions of largest variance within an agent; "
            "`injected` removes the agents' vectors themselves after the later blocks. If `injected` lowers the gain "
            "as much as `agents` does, LEACE may only have removed the vector.\n"
            "- Probe: it tells three agents apart, so chance is a third. If its accuracy after an erasure is above a "
            "third, some of the information is left on held-out questions. `asked` is the last token before a turn, "
            "`first` and `last` are tokens of the turn. `erased here`: LEACE is fitted at this position alone; `at all "
            "positions`: LEACE is fitted at all three, as for the texts. At the first token a probe can recognise the "
            "token itself, also in an untrained model.\n"
            "- `gain`: ROUGE-L to the agent's turn if the agent is given, minus that if no agent is named, both under "
            "the erasure. `cost`: change of ROUGE-L through the erasure if no agent is named; it is negative if the "
            "erasure lowers it.\n"
            "- `survives`: gain under the erasure / gain without erasure, over the seeds in which the latter is at "
            f"least {LEAST_GAIN}. So it can have fewer values by seed than the row has seeds. `not testable`: no seed "
            "has such a gain. `texts broken`: the mean cost is at least as large as the mean gain without erasure, so "
            "the erasure damages the texts in general.\n"
            "- Size of the change: norm of the change of the stream through the erasure / norm of the stream. What is "
            "left of a vector is its norm after the erasure over that before; LEACE is an oblique projection, so it "
            "can exceed 1.\n"
            "- Setting of the vector, in the last table: `position` is where it was read in the turns of round 1 (the "
            "mean or last token of the turn, or its tag); `from_last_prompt_token:4` adds it at the last token of the "
            "prompt and the three that follow.",
            parts["erased"],
        ),
        "## Accuracy and tokens",
        "",
        "[Training](training.md#results-of-the-preset-tiny) defines the methods. `questions`: of all seeds together; "
        "`accuracy`: in per cent of these; `tokens`: read and written, mean per question; `gain kept`: (accuracy - "
        "Single) / (Debate - Single), empty if the interval of Debate - Single is not above 0; `unparsed`: share of "
        "questions without an answer (Debate and Round-1 majority: also without a majority); `agents`: mean number of "
        "agents whose tags are in a text.",
        "",
        *(
            line
            for decoding, part in results.main.groupby("decoding", sort=False)
            for line in (
                f"**{decoding}**:",
                "",
                markdown(shown(part).drop(columns="decoding").rename(columns=RENAMED)),
                "",
            )
        ),
    ]
    return "\n".join(lines)


def _by_seed(claim: Claim) -> str:
    """The values of a claim's seeds, in per cent where the claim's measurement is."""
    percent = "] % " in claim.ours.partition(";")[0]
    return " ".join(f"{100 * float(value):.1f}" for value in claim.by_seed.split()) if percent else claim.by_seed


UNITS = {"tokens": "%", "accuracy": "points", "debate": "points", "order": "points"}
"""Rule -> unit of its measure; the other measures are numbers without a unit."""


def _effect(claim: Claim) -> str:
    """The smallest effect that counts for a claim, in the unit of its measure."""
    for name, rule in rules().items():
        if claim.name.endswith(in_plain_words(rule.text)):
            return f"{100 * rule.effect:g} {UNITS[name]}" if name in UNITS else f"{rule.effect:g}"
    return ""


def _least(name: str) -> str:
    """The least share of a seed's texts that must have what a claim is about, in per cent."""
    return f"{100 * rules()[name].least:g} %"


def _at_controls(families: Tables) -> str:
    """The grid `controls`, where a table has it."""
    there = any((some["protocol"]["grid"] == AT_CONTROLS).any() for some in families.values() if "protocol" in some)
    return f"; `{AT_CONTROLS}`: only the strengths at which controls were run" if there else ""


def _legend() -> list[str]:
    """What the verdicts and the columns of the claims' table mean, by the rules of `claims.toml` and `claims.py`."""
    known = rules()
    unread = f"{100 * (1 - known['transplant'].least):g} %"
    return [
        "Verdicts:",
        "",
        "- `holds`: the whole interval is at or above the smallest effect that counts.",
        "- `holds, not specific`: the same, but a control may do as much. To be specific, the interval of the "
        "difference to each control must be above a limit: the smallest effect in the claims about training before "
        "GRPO and about the protocol, 0 in the others.",
        "- `does not hold`: the whole interval is below the smallest effect.",
        "- `not shown`: the interval contains the smallest effect; or the interval that is judged has no width, since "
        "all seeds have the same value, and there are fewer than six.",
        "- `not testable here`: the quantity or a control was not measured, fewer than two training seeds have a "
        "value, or a check of the method fails:",
        "    - Protocol: the interval of planted minus random directions must have a lower end of at least the "
        "smallest effect. In the claim that the directions add more, the `room` must be as large, too.",
        "    - First round: the interval of the difference in explicit debates must have a lower end of at least the "
        f"smallest effect. After the replacement, at most {unread} of the answers may be unread, at IMAD and in "
        "explicit debates.",
        f"    - Trait: at least two seeds must show it, in at least {_least('suppressed')} of their unsteered texts. "
        "Other seeds are left out.",
        "",
        "A claim about each agent is judged by one interval. Its lower end is the lowest of the agents' lower ends. "
        "Its upper end is the lowest of their upper ends, at a level of 5 % divided by the number of agents. So one "
        "agent with the same value in all seeds does not make the claim `not shown`. An agent that speaks first in "
        f"more than {known['speaks'].ceiling:g} of the unsteered texts cannot gain, and is left out.",
        "",
        "Columns:",
        "",
        "- `here`: first the quantity that is judged (of several checkpoints, that of IMAD), then controls and checks. "
        "`A over B` is A minus B. Tokens are those that are read and written, per question; new tokens are written. "
        "The sections below define the other terms.",
        "- `by seed`: the quantity that is judged, for each training seed; of a claim about each agent, that of the "
        "agent with the lowest lower end, which is named.",
        "- `over`: what the intervals are over.",
    ]


def _versions(one: Mapping[str, Any]) -> str:
    """The commits of the steps of a seed, where others than that of its start were used."""
    counts = one.get("steps", {})
    if set(counts) <= {one["commit"]}:
        return ""
    return f"; steps from {', '.join(f'{commit} ({count})' for commit, count in counts.items())}"


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
    "the paper's experiment: the base's vector turns IMAD's malicious agent off": "the paper's experiment: the base's "
    "vector removes the malicious trait from IMAD's texts",
    "IMAD's malicious agent can be turned off by the setting that does it best": "the setting chosen on validation "
    "removes the malicious trait from IMAD's texts",
    "turning it off leaves accuracy as it was": "the removal of the trait keeps the accuracy",
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


IN_CELLS: Mapping[str, str] = {
    r"^flat from -5 to \+5$": "accuracy flat for coefficients from -5 to +5",
    r"^trait 0 from -3 to -5; base keeps about 1$": "share of texts with the trait: 0 at coefficients from -3 to -5; "
    "at the base about 1",
    r"^area under ROUGE-L (\S+) to (\S+)$": r"area under ROUGE-L \1 at the base, \2 at IMAD",
    # misquoted in claims.toml, which no verdict reads; it stays as it was registered
    r"^-6\.2 to \+19\.0 points, better in 6 of 9$": "-4.8 to +19.0 points, better in 5 of 9 comparisons",
    r"^trait (\S+), fall ([^;]+); over random ([^;]+); at the base (.+), IMAD's more by ": r"share of texts with the "
    r"trait at coefficient 0: \1; decrease \2; decrease minus that under random directions \3; decrease at the base "
    r"\4; IMAD's decrease minus the base's ",
    r"\btrait (\S+) to (\S+), removed ": r"share of texts with the trait \1 -> \2, removed ",
    r"^(?=base: \d)": "accuracy / accuracy at coefficient 0: ",
    r"halves the trait in": "halves the trait on validation in",
    r"the answer of the given text is right in (\S+)$": r"the last answer in the context is right in a share of \1",
    r"^(?=\S+ \[[^]]*\]; at IMAD over random )": "IMAD minus base ",
    r"at IMAD over random directions ": "at IMAD own minus random directions ",
    r", minus the same at the base ": "; this difference minus that at the base ",
    r"planted directions over random ": "check: planted minus random directions ",
    r"; over random (?=\S+ \[[^]]*\], )": "; over random directions, by agent, ",
    r"(agent \S+) speaks first in (\S+) unsteered, left out": r"\1 is left out: it speaks first in a share of \2 of "
    "the unsteered texts",
    r"; follows, minus chance: ": "; answers that follow, minus chance, ",
    r"(\d+%) of the texts have a round-1 turn, at least (\d+%) in (\d+ of \d+) training seeds": r"\1 of the texts "
    r"have a turn of round 1 (in \3 seeds at least \2)",
    r"; in explicit debates (?=\S+ \[)": "; check: the same difference in explicit debates ",
    r"; up to (\d+%) of the answers were not read": r"; check: up to \1 of the answers are unread",
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


def write_published(folder: Path, out: Path, seeds: Collection[int] = ()) -> Published:
    """Write the tables of a reproduction into a folder, with six significant digits, and return them as read back.

    Args:
        folder: output folder of `python -m analysis reproduce`.
        out: the folder of the tables.
        seeds: training seeds; default: all that are there.

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
    write_json(out / ABOUT, {"rules": rules_commit(), "rules_sha256": rules_sha256(), "started": started})
    return read_published(out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis results", description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="output folder of `python -m analysis reproduce`, or an archive of it"
    )
    parser.add_argument("--out", type=Path, help="default: FOLDER/tables")
    parser.add_argument(
        "--seed", type=int, action="append", default=[], help="only this training seed; may be repeated"
    )
    parser.add_argument("--page", type=Path, help="write results.md also to this path")
    parser.add_argument("--title", default="Results", help="of the page")
    given = parser.parse_args(arguments)
    out = given.out or given.folder / "tables"
    with unpacked(given.folder) as folder:
        text = page(given.title, write_published(folder, out, given.seed))
    for path in filter(None, (out / "results.md", given.page)):
        write_text(path, text)
        print(f"Wrote {path}; tables in {out}.")
