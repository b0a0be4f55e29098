"""Pictures of README and docs: what they show follows from the tables, nothing is cut, and they fit a page of paper."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from figures.dose import SPREAD
from figures.pages import PICTURES, RESULTS
from steerkit.io.tables import read_table
from steerkit.show.plots import DPI, TWO_COLUMNS

ROOT = Path(__file__).parents[2]


def test_every_control_of_readmes_figure_is_a_marker_near_its_dose_that_the_legend_calls_shifted() -> None:
    figure, _ = PICTURES["docs/dose.png"](RESULTS)
    controls = read_table(RESULTS / "demo" / "controls.csv")[0]
    mine = controls[controls["persona"] == "steps"]
    axes = figure.axes[0]
    room = SPREAD * (axes.dataLim.x1 - axes.dataLim.x0)
    drawn = {line.get_marker(): line for line in axes.lines if line.get_marker() in ("s", "^")}
    for role, marker in (("random", "s"), ("shuffled", "^")):
        part = mine[mine["role"] == role]
        np.testing.assert_allclose(drawn[marker].get_ydata(), part["trait"])
        assert np.abs(drawn[marker].get_xdata() - part["relative_dose"].iloc[0]).max() <= room + 1e-6
        assert len(part) == 19
    words = [text.get_text() for text in figure.legends[0].texts]
    assert sum("shifted sideways" in text for text in words) == 2


@pytest.mark.parametrize("name", ["docs/dose.png"])
def test_no_interval_of_a_figure_is_cut_at_the_end_of_an_axis(name: str) -> None:
    figure, _ = PICTURES[name](RESULTS)
    for axes in figure.axes:
        low, high = axes.get_ylim()
        ends = [y for lines in axes.collections for segment in lines.get_segments() for y in segment[:, 1]]
        assert ends and min(ends) >= low and max(ends) <= high
