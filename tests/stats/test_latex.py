from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import steerkit as sk


def test_an_estimate_and_its_interval_share_a_cell_and_special_characters_are_escaped() -> None:
    frame = pd.DataFrame(
        {
            "vector": ["calm_50%", "a & b"], "layer": [14, 16], "gain": [0.3, -0.251], "low": [0.02, -0.5],
            "high": [0.6, 0.0], "p": [0.00005, 0.2], "n": [40, 40], "note": [None, "x < y"],
        }
    )  # fmt: skip
    assert sk.latex_table(frame).splitlines() == [
        r"\begin{tabular}{lrrrrl}",
        r"\toprule",
        r"vector & layer & gain & p & n & note \\",
        r"\midrule",
        r"calm\_50\% & 14 & 0.30 [0.02, 0.60] & $<$ 0.001 & 40 & -- \\",
        r"a \& b & 16 & $-$0.25 [$-$0.50, 0.00] & 0.200 & 40 & x $<$ y \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_named_ends_missing_values_and_decimals() -> None:
    frame = pd.DataFrame(
        {"layer": ["embed", 3], "accuracy": [0.5, np.nan], "accuracy_low": [np.nan, 0.1], "accuracy_high": [0.7, 0.2],
         "roc_auc": [0.61234, 1.0]}
    )  # fmt: skip
    rows = sk.latex_table(frame, digits={"roc_auc": 3}).splitlines()[4:6]
    assert rows == [r"embed & 0.50 & 0.612 \\", r"3 & -- & 1.000 \\"]


def test_a_table_without_rows_or_with_half_an_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="table with rows; got 0 rows"):
        sk.latex_table(pd.DataFrame({"a": []}))
    for columns in ({"gain": [1.0], "low": [0.0]}, {"low": [0.0], "high": [1.0]}):
        with pytest.raises(ValueError, match="to the right of their estimate"):
            sk.latex_table(pd.DataFrame(columns))


def test_a_text_of_several_lines_is_one_cell_and_missing_values_of_any_kind_are_a_dash() -> None:
    frame = pd.DataFrame({"text": ["a\n\nb\tc", None], "when": [pd.NaT, pd.Timestamp("2026-01-02")], "n": [pd.NA, 1]})
    assert sk.latex_table(frame).splitlines()[4:6] == [r"a b c & -- & -- \\", r"-- & 2026-01-02 00:00:00 & 1 \\"]


def test_small_p_values_coefficients_and_doses_are_not_written_as_zero() -> None:
    frame = pd.DataFrame(
        {"coefficient": [0.004, -2.0], "dose": [1e-5, 0.25], "p_holm": [1e-5, 0.04], "p_random_holm": [np.nan, 1.0],
         "p_rank": [1, 0.05]}
    )  # fmt: skip
    assert sk.latex_table(frame).splitlines()[4:6] == [
        r"0.004 & 1e-05 & $<$ 0.001 & -- & 1.000 \\",
        r"$-$2 & 0.25 & 0.040 & 1.000 & 0.050 \\",
    ]


def test_a_column_that_only_begins_like_a_p_value_is_not_one() -> None:
    frame = pd.DataFrame(
        {
            "p_yes": [0.3],
            "p_yes_low": [0.2],
            "p_yes_high": [0.4],
            "p_points": [12.5],
            "prompt": [1e-5],
            "p_given": [0.25],
        }
    )
    rows = sk.latex_table(frame, digits={"p_given": 1}).splitlines()[4]
    assert rows == r"0.30 [0.20, 0.40] & 12.50 & 0.00 & 0.2 \\"
