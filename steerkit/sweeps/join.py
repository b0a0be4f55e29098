"""Several sweeps as one, and scores of an earlier table; a row is identified by its content. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from steerkit.io.json import canonical_json, short_json
from steerkit.models.site_names import DEFAULT
from steerkit.sweeps.columns import RESERVED

SETTINGS = (
    "rows",
    "weights",
    "dtype",
    "template_sha256",
    "tokenizer_sha256",
    "chat_template_kwargs",
    "temperature",
    "top_p",
    "max_new_tokens",
    "seed",
    "when",
)
"""Settings that are equal in sweeps that are merged: they also decide what the unsteered rows are."""
OF_VECTOR = ("positions", "operation", "site")
"""Settings that are equal for a vector and its controls, whose rows are compared."""
MAY_DIFFER_IN_A_PROMPT = ("messages", "relative_dose", "share_steered")
"""Columns that are neither of a prompt nor a score."""
NO_CONTENT = ("role", "control_of", "group", "probability", "relative_dose")
"""Columns that may change when a sweep grows, in rows whose text is the same."""
COUNTS = ("n_texts", "n_unread")


def key_columns(table: pd.DataFrame) -> list[str]:
    """The columns that identify a row: its strength is the dose where there is one, a choice is known by its text."""
    strength = "dose" if "dose" in table else "coefficient"
    return ["vector", "layer", strength, "prompt_id", "choice" if "choice" in table else "sample"]


def joined(tables: Sequence[pd.DataFrame], metas: Sequence[Mapping[str, Any]]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The table and provenance of several sweeps, see `SweepResult.merge`."""
    models = {(meta.get("model_fingerprint"), meta.get("adapter_fingerprint")) for meta in metas}
    if len(models) != 1:
        raise ValueError(f"expected sweeps of one model; got {len(models)} models. Merge the sweeps of each model.")
    if len({("dose" in table, "choice" in table) for table in tables}) > 1:
        raise ValueError(
            "expected sweeps that all have doses or all have none, and the same of choices; got both. Repeat one with "
            "the other's arguments."
        )
    several = {name: [meta.get(name) for meta in metas] for name in SETTINGS}
    if other := {name: values for name, values in several.items() if len(set(map(canonical_json, values))) > 1}:
        raise ValueError(f"expected sweeps with equal settings; got {short_json(other)}. Repeat one with the other's.")
    special = {
        "vectors": _vectors(tables, metas),
        "stream_norms": _norms(metas, is_dosed="dose" in tables[0]),
        "judges": _judges(metas),
        "n_prompts": pd.concat([table["prompt_id"] for table in tables]).nunique(),
        "special_tokens": {token: id for one in metas for token, id in (one.get("special_tokens") or {}).items()},
        "control_of": _controls(metas),
    }
    meta: dict[str, Any] = {}
    for name in dict.fromkeys(name for one in metas for name in one):
        values = [one.get(name) for one in metas]
        meta[name] = special.get(name, values[0] if all(value == values[0] for value in values) else values)
    return _table(tables, meta.get("control_of", {})), meta


def _vectors(tables: Sequence[pd.DataFrame], metas: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Vector name -> content, of the vectors in the tables."""
    contents: dict[str, str] = {}
    for table, meta in zip(tables, metas, strict=True):
        there = set(table["vector"])
        for name, content in (meta.get("vectors") or {}).items():
            if name in there and contents.setdefault(name, content) != content:
                raise ValueError(
                    f"expected one vector under each name; got two called {name!r}. Sweep one of them under another "
                    "name; in its run folder this generates nothing."
                )
    return contents


def _controls(metas: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Name of a control -> name of its vector."""
    given = [item for meta in metas for item in (meta.get("control_of") or {}).items()]
    found = dict(given)
    _check_roles(list(dict.fromkeys(name for name, of in given if found[name] != of)))
    return found


def _check_roles(several: Sequence[str]) -> None:
    if len(several):
        raise ValueError(
            f"expected one role of a vector, and one vector of a control; got several for {list(several[:5])}. Sweep "
            "them under other names."
        )


def _norms(metas: Sequence[Mapping[str, Any]], is_dosed: bool) -> Any:
    """Layer -> norm of the stream; of sweeps over coefficients that differ in it, a list with one value per sweep."""
    given: list[Mapping[Any, float]] = []  # one of several sweeps joined before has a list
    for one in metas:
        norms_of_one = one.get("stream_norms") or {}
        given += norms_of_one if isinstance(norms_of_one, list) else [norms_of_one]
    norms = {layer: norm for one in given for layer, norm in one.items()}
    if all(norms[layer] == norm for one in given for layer, norm in one.items()):
        return norms
    if is_dosed:
        raise ValueError(
            f"expected sweeps whose doses are of the same stream_norms; got {short_json(given)}. Repeat one with "
            "stream_norms= of the other."
        )
    return given


def _judges(metas: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Column -> what its judge was, with the counts of all sweeps."""
    judges: dict[str, dict[str, Any]] = {}
    for column, about in (item for meta in metas for item in (meta.get("judges") or {}).items()):
        known = judges.get(column, {**about, **dict.fromkeys(COUNTS, 0)})
        judges[column] = {**about, **{name: known[name] + about[name] for name in COUNTS}}
        if any(known[name] != about[name] for name in about if name not in COUNTS):
            raise ValueError(f"expected one judge per column; got two for {column!r}. Score one under another column=.")
    return judges


def _table(tables: Sequence[pd.DataFrame], control_of: Mapping[str, str]) -> pd.DataFrame:
    """All rows; a control is one of its vector again, also where the two were swept apart.

    Args:
        control_of: name of a control -> name of its vector, which may not be in the tables.
    """
    if any("site" in table for table in tables):
        tables = [table if "site" in table else table.assign(site=DEFAULT) for table in tables]
    table = pd.concat(tables, ignore_index=True)
    if "control_of" in table:
        names = set(table["vector"])
        of = table["vector"].map({name: one for name, one in control_of.items() if one in names})
        table["control_of"] = of.where(of.notna(), table["control_of"])
        roles = table.drop_duplicates(["vector", "role", "control_of"])["vector"]
        _check_roles(roles[roles.duplicated()].unique())
    for column in _of_prompt(table):
        if several := _with_several(table, table["prompt_id"], column):
            raise ValueError(
                f"expected one {column} per prompt id; got several for {several[:5]}. Give other prompts ids of their "
                "own."
            )
    family = _families(table)
    for column in OF_VECTOR:
        if several := _with_several(table, family, column):
            names = table["vector"][family.isin(several)].unique()[:5].tolist()
            raise ValueError(
                f"expected one value of {column} for a vector and its controls; got several for {names}. Sweep "
                "another value under another name, and its controls too."
            )
    keys = key_columns(table)
    if (twice := table.duplicated(keys)).any():
        rows = table.loc[twice, keys].head(3).to_dict("records")
        raise ValueError(
            f"expected sweeps without common rows; got {int(twice.sum())} rows twice, e.g. {rows}. Drop them with "
            "where(), or sweep everything into one folder."
        )
    sweep = np.repeat(np.arange(len(tables)), [len(one) for one in tables])
    return _with_all_choices(table, sweep) if "choice" in table else table


def _of_prompt(table: pd.DataFrame) -> list[str]:
    """The columns that came with a prompt: its text and ids, its group, and further ones such as `reference`.

    These are all that a sweep does not write itself, except scores, whose values are numbers.
    """
    own = RESERVED - {"prompt_ids"} | set(MAY_DIFFER_IN_A_PROMPT)
    return [
        name
        for name in table
        if name == "group" or (name not in own and not pd.api.types.is_numeric_dtype(table[name]))
    ]


def _families(table: pd.DataFrame) -> pd.Series:
    """For each row the vector that it is compared with as a control, or its own; "" for all if a control is of all."""
    if "control_of" not in table:
        return table["vector"]
    of_all = (table["role"] != "vector") & table["control_of"].isna()
    return pd.Series("", table.index) if of_all.any() else table["control_of"].fillna(table["vector"])


def _with_several(table: pd.DataFrame, of: pd.Series, column: str) -> list[Any]:
    """The values of `of` whose rows have several values of a column."""
    if column not in table:
        return []
    values = table[column].map(lambda value: value if isinstance(value, Hashable) else repr(value))
    counts = values.groupby(of, sort=False).nunique()
    return counts.index[counts > 1].tolist()


def _with_all_choices(table: pd.DataFrame, sweep: np.ndarray) -> pd.DataFrame:
    """The table with choices numbered per prompt, and probabilities among all choices of a prompt.

    Args:
        sweep: number of each row's sweep.
    """
    from steerkit.generation.choices import probabilities

    cells = key_columns(table)[:-1]
    sets = table.groupby(cells, sort=False)["choice"].agg(frozenset)
    if (unequal := sets.groupby("prompt_id").nunique()).gt(1).any():
        raise ValueError(
            "expected the same choices of a prompt under all vectors, layers and strengths; got others for "
            f"{unequal.index[unequal > 1].tolist()[:5]}. Sweep the missing ones, or drop some with where()."
        )
    split = table.assign(sweep=sweep).groupby(cells, sort=False)["sweep"].transform("nunique") > 1
    if split.any():
        rows = table[split]
        totals = rows.groupby([*(rows[name] for name in cells), sweep[split]], sort=False)["probability"].transform(
            lambda values: values.sum(skipna=False)
        )
        if (totals.sub(1).abs() > 1e-6).any():
            raise ValueError(
                "expected all choices of a prompt of each sweep, since probabilities are among the choices; got a "
                "part. Merge the sweeps first, then select with where()."
            )
        shares = rows.groupby(cells, sort=False)["log_prob"].transform(probabilities)
        table = table.assign(probability=table["probability"].where(~split, shares))
    numbers = table.groupby("prompt_id", sort=False)["choice"].transform(lambda choices: pd.factorize(choices)[0])
    return table.assign(sample=numbers.astype(int))


def scores_of(table: pd.DataFrame, scored: pd.DataFrame, others: Collection[str] = ()) -> dict[str, pd.Series]:
    """The columns of an earlier table that this one lacks, missing in rows added since; none without a common row.

    Args:
        others: names of vectors that were other ones in the earlier table. Their rows have no scores: some scores are
            of the vector, not of the text alone.
    """
    found = rows_in(scored, table, others)
    there = found >= 0
    if not there.any():
        return {}
    new = [column for column in scored if column not in table]
    known = {column: pd.Series(scored[column].to_numpy()[found[there]], index=table.index[there]) for column in new}
    return {column: values.reindex(table.index) for column, values in known.items()}


def rows_in(scored: pd.DataFrame, table: pd.DataFrame, others: Collection[str] = ()) -> np.ndarray:
    """For each row of a table its number in an earlier table, -1 if that lacks it.

    Args:
        others: as in `scores_of`; the earlier table lacks their rows.
    """
    compared = _compared(table, scored)
    if not compared:
        return np.full(len(table), -1)
    place = {row: number for number, row in enumerate(_contents(scored, compared))}
    found = np.array([place.get(row, -1) for row in _contents(table, compared)])
    return np.where(table["vector"].isin(others), -1, found)


def without_score(table: pd.DataFrame, scores: Iterable[str]) -> dict[str, int]:
    """The number of rows that have a text and lack a score, for each score that some lack."""
    counts = {name: int((table[name].isna() & table["text"].notna()).sum()) for name in scores}
    return {name: count for name, count in counts.items() if count}


def count_of_others(table: pd.DataFrame, scored: pd.DataFrame) -> int:
    """The number of rows of an earlier table that this one lacks."""
    compared = _compared(table, scored)
    there = set(_contents(table, compared))
    return sum(row not in there for row in _contents(scored, compared)) if compared else len(scored)


def _compared(table: pd.DataFrame, scored: pd.DataFrame) -> list[str]:
    """The columns that are equal in a row of two tables; none where one lacks a part of the key.

    These are key, token ids, text and all others that both have, except those that may change when a sweep grows.
    """
    may_change = {*NO_CONTENT, *(["sample"] if "choice" in table else [])}
    compared = [column for column in table if column in scored and column not in may_change]
    return compared if set(key_columns(table)) <= set(compared) else []


def _contents(table: pd.DataFrame, columns: Iterable[str]) -> list[tuple[Any, ...]]:
    """The values of some columns by row, all missing ones as None."""
    values = [
        [None if missing else value if isinstance(value, Hashable) else repr(value) for value, missing in
         zip(table[column].tolist(), table[column].isna(), strict=True)]
        for column in columns
    ]  # fmt: skip
    return list(zip(*values, strict=True))
