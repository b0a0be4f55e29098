"""Claims of the paper, each with our measurement, its unit and interval, and a verdict by the rule of `claims.toml`."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from scipy import special

from analysis.inputs import BASE
from analysis.paper.protocol import AT_CONTROLS, CAST, COEFFICIENT, PLANTED_BASE, TAGGED
from analysis.paper.transplant import EXPLICIT
from steerkit.io.files import sha256
from steerkit.stats.format import interval_text
from steerkit.stats.paired import Ratio
from steerkit.stats.seeds import SEED, OverSeeds
from training.evaluate.methods import DEBATES, PLURALITIES
from training.evaluate.results import by_method, difference_of, ratio_of
from training.presets import ON_ANSWERS, SELF_CHECKED

Tables = Mapping[str, Mapping[str, pd.DataFrame]]
RULES = Path(__file__).with_name("claims.toml")
HOLDS, NOT_SPECIFIC, NOT, NOT_SHOWN = "holds", "holds, not specific", "does not hold", "not shown"
UNTESTED = "not testable here"
ALONE, SHUFFLED = "GRPO without debate", "SFT on shuffled turns"
OTHER_GRPO = ("DebateGPT + GRPO", ON_ANSWERS, SELF_CHECKED)
"""The same GRPO after other trainings than SFT on debates: the controls of the claim that the debate helps."""
OTHER_SFT = ("SFT on gold answers", "SFT on right answers")
"""Trainings with other supervision than the debates, without GRPO: shown beside the claim, not judged."""
STEERED = ("base", "SFT", "SFT without tags", "SFT on single turns", "IMAD")
ALPHA = 0.05


@dataclass(frozen=True)
class Rule:
    """The rule of a claim, see `claims.toml`.

    Args:
        text: what is claimed.
        published: the paper's figure (arXiv 2604.24881).
        measure: what is measured.
        effect: the least value that counts.
        control: what must hold of a control, in words; empty without one.
        least: least share of a seed's texts that must have what the claim is about.
        ceiling: an agent whose unsteered score is above it cannot gain, and is left out.
    """

    text: str
    published: str
    measure: str
    effect: float
    control: str = ""
    least: float = 0.0
    ceiling: float = 1.0


@dataclass(frozen=True)
class Claim:
    """One judged claim.

    Args:
        name: family, or family and checkpoint, and what is claimed.
        published: the paper's figure.
        ours: our measurement, with its interval and that of the control.
        by_seed: the measurement of each training seed.
        unit: of the interval and how many of it.
        verdict: one of `HOLDS`, `NOT_SPECIFIC`, `NOT`, `NOT_SHOWN`, `UNTESTED`.
    """

    name: str
    published: str
    ours: str
    by_seed: str
    unit: str
    verdict: str


def rules(path: Path = RULES) -> dict[str, Rule]:
    """The rules by the claims' short names."""
    return {name: Rule(**fields) for name, fields in tomllib.loads(path.read_text(encoding="utf-8")).items()}


def rules_sha256() -> str:
    """A hash of the rules and of the code that judges by them; with another one, claims may be judged otherwise."""
    return sha256(sha256(RULES) + sha256(Path(__file__)))


def verdict(
    low: float, high: float, effect: float, seeds: int, controls: Sequence[float] = (), above: float = 0.0
) -> str:
    """The verdict on an interval over training seeds.

    One training seed says nothing about others. Equal values of all seeds have no spread to judge by: they count once
    that many equal signs are rare (`2^(1 - seeds) <= 0.05`, six seeds).

    Args:
        low: lower end of the measure's interval.
        high: upper end.
        effect: the least value that counts.
        seeds: training seeds that it is over.
        controls: lower ends of the intervals of what must be above the controls; NaN where a control has none.
        above: what each of them must exceed.
    """
    if math.isnan(low) or math.isnan(high) or seeds < 2:
        return UNTESTED
    if low == high and 2.0 ** (1 - seeds) > ALPHA:
        return NOT_SHOWN
    if low < effect:
        return NOT if high < effect else NOT_SHOWN
    if any(math.isnan(end) for end in controls):
        return UNTESTED
    return HOLDS if all(end > above for end in controls) else NOT_SPECIFIC


def claims(rows: pd.DataFrame, tables: Tables) -> list[Claim]:
    """All claims, by family.

    Args:
        rows: the questions of all runs, see `analysis.paper.main_table.read_runs`.
        tables: tables over the seeds by family, see `analysis.paper.pooling.collect_tables`.
    """
    known = rules()
    listed = []
    for family, part in rows[rows["decoding"] == "sampled"].groupby("family", sort=False):
        listed += of_answers(str(family), part, known)
    for family, some in tables.items():
        if "protocol" in some:
            listed += [of_protocol(family, some["protocol"], name, known[name]) for name in ("area", "above")]
        if "gains" in some:
            there = set(some["gains"]["stage"])
            for stage in (stage for stage in STEERED if stage in there):
                for name, score in (("steered", "rouge_l"), ("speaks", "speaks")):
                    if score in set(some["gains"]["score"]):
                        listed.append(steered(family, some["gains"], stage, score, known[name]))
        if "separability" in some:
            listed.append(tags(family, some.get("tag_ablation"), known["tags"]))
        if "transplant" in some:
            listed.append(transplant(family, some["transplant"], known["transplant"]))
        if "suppression_kept" in some:
            listed += [suppressed(family, some["suppression_kept"], known["suppressed"])]
            listed += [preserved(family, some["suppression_kept"], known["preserved"])]
        if "malicious_fall" in some:
            listed.append(malicious(family, some["malicious_fall"], known["malicious"]))
    return listed


def of_answers(family: str, rows: pd.DataFrame, known: Mapping[str, Rule]) -> list[Claim]:
    """Claims about tokens and accuracy."""
    correct = by_method(rows, "correct")
    seeds = correct.index.get_level_values("seed").nunique()
    saved, each, means = _saved(rows.assign(tokens=rows["tokens_in"] + rows["tokens_out"]))
    new, _, new_means = _saved(rows.assign(tokens=rows["tokens_out"]))
    rule = known["tokens"]
    ours = f"{_percent(saved)} ({means}); new tokens alone {_percent(new)} ({new_means})"
    result = verdict(saved.low, saved.high, rule.effect, seeds)
    found = [Claim(f"{family}: {rule.text}", rule.published, ours, each, _unit(seeds, len(correct)), result)]
    debate = PLURALITIES[0] if PLURALITIES[0] in correct else DEBATES[0]
    pairs = {"accuracy": ("IMAD", debate), "debate": ("IMAD", ALONE), "order": ("SFT", SHUFFLED)}
    for name, (first, second) in pairs.items():
        rule = known[name]
        if first not in correct or second not in correct:
            missing = f"{second if first in correct else first} was not run"
            found.append(Claim(f"{family}: {rule.text}", rule.published, missing, "", "", UNTESTED))
            continue
        gap = difference_of(correct, first, second)
        ours = f"{_points(gap)} ({first} - {second})"
        if name == "accuracy" and debate != DEBATES[0]:
            ours += f"; {_points(difference_of(correct, first, DEBATES[0]))} against a strict majority"
        controls: list[float] = []
        if name == "debate":
            others = {other: difference_of(correct, first, other) for other in OTHER_GRPO if other in correct}
            controls = [control.low for control in others.values()] or [math.nan]
            ours += "".join(f"; {_points(control)} over {other}" for other, control in others.items())
            ours += "" if others else f"; {OTHER_GRPO[0]} was not run"
            beside = [other for other in OTHER_SFT if other in correct]
            ours += "".join(f"; {_points(difference_of(correct, first, other))} over {other}" for other in beside)
        result = verdict(gap.low, gap.high, rule.effect, _seeds_of(gap), controls, rule.effect)
        unit = _unit(_seeds_of(gap), gap.n)
        found.append(Claim(f"{family}: {rule.text}", rule.published, ours, _seeds(gap.by_seed, 100), unit, result))
    return found


def _saved(rows: pd.DataFrame) -> tuple[Ratio, str, str]:
    """The share of `tokens` that IMAD saves, over seeds and seed by seed, and both means."""
    tokens = by_method(rows, "tokens")
    share = ratio_of(tokens, "IMAD", DEBATES[0])
    each = 1 - tokens["IMAD"].groupby(level="seed").mean() / tokens[DEBATES[0]].groupby(level="seed").mean()
    means = f"{tokens['IMAD'].mean():.0f} against {tokens[DEBATES[0]].mean():.0f} tokens"
    return Ratio(1 - share.value, 1 - share.high, 1 - share.low, share.n), _seeds(each), means


def of_protocol(family: str, protocol: pd.DataFrame, measure: str, rule: Rule) -> Claim:
    """An area of the paper's protocol, IMAD minus base, and at IMAD the area over random directions.

    It can be judged where the protocol finds planted directions. The area above coefficient 0 can be judged where there
    is room: the base with its own prompt, which wrote the references, has a larger area than IMAD without a push.

    Args:
        family: the family.
        protocol: see `analysis.paper.pooling.pool_protocol`.
        measure: `area`, or `above`: the area above its value at coefficient 0.
        rule: of the claim.
    """
    table = protocol[protocol["score"] == "rouge_l"]
    imad = table[(table["stage"] == "IMAD") & (table["context"] == TAGGED)]
    line = imad[(imad["grid"] == COEFFICIENT) & (imad["measure"] == f"{measure} over base")].iloc[0]
    # Where the controls have fewer coefficients, there is a grid of these alone.
    grid = AT_CONTROLS if (table["grid"] == AT_CONTROLS).any() else COEFFICIENT
    at = imad[imad["grid"] == grid].set_index("measure")
    over = at.loc["area over random"]
    ours = f"{_number(line)}; at IMAD over random directions {_number(over)}"
    if "own - random, over base" in at.index:
        ours += f", minus the same at the base {_number(at.loc['own - random, over base'])}"
    result = verdict(line["low"], line["high"], rule.effect, _seeds_of(line), [over["low"]], rule.effect)
    planted = table[(table["stage"] == PLANTED_BASE) & (table["grid"] == grid)].set_index("measure")
    power = planted.loc["area over random"] if len(planted) else None
    if power is None or not power["low"] >= rule.effect:
        result = UNTESTED
    ours += "; planted directions " + ("were not tried" if power is None else f"over random {_number(power)}")
    own_prompt = table[(table["stage"] == BASE) & (table["context"] == CAST) & (table["grid"] == COEFFICIENT)]
    if measure == "above" and len(own_prompt):
        imad_0 = imad[imad["grid"] == COEFFICIENT].set_index("measure").loc["at strength 0", "value"]
        room = own_prompt.set_index("measure").loc["at strength 0", "value"] - imad_0
        ours += f"; room at IMAD {room:+.3f}"
        result = UNTESTED if room < rule.effect else result
    return Claim(f"{family}: {rule.text}", rule.published, ours, line["by_seed"], _unit_of(line), result)


def steered(family: str, gain: pd.DataFrame, stage: str, score: str, rule: Rule) -> Claim:
    """The agents' gains over coefficient 0 and over random directions, in contexts that name no agent.

    All agents must gain, so the least gain is judged, without a correction; one of several agents that does not gain
    may be so by chance, so for `does not hold` the upper ends are those at a level of 5 % over the number of agents.
    """
    at_stage = gain[(gain["stage"] == stage) & ~gain["identity"].astype(bool)]
    over = {kind: part.set_index("agent") for kind, part in at_stage[at_stage["score"] == score].groupby("over")}
    every = over["coefficient 0"]
    first = at_stage[(at_stage["score"] == "speaks") & (at_stage["over"] == "coefficient 0")].set_index("agent")
    anyway = first["unsteered"] if len(first) else every["unsteered"]
    played = [agent for agent in every.index if anyway[agent] > rule.ceiling]
    zero = every.drop(index=played)
    random = over["random"].drop(index=played) if "random" in over else None
    name = f"{family}, {stage}: {rule.text}"
    left_out = "; ".join(f"agent {one} speaks first in {anyway[one]:.2f} unsteered, left out" for one in played)
    if zero.empty:
        return Claim(name, rule.published, left_out, "", _unit_of(every.iloc[0]), UNTESTED)
    least = zero["low"].idxmin()
    seeds = _seeds_of(zero.loc[least])
    ours = "; ".join(f"agent {agent} {_number(zero.loc[agent])}" for agent in zero.index)
    controls = [math.nan]
    if random is not None:
        ours += "; over random " + ", ".join(_number(random.loc[agent]) for agent in zero.index)
        controls = random.loc[zero.index, "low"].tolist()
    ours += f"; {left_out}" if left_out else ""
    wider = [_upper_end(line, len(zero)) for _, line in zero.iterrows()]
    ends = zero["low"].tolist() + wider
    low, high = (math.nan, math.nan) if any(map(math.isnan, ends)) else (zero["low"].min(), min(wider))
    result = verdict(low, max(low, high), rule.effect, seeds, controls)
    each = f"agent {least}: {zero.loc[least, 'by_seed']}"
    return Claim(name, rule.published, ours, each, _unit_of(zero.iloc[0]), result)


def _upper_end(line: pd.Series, tests: int) -> float:
    """The upper end of an interval over seeds at a level of 5 % over the number of tests."""
    seeds = _seeds_of(line)
    if seeds < 2:
        return float(line["high"])
    wide, plain = (float(special.stdtrit(seeds - 1, 1 - ALPHA / 2 / number)) for number in (tests, 1))
    centre = (line["low"] + line["high"]) / 2
    return float(centre + (line["high"] - centre) * wide / plain)


def tags(family: str, table: pd.DataFrame | None, rule: Rule) -> Claim:
    """Probe accuracy after SFT with tags minus that without."""
    name = f"{family}: {rule.text}"
    if table is None:
        return Claim(name, rule.published, "SFT without tags was not run", "", "", UNTESTED)
    line = table.iloc[0]
    result = verdict(line["low"], line["high"], rule.effect, _seeds_of(line))
    ours = f"{_number(line)} ({line['with_tags']:.3f} - {line['without']:.3f})"
    return Claim(name, rule.published, ours, line["by_seed"], _unit_of(line), result)


def transplant(family: str, table: pd.DataFrame, rule: Rule) -> Claim:
    """The share of answers that change with another question's first round, over that of a repeated continuation."""
    some = table[table["stage"] == "IMAD"]
    line = some.iloc[0]
    share = (
        f"{line['share_with_round_1']:.0%} of the texts have a round-1 turn, at least {rule.least:.0%} in "
        f"{line['seeds']} of {line['runs']} training seeds"
    )
    explicit = interval_text(line["explicit"], line["explicit_low"], line["explicit_high"], 2, signed=True)
    follows = interval_text(line["follows"], line["follows_low"], line["follows_high"], 3, signed=True)
    ours = f"{_number(line)}; follows, minus chance: {follows}; {share}; in explicit debates {explicit}"
    result = verdict(line["low"], line["high"], rule.effect, _seeds_of(line))
    explicit_debate = table[table["stage"] == EXPLICIT]
    unread = max([line["missing"], *explicit_debate["missing"]])
    ours += f"; up to {unread:.0%} of the answers were not read"
    if not line["explicit_low"] >= rule.effect or not unread <= 1 - rule.least:
        result = UNTESTED
    return Claim(f"{family}: {rule.text}", rule.published, ours, line["by_seed"], _unit_of(line), result)


def _forced(kept: pd.DataFrame) -> pd.DataFrame:
    return kept[kept["context"] == "forced"].set_index("stage")


def suppressed(family: str, kept: pd.DataFrame, rule: Rule) -> Claim:
    """The share of the trait that the frozen setting removes at IMAD, the agent named."""
    table = _forced(kept)
    parts = [
        f"{stage}: trait {line['trait_0']:.2f} to {line['trait']:.2f}, removed {_of(line, 'removed')}, over random "
        f"{_of(line, 'over_random', True)}, over matched {_of(line, 'over_matched', True)}"
        for stage, line in table.iterrows()
    ]
    line = table.loc["IMAD"]
    controls = [line["over_random_low"], line["over_matched_low"]]
    result = verdict(line["removed_low"], line["removed_high"], rule.effect, _seeds_of(line), controls)
    parts.append(f"IMAD's texts show the trait in {line['shown']} of {line['runs']} training seeds")
    if line["shown"] < 2 or not line["trait_0"] >= rule.least:
        result = UNTESTED
    name = f"{family}: {rule.text}"
    return Claim(name, rule.published, "; ".join(parts), str(line["by_seed"]), _unit_of(line), result)


def preserved(family: str, kept: pd.DataFrame, rule: Rule) -> Claim:
    """Accuracy that the frozen setting keeps at IMAD, the agent named."""
    table = _forced(kept)
    parts = [
        f"{stage}: {interval_text(line['kept'], line['kept_low'], line['kept_high'])}"
        for stage, line in table.iterrows()
    ]
    line = table.loc["IMAD"]
    result = verdict(line["kept_low"], line["kept_high"], rule.effect, int(line["halved"]))
    parts.append(f"IMAD's setting halves the trait in {line['halved']} of {line['runs']} training seeds")
    parts.append(f"the answer of the given text is right in {line['right_in_context']:.2f}")
    if line["halved"] < 2 or not line["trait_0"] >= rule.least:
        result = UNTESTED
    name = f"{family}: {rule.text}"
    return Claim(name, rule.published, "; ".join(parts), str(line["kept_by_seed"]), _unit_of(line), result)


def malicious(family: str, table: pd.DataFrame, rule: Rule) -> Claim:
    """The paper's experiment: the fall of the named malicious agent's trait under negative coefficients."""
    forced = table[table["context"] == "forced"].set_index(["stage", "measure"])
    line, over, more = (forced.loc["IMAD", name] for name in ("fall", "fall over random", "fall over the base's"))
    base = forced.loc[BASE, "fall"]
    ours = (
        f"trait {line['zero']:.2f}, fall {_number(line)}; over random {_number(over)}; at the base {_number(base)}, "
        f"IMAD's more by {_number(more)}"
    )
    result = verdict(line["low"], line["high"], rule.effect, _seeds_of(line), [over["low"], more["low"]])
    if not line["zero"] >= rule.least:
        result = UNTESTED
    return Claim(f"{family}: {rule.text}", rule.published, ours, line["by_seed"], _unit_of(line), result)


def _of(line: pd.Series, name: str, signed: bool = False) -> str:
    return interval_text(line[name], line[f"{name}_low"], line[f"{name}_high"], signed=signed)


def _number(line: pd.Series) -> str:
    """The first of the known measures of a row, with its interval."""
    value = next(line[name] for name in ("gain", "difference", "value") if name in line)
    if math.isnan(line["low"]):  # one training seed, or none
        return f"{value:+.3f}"
    return interval_text(value, line["low"], line["high"], 3, signed=True)


def _percent(share: Ratio) -> str:
    return interval_text(100 * share.value, 100 * share.low, 100 * share.high, 1) + " %"


def _points(gap: object) -> str:
    mean, low, high = (100 * getattr(gap, name) for name in ("mean", "low", "high"))
    return interval_text(mean, low, high, 1, signed=True) + " points"


def _seeds(values: Sequence[float] | pd.Series, scale: float = 1.0) -> str:
    return " ".join(f"{scale * value:.3g}" for value in values)


def _seeds_of(found: pd.Series | OverSeeds) -> int:
    """Training seeds that an interval is over: 1 for one over questions or controls."""
    unit, seeds = (found.unit, found.seeds) if isinstance(found, OverSeeds) else (found["unit"], found["seeds"])
    return int(seeds) if unit == SEED else 1


def _unit(seeds: int, n: int) -> str:
    return f"{seeds} training seeds" if seeds > 1 else f"{n} questions of one training seed"


def _unit_of(line: pd.Series) -> str:
    if line["unit"] == SEED:
        return f"{line['seeds']:.0f} training seeds" if line["seeds"] > 1 else "one training seed"
    return f"{line['n']:.0f} questions of one training seed" if "n" in line else "questions of one training seed"
