from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import linregress

from steerkit.stats.items import slopes
from steerkit.stats.mean import accuracy_interval
from steerkit.sweeps.result import SweepResult

SCORES = {  # prompt -> its score at -1, 0 and 2
    "up": [0.1, 0.2, 0.7], "down": [0.9, 0.5, 0.4], "flat": [0.3, 0.3, 0.3], "bent": [0.2, 0.9, 0.5],
}  # fmt: skip


def result(axis: str = "coefficient", scale: float = 1.0) -> SweepResult:
    rows = [
        {"vector": vector, "layer": layer, "coefficient": c * scale, axis: c, "prompt_id": prompt, "group": prompt,
         "sample": sample, "text": "t", "probability": sign * value + (0.01 * sample if prompt != "flat" else 0)}
        for vector, sign in (("v", 1), ("w", -1)) for layer in (3, 8) for prompt, values in SCORES.items()
        for c, value in zip((-1.0, 0.0, 2.0), values, strict=True) for sample in (0, 1)
    ]  # fmt: skip
    return SweepResult(pd.DataFrame(rows).sample(frac=1, random_state=0).reset_index(drop=True))


@pytest.mark.parametrize("axis", ["coefficient", "dose"])
def test_the_slope_of_each_prompt_is_that_of_a_regression_over_any_axis(axis: str) -> None:
    found = result(axis, scale=3.0 if axis == "dose" else 1.0).per_item("probability", axis=axis)
    assert len(found) == 2 * 2 * len(SCORES)
    for row in found.itertuples():
        sign = {"v": 1, "w": -1}[row.vector]
        assert row.slope == pytest.approx(sign * linregress([-1, 0, 2], SCORES[row.prompt_id]).slope, abs=1e-12)
        assert row.unsteered == pytest.approx(sign * SCORES[row.prompt_id][1] + 0.005 * (row.prompt_id != "flat"))
        assert row.n == 3


def test_the_share_that_moves_the_wrong_way_counts_slopes_below_zero_and_leaves_out_missing_ones() -> None:
    one = result()
    shares = one.wrong_way("probability").set_index(["vector", "layer"])
    assert shares.loc[("v", 3), "share"] == 0.25 and shares.loc[("w", 3), "share"] == 0.5
    wilson = accuracy_interval([0, 1, 0, 0])
    assert shares.loc[("v", 8), ["low", "high"]].tolist() == pytest.approx([wilson.low, wilson.high])
    assert (shares["unmoved"] == 0.25).all() and (shares["n"] == 4).all()
    lost = one.table["probability"].mask((one.table["prompt_id"] == "up") & (one.table["coefficient"] != 0))
    fewer = SweepResult(one.table.assign(probability=lost)).wrong_way("probability").set_index(["vector", "layer"])
    assert fewer.loc[("v", 3), "share"] == pytest.approx(1 / 3)
    assert (fewer["n_missing"] == 1).all() and (fewer["n"] == 3).all()


def test_prompts_of_one_group_are_one_unit() -> None:
    one = result()
    together = SweepResult(one.table.assign(group=one.table["prompt_id"].isin(["up", "flat"]).map(str)))
    assert (together.wrong_way("probability")["n"] == 2).all()


def test_several_choices_per_prompt_are_refused_until_one_is_selected() -> None:
    table = result().table
    both = pd.concat([table.assign(choice=" (A)"), table.assign(choice=" (B)", probability=1 - table["probability"])])
    both = both.assign(matching=np.where(both["prompt_id"] == "up", " (A)", " (B)")).reset_index(drop=True)
    with pytest.raises(ValueError, match="expected one choice per prompt"):
        SweepResult(both).wrong_way("probability")
    matching = SweepResult(both).where(both["choice"] == both["matching"])
    slope = matching.per_item("probability").set_index(["vector", "layer", "prompt_id"])["slope"]
    assert slope[("v", 3, "up")] > 0 and slope[("v", 3, "down")] > 0 and slope[("w", 3, "up")] < 0
    with pytest.raises(ValueError, match=f"expected {len(both)} booleans"):
        SweepResult(both).where([True])


def test_one_strength_has_no_slope_and_shapes_are_checked() -> None:
    one = result()
    with pytest.raises(ValueError, match="two values of coefficient or more"):
        one.where(one.table["coefficient"] == 0).per_item("probability")
    with pytest.raises(ValueError, match="columns to group by"):
        one.per_item("probability", axis="dose")
    with pytest.raises(ValueError, match="strengths \\[m\\] and scores"):
        slopes([0, 1], [[1.0]])
    assert np.isnan(slopes([0, 1], [[1.0, np.nan]])).all()
