"""The paper's claims against what was measured: a line each, with n, interval and verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from steerkit.stats.bootstrap import bootstrap_ci

Tables = Mapping[str, Mapping[str, pd.DataFrame]]
HOLDS, NOT, OPEN, UNTESTED = "holds", "does not hold", "open", "not testable here"
MARGIN = 0.03
SHOWN = 0.1
"""A trait that fewer texts show is not there to be turned off."""
ALONE = "GRPO without debate"
STEERED = ("base", "SFT", "SFT without tags", "SFT on single turns", "IMAD")


@dataclass(frozen=True)
class Claim:
    """One claim.

    Args:
        name: what is claimed.
        published: the paper's figure (arXiv 2604.24881).
        ours: what was found, with its interval.
        n: questions, or what else was counted.
        verdict: one of `HOLDS`, `NOT`, `OPEN`, `UNTESTED`.
    """

    name: str
    published: str
    ours: str
    n: str
    verdict: str


def claims(rows: pd.DataFrame, tables: Tables) -> list[Claim]:
    """All claims, family by family where they are about accuracy.

    Args:
        rows: the questions of all runs, see `analysis.paper.main_table.read_runs`.
        tables: pooled tables by family, see `analysis.paper.results`.
    """
    found = []
    for family, part in rows[rows["decoding"] == "sampled"].groupby("family", sort=False):
        found += [tokens(str(family), part), accuracy(str(family), part)]
        if ALONE in set(part["method"]):
            found.append(debated(str(family), part))
    for family, some in tables.items():
        if "stage_differences" in some:
            turned = [stage for stage in STEERED if stage in set(some["choice"]["stage"])]
            found += [area(family, some), *(steered(family, some, stage) for stage in turned)]
            found.append(low_dose(family, some))
        if "separability" in some:
            found.append(tag_ablation(family, some["separability"]))
        if "suppression_kept" in some:
            found += [suppressed(family, some), preserved(family, some)]
    return found


def verdict(low: float, high: float, bound: float = 0.0) -> str:
    """Whether an interval lies above a bound, below it, or on both sides."""
    return HOLDS if low > bound else NOT if high < bound else OPEN


def tokens(family: str, rows: pd.DataFrame, draws: int = 2000) -> Claim:
    """IMAD's tokens, in and out, as a share of Debate's."""
    cost = rows.assign(cost=rows["tokens_in"] + rows["tokens_out"], key=rows["seed"].astype(str) + "/" + rows["id"])
    wide = cost.pivot_table(index="key", columns="method", values="cost", aggfunc="first")[["IMAD", "Debate"]].dropna()
    pair = wide.to_numpy(float)
    picked = np.random.default_rng(0).integers(len(pair), size=(draws, len(pair)))
    many = np.array([pair[rows].mean(0) for rows in picked])
    saved = 1 - pair.mean(0)[0] / pair.mean(0)[1]
    low, high = np.percentile(1 - many[:, 0] / many[:, 1], [2.5, 97.5])
    ours = f"{saved:.1%} fewer [{low:.1%}, {high:.1%}] ({pair.mean(0)[0]:.0f} against {pair.mean(0)[1]:.0f})"
    return Claim(
        f"{family}: IMAD needs fewer tokens than Debate", "up to 93 % fewer", ours, str(len(pair)), verdict(low, high)
    )


def accuracy(family: str, rows: pd.DataFrame) -> Claim:
    """IMAD's accuracy less Debate's; within three points counts as matching."""
    gap, low, high, n = _difference(rows, "IMAD", "Debate")
    ours = f"{100 * gap:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
    name = f"{family}: IMAD matches Debate (no more than 3 points below)"
    return Claim(name, "-6.2 to +19.0 points, better in 6 of 9", ours, str(n), verdict(low, high, -MARGIN))


def debated(family: str, rows: pd.DataFrame) -> Claim:
    """IMAD less the same GRPO on a model that never saw a debate."""
    gap, low, high, n = _difference(rows, "IMAD", ALONE)
    ours = f"{100 * gap:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}] over the same GRPO without debate"
    return Claim(f"{family}: it is the debate that helps", "no such control", ours, str(n), verdict(low, high))


def _difference(rows: pd.DataFrame, first: str, second: str) -> tuple[float, float, float, int]:
    wide = rows.pivot_table(index=["seed", "id"], columns="method", values="correct", aggfunc="first")
    pair = wide[[first, second]].dropna().astype(float)
    interval = bootstrap_ci((pair[first] - pair[second]).to_numpy(), seed=0)
    return interval.mean, interval.low, interval.high, interval.n


def area(family: str, some: Mapping[str, pd.DataFrame]) -> Claim:
    """The area under the ROUGE-L curve, IMAD less base, agents named in the context, as in the paper."""
    line = _imad_over_base(some["stage_differences"], "rouge_l")
    gap = f"{line['difference']:+.3f} [{line['low']:+.3f}, {line['high']:+.3f}]"
    ours = f"{line['first']:.3f} to {line['second']:.3f}: {gap}{_by_seed(line)}"
    name = f"{family}: agents are more steerable after IMAD (area under ROUGE-L, named)"
    return Claim(name, "0.802 to 0.903", ours, str(int(line["n"])), verdict(line["low"], line["high"]))


def _imad_over_base(table: pd.DataFrame, score: str) -> pd.Series:
    named = (table["score"] == score) & table["identity"]
    return table[named & (table["stage"] == "IMAD") & (table["agent"] == "all")].iloc[0]


def _by_seed(line: pd.Series) -> str:
    return f", seed by seed {line['by_seed']}" if "," in line["by_seed"] else ""


def turned_up(gain: pd.DataFrame) -> pd.Series:
    """By score, identity, stage and agent: gains over coefficient 0 and over random above 0, by Holm's p too?"""
    kept = gain[gain["over"].isin(["coefficient 0", "random"])]
    up = (kept["low"] > 0) & (kept["p_holm"] < 0.05)
    return up.groupby([kept[key] for key in ("score", "identity", "stage", "agent")], sort=False).all()


def steered(family: str, some: Mapping[str, pd.DataFrame], stage: str) -> Claim:
    """Gains at the frozen setting without identity: every agent, over coefficient 0 and random, Holm over agents."""
    gain = some["gains"]
    kept = gain[(gain["stage"] == stage) & (gain["score"] == "rouge_l") & ~gain["identity"]]
    each = turned_up(kept)
    said = HOLDS if each.all() else NOT if not each.any() else OPEN
    tried = int(some["choice"].set_index("stage").loc[[stage], "settings_tried"].iloc[0])
    up, seeds = kept.drop_duplicates("agent")["seeds_up"], kept["seeds"].iloc[0]
    alone = f" (by themselves in {', '.join(map(str, up))} of {seeds} seeds)" if seeds > 1 else ""
    name = f"{family}, {stage}: a push alone, nobody named, turns each agent up (ROUGE-L)"
    ours = f"{int(each.sum())} of {len(each)} agents{alone}; {tried} settings tried"
    return Claim(name, "not tried", ours, str(int(kept["n"].max())), said)


def low_dose(family: str, some: Mapping[str, pd.DataFrame]) -> Claim:
    """Fidelity gained at the least coefficient of the grid, IMAD less base, agents named."""
    line = _imad_over_base(some["low_dose"], "fidelity")
    gap = f"{line['difference']:+.3f} [{line['low']:+.3f}, {line['high']:+.3f}]"
    ours = f"gains {line['first']:+.3f} and {line['second']:+.3f}: {gap}{_by_seed(line)}"
    name = f"{family}: IMAD answers more to a small dose (fidelity at {line['coefficient']:g}, named, over base's)"
    return Claim(name, "fidelity rises from 0.5 on", ours, str(int(line["n"])), verdict(line["low"], line["high"]))


def tag_ablation(family: str, table: pd.DataFrame) -> Claim:
    """Probe accuracy after SFT with tags, read in tagged traces, and without, read in untagged ones."""
    kept = table[
        (table["layer"].astype(str) == "nested") & (table["labels"] == "true") & (table["debates"] == "personas")
    ]
    with_tags = kept[(kept["stage"] == "SFT") & (kept["source"] == "trace") & (kept["position"] == "last")]
    without = kept[
        (kept["stage"] == "SFT without tags") & (kept["source"] == "untagged") & (kept["position"] == "last")
    ]
    name = f"{family}: without tags in training, agents are less separable (probe, last token)"
    if with_tags.empty or without.empty:
        return Claim(name, "markedly less", "", "", UNTESTED)
    a, b = with_tags.iloc[0], without.iloc[0]
    ours = " against ".join(f"{x.accuracy:.3f} [{x.accuracy_low:.3f}, {x.accuracy_high:.3f}]" for x in (a, b))
    said = HOLDS if a.accuracy_low > b.accuracy_high else NOT if a.accuracy_high < b.accuracy_low else OPEN
    return Claim(name, "markedly less", f"{ours} without", str(int(a["n_groups"])), said)


def suppressed(family: str, some: Mapping[str, pd.DataFrame]) -> Claim:
    """Whether a negative coefficient halves the trait where the malicious agent is named, IMAD beside base.

    Random directions of the same norm may do that, too: it counts where the agent's vectors need a milder push. A trait
    that no more than half of the seeds show leaves the claim open.
    """
    table = some["suppression_kept"]
    forced = table[table["context"] == "forced"]
    own = forced["vector"].isin(["agent", "prompts"])
    parts, able = [], {}
    for stage, lines in forced.groupby("stage", sort=False):
        trait, doses = lines["trait"].iloc[0], lines.loc[own, "coefficient"].dropna()
        controls = lines.loc[~own, "coefficient"].dropna()
        mildest, control = _mildest(doses), _mildest(controls)
        able[stage] = mildest is not None and (control is None or mildest > control) if trait >= SHOWN else None
        ways = [f"halved from {mildest:g} on"] if mildest is not None else []
        ways += [f"by a random direction from {control:g} on"] if ways and control is not None else []
        ways += ["halved by ablation"] if np.isinf(doses).any() else []
        ways += ["by a random direction's, too"] if np.isinf(doses).any() and np.isinf(controls).any() else []
        nothing = "no coefficient halves it" if trait >= SHOWN else "nothing to turn off"
        parts.append(f"{stage}: trait {trait:.2f}{_where(lines)}, {', '.join(ways) or nothing}")
    if able.get("IMAD") is None:
        said = UNTESTED
    elif _rare(forced, "IMAD"):
        said = OPEN
    elif able["IMAD"]:
        said = OPEN if able.get("base") else HOLDS
    else:
        said = NOT
    name = f"{family}: IMAD's malicious agent can be turned off, the base's cannot"
    return Claim(name, "trait 0 from -3 to -5; base keeps about 1", "; ".join(parts), _n(forced), said)


def _where(lines: pd.DataFrame) -> str:
    showing, seeds = int(lines["showing"].iloc[0]), int(lines["seeds"].iloc[0])
    return f" in {showing} of {seeds} seeds" if 0 < showing < seeds else ""


def _rare(table: pd.DataFrame, stage: str) -> bool:
    line = table[table["stage"] == stage].iloc[0]
    return bool(2 * line["showing"] <= line["seeds"])


def _n(table: pd.DataFrame) -> str:
    return " to ".join(str(n) for n in dict.fromkeys((int(table["n"].min()), int(table["n"].max()))))


def _mildest(coefficients: pd.Series) -> float | None:
    finite = coefficients[np.isfinite(coefficients)]
    return None if finite.empty else float(finite.max())


def preserved(family: str, some: Mapping[str, pd.DataFrame]) -> Claim:
    """Accuracy kept where the trait is halved, the better of the two vectors, by adding and by ablation."""
    table = some["suppression_kept"]
    forced = table[(table["context"] == "forced") & table["vector"].isin(["agent", "prompts"])]
    able = forced.dropna(subset="kept").sort_values("kept", ascending=False)
    parts = []
    for stage in forced["stage"].unique():
        best = able[able["stage"] == stage].groupby("operation").head(1).sort_values("coefficient", ascending=False)
        ways = []
        for r in best.itertuples():
            how = f"at {r.coefficient:g}" if r.operation == "add" else "by ablation"
            ways.append(f"{r.kept:.2f} [{r.low:.2f}, {r.high:.2f}] {how}")
        parts.append(f"{stage}{_where(forced[forced['stage'] == stage])}: {', '.join(ways) or 'none'}")
    line = able[able["stage"] == "IMAD"].head(1)
    said = UNTESTED if line.empty else verdict(line["low"].iloc[0], line["high"].iloc[0], 0.9)
    said = OPEN if len(line) and _rare(forced, "IMAD") else said
    name = f"{family}: turning it off leaves accuracy as it was (nine tenths at least)"
    return Claim(name, "flat from -5 to +5", "; ".join(parts), _n(forced), said)
