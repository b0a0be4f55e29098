"""Titles of the demo's figures say what the numbers say."""

from __future__ import annotations

import pandas as pd

from steerkit.demo.figures import dose_title


def test_a_trait_that_falls_with_the_dose_is_not_said_to_rise() -> None:
    falls = {"persona": "steps", "score": "trait", "role": "vector", "coefficient": [-1.0, 0.0, 1.0, 2.0]}
    curves = pd.DataFrame({**falls, "mean": [0.9, 0.6, 0.3, 0.1]})
    assert dose_title(curves) == "No trait score rises"
    assert dose_title(curves.assign(mean=[0.0, 0.1, 0.4, 0.9])).endswith("rise with the dose")
