"""Claims of the paper, each with our measurement, its n and interval, and a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from steerkit.stats.format import interval_text
from steerkit.stats.mean import Interval
from steerkit.stats.paired import paired_difference, ratio

Tables = Mapping[str, Mapping[str, pd.DataFrame]]
HOLDS, NOT, OPEN, UNTESTED = "holds", "does not hold", "open", "not testable here"
MARGIN = 0.03
"""An accuracy at most this far below another one counts as matching."""
SHOWN = 0.1
"""Least share of texts that must show a trait for its suppression to be tested."""
ALONE = "GRPO without debate"
STEERED = ("base", "SFT", "SFT without tags", "SFT on single turns", "IMAD")


@dataclass(frozen=True)
class Claim:
    """One claim.

    Args:
        name: what is claimed.
        published: the paper's figure (arXiv 2604.24881).
        ours: our measurement, with its interval.
        n: number of questions.
        verdict: one of `HOLDS`, `NOT`, `OPEN`, `UNTESTED`.
    """

    name: str
    published: str
    ours: str
    n: str
    verdict: str


def claims(rows: pd.DataFrame, tables: Tables) -> list[Claim]:
    """All claims: those about accuracy and tokens by family, then those about steering, probes and suppression.

    Args:
        rows: the questions of all runs, see `analysis.paper.main_table.read_runs`.
        tables: pooled tables by family, see `analysis.paper.pooling.collect_tables`.
    """
    listed = []
    for family, part in rows[rows["decoding"] == "sampled"].groupby("family", sort=False):
        listed += [tokens(str(family), part), accuracy(str(family), part)]
        if ALONE in set(part["method"]):
            listed.append(debated(str(family), part))
    for family, some in tables.items():
        if "stage_differences" in some:
            turned = [stage for stage in STEERED if stage in set(some["choice"]["stage"])]
            listed += [area(family, some), *(steered(family, some, stage) for stage in turned)]
            listed.append(low_dose(family, some))
        if "separability" in some:
            listed.append(tag_ablation(family, some["separability"]))
        if "suppression_kept" in some:
            listed += [suppressed(family, some), preserved(family, some)]
    return listed


def verdict(low: float, high: float, bound: float = 0.0) -> str:
    """Whether an interval lies above a bound, below it, or on both sides."""
    return HOLDS if low > bound else NOT if high < bound else OPEN


def tokens(family: str, rows: pd.DataFrame) -> Claim:
    """IMAD's tokens, in and out, as a share of Debate's."""
    cost = rows.assign(cost=rows["tokens_in"] + rows["tokens_out"], key=rows["seed"].astype(str) + "/" + rows["id"])
    wide = cost.pivot_table(index="key", columns="method", values="cost", aggfunc="first")[["IMAD", "Debate"]].dropna()
    share = ratio(wide["IMAD"], wide["Debate"])
    saved, low, high = 1 - share.value, 1 - share.high, 1 - share.low
    interval = f"{saved:.1%} fewer [{low:.1%}, {high:.1%}]"
    ours = f"{interval} ({wide['IMAD'].mean():.0f} against {wide['Debate'].mean():.0f})"
    name = f"{family}: IMAD needs fewer tokens than Debate"
    return Claim(name, "up to 93 % fewer", ours, str(share.n), verdict(low, high))


def accuracy(family: str, rows: pd.DataFrame) -> Claim:
    """IMAD's accuracy minus Debate's; at most `MARGIN` below counts as matching."""
    gap = _gap(rows, "IMAD", "Debate")
    name = f"{family}: IMAD matches Debate (no more than 3 points below)"
    result = verdict(gap.low, gap.high, -MARGIN)
    return Claim(name, "-6.2 to +19.0 points, better in 6 of 9", _points(gap), str(gap.n), result)


def debated(family: str, rows: pd.DataFrame) -> Claim:
    """IMAD's accuracy minus that of the same GRPO on a model that was not trained on debates."""
    gap = _gap(rows, "IMAD", ALONE)
    ours = f"{_points(gap)} over the same GRPO without debate"
    name = f"{family}: it is the debate that helps"
    return Claim(name, "no such control", ours, str(gap.n), verdict(gap.low, gap.high))


def _gap(rows: pd.DataFrame, first: str, second: str) -> Interval:
    """The accuracy of one method minus that of another, paired by seed and question."""
    wide = rows.pivot_table(index=["seed", "id"], columns="method", values="correct", aggfunc="first")
    pair = wide[[first, second]].dropna().astype(float)
    return paired_difference(pair[first], pair[second])


def _points(gap: Interval) -> str:
    mean, low, high = (100 * share for share in (gap.mean, gap.low, gap.high))
    return f"{mean:+.1f} points [{low:+.1f}, {high:+.1f}]"


def area(family: str, some: Mapping[str, pd.DataFrame]) -> Claim:
    """The area under the ROUGE-L curve, IMAD minus base, agents named in the context, as in the paper."""
    line = _imad_over_base(some["stage_differences"], "rouge_l")
    gap = interval_text(line["difference"], line["low"], line["high"], 3, signed=True)
    ours = f"{line['first']:.3f} to {line['second']:.3f}: {gap}{_by_seed(line)}"
    name = f"{family}: agents are more steerable after IMAD (area under ROUGE-L, named)"
    return Claim(name, "0.802 to 0.903", ours, str(int(line["n"])), verdict(line["low"], line["high"]))


def _imad_over_base(table: pd.DataFrame, score: str) -> pd.Series:
    named = (table["score"] == score) & table["identity"]
    return table[named & (table["stage"] == "IMAD") & (table["agent"] == "all")].iloc[0]


def _by_seed(line: pd.Series) -> str:
    return f", seed by seed {line['by_seed']}" if "," in line["by_seed"] else ""


def turned_up(gain: pd.DataFrame) -> pd.Series:
    """Whether an agent gains over coefficient 0 and over random directions: interval above 0 and Holm's p below 0.05.

    Args:
        gain: the gains of `analysis.agents.curves.gains`, with the columns score, identity and stage.

    Returns:
        A bool per (score, identity, stage, agent).
    """
    kept = gain[gain["over"].isin(["coefficient 0", "random"])]
    up = (kept["low"] > 0) & (kept["p_holm"] < 0.05)
    return up.groupby([kept[key] for key in ("score", "identity", "stage", "agent")], sort=False).all()


def steered(family: str, some: Mapping[str, pd.DataFrame], stage: str) -> Claim:
    """Gains at the frozen setting, agents unnamed: every agent over coefficient 0 and random, Holm over agents."""
    gain = some["gains"]
    kept = gain[(gain["stage"] == stage) & (gain["score"] == "rouge_l") & ~gain["identity"]]
    each = turned_up(kept)
    result = HOLDS if each.all() else NOT if not each.any() else OPEN
    tried = int(some["choice"].set_index("stage").loc[[stage], "settings_tried"].iloc[0])
    up, seeds = kept.drop_duplicates("agent")["seeds_up"], kept["seeds"].iloc[0]
    of_seeds = f" (by themselves in {', '.join(map(str, up))} of {seeds} seeds)" if seeds > 1 else ""
    name = f"{family}, {stage}: a push alone, nobody named, turns each agent up (ROUGE-L)"
    ours = f"{int(each.sum())} of {len(each)} agents{of_seeds}; {tried} settings tried"
    return Claim(name, "not tried", ours, str(int(kept["n"].max())), result)


def low_dose(family: str, some: Mapping[str, pd.DataFrame]) -> Claim:
    """Fidelity gained at the least coefficient of the grid, IMAD minus base, agents named."""
    line = _imad_over_base(some["low_dose"], "fidelity")
    gap = interval_text(line["difference"], line["low"], line["high"], 3, signed=True)
    ours = f"gains {line['first']:+.3f} and {line['second']:+.3f}: {gap}{_by_seed(line)}"
    name = f"{family}: IMAD answers more to a small dose (fidelity at {line['coefficient']:g}, named, over base's)"
    return Claim(name, "fidelity rises from 0.5 on", ours, str(int(line["n"])), verdict(line["low"], line["high"]))


def tag_ablation(family: str, table: pd.DataFrame) -> Claim:
    """Probe accuracy after SFT with tags, read in tagged traces, and without, read in untagged ones."""
    nested = (table["layer"].astype(str) == "nested") & (table["labels"] == "true") & (table["debates"] == "personas")
    kept = table[nested & (table["position"] == "last")]
    with_tags = kept[(kept["stage"] == "SFT") & (kept["source"] == "trace")]
    without = kept[(kept["stage"] == "SFT without tags") & (kept["source"] == "untagged")]
    name = f"{family}: without tags in training, agents are less separable (probe, last token)"
    if with_tags.empty or without.empty:
        return Claim(name, "markedly less", "", "", UNTESTED)
    a, b = with_tags.iloc[0], without.iloc[0]
    ours = " against ".join(interval_text(x.accuracy, x.accuracy_low, x.accuracy_high, 3) for x in (a, b))
    result = HOLDS if a.accuracy_low > b.accuracy_high else NOT if a.accuracy_high < b.accuracy_low else OPEN
    return Claim(name, "markedly less", f"{ours} without", str(int(a["n_groups"])), result)


def suppressed(family: str, some: Mapping[str, pd.DataFrame]) -> Claim:
    """Whether a negative coefficient halves the trait where the malicious agent is named, IMAD compared with base.

    Random directions of the same norm may halve it, too: the claim needs a milder coefficient of the agent's vectors. A
    trait that no more than half of the seeds show leaves the claim open.
    """
    table = some["suppression_kept"]
    forced = table[table["context"] == "forced"]
    parts, able = [], {}
    for stage, lines in forced.groupby("stage", sort=False):
        text, able[stage] = _suppression_of(lines)
        parts.append(f"{stage}: {text}")
    if able.get("IMAD") is None:
        result = UNTESTED
    elif _rare(forced, "IMAD"):
        result = OPEN
    elif able["IMAD"]:
        result = OPEN if able.get("base") else HOLDS
    else:
        result = NOT
    name = f"{family}: IMAD's malicious agent can be turned off, the base's cannot"
    return Claim(name, "trait 0 from -3 to -5; base keeps about 1", "; ".join(parts), _n(forced), result)


def _suppression_of(lines: pd.DataFrame) -> tuple[str, bool | None]:
    """How a checkpoint's trait is halved, as text, and whether the agent's vectors are milder than random directions.

    The second is None where too few texts show the trait.
    """
    own = lines["role"] == "vector"
    trait = lines["trait"].iloc[0]
    coefficients, control_coefficients = (lines.loc[rows, "coefficient"].dropna() for rows in (own, ~own))
    mildest, control = _mildest(coefficients), _mildest(control_coefficients)
    ways = []
    if mildest is not None:
        ways.append(f"halved from {mildest:g} on")
        if control is not None:
            ways.append(f"by a random direction from {control:g} on")
    if np.isinf(coefficients).any():
        ways.append("halved by ablation")
        if np.isinf(control_coefficients).any():
            ways.append("by a random direction's, too")
    nothing = "no coefficient halves it" if trait >= SHOWN else "nothing to turn off"
    text = f"trait {trait:.2f}{_where(lines)}, {', '.join(ways) or nothing}"
    milder = mildest is not None and (control is None or mildest > control)
    return text, milder if trait >= SHOWN else None


def _where(lines: pd.DataFrame) -> str:
    """The seeds that show the trait, where some do and some do not."""
    showing, seeds = int(lines["showing"].iloc[0]), int(lines["seeds"].iloc[0])
    return f" in {showing} of {seeds} seeds" if 0 < showing < seeds else ""


def _rare(table: pd.DataFrame, stage: str) -> bool:
    """Whether no more than half of the seeds show the trait."""
    line = table[table["stage"] == stage].iloc[0]
    return bool(2 * line["showing"] <= line["seeds"])


def _n(table: pd.DataFrame) -> str:
    return " to ".join(str(n) for n in dict.fromkeys((int(table["n"].min()), int(table["n"].max()))))


def _mildest(coefficients: pd.Series) -> float | None:
    """The finite coefficient next to 0, of negative ones."""
    finite = coefficients[np.isfinite(coefficients)]
    return None if finite.empty else float(finite.max())


def preserved(family: str, some: Mapping[str, pd.DataFrame]) -> Claim:
    """Accuracy kept where the trait is halved, the better of the two vectors, by adding and by ablation."""
    table = some["suppression_kept"]
    forced = table[(table["context"] == "forced") & (table["role"] == "vector")]
    able = forced.dropna(subset="kept").sort_values("kept", ascending=False)
    parts = []
    for stage in forced["stage"].unique():
        best = able[able["stage"] == stage].groupby("operation").head(1).sort_values("coefficient", ascending=False)
        ways = []
        for row in best.itertuples():
            how = f"at {row.coefficient:g}" if row.operation == "add" else "by ablation"
            ways.append(f"{interval_text(row.kept, row.low, row.high)} {how}")
        parts.append(f"{stage}{_where(forced[forced['stage'] == stage])}: {', '.join(ways) or 'none'}")
    line = able[able["stage"] == "IMAD"].head(1)
    if line.empty:
        result = UNTESTED
    elif _rare(forced, "IMAD"):
        result = OPEN
    else:
        result = verdict(line["low"].iloc[0], line["high"].iloc[0], 0.9)
    name = f"{family}: turning it off leaves accuracy as it was (nine tenths at least)"
    return Claim(name, "flat from -5 to +5", "; ".join(parts), _n(forced), result)
