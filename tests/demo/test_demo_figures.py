"""Titles of the demo's figures say what the numbers say."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from steerkit.demo.figures import dose_title, gain_title
from steerkit.demo.run import verdict
from steerkit.demo.selection import Choice
from steerkit.demo.summary import sentences
from steerkit.sweeps.result import SweepResult


def test_a_trait_that_falls_with_the_dose_is_not_said_to_rise() -> None:
    falls = {"persona": "steps", "score": "trait", "role": "vector", "coefficient": [-1.0, 0.0, 1.0, 2.0]}
    curves = pd.DataFrame({**falls, "mean": [0.9, 0.6, 0.3, 0.1]})
    assert dose_title(curves) == "No trait score rises"
    assert dose_title(curves.assign(mean=[0.0, 0.1, 0.4, 0.9])).endswith("rise with the dose")


CHOICE = Choice("steps", "instructions-last", 3, "all", 1.0, True, 50)
COMPARISONS = ("coefficient 0", "random directions", "shuffled labels")


def trait_gains(**changed: Any) -> pd.DataFrame:
    """Gains of the trait score that are shown over all comparisons, but for `changed`: column -> its three values."""
    shown = {"gain": [0.3] * 3, "low": [0.1] * 3, "high": [0.5] * 3, "p": [0.01] * 3, "p_holm": [0.03] * 3}
    table = {"persona": "steps", "score": "trait", "over": COMPARISONS, **shown, "p_rank": [float("nan"), 0.05, 0.05]}
    return pd.DataFrame({**table, **changed})


def found(gains: pd.DataFrame, repetition: float = 0.0) -> dict[str, Any]:
    rows = [
        {
            "vector": "steps", "layer": 3, "coefficient": steered, "sample": 0, "text": "x", "prompt_id": str(i),
            "group": str(i), "trait": 0.3 * steered, "right": 1.0, "perplexity": 2.0, "repeated_4grams": repetition * steered, "relative_dose": 0.4 * steered,
        }
        for steered in (0.0, 1.0)
        for i in range(8)
    ]  # fmt: skip
    return verdict("steps", gains, SweepResult(pd.DataFrame(rows), {}), CHOICE, [0.8] * 8)


NAN = float("nan")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"p_holm": [0.09, 0.1, 0.1]}, "p (Holm) of the gain over coefficient 0 is 0.090"),
        ({"p_rank": [NAN, 0.1, 0.05]}, "p by rank of the gain over random directions is 0.100"),
        ({"low": [0.1, 0.1, -0.1]}, "the gain over shuffled labels is not shown to be above zero"),
        (
            {"low": [NAN] * 3, "high": [NAN] * 3, "p": [0.01, 0.2, 0.05]},
            "the gain over random directions is not shown to be above zero",
        ),
        (
            {"low": [0.1, -0.1, -0.1], "p_holm": [0.09, 1.0, 1.0]},
            "the gain over random directions, shuffled labels is not shown to be above zero; p (Holm) of the gain over "
            "coefficient 0 is 0.090",
        ),
    ],
)
def test_the_verdict_the_summary_and_the_title_name_the_same_condition_that_fails(changed: Any, reason: str) -> None:
    gains = trait_gains(**changed)
    one = found(gains)
    assert (one["steered"], one["unmet"]) == (False, reason)
    choice = {"positions": "all", "layer": 3, "coefficient": 1.0, "source": "instructions-last"}
    (text,) = sentences({"verdicts": {"steps": one}, "choices": {"steps": choice}})
    assert f"not steered ({reason})." in text
    assert gain_title(gains) == "Steering raises no trait score"


def test_a_trait_that_rises_is_steered_only_in_fluent_text() -> None:
    assert found(trait_gains())["steered"] and gain_title(trait_gains()).endswith("of numbered steps")
    repetitive = found(trait_gains(), repetition=0.9)
    assert (repetitive["steered"], repetitive["unmet"]) == (False, "the text is repetitive or not fluent")
