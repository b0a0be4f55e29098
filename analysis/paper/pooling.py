"""Tables of several training seeds as one: means over the seeds, with intervals whose unit is the training seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.inputs import BASE
from analysis.paper.protocol import CAST, CONTROLS, OWN, TAGGED
from analysis.paper.transplant import EXPLICIT
from steerkit.io.tables import read_table
from steerkit.stats.multiple import holm
from steerkit.stats.paired import ratio
from steerkit.stats.seeds import QUESTION, SEED, over_seeds, seed_interval
from training.evaluate.results import listed

Runs = Mapping[int, pd.DataFrame]
"""A table of each training seed."""
SHOWN_OF_ONE_SEED = ("cosines", "plane", "reliability")


def over_runs(
    runs: Runs, keys: Sequence[str], value: str, ends: tuple[str, str] = ("low", "high"), means: Sequence[str] = ()
) -> pd.DataFrame:
    """A row per key: the mean of a column over training seeds, with Student's t interval over the seeds.

    With one seed, the row is that seed's, with its interval over questions.

    Args:
        runs: a table per seed, with one row per key.
        keys: columns that name a row.
        value: the column.
        ends: columns of its interval over questions, which have the interval's ends in the result.
        means: further columns of numbers, whose means over the seeds are kept.

    Returns:
        Columns keys, value, ends, p, unit (of the interval), seeds, by_seed (the values, in the order of the seeds),
        and means.

    Raises:
        ValueError: several rows of a seed have one key.
    """
    table = pd.concat([run.assign(seed=seed) for seed, run in sorted(runs.items())], ignore_index=True)
    if table.duplicated([*keys, "seed"]).any():
        raise ValueError(f"expected one row per seed and {list(keys)}; got several. Name the rows by further columns.")
    rows = []
    for key, part in table.groupby(list(keys), sort=False, dropna=False):
        found = over_seeds(part[value].to_numpy(float), part["seed"].tolist())
        low, high, p = found.low, found.high, found.p
        if len(runs) == 1:
            only = part.iloc[0]
            low, high, p = only[ends[0]], only[ends[1]], only.get("p", float("nan"))
        rows.append(
            {
                **dict(zip(keys, key, strict=True)),
                value: found.mean,
                ends[0]: low,
                ends[1]: high,
                "p": p,
                "unit": QUESTION if len(runs) == 1 else SEED,
                "seeds": found.seeds,
                "by_seed": listed(found.by_seed),
                **{name: part[name].mean() for name in means},
            }
        )
    return pd.DataFrame(rows)


def ratio_over_runs(runs: Runs, keys: Sequence[str], numerator: str, denominator: str, name: str) -> pd.DataFrame:
    """A row per key: the ratio of two columns' means over training seeds, with Fieller's interval over the seeds.

    Args:
        runs: a table per seed, with one row per key and, for a single seed, the columns `name`, `name_low`,
            `name_high` with the interval over its questions.
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
    return pd.DataFrame(rows)


def seeds_of(folder: Path) -> dict[int, Path]:
    """The analysed seeds of a family, by number."""
    return {int(path.name.removeprefix("seed-")): path for path in sorted(folder.glob("seed-*"))}


def collect_tables(folder: Path) -> dict[str, dict[str, pd.DataFrame]]:
    """All tables of a reproduction over its seeds, by family and name."""
    tables: dict[str, dict[str, pd.DataFrame]] = {}
    for family in sorted(path for path in (folder / "analysis").iterdir() if path.is_dir()):
        of_family: dict[str, pd.DataFrame] = {}
        seeds = seeds_of(family)
        one = next(iter(seeds.values()))
        if (one / "choice.csv").is_file():
            of_family |= pool_agents(seeds)
        if (one / "separability.csv").is_file():
            of_family["separability"] = pool_probes(seeds)
            if len(ablation := tag_ablation(seeds)):
                of_family["tag_ablation"] = ablation
        if (one / "protocol" / "areas.parquet").is_file():
            of_family["protocol"] = pool_protocol(seeds)
        if (one / "transplant" / "effects.csv").is_file():
            of_family["transplant"] = pool_transplant(seeds)
        if (one / "suppression_kept.csv").is_file():
            of_family |= pool_suppression(seeds)
        if (one / "malicious" / "malicious.csv").is_file():
            of_family["malicious"] = pool_malicious(seeds)
        for name in ("known_texts", "agreement"):
            if (one / f"{name}.csv").is_file():
                of_family[name] = read_table(one / f"{name}.csv")[0]
        tables[family.name] = of_family
    return tables


def read_all(seeds: Mapping[int, Path], name: str) -> dict[int, pd.DataFrame]:
    """A table of each seed."""
    return {seed: read_table(path / f"{name}.csv")[0] for seed, path in seeds.items()}


def pool_agents(seeds: Mapping[int, Path]) -> dict[str, pd.DataFrame]:
    """Curves, gains at the frozen settings, and differences between checkpoints, over the seeds of a family."""
    place = ["score", "identity", "stage"]
    gain_keys = [*place, "agent", "over"]
    gains = over_runs(read_all(seeds, "gains"), gain_keys, "gain", means=("p_rank", "n", "k"))
    known = gains[gains["p"].notna()]
    gains["p_holm"] = known.groupby([*place, "over"])["p"].transform(lambda p: holm(p.to_numpy()))
    curves = read_all(seeds, "curves")
    curve_keys = [*place, "agent", "kind", "role", "coefficient"]
    curve = over_runs(curves, curve_keys, "mean", means=("relative_dose", "n", "k"))
    ends = ("area_low", "area_high")
    areas = {seed: table.drop_duplicates([*curve_keys[:-1]]) for seed, table in curves.items()}
    area = over_runs(areas, curve_keys[:-1], "area", ends).drop(columns=["p", "unit", "seeds", "by_seed"])
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


def pool_probes(seeds: Mapping[int, Path]) -> pd.DataFrame:
    """Probe accuracies over the seeds."""
    keys = ["stage", "debates", "source", "position", "layer", "features", "labels"]
    ends = ("accuracy_low", "accuracy_high")
    table = over_runs(read_all(seeds, "separability"), keys, "accuracy", ends, ("majority", "n", "n_groups"))
    return table.assign(**{end: table[end].clip(0, 1) for end in ends})


def tag_ablation(seeds: Mapping[int, Path]) -> pd.DataFrame:
    """Probe accuracy after SFT with tags, read in tagged traces, minus that after SFT without, in untagged ones.

    A row with value, low, high, p, unit, seeds, by_seed, with_tags and without (means); empty where a stage is missing.
    With one seed there is no interval.
    """
    gaps, sides = [], []
    for table in read_all(seeds, "separability").values():
        nested = (table["layer"].astype(str) == "nested") & (table["labels"] == "true") & (table["position"] == "last")
        kept = table[nested & (table["debates"] == "personas")].set_index(["stage", "source"])["accuracy"]
        pair = (("SFT", "trace"), ("SFT without tags", "untagged"))
        if not all(key in kept.index for key in pair):
            return pd.DataFrame()
        sides.append([float(kept[key]) for key in pair])
        gaps.append(sides[-1][0] - sides[-1][1])
    found = seed_interval(gaps)
    means = pd.DataFrame(sides, columns=["with_tags", "without"]).mean()
    line = {"value": found.mean, "low": found.low, "high": found.high, "p": found.p, "unit": SEED, "seeds": len(gaps)}
    return pd.DataFrame([{**line, "by_seed": listed(gaps), **means}])


def pool_protocol(seeds: Mapping[int, Path]) -> pd.DataFrame:
    """Areas of the paper's protocol over the seeds, against the base and against the controls, questions paired.

    Returns:
        A row per stage, context, score, grid and measure: value, low, high, p, unit, seeds, by_seed, n (questions).
        Measures: `area` and `above` of each kind of directions; `area over base` (of the agents' own directions, minus
        that at the base in the same context); `area over random` and `area over shuffled` (minus the mean control).
    """
    runs = {seed: read_table(path / "protocol" / "areas.parquet")[0] for seed, path in seeds.items()}
    table = pd.concat([run.assign(seed=seed) for seed, run in sorted(runs.items())], ignore_index=True)
    place, unit = ["stage", "context", "score", "grid"], ["seed", "question"]
    rows = []

    def add(key: Mapping[str, Any], measure: str, values: pd.Series) -> None:
        levels = [values.index.get_level_values(level).tolist() for level in unit]
        found = over_seeds(values.to_numpy(float), *levels)
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
        for control in CONTROLS:
            if control in by_kind:
                add(key, f"area over {control}", by_kind[leading]["area"] - by_kind[control]["area"])
        if leading != OWN:
            continue
        for context, name in ((TAGGED, "area over base"), (CAST, "area over base with its own prompt")):
            same = (table["score"] == key["score"]) & (table["grid"] == key["grid"]) & (table["kind"] == OWN)
            base = table[same & (table["stage"] == BASE) & (table["context"] == context)]
            if len(base) and key["stage"] != BASE:
                add(key, name, by_kind[OWN]["area"] - base.groupby(unit)["area"].mean())
    return pd.DataFrame(rows)


def pool_transplant(seeds: Mapping[int, Path]) -> pd.DataFrame:
    """What a transplanted first round does to answers, over the seeds.

    Returns:
        A row per stage: value (the share of answers that change, minus that after the own prefix), low, high, p, unit,
        seeds, by_seed, n; means of changed, changed_again, follows, right, right_again and share_with_round_1; and
        explicit, the value in explicit debates.
    """
    runs = {seed: read_table(path / "transplant" / "effects.csv")[0] for seed, path in seeds.items()}
    table = pd.concat([run.assign(seed=seed) for seed, run in sorted(runs.items())], ignore_index=True)
    names = ["changed", "changed_again", "follows", "right", "right_again", "share_with_round_1"]
    rows = []
    for stage, part in table.groupby("stage", sort=False):
        found = over_seeds(part["effect"].to_numpy(float), part["seed"].tolist(), part["question"].tolist())
        ends = {"low": found.low, "high": found.high, "p": found.p, "unit": found.unit, "seeds": found.seeds}
        means = part.groupby("seed")[names].mean().mean()
        rows.append(
            {"stage": stage, "value": found.mean, **ends, "by_seed": listed(found.by_seed), "n": found.n, **means}
        )
    explicit = next((row["value"] for row in rows if row["stage"] == EXPLICIT), float("nan"))
    return pd.DataFrame(rows).assign(explicit=explicit)


def pool_suppression(seeds: Mapping[int, Path]) -> dict[str, pd.DataFrame]:
    """Curves, and what the choice on validation does to the trait and to accuracy on test, over the seeds."""
    keys = ["stage", "context", "vector", "role", "operation", "score", "coefficient"]
    tables = {"suppression_curves": over_runs(read_all(seeds, "suppression_curves"), keys, "mean", means=("n",))}
    runs = read_all(seeds, "suppression_kept")
    keys = ["stage", "context"]
    left = {
        seed: run.assign(left=1 - run["removed"], left_low=1 - run["removed_high"], left_high=1 - run["removed_low"])
        for seed, run in runs.items()
    }
    removed = ratio_over_runs(left, keys, "trait", "trait_0", "left")
    removed = removed.assign(
        removed=1 - removed["left"], removed_low=1 - removed["left_high"], removed_high=1 - removed["left_low"]
    ).drop(columns=["left", "left_low", "left_high"])
    kept = ratio_over_runs(runs, keys, "accuracy", "accuracy_0", "kept").rename(columns={"by_seed": "kept_by_seed"})
    means = ("trait_0", "trait", "accuracy_0", "accuracy", "n", "k", "p_rank")
    over = over_runs(runs, keys, "over_random", ("over_random_low", "over_random_high"), means)
    over = over.rename(columns={"by_seed": "over_random_by_seed", "p": "over_random_p"})
    for other in (kept, over):
        removed = removed.merge(other.drop(columns=["unit", "seeds"]), on=keys, validate="one_to_one")
    tables["suppression_kept"] = removed
    chosen = [*keys, "vector", "operation", "layer", "coefficient", "halved"]
    choices = [run.drop_duplicates("stage")[chosen].assign(seed=seed) for seed, run in runs.items()]
    tables["suppression_choice"] = pd.concat(choices, ignore_index=True)
    return tables


def pool_malicious(seeds: Mapping[int, Path]) -> pd.DataFrame:
    """The paper's experiment with a malicious agent over the seeds.

    Returns:
        A row per stage, context, grid, strength and score: gain (of the own vector over the mean random direction),
        low, high, p, unit, seeds, by_seed; and means of own, zero, random, p_rank, n and k.
    """
    runs = {seed: read_table(path / "malicious" / "malicious.csv")[0] for seed, path in seeds.items()}
    keys = ["stage", "context", "grid", "strength", "score"]
    return over_runs(runs, keys, "gain", means=("own", "zero", "random", "p_rank", "n", "k"))
