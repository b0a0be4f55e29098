"""Patched rounds and erased names over training seeds: means, intervals over seeds, and ratios of means."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.paper.pooling import pool_erasure, pool_patched_rounds
from analysis.paper.results import erased_changes_table, erased_gains_table, erased_probes_table, patched_table
from analysis.paper.transplant import AGREED, REVISION
from analysis.patching.rounds import OWN, ROUND
from steerkit.io.tables import write_table
from steerkit.stats.seeds import QUESTION

SHARES = {20: 0.5, 21: 0.7, 22: 0.9}
GAINS = {20: (0.4, 0.1), 21: (0.2, 0.1), 22: (0.3, 0.2)}
"""By seed the gain, and what is left of it after the erasure."""


@pytest.fixture
def seeds(tmp_path) -> dict[int, Path]:
    found = {seed: tmp_path / f"seed-{seed}" for seed in SHARES}
    for seed, folder in found.items():
        rows = [
            {"stage": "IMAD", "text": "debate", "then": REVISION, "part": part, "site": "resid_post", "layer": 1,
             "positions": 30, "quantity": quantity, "share": share, "low": share - 0.1, "high": share + 0.05, "n": 40}
            for part, share in ((ROUND, SHARES[seed]), (OWN, 0.0))
            for quantity in ("follows", "changed", "chance")
        ]  # fmt: skip
        rows += [{**rows[0], "then": AGREED, "n": 1 if seed == 20 else 25}]
        write_table(folder / "patch-rounds" / "patched_rounds.csv", pd.DataFrame(rows), {})
        counts = {"stage": "IMAD", "text": "debate", "texts": 300, "with round 1": 200 + seed, "pairs": 40}
        write_table(folder / "patch-rounds" / "patched_rounds_counts.csv", pd.DataFrame([counts]), {})
        lines = []
        for identity, factor in (("tag", 1.0), ("vector", 0.1)):
            gain, left = (factor * value for value in GAINS[seed])
            values = {("none", "gain"): gain, ("agents", "gain"): left, ("agents", "cost"): -0.01,
                      ("agents", "survives"): left / gain if gain > 0.1 else np.nan,
                      ("shuffled", "gain"): gain, ("shuffled", "cost"): 0.0,
                      ("shuffled", "survives"): 1.0 if gain > 0.1 else np.nan}  # fmt: skip
            lines += [
                {"stage": "SFT", "identity": identity, "erasure": erasure, "quantity": quantity, "mean": mean,
                 "low": mean - 0.05, "high": mean + 0.05, "n": 64, "k": 1}
                for (erasure, quantity), mean in values.items()
            ]  # fmt: skip
        write_table(folder / "erasure" / "erasure_survival.csv", pd.DataFrame(lines), {})
        changed = [
            {"stage": "SFT", "erasure": erasure, "layer": 1, "of": of, "share": seed / 100}
            for erasure in ("agents", "shuffled 0", "shuffled 1")
            for of in ("tag", "vector 1")
        ]
        write_table(folder / "erasure" / "erasure_changes.csv", pd.DataFrame(changed), {})
        choice = {"stage": "SFT", "source": "trace", "position": "tag", "layer": 0, "extent": "all", "coefficient": 1.0}
        write_table(folder / "erasure" / "erasure_choice.csv", pd.DataFrame([choice]), {})
        probes = [
            {"stage": "SFT", "position": position, "layer": layer, "features": features, "accuracy": 0.95,
             "accuracy_low": 0.9, "accuracy_high": 0.97, "majority": 0.34, "n": 90, "n_groups": 30, "folds": 5}
            for position, layer, features in product(
                ("tag", "last"), (0, 2), ("resid", "erased", "erased_shuffled"))
        ]  # fmt: skip
        write_table(folder / "erasure" / "erasure_separability.csv", pd.DataFrame(probes), {})
    return found


def test_shares_of_patched_rounds_have_students_interval_over_training_seeds(seeds) -> None:
    table = pool_patched_rounds(seeds)["patched_rounds"]
    line = table[(table["part"] == ROUND) & (table["quantity"] == "follows")].iloc[0]
    values = np.array(list(SHARES.values()))
    half = stats.t.ppf(0.975, 2) * values.std(ddof=1) / np.sqrt(3)
    assert line["share"] == pytest.approx(values.mean())
    assert line["low"] == pytest.approx(values.mean() - half)
    assert line["high"] == 1.0  # the interval ends at the largest share that exists
    assert (line["seeds"], line["by_seed"]) == (3, "0.5 0.7 0.9")
    own = table[(table["part"] == OWN) & (table["quantity"] == "changed")].iloc[0]
    assert (own["share"], own["low"], own["high"]) == (0.0, 0.0, 0.0)


def test_one_seed_keeps_the_interval_over_its_pairs(seeds) -> None:
    table = pool_patched_rounds({20: seeds[20]})["patched_rounds"]
    line = table[(table["part"] == ROUND) & (table["quantity"] == "follows")].iloc[0]
    assert (line["low"], line["high"], line["unit"]) == (0.4, 0.55, QUESTION)


def test_a_seed_with_few_pairs_is_left_out_and_the_others_are_counted(seeds) -> None:
    table = pool_patched_rounds(seeds)["patched_rounds"]
    line = table[table["then"] == AGREED].iloc[0]
    assert (line["seeds"], line["by_seed"]) == (2, "0.7 0.9") and line["share"] == pytest.approx(0.8)


def test_the_surviving_share_is_a_ratio_of_means_over_seeds_not_a_mean_of_ratios(seeds) -> None:
    table = pool_erasure(seeds)["erasure_survives"]
    line = table[(table["identity"] == "tag") & (table["erasure"] == "agents")].iloc[0]
    gains, left = (np.mean([pair[i] for pair in GAINS.values()]) for i in (0, 1))
    assert line["survives"] == pytest.approx(left / gains)
    assert line["survives"] != pytest.approx(np.mean([b / a for a, b in GAINS.values()]))
    assert line["survives_low"] < line["survives"] < line["survives_high"]
    control = table[(table["identity"] == "tag") & (table["erasure"] == "shuffled")].iloc[0]
    assert control["survives"] == pytest.approx(1.0)


def test_an_identity_that_adds_little_has_no_surviving_share(seeds) -> None:
    assert set(pool_erasure(seeds)["erasure_survives"]["identity"]) == {"tag"}


def test_the_page_shows_every_place_identity_and_read_position_once(seeds) -> None:
    shown = patched_table(pool_patched_rounds(seeds)["patched_rounds"])
    assert list(shown["after round 1"]) == [REVISION, AGREED]
    assert shown.iloc[0]["by seed, round 1"] == "0.50 0.70 0.90"
    assert shown.iloc[0]["changes, round 1 (own activations)"].endswith("] (0.00)")
    pooled = pool_erasure(seeds)
    gains = erased_gains_table(pooled["erasure_gains"], pooled["erasure_survives"])
    assert len(gains) == 6 and list(gains.columns[3:]) == ["gain", "survives", "survives by seed", "cost", "seeds"]
    survives = gains.set_index(["identity", "erasure"])["survives"]
    assert (
        survives["vector", "agents"] == "not testable" and survives["vector", "none"] == survives["tag", "none"] == ""
    )
    assert re.fullmatch(r"\d\.\d\d \[-?\d\.\d\d, \d\.\d\d\]", survives["tag", "agents"])
    one = {seed: folder for seed, folder in seeds.items() if seed == min(seeds)}  # a share of NaN, from a single run
    single = pool_erasure(one)
    alone = erased_gains_table(single["erasure_gains"], single["erasure_survives"]).set_index(["identity", "erasure"])
    assert alone.loc[("vector", "agents"), "survives"] == "not testable"
    probes = erased_probes_table(pooled["erasure_probes"])
    assert list(zip(probes["position"], probes["layer"], strict=True)) == [
        ("tag", 0),
        ("tag", 2),
        ("last", 0),
        ("last", 2),
    ]
    changed = erased_changes_table(pooled["erasure_changes"]).set_index("erasure")
    assert changed.loc["shuffled", "tag"] == pytest.approx(0.21)


def test_a_share_is_hidden_where_its_own_erasure_costs_what_the_identity_adds(seeds) -> None:
    pooled = pool_erasure(seeds)
    gains, survives = pooled["erasure_gains"], pooled["erasure_survives"]
    of_tag = gains["identity"] == "tag"
    added = gains[of_tag & (gains["erasure"] == "none")]["mean"].item()
    gains.loc[of_tag & (gains["erasure"] == "agents") & (gains["quantity"] == "cost"), "mean"] = -added
    shown = erased_gains_table(gains, survives).set_index(["identity", "erasure"])
    assert shown.loc[("tag", "agents"), ["survives", "survives by seed"]].tolist() == ["texts broken", ""]
    assert shown.loc[("tag", "shuffled"), "survives"].startswith("1.00 [")
    assert shown.loc[("vector", "agents"), "survives"] == "not testable"


def test_own_activations_are_shown_where_they_were_measured_and_shares_everywhere(seeds) -> None:
    pooled = pool_patched_rounds(seeds)["patched_rounds"]
    more = pooled[pooled["part"] == ROUND].assign(layer=0)
    shown = patched_table(pd.concat([more, pooled])).set_index(["after round 1", "place"])
    column = shown["changes, round 1 (own activations)"]
    assert column[REVISION, "resid_post, layer 1"].endswith("] (0.00)")
    assert column[REVISION, "resid_post, layer 0"].endswith("]")
