"""Tables of several training seeds as one: means over the seeds, with intervals whose unit is the training seed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inputs import BASE
from analysis.paper.claims import rules
from analysis.paper.protocol import CAST, CONTROLS, OWN, RANDOM, TAGGED
from analysis.paper.transplant import EXPLICIT
from analysis.probes.erased import LEAST_GAIN
from steerkit.io.tables import read_table
from steerkit.stats.multiple import holm
from steerkit.stats.paired import ratio
from steerkit.stats.seeds import QUESTION, SEED, over_seeds, seed_interval
from training.evaluate.results import listed

Runs = Mapping[int, pd.DataFrame]
"""A table of each training seed."""
ZERO, CONTROL = "coefficient 0", "control direction (one seed)"
FOLLOWS = ("follows", "follows_low", "follows_high")
LEAST_PAIRS = 20
"""With fewer pairs of debates, a seed says nothing about patched rounds."""
SHOWN_OF_ONE_SEED = ("cosines", "plane", "reliability")
OF_FIRST_SEED = ("known_texts", "agreement")
DOWN = -3.0
"""The paper reports that the malicious agent's trait is gone from this coefficient on."""


def over_runs(
    runs: Runs,
    keys: Sequence[str],
    value: str,
    ends: tuple[str, str] = ("low", "high"),
    means: Sequence[str] = (),
    lists: Sequence[str] = (),
) -> pd.DataFrame:
    """A row per key: the mean of a column over training seeds, with Student's t interval over the seeds.

    With one seed, the row is that seed's, with its own interval: over questions, or over controls where the value is a
    difference to controls. Of several seeds one alone with a value has no interval.

    Args:
        runs: a table per seed, with at most one row per key.
        keys: columns that name a row.
        value: the column.
        ends: columns of its interval within a seed, which have the interval's ends in the result.
        means: further columns of numbers, whose means over the seeds are kept.
        lists: further columns whose values are kept seed by seed, as text.

    Returns:
        Columns keys, value, ends, p, unit (of the interval), seeds, by_seed (the values, in the order of the seeds),
        means, and lists.

    Raises:
        ValueError: several rows of a seed have one key.
    """
    table = pd.concat([run.assign(seed=seed) for seed, run in sorted(runs.items())], ignore_index=True)
    if table.duplicated([*keys, "seed"]).any():
        raise ValueError(f"expected one row per seed and {list(keys)}; got several. Name the rows by further columns.")
    rows = []
    for key, part in table.groupby(list(keys), sort=False, dropna=False):
        named = dict(zip(keys, key, strict=True))
        found = over_seeds(part[value].to_numpy(float), part["seed"].tolist(), of=len(runs))
        low, high, p, unit = found.low, found.high, found.p, SEED
        if len(runs) == 1:
            only = part.iloc[0]
            low, high, p = only[ends[0]], only[ends[1]], only.get("p", float("nan"))
            unit = QUESTION if named.get("over", ZERO) == ZERO else CONTROL
        rows.append(
            {
                **named,
                value: found.mean,
                ends[0]: low,
                ends[1]: high,
                "p": p,
                "unit": unit,
                "seeds": found.seeds,
                "by_seed": listed(found.by_seed),
                **{name: part[name].mean() for name in means},
                **{name: listed(part[name]) for name in lists},
            }
        )
    columns = [*keys, value, *ends, "p", "unit", "seeds", "by_seed", *means, *lists]
    return pd.DataFrame(rows, columns=columns)


def bands_over_runs(runs: Runs, keys: Sequence[str], means: Sequence[str]) -> pd.DataFrame:
    """A row per key of the controls' curves: mean over seeds of their mean and of the band of a further control.

    Args:
        runs: a table per seed, with at most one row per key, and the columns mean, low and high.
        keys: columns that name a row.
        means: further columns whose means are kept.
    """
    table = pd.concat([run.assign(seed=seed) for seed, run in sorted(runs.items())], ignore_index=True)
    grouped = table.groupby(list(keys), sort=False, dropna=False)
    found = grouped[["mean", "low", "high", *means]].mean()
    each = grouped["mean"].apply(listed).rename("by_seed")
    seeds = grouped["seed"].nunique().rename("seeds")
    return pd.concat([found, seeds, each], axis=1).reset_index().assign(p=float("nan"), unit=CONTROL)


def curves_over_runs(runs: Runs, keys: Sequence[str], means: Sequence[str]) -> pd.DataFrame:
    """Curves of vectors with intervals over the seeds, and of controls with the mean band of a further control.

    Args:
        runs: a table per seed, with the columns role, mean, low and high.
        keys: columns that name a row.
        means: further columns whose means are kept.
    """
    own = {seed: run[run["role"] == "vector"] for seed, run in runs.items()}
    controls = {seed: run[run["role"] != "vector"] for seed, run in runs.items()}
    parts = [over_runs(own, keys, "mean", means=means)]
    if any(len(run) for run in controls.values()):
        parts.append(bands_over_runs(controls, keys, means))
    return within_range(pd.concat(parts, ignore_index=True))


RANGES = {**dict.fromkeys(("rouge_l", "speaks", "trait", "accuracy"), (0.0, 1.0)), "perplexity": (1.0, np.inf)}
"""What a mean of a score can be."""


def within_range(table: pd.DataFrame, ends: Sequence[str] = ("low", "high")) -> pd.DataFrame:
    """A table whose intervals of means of a score are cut to what the score can be; differences are not cut."""
    low, high = (table["score"].map({name: one[end] for name, one in RANGES.items()}) for end in (0, 1))
    return table.assign(**{end: table[end].clip(low.fillna(-np.inf), high.fillna(np.inf)) for end in ends})


def ratio_over_runs(runs: Runs, keys: Sequence[str], numerator: str, denominator: str, name: str) -> pd.DataFrame:
    """A row per key: the ratio of two columns' means over training seeds, with Fieller's interval over the seeds.

    Args:
        runs: a table per seed, with at most one row per key and, for a single seed, the columns `name`, `name_low`,
            `name_high` with the interval over its questions. Of several seeds one alone with a value has no interval.
        keys: columns that name a row.
        numerator: a column of means over questions.
        denominator: another one.
        name: of the ratio's column.

    Returns:
        Columns keys, name, name_low, name_high, unit, seeds, by_seed.
    """
    table = pd.concat([run.assign(seed=seed) for seed, run in sorted(runs.items())], ignore_index=True)
    rows = []
    for key, part in table.groupby(list(keys), sort=False, dropna=False):
        there = part[part[numerator].notna() & part[denominator].notna()]
        line = {**dict(zip(keys, key, strict=True)), "seeds": len(there)}
        if len(runs) == 1:
            only = part.iloc[0]
            value, low, high = only[name], only[f"{name}_low"], only[f"{name}_high"]
        elif there.empty:
            value = low = high = float("nan")
        else:
            found = ratio(there[numerator], there[denominator])
            value, low, high = found.value, found.low, found.high
        each = (there[numerator] / there[denominator]).tolist()
        unit = QUESTION if len(runs) == 1 else SEED
        rows.append(
            {**line, name: value, f"{name}_low": low, f"{name}_high": high, "unit": unit, "by_seed": listed(each)}
        )
    columns = [*keys, "seeds", name, f"{name}_low", f"{name}_high", "unit", "by_seed"]
    return pd.DataFrame(rows, columns=columns)


def seeds_of(folder: Path, only: Collection[int] = ()) -> dict[int, Path]:
    """The analysed seeds of a family, by number; with `only`, these of them."""
    found = {int(path.name.removeprefix("seed-")): path for path in sorted(folder.glob("seed-*"))}
    return {seed: path for seed, path in found.items() if not only or seed in only}


def collect_tables(folder: Path, only: Collection[int] = ()) -> dict[str, dict[str, pd.DataFrame]]:
    """All tables of a reproduction over its seeds, by family and name; with `only`, over these seeds.

    A table is over the seeds in which its analysis was run.
    """
    tables: dict[str, dict[str, pd.DataFrame]] = {}
    for family in sorted(path for path in (folder / "analysis").iterdir() if path.is_dir()):
        seeds = seeds_of(family, only)
        if not seeds:
            continue
        of_family = dict[str, pd.DataFrame]()
        for file, pool in POOLED.items():
            if analysed := {seed: path for seed, path in seeds.items() if (path / file).is_file()}:
                of_family |= pool(analysed)
        for name in OF_FIRST_SEED:
            if there := [path for path in seeds.values() if (path / f"{name}.csv").is_file()]:
                of_family[name] = read_table(there[0] / f"{name}.csv")[0]
        tables[family.name] = of_family
    return tables


def read_all(seeds: Mapping[int, Path], name: str) -> dict[int, pd.DataFrame]:
    """A table of each seed."""
    return {seed: read_table(path / f"{name}.csv")[0] for seed, path in seeds.items()}


def rounded(table: pd.DataFrame, digits: int) -> pd.DataFrame:
    """A table whose numbers have so many significant digits."""
    numbers = table.select_dtypes("float").columns
    return table.assign(**{name: [float(f"{value:.{digits}g}") for value in table[name]] for name in numbers})


def mean_areas(table: pd.DataFrame) -> pd.DataFrame:
    """Areas of the paper's protocol, the mean over the directions of a kind: a row per question."""
    keys = ["stage", "context", "score", "grid", "kind", "question"]
    return table.groupby(keys, sort=False)[["area", "above"]].mean().reset_index()


def pool_agents(seeds: Mapping[int, Path]) -> dict[str, pd.DataFrame]:
    """Curves, gains at the frozen settings, and differences between checkpoints, over the seeds of a family."""
    place = ["score", "identity", "stage"]
    gain_keys = [*place, "agent", "over"]
    gains = over_runs(read_all(seeds, "gains"), gain_keys, "gain", means=("n", "k", "unsteered"), lists=("p_rank",))
    known = gains[gains["p"].notna()]
    gains["p_holm"] = known.groupby([*place, "over"])["p"].transform(lambda p: holm(p.to_numpy()))
    curves = {seed: table[table["score"] == "rouge_l"] for seed, table in read_all(seeds, "curves").items()}
    curve_keys = [*place, "agent", "kind", "role", "coefficient"]
    curve = curves_over_runs(curves, curve_keys, ("relative_dose", "n", "k"))
    ends = ("area_low", "area_high")
    areas = {seed: table.drop_duplicates([*curve_keys[:-1]]) for seed, table in curves.items()}
    area = within_range(over_runs(areas, curve_keys[:-1], "area", ends), ends)
    area = area.drop(columns=["p", "unit", "seeds", "by_seed"])
    tables = {"gains": gains, "curves": curve.merge(area, on=curve_keys[:-1], how="left", validate="many_to_one")}
    for kind in ("stage_differences", "low_dose"):
        keys = [*place, "minus", "agent"]
        extra = ("first", "second", "n", *(("coefficient",) if kind == "low_dose" else ()))
        tables[kind] = over_runs(read_all(seeds, kind), keys, "difference", means=extra)
    one = next(iter(seeds.values()))
    for kind in SHOWN_OF_ONE_SEED:
        tables[kind] = read_table(one / f"{kind}.csv")[0]
    cosines = pd.concat(read_all(seeds, "checkpoint_cosines").values())
    keys = ["agent", "layer", "stage", "other"]
    tables["checkpoint_cosines"] = cosines.groupby(keys, sort=False)["cosine"].mean().reset_index()
    choices = [table.assign(seed=seed) for seed, table in read_all(seeds, "choice").items()]
    tables["choice"] = pd.concat(choices, ignore_index=True)
    return tables


def pool_probes(seeds: Mapping[int, Path]) -> dict[str, pd.DataFrame]:
    """Probe accuracies over the seeds, and, where both trainings are there, what tags in training change."""
    keys = ["stage", "debates", "source", "position", "layer", "features", "labels"]
    ends = ("accuracy_low", "accuracy_high")
    table = over_runs(read_all(seeds, "separability"), keys, "accuracy", ends, ("majority", "n", "n_groups"))
    tables = {"separability": table.assign(**{end: table[end].clip(0, 1) for end in ends})}
    ablation = tag_ablation(seeds)
    return tables | ({"tag_ablation": ablation} if len(ablation) else {})


def tag_ablation(seeds: Mapping[int, Path]) -> pd.DataFrame:
    """Probe accuracy after SFT with tags, read in tagged traces, minus that after SFT without, in untagged ones.

    A row with value, low, high, p, unit, seeds, by_seed, with_tags and without (means), over the seeds that have both
    stages; empty where none has. With one seed there is no interval.
    """
    gaps, sides = [], []
    for table in read_all(seeds, "separability").values():
        nested = (table["layer"].astype(str) == "nested") & (table["labels"] == "true") & (table["position"] == "last")
        kept = table[nested & (table["debates"] == "personas")].set_index(["stage", "source"])["accuracy"]
        pair = (("SFT", "trace"), ("SFT without tags", "untagged"))
        if not all(key in kept.index for key in pair):
            continue
        sides.append([float(kept[key]) for key in pair])
        gaps.append(sides[-1][0] - sides[-1][1])
    if not gaps:
        return pd.DataFrame()
    found = seed_interval(gaps)
    means = pd.DataFrame(sides, columns=["with_tags", "without"]).mean()
    line = {"value": found.mean, "low": found.low, "high": found.high, "p": found.p, "unit": SEED, "seeds": len(gaps)}
    return pd.DataFrame([{**line, "by_seed": listed(gaps), **means}])


def pool_protocol(seeds: Mapping[int, Path]) -> pd.DataFrame:
    """Areas of the paper's protocol over the seeds, against the base and against the controls, questions paired.

    Returns:
        A row per stage, context, score, grid and measure: value, low, high, p, unit, seeds, by_seed, n (questions).
        Measures: `area, KIND` and `area above strength 0, KIND` of each kind of directions; `at strength 0`; `area over
        base` and `above over base` (of the agents' own directions, minus that at the base in the same context); `area
        over random` and `area over shuffled` (minus the mean control; with one seed its interval is that of a further
        control), with p_rank by seed; and `own - random, over base` (that difference minus the base's).
    """
    alone = len(seeds) == 1
    one: pd.DataFrame = read_table(next(iter(seeds.values())) / "protocol" / "protocol.csv")[0]
    runs = {seed: mean_areas(read_table(path / "protocol" / "areas.parquet")[0]) for seed, path in seeds.items()}
    table = pd.concat([run.assign(seed=seed) for seed, run in sorted(runs.items())], ignore_index=True)
    place, unit = ["stage", "context", "score", "grid"], ["seed", "question"]
    rows = []

    def add(key: Mapping[str, Any], measure: str, values: pd.Series) -> None:
        of_seed, questions = (values.index.get_level_values(level).tolist() for level in unit)
        found = over_seeds(values.to_numpy(float), of_seed, questions, of=len(seeds))
        ends = {"low": found.low, "high": found.high, "p": found.p, "unit": found.unit, "seeds": found.seeds}
        rows.append(
            {**key, "measure": measure, "value": found.mean, **ends, "by_seed": listed(found.by_seed), "n": found.n}
        )

    for values, part in table.groupby(place, sort=False):
        key = dict(zip(place, values, strict=True))
        by_kind = {
            kind: some.groupby(unit)[["area", "above"]].mean() for kind, some in part.groupby("kind", sort=False)
        }
        for kind, means in by_kind.items():
            add(key, f"area, {kind}", means["area"])
            add(key, f"area above strength 0, {kind}", means["above"])
        leading = next(kind for kind in by_kind if kind not in CONTROLS)
        add(key, "at strength 0", by_kind[leading]["area"] - by_kind[leading]["above"])
        for control in CONTROLS:
            if control in by_kind and not alone:
                add(key, f"area over {control}", by_kind[leading]["area"] - by_kind[control]["area"])
            elif control in by_kind:
                same = np.logical_and.reduce([one[name] == value for name, value in key.items()])
                line = one[same & (one["kind"] == leading) & (one["over"] == control)].iloc[0]
                ends = {name: line[name] for name in ("low", "high", "p", "n")}
                about = {"unit": CONTROL, "seeds": 1, "by_seed": listed([line["gain"]])}
                rows.append({**key, "measure": f"area over {control}", "value": line["gain"], **ends, **about})
        if leading != OWN:
            continue
        for context, name in ((TAGGED, "over base"), (CAST, "over base with its own prompt")):
            same = (table["score"] == key["score"]) & (table["grid"] == key["grid"]) & (table["kind"] == OWN)
            base = table[same & (table["stage"] == BASE) & (table["context"] == context)]
            if len(base) and key["stage"] != BASE:
                for measure in ("area", "above"):
                    add(key, f"{measure} {name}", by_kind[OWN][measure] - base.groupby(unit)[measure].mean())
                random = (table["score"] == key["score"]) & (table["grid"] == key["grid"]) & (table["kind"] == RANDOM)
                random &= (table["stage"] == BASE) & (table["context"] == context)
                if RANDOM in by_kind and random.any():
                    at_base = base.groupby(unit)["area"].mean() - table[random].groupby(unit)["area"].mean()
                    add(key, f"own - random, {name}", by_kind[OWN]["area"] - by_kind[RANDOM]["area"] - at_base)
    ranks = pd.concat(read_all(seeds, "protocol/protocol").values())
    compared = ranks[ranks["over"].notna()]
    by_rank = compared.groupby([*place, "over"], sort=False)["p_rank"].apply(listed)
    found = pd.DataFrame(rows)
    means = found["measure"].str.fullmatch(r"area, \w+|at strength 0")
    found = found.mask(means, within_range(found))
    found["p_rank"] = [
        by_rank.get((row.stage, row.context, row.score, row.grid, row.measure.removeprefix("area over ")), "")
        for row in found.itertuples()
    ]
    return found


def pool_transplant(seeds: Mapping[int, Path]) -> pd.DataFrame:
    """What a transplanted first round does to answers, over the seeds.

    Returns:
        A row per stage: value (the share of answers that change, minus that after the own prefix, among those read
        after both), low, high, p, unit, seeds, by_seed, n; the same of follows minus chance as follows, follows_low,
        follows_high; means of changed, changed_again, changed_resampled, the shares of answers that were not read
        (missing, missing_again, missing_resampled), chance, right and right_again, over the seeds in which enough texts
        have a round-1 turn (`least` of the claim); share_with_round_1, share_read (of the own answers), agents (mean
        number in round 1) and share_agreed (the consensus follows round 1) over all seeds; runs (all seeds); and
        explicit, explicit_low and explicit_high: the value in explicit debates.
    """
    least = rules()["transplant"].least
    runs, shares = (
        {seed: read_table(path / "transplant" / f"{name}.csv")[0] for seed, path in seeds.items()}
        for name in ("effects", "shares")
    )
    table, share = (
        pd.concat([run.assign(seed=seed) for seed, run in sorted(each.items())], ignore_index=True)
        for each in (runs, shares)
    )
    arms = ("", "_again", "_resampled")
    names = [*(f"{name}{arm}" for name in ("changed", "missing") for arm in arms), "chance", "right", "right_again"]
    rows = []
    for stage, of_stage in share.groupby("stage", sort=False):
        enough = of_stage.loc[of_stage["share_with_round_1"] >= least, "seed"]
        part = table[(table["stage"] == stage) & table["seed"].isin(enough)]
        kept = ["share_with_round_1", "share_read", "agents", "share_agreed"]
        line = {"stage": stage, "runs": len(runs), **of_stage[kept].mean()}
        read = part[part["effect"].notna()]
        if read.empty:
            blank = dict.fromkeys(("value", "low", "high", "p", *FOLLOWS, *names), float("nan"))
            rows.append({**line, **blank, "unit": SEED, "seeds": 0, "by_seed": "", "n": 0})
            continue
        found = over_seeds(
            read["effect"].to_numpy(float), read["seed"].tolist(), read["question"].tolist(), of=len(runs)
        )
        ends = {"low": found.low, "high": found.high, "p": found.p, "unit": found.unit, "seeds": found.seeds}
        known = part[part["follows"].notna()]
        above = (known["follows"] - known["chance"]).to_numpy(float)
        follows = over_seeds(above, known["seed"].tolist(), known["question"].tolist(), of=len(runs))
        ends |= dict(zip(FOLLOWS, (follows.mean, follows.low, follows.high), strict=True))
        means = part.groupby("seed")[names].mean().mean()
        rows.append({**line, "value": found.mean, **ends, "by_seed": listed(found.by_seed), "n": found.n, **means})
    nan = dict.fromkeys(("value", "low", "high"), float("nan"))
    explicit = next((row for row in rows if row["stage"] == EXPLICIT), nan)
    ends = {f"explicit{end}": explicit[name] for end, name in (("", "value"), ("_low", "low"), ("_high", "high"))}
    return pd.DataFrame(rows).assign(**ends)


def pool_suppression(seeds: Mapping[int, Path]) -> dict[str, pd.DataFrame]:
    """Curves, and what the choice on validation does to the trait and to accuracy on test, over the seeds.

    `suppression_kept` has per stage and context: removed (of the trait), over_random and over_matched, over the seeds
    whose unsteered texts show the trait (`least` of the claim), which are counted in `shown`; kept (of the accuracy),
    over those of them whose setting halves it on validation, counted in `halved`; each with its interval and by_seed;
    `runs`; the means of trait_0, trait, accuracy_0, accuracy, and of the controls' accuracy and the openings over the
    seeds that are shown; right_in_context, n and k over all seeds.
    """
    keys = ["stage", "context", "vector", "role", "operation", "score", "coefficient"]
    tables = {"suppression_curves": curves_over_runs(read_all(seeds, "suppression_curves"), keys, ("n",))}
    runs = read_all(seeds, "suppression_kept")
    keys = ["stage", "context"]
    least = rules()["suppressed"].least
    left = {
        seed: run.assign(left=1 - run["removed"], left_low=1 - run["removed_high"], left_high=1 - run["removed_low"])
        for seed, run in runs.items()
    }
    showing = {seed: run[run["trait_0"] >= least] for seed, run in left.items()}
    off = {seed: run[run["halved"].astype(bool)] for seed, run in showing.items()}
    removed = ratio_over_runs(showing, keys, "trait", "trait_0", "left")
    each = [listed([1 - float(value) for value in text.split()]) for text in removed["by_seed"]]
    removed = removed.assign(
        removed=1 - removed["left"],
        removed_low=1 - removed["left_high"],
        removed_high=1 - removed["left_low"],
        by_seed=each,
    ).drop(columns=["left", "left_low", "left_high"])
    kept = ratio_over_runs(off, keys, "accuracy", "accuracy_0", "kept")
    kept = kept.rename(columns={"by_seed": "kept_by_seed", "seeds": "halved"})
    over = []
    for control, rank in (("random", "p_rank"), ("matched", "p_rank_matched")):
        name = f"over_{control}"
        one = over_runs(showing, keys, name, (f"{name}_low", f"{name}_high"), lists=(rank,))
        over.append(one.rename(columns={"by_seed": f"{name}_by_seed", "p": f"{name}_p"}))
    names = ["trait_0", "trait", "accuracy_0", "accuracy", "accuracy_random", "accuracy_matched"]
    names += ["own_opening_0", "own_opening", "other_opening_0", "other_opening"]
    of_shown = pd.concat(showing.values()).groupby(keys, sort=False)[names].mean().reset_index()
    of_all = pd.concat(runs.values()).groupby(keys, sort=False)[["right_in_context", "n", "k"]].mean().reset_index()
    table = of_all.merge(of_shown, on=keys, how="left", validate="one_to_one").assign(runs=len(runs))
    for other in (removed.rename(columns={"seeds": "shown"}), kept, *over):
        dropped = [name for name in ("unit", "seeds") if name in other]
        table = table.merge(other.drop(columns=dropped), on=keys, how="left", validate="one_to_one")
    counts = table[["shown", "halved"]].fillna(0).astype(int)
    tables["suppression_kept"] = table.assign(**counts, unit=SEED if len(runs) > 1 else QUESTION, seeds=counts["shown"])
    chosen = [*keys, "vector", "operation", "layer", "coefficient", "halved"]
    choices = [run.drop_duplicates("stage")[chosen].assign(seed=seed) for seed, run in runs.items()]
    tables["suppression_choice"] = pd.concat(choices, ignore_index=True)
    return tables


def pool_malicious(seeds: Mapping[int, Path]) -> pd.DataFrame:
    """The paper's experiment with a malicious agent over the seeds.

    Returns:
        A row per stage, context, grid, strength and score: gain (of the own vector over the mean random direction),
        low, high, p, unit, seeds, by_seed; means of own, zero, random, n and k; and p_rank by seed.
    """
    runs = read_all(seeds, "malicious/malicious")
    keys = ["stage", "context", "grid", "strength", "score"]
    found = over_runs(runs, keys, "gain", means=("own", "zero", "random", "n", "k"), lists=("p_rank",))
    return found if len(runs) > 1 else found.assign(unit=CONTROL)


def malicious_fall(seeds: Mapping[int, Path]) -> pd.DataFrame:
    """How far the trait falls at coefficients of -3 and below, in the paper's experiment with a malicious agent.

    Returns:
        A row per stage, context and measure: value, low, high, p, unit, seeds, by_seed, zero (the trait at coefficient
        0, mean over the seeds), and runs (all seeds). Seeds in which less than `least` of the claim's rule show the
        trait are left out of a row, unless all are such. Measures: `fall` (the trait at coefficient 0 minus its mean at
        these coefficients), `fall over random` (the mean trait under random directions minus that under the vector),
        and `fall over the base's` (the fall minus that of the base in the same context). With one seed there is no
        interval.
    """
    each = []
    for seed, run in read_all(seeds, "malicious/malicious").items():
        some = run[(run["score"] == "trait") & (run["grid"] == "coefficient") & (run["strength"] <= DOWN)]
        means = some.groupby(["stage", "context"], sort=False)[["zero", "own", "random"]].mean()
        falls = means["zero"] - means["own"]
        at_base = falls.xs(BASE, level="stage").reindex(falls.index.get_level_values("context")).to_numpy()
        measures = {"fall": falls, "fall over random": means["random"] - means["own"]}
        measures["fall over the base's"] = falls - at_base
        for measure, values in measures.items():
            each.append(
                values.rename("value").reset_index().assign(measure=measure, zero=means["zero"].array, seed=seed)
            )
    rows, least = [], rules()["malicious"].least
    table = pd.concat(each, ignore_index=True)
    for (stage, context, measure), part in table.groupby(["stage", "context", "measure"], sort=False):
        showing = part[part["zero"] >= least]
        used = showing if len(showing) else part
        found = seed_interval(used["value"])
        ends = {"low": found.low, "high": found.high, "p": found.p, "unit": SEED, "seeds": found.n}
        line = {"stage": stage, "context": context, "measure": measure, "value": found.mean, **ends}
        zero = used["zero"].mean()
        rows.append({**line, "by_seed": listed(used["value"]), "zero": zero, "runs": len(part)})
    return pd.DataFrame(rows)


def pool_patched_rounds(seeds: Mapping[int, Path]) -> dict[str, pd.DataFrame]:
    """How often answers follow and change when the activations of another first round are put in, over the seeds.

    Returns:
        `patched_rounds`: a row per stage, text, then, part, site, layer and quantity: share, low, high, p, unit, seeds,
        by_seed; means of n (pairs) and positions. A seed with fewer than `LEAST_PAIRS` pairs is left out of a row.
        `patched_rounds_counts`: per stage and text the means of texts, of those with a round 1, of pairs, and seeds.
    """
    keys = ["stage", "text", "then", "part", "site", "layer", "quantity"]
    runs = {seed: run[run["n"] >= LEAST_PAIRS] for seed, run in read_all(seeds, "patch-rounds/patched_rounds").items()}
    counts = pd.concat(read_all(seeds, "patch-rounds/patched_rounds_counts").values())
    table = over_runs(runs, keys, "share", means=("n", "positions"))
    return {
        "patched_rounds": table.assign(**{end: table[end].clip(0, 1) for end in ("low", "high")}),
        "patched_rounds_counts": counts.groupby(["stage", "text"], sort=False)
        .mean()
        .reset_index()
        .assign(seeds=len(runs)),
    }


def pool_erasure(seeds: Mapping[int, Path]) -> dict[str, pd.DataFrame]:
    """What the erasure of the agents' names leaves of probes and of steering, over the seeds.

    Returns:
        `erasure_probes`: a row per stage, position, layer and features: accuracy with its interval, majority, n,
        n_groups. `erasure_gains`: a row per stage, identity, erasure and quantity (`gain`, `cost`): mean, low, high, p,
        unit, seeds, by_seed, n, k; in ROUGE-L. `erasure_survives`: a row per stage, identity and erasure: survives (the
        gain under it as a share of the gain), its interval, unit, seeds, by_seed; over the seeds in which the identity
        adds at least `LEAST_GAIN`. `erasure_changes`: the mean share by stage, erasure, layer and what is changed,
        and seeds.
        `erasure_choice`: the vector's setting by stage and seed.
    """
    ends = ("accuracy_low", "accuracy_high")
    keys = ["stage", "position", "layer", "features"]
    probes = over_runs(
        read_all(seeds, "erasure/erasure_separability"), keys, "accuracy", ends, ("majority", "n", "n_groups")
    )
    runs = read_all(seeds, "erasure/erasure_survival")
    keys = ["stage", "identity", "erasure"]
    gains = {seed: run[run["quantity"] != "survives"] for seed, run in runs.items()}
    ratios = {}
    for seed, run in runs.items():
        gain = run[run["quantity"] == "gain"]
        plain = gain[gain["erasure"] == "none"].set_index(keys[:2])["mean"].rename("plain")
        shares = run[run["quantity"] == "survives"].drop(columns="quantity")
        shares = shares.rename(columns={"mean": "survives", "low": "survives_low", "high": "survives_high"})
        under = gain[[*keys, "mean"]].rename(columns={"mean": "gain"})
        wide = shares.merge(under, on=keys).join(plain, on=keys[:2])
        ratios[seed] = wide if len(runs) == 1 else wide[wide["plain"] >= LEAST_GAIN]
    changed = pd.concat(read_all(seeds, "erasure/erasure_changes").values())
    changed["erasure"] = changed["erasure"].str.partition(" ")[0]
    choices = [run.assign(seed=seed) for seed, run in read_all(seeds, "erasure/erasure_choice").items()]
    return {
        "erasure_probes": probes.assign(**{end: probes[end].clip(0, 1) for end in ends}),
        "erasure_gains": over_runs(gains, [*keys, "quantity"], "mean", means=("n", "k")),
        "erasure_survives": ratio_over_runs(ratios, keys, "gain", "plain", "survives"),
        "erasure_changes": changed.groupby(["stage", "erasure", "layer", "of"], sort=False)["share"]
        .mean()
        .reset_index()
        .assign(seeds=len(seeds)),
        "erasure_choice": pd.concat(choices, ignore_index=True),
    }


READ = (
    *("choice.csv", "curves.csv", "gains.csv", "stage_differences.csv", "low_dose.csv", "checkpoint_cosines.csv"),
    *(f"{name}.csv" for name in (*SHOWN_OF_ONE_SEED, *OF_FIRST_SEED)),
    *("separability.csv", "suppression_curves.csv", "suppression_kept.csv", "malicious/malicious.csv"),
    *("protocol/areas.parquet", "protocol/protocol.csv", "protocol/planting.csv"),
    *("transplant/effects.csv", "transplant/shares.csv"),
    *("patch-rounds/patched_rounds.csv", "patch-rounds/patched_rounds_counts.csv"),
    *(f"erasure/erasure_{name}.csv" for name in ("separability", "survival", "changes", "choice")),
)
"""The tables of an analysed seed that are read here, and the losses of the planting."""
POOLED: Mapping[str, Callable[[Mapping[int, Path]], dict[str, pd.DataFrame]]] = {
    "choice.csv": pool_agents,
    "separability.csv": pool_probes,
    "protocol/areas.parquet": lambda seeds: {"protocol": pool_protocol(seeds)},
    "transplant/effects.csv": lambda seeds: {"transplant": pool_transplant(seeds)},
    "suppression_kept.csv": pool_suppression,
    "malicious/malicious.csv": lambda seeds: {
        "malicious": pool_malicious(seeds),
        "malicious_fall": malicious_fall(seeds),
    },
    "patch-rounds/patched_rounds.csv": pool_patched_rounds,
    "erasure/erasure_survival.csv": pool_erasure,
}
"""A file of an analysis, and the tables over the seeds that are made where it is there."""
