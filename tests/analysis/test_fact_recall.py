"""Fact recall: which countries are paired, what the tables hold, and that a finished part is not run again."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import steerkit as sk
from analysis.patching import fact_recall
from analysis.patching.fact_recall import (
    CAPITALS,
    LAST,
    NAMES,
    SITES,
    SUBJECT,
    TEMPLATE,
    agreement,
    apart,
    depth,
    pairs_of,
)
from steerkit.io.tables import read_table
from steerkit.stats.mean import mean_interval
from tests.tiny import tiny_model

KNOWN = ["France", "Italy", "Spain", "Japan"]


def word_tokenizer(countries: list[str]) -> Any:
    """One token per word; a country that is not listed takes one token per letter."""
    words = [*TEMPLATE.replace("{} ", "").split(), *countries, *(CAPITALS[one] for one in countries), "<end>"]
    letters = [chr(code) for code in range(65, 123)]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*words, *letters]))}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="<end>", continuing_subword_prefix=""))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", clean_up_tokenization_spaces=False)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    tiny_model("llama").save_pretrained(path)
    word_tokenizer(KNOWN).save_pretrained(path)
    return path


def test_countries_of_one_token_are_paired_with_their_neighbours_in_a_circle() -> None:
    found = pairs_of(word_tokenizer(KNOWN))
    assert found == list(zip(KNOWN, [*KNOWN[1:], KNOWN[0]], strict=True))


def test_the_tables_are_those_of_sk_patch_and_a_finished_part_is_read_back(
    checkpoint: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    call = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "run"), "--results", str(tmp_path / "results")]
    fact_recall.main([*call, "--pairs", "3"])
    table, meta = read_table(tmp_path / "results" / "fact_recall.csv")
    assert meta["checkpoint"] == "model" and meta["pairs"] == [
        list(pair) for pair in pairs_of(word_tokenizer(KNOWN))[:3]
    ]
    assert len(table) == 3 * len(SITES) * 4 * len(NAMES) and set(table["n"]) == {3}
    model, tokenizer = sk.load(checkpoint)
    for mode in ("denoising", "noising"):
        result = sk.patch(
            model, tokenizer,
            [TEMPLATE.format(one) for one in KNOWN[:3]], [TEMPLATE.format(one) for one in KNOWN[1:]],
            [(CAPITALS[a], CAPITALS[b]) for a, b in pairwise(KNOWN)],
            sites=SITES, positions=range(8), mode=mode,
        )  # fmt: skip
        own = table[(table["mode"] == mode) & (table["method"] == "exact")]
        for column in ("effect", "effect_low", "effect_high"):
            assert own[column].to_numpy() == pytest.approx(result.table[column].to_numpy(), abs=1e-3, nan_ok=True)
    whole = own[(own["site"] == "resid_post") & (own["layer"] == 3) & (own["position"] == LAST)]
    assert whole["effect"].item() == pytest.approx(1, abs=1e-3)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("patched again")

    monkeypatch.setattr(fact_recall, "effects", never)
    fact_recall.main([*call[:4], "--pairs", "3"])
    assert read_table(tmp_path / "run" / "fact_recall.csv")[0].equals(table)
    printed = capsys.readouterr().out
    assert "largest" in printed and "odd pairs" in printed


def test_depth_takes_the_mean_over_the_layers_of_a_third_in_each_pair_first() -> None:
    torch.manual_seed(0)
    rows = [
        {"site": "mlp_out", "layer": layer, "position": position, "pair": pair, "effect": float(torch.rand(()))}
        for pair in range(4) for layer in range(5) for position in NAMES
    ]  # fmt: skip
    pairs = pd.DataFrame(rows)
    found = depth(pairs)
    assert set(found["position"]) == {SUBJECT, LAST} and len(found) == 8
    assert found[["part", "first", "last"]].head(3).to_numpy().tolist() == [
        ["early", 0, 1], ["middle", 2, 2], ["late", 3, 4]
    ]  # fmt: skip
    own = pairs[pairs["position"] == LAST]
    late = mean_interval([own[(own["pair"] == p) & (own["layer"] > 2)]["effect"].mean() for p in range(4)])
    row = found[(found["position"] == LAST) & (found["part"] == "late")].iloc[0]
    assert (row["effect"], row["low"], row["high"], row["n"]) == pytest.approx((late.mean, late.low, late.high, 4))
    best = own.groupby("layer")["effect"].mean()
    row = found[(found["position"] == LAST) & (found["part"] == "largest")].iloc[0]
    assert row["first"] == row["last"] == best.idxmax() and row["effect"] == pytest.approx(best.max())


def test_the_layer_that_odd_pairs_choose_is_reported_on_even_pairs_alone() -> None:
    effects = {0: (0.1, 0.9), 1: (0.4, 0.2)}  # of each layer, in even and in odd pairs
    rows = [
        {"site": "mlp_out", "layer": layer, "position": position, "pair": pair, "effect": values[pair % 2]}
        for pair in range(6) for layer, values in effects.items() for position in NAMES
    ]  # fmt: skip
    found = apart(pd.DataFrame(rows))
    assert list(found["position"]) == [SUBJECT, LAST] and set(found["n"]) == {3}
    assert set(found["layer"]) == {0} and found["effect"].to_numpy() == pytest.approx(0.1)


def test_agreement_correlates_the_places_of_a_site_that_can_have_an_effect_and_compares_sizes() -> None:
    rows = {"site": ["z"] * 4, "layer": range(4), "position": [LAST] * 4, "effect": [0.0, 0.1, 0.3, 1.0]}
    places = pd.DataFrame(rows)
    before = places.assign(position=NAMES[0], effect=0.0)  # the prompts are equal there
    fast = pd.concat([places.assign(effect=[0.0, 0.1, 0.2, 9.0]), before])
    found = agreement(pd.concat([places, before]), fast).iloc[0]
    assert found["places"] == 4 and found["spearman"] == pytest.approx(1.0) and 0.9 < found["pearson"] < 1
    assert found["slope"] == pytest.approx((0.01 + 0.06 + 9.0) / (0.01 + 0.09 + 1.0))


def test_a_tokenizer_that_splits_all_countries_is_refused_with_the_fix(checkpoint: Path, tmp_path: Path) -> None:
    word_tokenizer([]).save_pretrained(checkpoint)
    with pytest.raises(SystemExit, match="one token per country"):
        fact_recall.main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_one_pair_is_refused_as_a_wrong_option_and_not_as_a_wrong_tokenizer(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        fact_recall.main(["--checkpoint", "none", "--out", str(tmp_path / "run"), "--pairs", "1"])
    assert stopped.value.code == 2
    assert "expected --pairs of at least 2; got 1. Pass 2 or more." in capsys.readouterr().err
