"""Pictures of README and docs: what they show follows from the tables, nothing is cut, and they fit a page of paper."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text

from figures.dose import SPREAD
from figures.pages import PICTURES, RESULTS
from steerkit.demo.figures import gain_rows
from steerkit.io.tables import read_table
from steerkit.show.plots import DPI, SMALLEST, TWO_COLUMNS

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


DRAWN = [name for name in PICTURES if (ROOT / name).is_file() and not name.startswith("docs/agents")]
"""Pictures whose tables are in `results/`."""


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_at_most_as_wide_as_the_text_of_a_paper_and_no_higher_than_it_is_wide_by_a_tenth(name) -> None:
    width, height = struct.unpack(">II", (ROOT / name).read_bytes()[16:24])
    assert width <= TWO_COLUMNS * DPI and height <= 1.1 * width


@pytest.mark.parametrize("name", DRAWN)
def test_the_title_of_a_picture_is_a_sentence_and_no_text_leaves_the_picture_or_is_under_7_points(name) -> None:
    figure, _ = PICTURES[name](RESULTS)
    title = figure.get_suptitle()
    verbs = r"\b(?:adds?|raises?|rises?|moves?|depends?|grows?|do|does)\b"
    assert re.search(verbs, title) and not re.search(r"^(?:Gain|Seconds and)\b", title)
    figure.draw_without_rendering()
    whole = figure.bbox
    labels = [
        label for axes in figure.axes for label in (axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title)
    ]
    notes = [note for legend in figure.legends for note in (legend.get_title(), *legend.texts)]
    for text in (*figure.texts, *labels, *notes):
        box = text.get_window_extent()
        assert not text.get_text() or (box.x0 >= -1 and box.y0 >= -1 and box.x1 <= whole.x1 + 1), text
    assert min(text.get_size() for text in figure.findobj(Text)) >= SMALLEST


def test_gains_over_controls_have_a_p_by_rank_and_no_p_of_the_sign_flip_test() -> None:
    rows = gain_rows(read_table(RESULTS / "demo" / "gains.csv")[0])
    controls = rows["comparison"] != "over coefficient 0"
    assert rows.loc[controls, "p"].isna().all() and rows.loc[controls, "p_rank"].notna().all()
    assert rows.loc[~controls, "p"].notna().all() and rows.loc[~controls, "p_rank"].isna().all()
    figure, _ = PICTURES["docs/demo-gains.png"](RESULTS)
    words = " ".join(text.get_text() for text in figure.findobj(Text))
    assert "p  p by rank" in words


def test_the_figure_of_doses_marks_the_chosen_coefficient_of_each_persona_and_names_its_controls() -> None:
    figure, _ = PICTURES["docs/demo-dose.png"](RESULTS)
    chosen = read_table(RESULTS / "demo" / "verdicts.csv")[0]["coefficient"].tolist()
    dotted = [[line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":" and len(line.get_xdata()) == 2
               and line.get_xdata()[0] == line.get_xdata()[1]] for axes in figure.axes]  # fmt: skip
    assert dotted == [[one] for one in chosen] * 4
    words = {text.get_text() for text in figure.legends[0].texts}
    assert {"one random direction of its norm", "one vector from shuffled labels"} <= words


@pytest.mark.parametrize("name", ["docs/demo-dose.png", "docs/tutorial-curves.png"])
def test_a_band_that_is_cut_at_the_axis_has_a_mark(name: str) -> None:
    figure, _ = PICTURES[name](RESULTS)
    cut = [axes for axes in figure.axes for band in axes.collections if band.get_paths()
           and min(path.vertices[:, 1].min() for path in band.get_paths()) < axes.get_ylim()[0] - 1e-9]  # fmt: skip
    assert cut and all(any(line.get_marker() == "v" for line in axes.lines) for axes in cut)
    assert "the band reaches below the axis" in {text.get_text() for text in figure.legends[0].texts}


def test_the_legend_has_the_number_of_controls_that_a_line_is_the_mean_of() -> None:
    figure, _ = PICTURES["docs/tutorial-curves.png"](RESULTS)
    assert "cheerful/random: mean of 19" in {text.get_text() for text in figure.legends[0].texts}


@pytest.mark.parametrize("name", ["docs/dose.png"])
def test_no_interval_of_a_figure_is_cut_at_the_end_of_an_axis(name: str) -> None:
    figure, _ = PICTURES[name](RESULTS)
    for axes in figure.axes:
        low, high = axes.get_ylim()
        segments = [one for lines in axes.collections for one in lines.get_segments() if len(one)]
        ends = [y for segment in segments for y in segment[:, 1]]
        assert ends and min(ends) >= low and max(ends) <= high
