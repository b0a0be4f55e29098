"""Figures: what is drawn is what the frame says, nothing is cut off, and equal data gives equal bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import steerkit as sk
from steerkit.io.tables import read_table, write_table
from steerkit.show import plots
from steerkit.stats.multiple import holm
from steerkit.sweeps.result import SweepResult

COEFFICIENTS = (-4.0, -1.0, 0.0, 1.0, 4.0)
CONTROLS = ["random 1", "random 2"]


def curve_frame(
    names: Sequence[str] = ("formal", "terse", *CONTROLS), seed: int = 0, dose: float = 0.07
) -> pd.DataFrame:
    frame = pd.MultiIndex.from_product([names, COEFFICIENTS], names=["vector", "coefficient"]).to_frame(index=False)
    mean, below, above = np.random.default_rng(seed).uniform([[1], [0.1], [0.1]], [[3], [0.4], [0.4]], (3, len(frame)))
    frame = frame.assign(layer=12, mean=mean, low=mean - below, high=mean + above, n=40, n_missing=0)
    return frame.assign(relative_dose=dose * frame["coefficient"].abs())


def probe_table(layers: int = 12) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    kinds = [(layer, "resid", labels) for layer in ["embed", *range(layers)] for labels in ("true", "shuffled")]
    for layer, features, labels in [*kinds, ("nested", "resid", "true"), (None, "length_position", "true")]:
        accuracy = (0.5 if labels == "shuffled" else 0.8) + rng.normal() * 0.02
        rows.append((layer, features, labels, accuracy, accuracy - 0.04, accuracy + 0.05, accuracy, 240, 60, 2, 5))
    means = ["accuracy", "accuracy_low", "accuracy_high", "roc_auc"]
    return pd.DataFrame(rows, columns=["layer", "features", "labels", *means, "n", "n_groups", "n_classes", "folds"])


def gain_frame() -> pd.DataFrame:
    rows = [
        ("formal", "over unsteered", 0.31, 0.12, 0.5, 40, 0.0004),
        ("terse", "over unsteered", -0.2, -0.41, 0.02, 39, 0.0821),
        ("formal", "over random directions", 0.1, float("nan"), float("nan"), 1, float("nan")),
    ]
    return pd.DataFrame(rows, columns=["name", "comparison", "gain", "low", "high", "n", "p"])


def matrix() -> pd.DataFrame:
    values = np.random.default_rng(0).uniform(-1, 1, (4, 6))
    values[1, 2] = np.nan
    columns = pd.Index(range(-2, 4), name="coefficient", dtype=float)
    return pd.DataFrame(values, pd.Index([3, 6, 9, 12], name="layer"), columns)


def sweep_result() -> SweepResult:
    rng = np.random.default_rng(0)
    rows = [
        {"vector": vector, "layer": 12, "coefficient": c, "prompt_id": str(i), "sample": 0, "group": str(i),
         "text": "a", "trait": rng.normal() + c * (vector == "formal"), "relative_dose": abs(c) * 0.1}
        for vector in ("formal", *CONTROLS) for c in COEFFICIENTS for i in range(8)
    ]  # fmt: skip
    return SweepResult(pd.DataFrame(rows))


def layered_result(axis: str = "coefficient") -> SweepResult:
    """A sweep over layers 2, 10 and a set, with four random controls; `axis` holds the strengths."""
    rng = np.random.default_rng(1)
    names = {"calm": ("vector", None), **{f"calm/random-{i}": ("random", "calm") for i in range(4)}}
    rows = [
        {"vector": name, "role": role, "control_of": of, "layer": layer,
         "coefficient": c * (1 + (axis != "coefficient")), axis: c,
         "prompt_id": str(i), "sample": 0, "group": str(i), "text": "a", "relative_dose": abs(c) * 0.1,
         "trait": rng.normal() + c * (name == "calm")}
        for name, (role, of) in names.items() for layer in (10, 2, "2+10") for c in (0.0, 0.4) for i in range(40)
    ]  # fmt: skip
    return SweepResult(pd.DataFrame(rows))


FURTHER = "95 % prediction interval of one further control: grey."
FIGURES = {
    "by layer": lambda: plots.effect_by_layer(layered_result(), "trait", at=0.4, title="Calm"),
    "profiles": lambda: plots.layer_profiles({"base": probe_table(), "SFT": probe_table(8)}, title="Formality"),
    "curves": lambda: plots.curves(curve_frame(), "coefficient", "trait", controls=CONTROLS, title="Layer", zero=2.0),
    "grid": lambda: plots.curve_grid(
        {score: {name: curve_frame(seed=i) for i, name in enumerate("abc")} for score in ("trait", "perplexity")},
        "coefficient", controls=CONTROLS, title="Personas", zero={"trait": 2.0}, log=["perplexity"],
    ),
    "profile": lambda: plots.layer_profile(probe_table(30), title="Formality", majority=0.52),
    "heat map": lambda: plots.heat_map(matrix(), "gain", 0.0, matrix() - 0.1, matrix() + 0.1, n=40, title="Gain"),
    "cosines": lambda: plots.heat_map(matrix().rename(columns="a long name {}".format), "cosine"),
    "intervals": lambda: plots.intervals(gain_frame(), "gain in trait score", title="Gain"),
}  # fmt: skip


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("curves", "curves"),
        ("grid", "curve_grid"),
        ("profile", "layer_profile"),
        ("by layer", "effect_by_layer"),
        ("profiles", "layer_profiles"),
        ("heat map", "heat_map"),
        ("intervals", "intervals"),
    ],
)
def test_a_long_title_is_broken_into_lines_and_stays_inside_the_figure(name, function, monkeypatch) -> None:
    words = "a title that says rather more than a narrow figure has room for in one line " * 2
    drawn = getattr(plots, function)
    monkeypatch.setattr(plots, function, lambda *a, **k: drawn(*a, **{**k, "title": words.strip()}))
    figure = FIGURES[name]()
    figure.canvas.draw()
    (title,) = [text for text in figure.findobj(Text) if text.get_text() == words.strip()]
    box = title.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert box.height > 2 * title.get_fontsize() * figure.dpi / 72
    assert all(box.y0 >= axes.get_tightbbox().y1 for axes in figure.axes)


def lines(axes: Any) -> dict[str, list[Any]]:
    """The lines with more than two points, by colour."""
    return {to_hex(line.get_color()).upper(): line for line in axes.lines if len(line.get_xdata()) > 2}


def test_neither_torch_nor_pyplot_nor_before_the_first_figure_matplotlib_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys, pandas as pd; from steerkit import plots\n"
        "found = sorted({'torch', 'matplotlib'} & set(sys.modules))\n"
        "figure = plots.heat_map(pd.DataFrame([[1.0, 2.0]]), 'x'); plots.save_figure(figure, sys.argv[1], {})\n"
        "print(found, sorted({'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[] []"


@pytest.mark.parametrize("kind", FIGURES)
def test_no_text_is_smaller_than_7_points(kind: str) -> None:
    figure = FIGURES[kind]()
    figure.draw_without_rendering()
    sizes = {one.get_fontsize() for one in figure.findobj(Text) if one.get_text() and one.get_visible()}
    assert min(sizes) >= 7


@pytest.mark.parametrize("kind", FIGURES)
def test_nothing_is_cut_off_and_the_widths_are_those_of_a_page(kind: str) -> None:
    figure = FIGURES[kind]()
    figure.draw_without_rendering()
    width, height = figure.get_size_inches()
    assert plots.ONE_COLUMN <= width <= plots.TWO_COLUMNS
    assert height < 9
    box = figure.get_tightbbox()
    assert min(box.x0, box.y0) >= -0.005
    assert box.x1 <= width + 0.005
    assert box.y1 <= height + 0.005


@pytest.mark.parametrize("kind", [kind for kind in FIGURES if kind != "cosines"])
def test_each_figure_says_its_n_and_its_interval(kind: str) -> None:
    shown = " ".join(texts(FIGURES[kind]()))
    assert "95 % interval" in shown
    assert "n = 40" in shown or "n = 240" in shown or "  40 " in shown


def test_equal_data_gives_equal_bytes_in_another_process_too(tmp_path: Path) -> None:
    meta = {"checkpoint": "é $x$", "seed": 0}
    for name in ("one", "two"):
        plots.save_figure(FIGURES["curves"](), tmp_path / name, meta)
    figure = FIGURES["curves"]()
    plots.save_figure(figure, tmp_path / "three", meta)
    with matplotlib.rc_context({"font.size": 20, "savefig.dpi": 50, "pdf.fonttype": 3, "savefig.bbox": "tight"}):
        plots.save_figure(figure, tmp_path / "four", meta)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from steerkit import plots; from tests.show.test_plots import FIGURES\n"
        "plots.save_figure(FIGURES['curves'](), sys.argv[2], {'checkpoint': '\\u00e9 $x$', 'seed': 0})"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", code, root, str(tmp_path / "five")], check=True, env=environment)
    for suffix in (".png", ".pdf"):
        contents = {(tmp_path / (name + suffix)).read_bytes() for name in ("one", "two", "three", "four", "five")}
        assert len(contents) == 1


def test_files_embed_fonts_and_provenance_and_no_date(tmp_path: Path) -> None:
    png, pdf = plots.save_figure(
        FIGURES["curves"](), tmp_path / "folder" / "at 0.5", {"b": [1, float("nan")], "a": "é"}
    )
    assert (png.name, pdf.name) == ("at 0.5.png", "at 0.5.pdf")
    assert sorted(path.name for path in png.parent.iterdir()) == ["at 0.5.pdf", "at 0.5.png"]
    with Image.open(png) as image:
        assert json.loads(image.text["Description"]) == {"a": "é", "b": [1, None]}
        assert set(image.text) == {"Description"}
        assert image.width == 650
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
    content = pdf.read_bytes()
    assert b"/FontFile2" in content
    assert b"/Type3" not in content
    assert b"/Subject" in content
    assert not any(key in content for key in (b"Date", b"/Producer", b"/Creator"))


def test_the_settings_of_the_user_are_left_alone() -> None:
    before = dict(matplotlib.rcParams)
    for draw in FIGURES.values():
        draw()
    assert dict(matplotlib.rcParams) == before
    with pytest.raises(ValueError, match="expected"):
        plots.curves(pd.DataFrame(), "c", "y")
    assert dict(matplotlib.rcParams) == before


def test_curves_draw_the_means_and_the_bands_of_the_frame_whatever_its_order() -> None:
    frame = curve_frame()
    figure = plots.curves(frame.sample(frac=1, random_state=0).sort_values("vector"), "c", "y", controls=CONTROLS)
    (axes,) = figure.axes
    drawn = lines(axes)
    shades = dict(zip(CONTROLS, plots.GREYS, strict=False)) | {"formal": plots.PALETTE[0], "terse": plots.PALETTE[1]}
    for name, colour in shades.items():
        part = frame[frame["vector"] == name]
        assert drawn[colour].get_xdata().tolist() == list(COEFFICIENTS)
        assert drawn[colour].get_ydata() == pytest.approx(part["mean"])
        assert drawn[colour].is_dashed() == (name in CONTROLS)
        assert drawn[colour].get_marker() == ("" if name in CONTROLS else {"formal": "o", "terse": "s"}[name])
        bands = [
            x for x in axes.collections if len(x.get_facecolor()) and to_hex(x.get_facecolor()[0]).upper() == colour
        ]
        heights = np.concatenate([path.vertices[:, 1] for band in bands for path in band.get_paths()])
        assert {*part["low"], *part["high"]} <= set(heights)
        assert (heights.min(), heights.max()) == (part["low"].min(), part["high"].max())
    assert figure.legends[0].get_title().get_text() == "Mean and 95 % interval, n = 40 prompt groups."
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["formal", "terse", *CONTROLS]


def test_the_relative_dose_is_shown_only_where_all_series_have_the_same() -> None:
    frame = curve_frame()
    figure = plots.curves(frame, "c", "y")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    (axis,) = axes.child_axes
    assert axis.get_xlim() == pytest.approx([0.07 * end for end in axes.get_xlim()])
    assert axis.xaxis.get_major_formatter()(-0.2) == "0.2"
    for spoil in (
        frame.assign(relative_dose=frame["relative_dose"] * np.where(frame["vector"] == "terse", 1.01, 1)),
        frame.assign(relative_dose=frame["relative_dose"].mask(frame["coefficient"] == 4)),
        frame.assign(relative_dose=frame["coefficient"] ** 2),
        frame.drop(columns="relative_dose"),
    ):
        assert not plots.curves(spoil, "c", "y").axes[0].child_axes


def test_curves_tell_areas_missing_values_and_names_as_they_are() -> None:
    frame = curve_frame(("_a", "b$c$")).assign(n=[38, 40] * 5, n_missing=[0, 3] * 5)
    areas = pd.DataFrame({"vector": ["_a", "b$c$"], "curve_auc": [8.154, np.nan], "low": [-0.001, 1], "high": [9.1, 2]})
    figure = plots.curves(frame, "c", "y", areas=areas, zero=1.5, log=True)
    shown = texts(figure)
    assert "_a: area 8.15 [0.00, 9.10]" in shown
    assert "b$c$: area \u2013" in shown
    assert "Mean and 95 % interval, n = 38\u201340 prompt groups (3 at most without a value)." in shown
    assert figure.axes[0].get_yscale() == "log"
    assert any(list(line.get_ydata()) == [1.5, 1.5] for line in figure.axes[0].lines)


def test_a_lone_coefficient_keeps_its_interval() -> None:
    frame = curve_frame(("a", "b"))
    (axes,) = plots.curves(frame[frame["coefficient"] == 4], "c", "y", controls=["b"]).axes
    bars = [
        segment[:, 1].tolist()
        for bar in axes.collections
        if hasattr(bar, "get_segments")
        for segment in bar.get_segments()
    ]
    assert bars == [pytest.approx([row.low, row.high]) for row in frame[frame["coefficient"] == 4].itertuples()]
    assert [line.get_marker() for line in axes.lines[:2]] == ["o", "_"]


def test_curves_of_a_sweep_result_go_in_as_they_come() -> None:
    result = sweep_result()
    figure = plots.curves(result.curve("trait"), "c", "trait", controls=CONTROLS, areas=result.curve_auc("trait"))
    assert "n = 8 prompt groups" in " ".join(texts(figure))
    assert figure.axes[0].child_axes
    gain = result.gain("trait", over=CONTROLS).assign(comparison="over random directions")
    gain["p"] = holm(gain["p"])
    figure = plots.intervals(gain.assign(name=[f"formal at {c:g}" for c in gain["coefficient"]]), "gain")
    assert "formal at 4" in texts(figure)


def test_the_grid_shares_its_axes_and_its_looks() -> None:
    panels = {
        "trait": {"formal": curve_frame(dose=0.1), "terse": curve_frame(("terse", "random 1"), 1)},
        "perplexity": {"formal": curve_frame(seed=2, dose=0.1), "terse": curve_frame(("terse", "random 1"), 3)},
    }
    figure = plots.curve_grid(panels, "coefficient", controls=["random 1"], log=["perplexity"], zero={"trait": 0.0})
    top, bottom = np.array(figure.axes).reshape(2, 2)
    assert [axes.get_title(loc="left") for axes in top] == ["formal", "terse"]
    assert [top[0].get_ylabel(), bottom[0].get_ylabel()] == ["trait", "perplexity (log)"]
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    assert [axes.get_yscale() for axes in (*top, *bottom)] == ["linear", "linear", "log", "log"]
    assert top[0].get_ylim() == top[1].get_ylim()
    assert len(top[0].child_axes) == len(top[1].child_axes) == 1
    assert not bottom[0].child_axes
    assert lines(top[0])[plots.PALETTE[1]].get_ydata() == pytest.approx(
        panels["trait"]["formal"].query("vector == 'terse'")["mean"]
    )
    assert lines(top[1])[plots.PALETTE[1]].get_ydata() == pytest.approx(
        panels["trait"]["terse"].query("vector == 'terse'")["mean"]
    )


@pytest.mark.parametrize("numbers", ["as they are", "read from CSV"])
def test_the_profile_has_embedding_nested_choice_and_controls(numbers: str, tmp_path: Path) -> None:
    table = probe_table()
    if numbers == "read from CSV":
        table.to_csv(tmp_path / "table.csv", index=False)
        table = pd.read_csv(tmp_path / "table.csv")
    figure = plots.layer_profile(table, majority=0.5)
    (axes,) = figure.axes
    ticks = dict(zip((text.get_text() for text in axes.get_xticklabels()), axes.get_xticks(), strict=True))
    assert ticks["embed"] < 0 < 11 < ticks["nested"]
    assert ticks["4"] == 4
    nested = table[table["layer"] == "nested"].iloc[0]
    assert any(
        list(line.get_ydata()) == [nested["accuracy"]] * 2 and line.get_transform() != axes.transData
        for line in axes.lines
    )
    assert any(line.get_xydata().tolist() == [[ticks["nested"], nested["accuracy"]]] for line in axes.lines)
    drawn = lines(axes)
    for labels, colour in (("true", plots.PALETTE[0]), ("shuffled", plots.GREYS[1])):
        part = table[(table["labels"] == labels) & table["layer"].isin([*range(12), *map(str, range(12))])]
        assert drawn[colour].get_xdata().tolist() == list(range(12))
        assert drawn[colour].get_ydata() == pytest.approx(part["accuracy"])
    assert [text.get_text().split(":")[0] for text in figure.legends[0].get_texts()] == [
        "probe at each layer", "layer chosen in training folds", "length and position alone", "shuffled labels",
        "largest class",
    ]  # fmt: skip
    assert "n = 240 items in 60 groups" in figure.legends[0].get_title().get_text()


def test_a_profile_draws_an_accuracy_whose_band_is_missing() -> None:
    table = probe_table()
    shuffled = table["labels"] == "shuffled"
    table.loc[shuffled & table["layer"].isin([3, 4]), ["accuracy_low", "accuracy_high"]] = np.nan
    for figure in (plots.layer_profile(table), plots.layer_profiles({"base": table})):
        drawn = [np.asarray(line.get_ydata()).tolist() for line in figure.axes[0].lines]
        assert any(set(table[shuffled]["accuracy"][1:]) <= set(values) for values in drawn)


def test_a_profile_needs_no_embedding_nor_controls() -> None:
    table = probe_table()
    figure = plots.layer_profile(table[table["layer"].isin(range(3)) & (table["labels"] == "true")])
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["0", "1", "2"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["probe at each layer"]


def luminance(colour: Any) -> float:
    return float(
        np.dot(
            [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(colour)],
            [0.2126, 0.7152, 0.0722],
        )
    )


@pytest.mark.parametrize("centre", [None, 0.0, 1.0])
def test_every_cell_of_a_heat_map_can_be_read(centre: float | None) -> None:
    frame = pd.DataFrame(np.linspace(-1, 1, 60).reshape(6, 10))
    axes = plots.heat_map(frame, "x", centre).axes[0]
    fills = axes.collections[0].to_rgba(frame.to_numpy()).reshape(-1, 4)
    for text, fill in zip(axes.texts, fills, strict=True):
        dark, light = sorted([luminance(text.get_color()), luminance(fill[:3])])
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    if centre is not None:
        assert luminance(axes.collections[0].to_rgba(centre)[:3]) > 0.9


def test_a_heat_map_prints_its_values_with_their_intervals() -> None:
    frame = matrix()
    figure = plots.heat_map(frame, "gain", 0.0, frame - 0.1, frame + 0.1, n=pd.Series([40, 38, 40]))
    assert figure.get_supxlabel() == "In brackets 95 % intervals. n = 38\u201340 prompt groups."
    axes = figure.axes[0]
    printed = np.array([text.get_text() for text in axes.texts]).reshape(frame.shape)
    assert printed[1, 2] == "\u2013"
    value, interval = printed[0, 0].split("\n")
    assert float(value.replace("\u2212", "-")) == pytest.approx(frame.iloc[0, 0], abs=0.005)
    assert interval == f"[{frame.iloc[0, 0] - 0.1:.2f}, {frame.iloc[0, 0] + 0.1:.2f}]".replace("-", "\u2212")
    assert [text.get_text() for text in axes.get_xticklabels()] == ["\u22122", "\u22121", "0", "1", "2", "3"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["3", "6", "9", "12"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("coefficient", "layer")
    top, bottom = axes.texts[0], axes.texts[-1]
    assert axes.transData.transform(top.get_position())[1] > axes.transData.transform(bottom.get_position())[1]


def test_a_heat_map_of_one_value_or_of_equal_values_is_drawn() -> None:
    for centre in (None, 2.0):
        for frame in (pd.DataFrame([[2.0]]), pd.DataFrame([[2.0, 2.0], [2.0, np.nan]])):
            axes = plots.heat_map(frame, "x", centre).axes[0]
            assert axes.texts[0].get_text() == "2.00"
            assert axes.texts[0].get_color() == "black"


def test_intervals_print_the_rows_under_their_names() -> None:
    figure = plots.intervals(gain_frame(), "gain")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "", "formal", "over unsteered", "over random directions", "terse", "over unsteered",
    ]  # fmt: skip
    right = [text.get_text().split() for text in axes.child_axes[0].get_yticklabels()]
    assert right[2:] == [
        ["0.31", "[0.12,", "0.50]", "40", "<", "0.001"],
        ["0.10", "1", "\u2013"],
        [],
        ["\u22120.20", "[\u22120.41,", "0.02]", "39", "0.082"],
    ]
    points = [line.get_xydata()[0].tolist() for line in axes.lines if line.get_marker() == "o"]
    assert points == [[0.31, 2], [0.1, 3], [-0.2, 5]]
    assert any(list(line.get_xdata()) == [0, 0] for line in axes.lines)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.curves(curve_frame().drop(columns="low"), "c", "y"), "low"),
        (lambda: plots.curves(curve_frame().iloc[:0], "c", "y"), "got 0"),
        (
            lambda: plots.curves(pd.concat([curve_frame(), curve_frame().assign(layer=13)]), "c", "y"),
            "one row per vector",
        ),
        (lambda: plots.curves(curve_frame(), "c", "y", controls=["random 9"]), "random 9"),
        (lambda: plots.curve_grid({}, "c"), "at least one"),
        (lambda: plots.curve_grid({"a": {"x": curve_frame()}, "b": {"y": curve_frame()}}, "c"), "same personas"),
        (lambda: plots.layer_profile(probe_table().drop(columns="n_groups")), "n_groups"),
        (lambda: plots.layer_profile(probe_table(0)), "block layers"),
        (lambda: plots.heat_map(matrix() * np.nan, "x"), "finite"),
        (lambda: plots.heat_map(matrix(), "x", low=matrix()), "both or neither"),
        (lambda: plots.heat_map(matrix(), "x", low=matrix().T, high=matrix().T), "in that shape"),
        (lambda: plots.intervals(gain_frame().drop(columns="p"), "x"), "'p'"),
        (lambda: plots.intervals(gain_frame().iloc[:0], "x"), "got 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_reason(draw: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


@pytest.mark.parametrize(("top", "wanted"), [(40.0, ["2", "5", "10", "20"]), (2e5, ["10", "100", "1000", "10000"])])
def test_a_logarithmic_axis_has_plain_numbers_over_two_decades_and_over_five(top, wanted) -> None:
    frame = curve_frame()
    rising = np.geomspace(1.5, top, len(frame))
    frame = frame.assign(mean=rising, low=rising, high=rising)
    panels = {"perplexity": dict.fromkeys("abc", frame)}
    figure = plots.curve_grid(panels, "coefficient", controls=CONTROLS, log=["perplexity"])
    figure.canvas.draw()
    for axes in figure.axes[:3]:
        shown = [axes.yaxis.get_major_formatter()(at) for at in axes.yaxis.get_majorticklocs()]
        assert set(wanted) <= set(shown)
        assert len(shown) < 12
        assert not any(label.get_text() for label in axes.get_yticklabels(minor=True))


@pytest.mark.parametrize("axis", ["coefficient", "dose"])
def test_the_effect_by_layer_is_the_curve_of_one_strength_and_the_controls_are_a_band(axis: str) -> None:
    result = layered_result(axis)
    figure = plots.effect_by_layer(result, "trait", at=0.4, axis=axis)
    (axes,) = figure.axes
    at = result.where((result.table[axis] == 0.4) & (result.table["layer"] != "2+10"))
    curve = at.curve("trait").query("vector == 'calm'").sort_values("layer")
    (line,) = [one for one in axes.lines if to_hex(one.get_color()).upper() == plots.PALETTE[0]]
    assert line.get_xdata().tolist() == [2, 10] and line.get_ydata() == pytest.approx(curve["mean"])
    band = at.control_curve("trait")
    grey = [
        x for x in axes.collections if len(x.get_facecolor()) and to_hex(x.get_facecolor()[0]).upper() == plots.GREYS[0]
    ]
    heights = {float(y) for one in grey for path in one.get_paths() for y in path.vertices[:, 1]}
    assert {*band["low"], *band["high"]} <= heights
    plain = result.table.query(f"vector == 'calm' and {axis} == 0 and layer != '2+10'")["trait"].mean()
    assert any(list(one.get_ydata()) == [pytest.approx(plain)] * 2 for one in axes.lines)
    shown = texts(figure)
    title = f"Mean and 95 % interval, n = 40 prompt groups, {axis} 0.4."
    assert f"{title}\n{FURTHER}" in shown and "calm/random, k = 4" in shown
    vector_alone = result.where(result.table["vector"] == "calm")
    assert title in texts(plots.effect_by_layer(vector_alone, "trait", at=0.4, axis=axis))


def test_the_legend_says_which_interval_a_band_of_controls_is() -> None:
    result = layered_result().where(layered_result().table["layer"] == 2)
    own = result.curve("trait")
    both = pd.concat([own[own["vector"] == "calm"], result.control_curve("trait")])
    grey = plots.curves(both, "coefficient", "trait", controls=["calm/random"]).legends[0].get_title().get_text()
    assert grey == f"Mean and 95 % interval, n = 40 prompt groups.\n{FURTHER}"
    coloured = plots.curves(both, "coefficient", "trait").legends[0].get_title().get_text()
    assert coloured.endswith("95 % prediction interval of one further control:\ncalm/random.")
    several = both.assign(vector=both["vector"] + "-with-a-long-name")
    long = plots.curves(pd.concat([both, several]), "coefficient", "trait")
    long.canvas.draw()
    box = long.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= long.bbox.x1, "text of the legend outside the figure"
    single = plots.curves(own, "coefficient", "trait", controls=[f"calm/random-{i}" for i in range(4)])
    assert single.legends[0].get_title().get_text() == "Mean and 95 % interval, n = 40 prompt groups."


def test_an_effect_by_layer_refuses_other_strengths_and_several_choices() -> None:
    result = layered_result()
    with pytest.raises(ValueError, match=r"coefficient 3; got coefficient \[0.0, 0.4\]"):
        plots.effect_by_layer(result, "trait", at=3)
    with pytest.raises(ValueError, match="'other'"):
        plots.effect_by_layer(result, "other", at=0.4)
    twice = pd.concat([result.table.assign(choice=one) for one in ("A", "B")], ignore_index=True)
    with pytest.raises(ValueError, match="expected one choice per prompt"):
        plots.effect_by_layer(SweepResult(twice), "trait", at=0.4)
    plots.effect_by_layer(SweepResult(twice).where(twice["choice"] == "A"), "trait", at=0.4)


def test_profiles_of_checkpoints_are_their_tables() -> None:
    tables = {"base": probe_table(), "SFT": probe_table(8)}
    (axes,) = plots.layer_profiles(tables).axes
    ticks = dict(zip((text.get_text() for text in axes.get_xticklabels()), axes.get_xticks(), strict=True))
    assert ticks["embed"] == -1.5 and ticks["4"] == 4
    drawn = lines(axes)
    for number, table in enumerate(tables.values()):
        rows = table[(table["features"] == "resid") & (table["labels"] == "true") & (table["layer"] != "nested")]
        assert drawn[plots.PALETTE[number]].get_ydata() == pytest.approx(rows["accuracy"])
        assert drawn[plots.PALETTE[number]].get_xdata().tolist() == [-1.5, *range(len(rows) - 1)]
    with pytest.raises(ValueError, match="got none"):
        plots.layer_profiles({})


def test_cosines_are_drawn_where_widths_and_layers_agree_and_the_others_are_named() -> None:
    import torch

    from steerkit.vectors.vector import SteeringVector

    torch.manual_seed(0)
    one, two = (SteeringVector({layer: torch.randn(16) for layer in layers}) for layers in ((1, 2, 3), (2, 3, 4)))
    wide = SteeringVector({2: torch.randn(20)})
    figure = plots.cosine_profile({"base": one, "SFT": two, "other": wide})
    (line,) = [one for one in figure.axes[0].lines if to_hex(one.get_color()).upper() == plots.PALETTE[0]]
    assert line.get_xdata().tolist() == [2, 3]
    assert line.get_ydata() == pytest.approx(list(one.at(2, 3).cosine(two.at(2, 3)).values()))
    note = figure.legends[0].get_title().get_text()
    assert "d = 16" in note and "No cosine: base and other; SFT and other." in note
    with pytest.raises(ValueError, match="two vectors of one width"):
        plots.cosine_profile({"base": one, "other": wide})


def test_token_projections_show_both_sides_of_the_push_the_tokens_and_the_end_of_the_prompt() -> None:
    token = ["How", "?", "\n", "Fine"]
    end = [False, True, False, False]
    table = pd.DataFrame({"text": 0, "vector": "mood", "layer": 2, "token": token, "prompt_end": end})
    plain = table.assign(before=[0.0, 1.0, 2.0, 3.0], after=[0.0, 1.0, 2.0, 3.0])
    pushed = plain.assign(after=[0.0, 4.0, 5.0, 6.0], vector="calm")
    axes, lower = plots.token_projections(pd.concat([plain, pushed])).axes
    assert [list(line.get_ydata()) for line in axes.lines[:1]] == [[0, 1, 2, 3]]
    assert [list(line.get_ydata()) for line in lower.lines[:2]] == [[0, 1, 2, 3], [0, 4, 5, 6]]
    assert [text.get_text() for text in lower.get_xticklabels()] == ["How", "?", "\u21b5", "Fine"]
    assert [list(line.get_xdata()) for line in lower.lines[3:]] == [[1.5, 1.5]]
    assert len(plots.token_projections({"mood": plain[["token", "before", "after"]]}).axes) == 1
    with pytest.raises(ValueError, match="expected one text; got 2"):
        plots.token_projections(pd.concat([plain, plain.assign(text=1)]))
    with pytest.raises(ValueError, match="expected rows with the columns"):
        plots.token_projections({})


@pytest.mark.parametrize("site", ["resid_post", "z"])
def test_the_map_of_patching_has_a_row_per_layer_or_head_and_a_column_per_token(
    site: str, llama: Any, tmp_path: Path
) -> None:
    model, tokenizer = llama
    table = sk.patch(model, tokenizer, "The sea is", "The fog is", (" A", " B"), sites=site, layers=[1, 10 % 4]).table
    if site == "z":
        write_table(tmp_path / "table.csv", table, {})
        table = read_table(tmp_path / "table.csv")[0]
    figure = plots.patching(table, site)
    axes, _ = figure.axes
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == ([f"{a}.{b}" for a in (1, 2) for b in range(4)] if site == "z" else ["1", "2"])
    assert [label.get_text() for label in axes.get_xticklabels()] == [f"{i} {c}" for i, c in enumerate("The fog is")]
    (mesh,) = (one for one in axes.collections if one.get_array() is not None)
    values = np.asarray(mesh.get_array()).reshape(len(shown), 10)
    for name, drawn in zip(shown, values, strict=True):
        layer, _, head = name.partition(".")
        own = table[
            (table["layer"] == int(layer)) & (table["head"].isna() if not head else table["head"] == int(head or 0))
        ]
        assert drawn == pytest.approx(own.sort_values("position")["effect"].to_numpy())
    assert mesh.norm.vcenter == 0.0
    assert "n = 1 prompt groups." in texts(figure)


def test_the_map_of_patching_takes_a_table_read_from_csv_and_names_a_missing_site(tmp_path: Path) -> None:
    rows = [
        {"site": "mlp_out", "layer": layer, "head": None, "position": name, "token": None, "effect": 0.1, "n": 3}
        for layer in (9, 10) for name in ("subject", "last")
    ]  # fmt: skip
    write_table(tmp_path / "table.csv", pd.DataFrame(rows), {})
    table = read_table(tmp_path / "table.csv")[0]
    for one in (table, table.drop(columns=["head", "token"])):
        axes, _ = plots.patching(one, "mlp_out").axes
        assert [label.get_text() for label in axes.get_yticklabels()] == ["9", "10"]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["subject", "last"]
    with pytest.raises(ValueError, match=r"expected a site among \['mlp_out'\]; got 'z'"):
        plots.patching(table, "z")
