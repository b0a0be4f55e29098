"""Tables of several training seeds as one: means over the seeds, with intervals whose unit is the training seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from steerkit.io.tables import read_table
from steerkit.stats.multiple import holm
from steerkit.stats.paired import ratio
from steerkit.stats.seeds import QUESTION, SEED, over_seeds
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
        rows.append({**line, name: value, f"{name}_low": low, f"{name}_high": high, "unit": unit, "by_seed": listed(each)})
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
        if (one / "suppression_kept.csv").is_file():
            of_family |= pool_suppression(seeds)
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


def pool_suppression(seeds: Mapping[int, Path]) -> dict[str, pd.DataFrame]:
    """Curves, and what the choice on validation does to the trait and to accuracy on test, over the seeds."""
    keys = ["stage", "context", "vector", "role", "operation", "score", "coefficient"]
    curves = over_runs(read_all(seeds, "suppression_curves"), keys, "mean", means=("n",))
    kept_runs = read_all(seeds, "suppression_kept")
    keys = ["stage", "context"]
    kept = ratio_over_runs(kept_runs, keys, "accuracy", "accuracy_0", "kept")
    means = ("trait_0", "trait", "accuracy_0", "accuracy", "n", "k", "p_rank")
    lowered = over_runs(kept_runs, keys, "lowered", ("lowered_low", "lowered_high"), means)
    over = over_runs(kept_runs, keys, "over_random", ("over_random_low", "over_random_high"))
    tables = {"suppression_curves": curves}
    tables["suppression_kept"] = lowered.merge(
        kept.rename(columns={"by_seed": "kept_by_seed"}).drop(columns=["unit", "seeds"]), on=keys, validate="one_to_one"
    ).merge(
        over.rename(columns={"by_seed": "over_random_by_seed", "p": "over_random_p"}).drop(columns=["unit", "seeds"]),
        on=keys,
        validate="one_to_one",
    )
    choices = [table[[*keys, "vector", "operation", "layer", "coefficient"]].assign(seed=seed) for seed, table in kept_runs.items()]
    tables["suppression_choice"] = pd.concat(choices, ignore_index=True)
    return tables
