"""Figures for papers, drawn without pyplot, each with its n and its 95 % intervals. Imports no torch."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from steerkit.io.files import atomic_path
from steerkit.io.json import canonical_json
from steerkit.stats.format import DASH, MINUS, digits_for, interval_text, number_text, p_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from steerkit.sweeps.result import SweepResult
    from steerkit.vectors.vector import SteeringVector


ONE_COLUMN = 3.25  # inches: a column of a page with two
TWO_COLUMNS = 5.5  # the text of a page with one
SMALLEST = 7.0  # points
DPI = 200
INK = "#262626"
GREY = "#6E6E6E"
# Okabe and Ito, "Color Universal Design", 2008, without the yellow, of which a thin line is invisible on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^DvPX"
GREYS = ("#5A5A5A", "#8A8A8A", "#737373", "#A0A0A0")
DASHES = ((0, (4, 2)), (0, (1, 1.5)), (0, (4, 1.5, 1, 1.5)), (0, (7, 2)))
STYLE: dict[str, Any] = {
    "figure.dpi": DPI,
    "font.family": ["DejaVu Sans"],
    "font.size": SMALLEST,
    "axes.titlesize": 7.5,
    "axes.labelsize": SMALLEST,
    "xtick.labelsize": SMALLEST,
    "ytick.labelsize": SMALLEST,
    "legend.fontsize": SMALLEST,
    "legend.title_fontsize": SMALLEST,
    "text.color": INK,
    "text.parse_math": False,
    "pdf.fonttype": 42,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E8E8E8",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.2,
    "xtick.color": GREY,
    "xtick.labelcolor": INK,
    "xtick.major.size": 2.5,
    "ytick.color": GREY,
    "ytick.labelcolor": INK,
    "ytick.major.size": 2.5,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
}
Panels = Mapping[str, Mapping[str, pd.DataFrame]]
"""Score -> panel title, such as a persona -> a frame as for `curves`."""


def _matplotlib() -> Any:
    """Import matplotlib when the first figure is drawn."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure

    return matplotlib


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Apply `STYLE` over matplotlib's defaults inside the `with`; the user's settings are ignored and restored."""
    with _matplotlib().rc_context():
        _matplotlib().rcdefaults()
        _matplotlib().rcParams.update(STYLE)
        yield


def new_figure(width: float, height: float, title: str | None, rows: int = 1, columns: int = 1, **share: Any) -> Any:
    """Create a figure without pyplot.

    Args:
        width: in inches.
        height: in inches.
        title: printed above the axes.
        rows: rows of axes.
        columns: columns of axes.
        share: `sharex` and `sharey`, as for `Figure.subplots`.

    Returns:
        The figure, and its axes as an array `[row, column]`.
    """
    figure = _matplotlib().figure.Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title or "", x=0.01, ha="left", size=8, weight="bold", wrap=True)
    _matplotlib().backends.backend_agg.FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **share)


@styled()
def save_figure(figure: Figure, path: str | Path, meta: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write `PATH.png` (200 dpi) and `PATH.pdf` (fonts embedded), each atomically; equal data gives equal bytes.

    Args:
        figure: its layout is fixed by this call.
        path: without suffix.
        meta: provenance, stored as JSON in the PNG's "Description" and the PDF's "Subject".

    Returns:
        The two paths.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    provenance = canonical_json(meta)
    png, pdf = (Path(path).with_name(Path(path).name + suffix) for suffix in (".png", ".pdf"))
    undated = {"Creator": None, "Producer": None, "CreationDate": None}
    metadata_of = {png: {"Software": None, "Description": provenance}, pdf: {**undated, "Subject": provenance}}
    for file, metadata in metadata_of.items():
        with atomic_path(file) as temporary:
            figure.savefig(temporary, format=file.suffix[1:], dpi=DPI, metadata=metadata)
    return png, pdf


def curves(
    curve: pd.DataFrame,
    label_x: str,
    label_y: str,
    series: str = "vector",
    controls: Sequence[str] = (),
    title: str | None = None,
    zero: float | None = None,
    areas: pd.DataFrame | None = None,
    log: bool = False,
) -> Figure:
    """Draw the mean of a score over the coefficient, one line with its 95 % band per series; one column wide.

    Where the curve has a column dose, it is drawn over the dose. An axis on top shows the relative dose, if it is the
    same multiple of |coefficient| in all series.

    Args:
        curve: result of `SweepResult.curve`: `series`, coefficient, mean, low, high, n (groups), and optionally
            n_missing and relative_dose. One row per series and coefficient. Rows of `SweepResult.control_curve` (with
            k controls) may be added; the legend then says that their interval is that of a further control.
        label_x: label of the coefficient's axis.
        label_y: name of the score, with its unit.
        series: the column whose values are the series.
        controls: the series to draw in grey and dashed.
        title: printed above the axes.
        zero: a score to mark with a horizontal line, such as chance.
        areas: result of `SweepResult.curve_auc` for these series; printed in the legend.
        log: make the score's axis logarithmic.

    Raises:
        ValueError: a missing column, two rows of one series and coefficient, or a control that is no series.

    Example:
        >>> plots.curves(result.curve("rouge_l"), "coefficient", "ROUGE-L", controls=["calm/random-0"])
    """
    labels = {}
    if areas is not None:
        for name, area, low, high in areas[[series, "curve_auc", "low", "high"]].itertuples(index=False):
            text = interval_text(area, low, high, digits_for(area), typographic=True)
            labels[str(name)] = f"{name}: area {text}"
    return curve_grid(
        {label_y: {"": curve}},
        label_x,
        series=series,
        controls=controls,
        title=title,
        zero={} if zero is None else {label_y: zero},
        log=[label_y] if log else [],
        labels=labels,
        width=ONE_COLUMN,
    )


@styled()
def curve_grid(
    panels: Panels,
    label_x: str,
    series: str = "vector",
    controls: Sequence[str] = (),
    title: str | None = None,
    zero: Mapping[str, float] | None = None,
    log: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
    width: float = TWO_COLUMNS,
    sample: str | None = None,
) -> Figure:
    """Draw a grid of `curves`: one row per score, one column per persona, x shared by all, y shared by each row.

    Each column has the axis of the relative dose that `curves` has.

    Args:
        panels: score -> persona -> frame as for `curves`; the same personas for every score.
        label_x: label of the coefficient's axis.
        series: as for `curves`; a series looks the same in all panels.
        controls: as for `curves`.
        title: printed above the grid.
        zero: score -> the value to mark with a horizontal line.
        log: the scores with a logarithmic axis.
        labels: series -> its text in the legend; default its name, of several controls with their number (column k).
        width: of the figure, in inches.
        sample: what the intervals are over and how many of it there are; default: the number of prompt groups.

    Raises:
        ValueError: as for `curves`; a score without a panel for each persona.
    """
    panels = {score: {key: _over_doses(one) for key, one in row.items()} for score, row in panels.items()}
    names = [list(row) for row in panels.values()]
    frames = [frame for row in panels.values() for frame in row.values()]
    if not frames or names != names[:1] * len(names):
        raise ValueError(
            f"expected the same personas for every score, at least one; got {names}. Pass a frame for each of them."
        )
    looks = _looks(frames, series, controls)
    legend_text = _with_numbers(looks, frames, series) | dict(labels or {})
    legend_columns = max(1, min(len(looks), int(width * 15) // (max(map(len, legend_text.values())) + 8)))
    doses = {persona: _dose_per_coefficient([row[persona] for row in panels.values()]) for persona in names[0]}
    height = max(1.65, 1.1 * len(panels)) + 0.14 * math.ceil(len(looks) / legend_columns)
    bands = _further_controls(frames, series)
    height += 0.25 * any(doses.values()) + 0.55 + 0.2 * bool(title) + 0.15 * any(doses) + 0.14 * bool(bands)
    figure, grid = new_figure(width, height, title, len(panels), len(doses), sharex=True, sharey="row")
    handles: dict[str, Any] = {}
    for (score, row), row_of_axes in zip(panels.items(), grid, strict=True):
        row_of_axes[0].set_ylabel(f"{score} (log)" if score in log else score)
        for frame, axes in zip(row.values(), row_of_axes, strict=True):
            for name, look in looks.items():
                part = frame[frame[series].astype(str) == name].sort_values("coefficient")
                handles[legend_text[name]] = _draw_line(axes, part[["coefficient", "mean", "low", "high"]], look)
            if frame["coefficient"].min() <= 0:
                axes.axvline(0, color=GREY, lw=0.6, zorder=1)
            if zero and score in zero:
                axes.axhline(zero[score], color=INK, lw=0.7, ls=(0, (2, 2)), zorder=1)
            if score in log:
                _set_log_axis(axes, min(float(part["mean"].min()) for part in row.values()))
                if len(cut := frame[frame["low"] < axes.get_ylim()[0]]):
                    at = np.full(len(cut), axes.get_ylim()[0])
                    marks = {"color": INK, "marker": "v", "ls": "", "ms": 3.5, "clip_on": False, "zorder": 6}
                    (handles["the band reaches below the axis"],) = axes.plot(cut["coefficient"], at, **marks)
            most_ticks = 8 if len(doses) == 1 else 5
            axes.xaxis.set_major_locator(_matplotlib().ticker.MaxNLocator(most_ticks, steps=[1, 2, 4, 5, 10]))
    for (persona, dose), top, bottom in zip(doses.items(), grid[0], grid[-1], strict=True):
        top.set_title(persona)
        bottom.set_xlabel(label_x)
        if dose:
            _add_dose_axis(top, dose)
    figure.align_ylabels(list(grid[:, 0]))
    n_missing = max(int(frame["n_missing"].max()) if "n_missing" in frame else 0 for frame in frames)
    text = sample or f"n = {_range_text(pd.concat([frame['n'] for frame in frames]))} prompt groups"
    if n_missing:
        text += f" ({n_missing} at most without a value)"
    _draw_legend(figure, handles, text, legend_columns, ["grey"] if bands and {*bands} <= {*controls} else bands)
    return figure


def _further_controls(frames: Sequence[pd.DataFrame], series: str) -> list[str]:
    """The series whose intervals are those of a further control: they have k controls (`SweepResult.control_curve`)."""
    rows = pd.concat([frame[frame["k"] > 0] for frame in frames if "k" in frame] or [pd.DataFrame({series: []})])
    return [str(name) for name in rows[series].unique()]


def _with_numbers(names: Iterable[str], frames: Sequence[pd.DataFrame], series: str) -> dict[str, str]:
    """Name of a series -> its text in the legend, with the number of controls where it is a mean over several."""
    rows = pd.concat([frame.reindex(columns=[series, "k"]) for frame in frames])
    counted = rows.groupby(rows[series].astype(str))["k"].max()
    return {name: name if pd.isna(counted[name]) else f"{name}: mean of {counted[name]:.0f}" for name in names}


def _set_log_axis(axes: Any, least: float) -> None:
    """Make the y axis logarithmic, with plain numbers at 1, 2 and 5 per decade, or at 1 where it spans many.

    Bands that reach to 0 or below are cut at half of the smallest mean, `least`.
    """
    ticker = _matplotlib().ticker
    axes.set_yscale("log", subs=[])
    low, high = axes.get_ylim()
    if low < least / 2:
        low = least / 2
        axes.set_ylim(low, high)
    ticks = ticker.LogLocator(subs=(1, 2, 5) if high < 1e4 * low else (1,), numticks=99)
    axes.yaxis.set(major_locator=ticks, major_formatter="{x:g}", minor_formatter=ticker.NullFormatter())


def _add_dose_axis(axes: Any, dose: float) -> None:
    """Add an axis on top for the relative dose, `dose` times |coefficient|."""
    axis = axes.secondary_xaxis("top", functions=(lambda c: c * dose, lambda d: d / dose))
    axis.set_xlabel("relative dose |c|\u00b7\u2016v\u2016 / \u2016h\u2016", size=SMALLEST, color=GREY)
    axis.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axis.tick_params(labelcolor=GREY)


@dataclass(frozen=True)
class _Look:
    """How a line is drawn: its colour, the opacity of its band, its dashes and its marker."""

    color: str
    band: float
    linestyle: Any = "-"
    marker: str = ""


MOST_ROWS = 12
"""Layers that `patching` draws below each other; more are drawn side by side."""


@styled()
def effect_by_layer(
    result: SweepResult,
    score: str,
    at: float,
    axis: str | None = None,
    label_y: str | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the mean of a score by steered layer at one coefficient, with the controls as a band; one column wide.

    A vector is a line with the 95 % interval of its mean over prompts. The controls of a kind, such as random
    directions, are a grey band: where the mean of a further control lies with a probability of 95 %. A horizontal line
    is the unsteered mean.

    Args:
        result: a sweep over several single layers; sets of layers are left out.
        score: a column of scores. Where rows are choices, select one per prompt first (`result.where`).
        at: the coefficient to draw, or the value of `axis`.
        axis: the column of the steering's strength; default `result.axis`.
        label_y: name of the score in the figure; default `score`.
        title: printed above the axes.

    Raises:
        ValueError: no such score, axis or value; no vector at a single layer; several choices per prompt.

    Example:
        >>> plots.effect_by_layer(result, "rouge_l", at=1.0)
    """
    table, axis = result.table, axis or result.axis
    if score not in table or axis not in table:
        raise ValueError(f"expected the columns {score!r} and {axis!r}; got {list(table)[:20]}. Add the score first.")
    result.check_one_choice()
    single = pd.to_numeric(table["layer"], errors="coerce").notna()
    here = np.isclose(table[axis].astype(float), at) & single
    roles = result.roles()
    names = [name for name, (role, _) in roles.items() if role == "vector"] or list(roles)
    if not (here & table["vector"].isin(names)).any():
        values = sorted(table[axis].dropna().unique().tolist())[:12]
        raise ValueError(f"expected a vector at a single layer with {axis} {at:g}; got {axis} {values}. Choose one.")
    drawn = replace(result, table=table[here].assign(coefficient=float(at)).drop(columns="dose", errors="ignore"))
    curve = drawn.curve(score)
    has_band = any(roles[name][0] != "vector" for name in curve["vector"].unique())
    figure, [[axes]] = new_figure(ONE_COLUMN, 2.6 + 0.15 * bool(title) + 0.14 * has_band, title)
    handles: dict[str, Any] = {}
    if has_band:
        band = drawn.control_curve(score)
        for number, (name, part) in enumerate(band.groupby("vector", sort=False)):
            look = _Look(GREYS[number % 4], 0.22, DASHES[number % 4])
            handles[f"{name}, k = {_range_text(part['k'])}"] = _draw_by_layer(axes, part, look)
    for number, name in enumerate(names):
        if len(part := curve[curve["vector"] == name]):
            look = _Look(PALETTE[number % 7], 0.18, marker=MARKERS[number % 7])
            handles[str(name)] = _draw_by_layer(axes, part, look)
    plain = table[single & (table[axis] == 0) & table["vector"].isin(names)]
    if len(plain):
        line = axes.axhline(float(plain[score].mean()), color=INK, lw=0.7, ls=(0, (2, 2)), zorder=1)
        handles["unsteered"] = line
    axes.xaxis.set_major_locator(_matplotlib().ticker.MaxNLocator(8, integer=True))
    axes.set(xlabel="steered layer", ylabel=label_y or score)
    shown = curve[curve["vector"].isin(names)]
    sample = f"n = {_range_text(shown['n'])} prompt groups, {axis} {at:g}"
    _draw_legend(figure, handles, sample, 1, ["grey"] if has_band and band["low"].notna().any() else [])
    return figure


EMBED_AT = -1.5
"""Where `layer_profiles` draws the embedding."""


def _draw_by_layer(axes: Any, frame: pd.DataFrame, look: _Look) -> Any:
    """Draw `mean`, `low` and `high` over single layers."""
    points = frame.assign(x=pd.to_numeric(frame["layer"])).sort_values("x")
    return _draw_line(axes, points[["x", "mean", "low", "high"]], look)


@styled()
def layer_profiles(tables: Mapping[str, pd.DataFrame], title: str | None = None) -> Figure:
    """Draw the probes of several checkpoints in one figure: held-out accuracy by layer; one column wide.

    Each checkpoint is a line with its 95 % band. Its shuffled labels are a thin grey line, dashed as the checkpoint's
    number. Use the same items and folds for all checkpoints. The embedding is the tick at the left.

    Args:
        tables: checkpoint -> `ProbeResult.table`.
        title: printed above the axes.

    Raises:
        ValueError: no tables, a missing column, or no row of a block.

    Example:
        >>> plots.layer_profiles({"base": base.table, "SFT": sft.table})
    """
    estimates = ["accuracy", "accuracy_low", "accuracy_high"]
    if not tables:
        raise ValueError("expected a table per checkpoint; got none. Pass {'base': probes.table}.")
    figure, [[axes]] = new_figure(ONE_COLUMN, 2.4 + 0.14 * len(tables) + 0.15 * bool(title), title)
    handles: dict[str, Any] = {}
    has_embed, last = False, 0.0
    for number, (name, table) in enumerate(tables.items()):
        _check_columns(table, ["layer", "features", "labels", *estimates, "n", "n_groups"])
        layers = pd.to_numeric(table["layer"], errors="coerce")
        if layers.isna().all():
            raise ValueError(f"expected rows of block layers for {name!r}; got none. Pass the table of probe_layers.")
        is_embed = table["layer"] == "embed"
        x, has_embed, last = layers.mask(is_embed, EMBED_AT), has_embed | is_embed.any(), max(last, layers.max())
        rows = table.assign(x=x)[(table["features"] == "resid") & x.notna()].sort_values("x")
        looks = {
            "true": _Look(PALETTE[number % 7], 0.18, marker=MARKERS[number % 7]),
            "shuffled": _Look(GREYS[number % 4], 0.0, DASHES[number % 4]),
        }
        for labels, look in looks.items():
            part = rows[rows["labels"] == labels]
            if len(part):
                drawn = _draw_line(axes, part[["x", *estimates]], look)
                handles[name if labels == "true" else f"{name}, shuffled labels"] = drawn
    numbers = _matplotlib().ticker.MaxNLocator(6, integer=True).tick_values(0, last)
    ticks = {at: f"{at:.0f}" for at in numbers if 0 <= at <= last} | ({EMBED_AT: "embed"} if has_embed else {})
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set(xlabel="layer", ylabel="held-out accuracy")
    items = pd.concat([table["n"] for table in tables.values()])
    groups = pd.concat([table["n_groups"] for table in tables.values()])
    _draw_legend(figure, handles, f"n = {_range_text(items)} items in {_range_text(groups)} groups", 1)
    return figure


@styled()
def cosine_profile(vectors: Mapping[str, SteeringVector], title: str | None = None) -> Figure:
    """Draw the cosine of each two vectors by layer, such as one direction in several checkpoints; one column wide.

    Vectors of different widths have no cosine; the note below the figure names these pairs. For two unrelated vectors
    of width d the cosine has mean 0 and standard deviation 1 / sqrt(d): the grey band is twice that on both sides.

    Args:
        vectors: name -> vector.
        title: printed above the axes.

    Raises:
        ValueError: fewer than two vectors, or no two of one width with a common layer.

    Example:
        >>> plots.cosine_profile({"base": base_vector, "SFT": sft_vector})
    """
    figure, [[axes]] = new_figure(ONE_COLUMN, 2.6 + 0.15 * bool(title), title)
    handles: dict[str, Any] = {}
    apart: list[str] = []
    widths: set[int] = set()
    for (first, one), (second, other) in itertools.combinations(vectors.items(), 2):
        common = [layer for layer in one.layers if layer in other.layers]
        if one.d_model != other.d_model or not common:
            apart.append(f"{first} and {second}")
            continue
        cosines = one.at(common).cosine(other.at(common))
        number = len(handles)
        (line,) = axes.plot(
            list(cosines), list(cosines.values()), color=PALETTE[number % 7], marker=MARKERS[number % 7], zorder=3
        )
        handles[f"{first} and {second}"] = line
        widths.add(one.d_model)
    if not handles:
        given = {name: (vector.d_model, list(vector.layers)[:4]) for name, vector in vectors.items()}
        raise ValueError(
            f"expected two vectors of one width with a common layer; got widths and layers {given!r:.160}. Pass such."
        )
    reach = 2 / math.sqrt(min(widths))
    axes.axhspan(-reach, reach, color=GREYS[1], alpha=0.18, lw=0)
    axes.axhline(0, color=INK, lw=0.6, zorder=1)
    axes.xaxis.set_major_locator(_matplotlib().ticker.MaxNLocator(8, integer=True))
    axes.set(xlabel="layer", ylabel="cosine")
    note = f"Grey: 95 % of random directions, d = {min(widths)}."
    if apart:
        note += f" No cosine: {'; '.join(apart)}."
    options: Any = {"title": note, "alignment": "left", "loc": "outside lower left"}
    figure.legend(list(handles.values()), list(handles), **options)
    return figure


PROFILE = {
    "true": ("probe at each layer", _Look(PALETTE[0], 0.2, "-", "o")),
    "nested": ("layer chosen in training folds", _Look(PALETTE[1], 0.0, DASHES[1], "D")),
    "length": ("length and position alone", _Look(PALETTE[2], 0.12, DASHES[2])),
    "shuffled": ("shuffled labels", _Look(GREYS[1], 0.22, DASHES[0])),
}
"""Rows of a probe's table -> their text in the legend of `layer_profile`, and their look."""


@styled()
def layer_profile(table: pd.DataFrame, title: str | None = None, majority: float | None = None) -> Figure:
    """Draw the held-out accuracy of a probe by layer with its controls; one column wide.

    The embedding has its own tick at the left. The result with the layer chosen inside the training folds is a point at
    the right, labelled "nested", and a horizontal line.

    Args:
        table: `ProbeResult.table`.
        title: printed above the axes.
        majority: share of the largest class (`ProbeResult.meta["majority_accuracy"]`); a thin line.

    Raises:
        ValueError: a missing column, or no row of a block.

    Example:
        >>> plots.layer_profile(probes.table, majority=probes.meta["majority_accuracy"])
    """
    estimates = ["accuracy", "accuracy_low", "accuracy_high"]
    _check_columns(table, ["layer", "features", "labels", *estimates, "n", "n_groups"])
    layers = pd.to_numeric(table["layer"], errors="coerce")
    if layers.isna().all():
        raise ValueError(f"expected rows of block layers; got {list(table['layer'])}. Pass the table of probe_layers.")
    first = layers.min()
    last = layers.max()
    gap = max(1.0, (last - first) / 8)
    x = layers.mask(table["layer"] == "embed", first - gap).mask(table["layer"] == "nested", last + gap)
    kind = table["labels"].where(table["features"] == "resid", "length").mask(table["layer"] == "nested", "nested")
    figure, [[axes]] = new_figure(ONE_COLUMN, 2.85 + 0.15 * bool(title), title)
    handles: dict[str, Any] = {}
    for name, (text, look) in PROFILE.items():
        part = table.assign(x=x)[kind == name].sort_values("x")
        label = text
        if name in ("nested", "length") and len(part):
            mean, low, high = map(float, part[estimates].iloc[0])
            label = f"{text}: {interval_text(mean, low, high, 2, typographic=True)}"
            axes.axhline(mean, color=look.color, ls=look.linestyle, lw=1, zorder=1.5)
            axes.axhspan(low, high, color=look.color, alpha=look.band, lw=0)
        for _, segment in part.groupby(part["layer"] != "embed"):
            handles[label] = _draw_line(axes, segment[["x", *estimates]].dropna(subset=["x", "accuracy"]), look)
    if majority is not None:
        line = axes.axhline(majority, color=INK, lw=0.6, zorder=1)
        handles[f"largest class: {number_text(majority, 2, typographic=True)}"] = line
    numbers = _matplotlib().ticker.MaxNLocator(6, integer=True).tick_values(first, last)
    ticks = {at: f"{at:.0f}" for at in numbers if first <= at <= last}
    ticks |= {at: str(layer) for at, layer in zip(x, table["layer"], strict=True) if at < first or at > last}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set(xlabel="layer", ylabel="held-out accuracy", xlim=(x.min() - gap / 2, x.max() + gap / 2))
    sample = f"n = {_range_text(table['n'])} items in {_range_text(table['n_groups'])} groups"
    _draw_legend(figure, handles, sample, 1)
    return figure


@styled()
def heat_map(
    frame: pd.DataFrame,
    label: str,
    centre: float | None = None,
    low: pd.DataFrame | None = None,
    high: pd.DataFrame | None = None,
    n: int | pd.Series | None = None,
    title: str | None = None,
    digits: int | None = None,
) -> Figure:
    """Draw a matrix in colours, at most two columns of a page wide. Values and intervals are printed where they fit.

    Args:
        frame: rows x columns of numbers; NaN is shown as a dash. The names of its two axes become the axis labels.
        label: what the numbers are, with their unit; printed at the colour bar.
        centre: the value that is white, with one colour on each side; None for a single scale of brightness.
        low: lower ends of the 95 % intervals, in the frame's shape; needs `high`.
        high: upper ends of the 95 % intervals, in the frame's shape; needs `low`.
        n: prompt groups per value; one number, or one per value. Omit it for exact numbers, such as cosines.
        title: printed above the axes.
        digits: decimals of the printed values; None for as many as the values need.

    Raises:
        ValueError: no finite value, one of `low` and `high` alone, or ends of another shape.
    """
    values, *bounds = (part.to_numpy(dtype=float) for part in (frame, low, high) if part is not None)
    if not np.isfinite(values).any() or len(bounds) == 1 or any(part.shape != values.shape for part in bounds):
        raise ValueError(
            f"expected finite values {values.shape}, and low and high both or neither, in that shape; got "
            f"{int(np.isfinite(values).sum())} finite values and intervals {[part.shape for part in bounds]}. Pass "
            "both or neither."
        )
    rows, columns = values.shape
    margin = 1.0 + 0.055 * max(len(str(name)) for name in frame.index)
    width = min(TWO_COLUMNS, max(ONE_COLUMN, margin + (0.65 if bounds else 0.36) * columns))
    height = rows * (0.3 if bounds else 0.24) + 0.75 + 0.2 * bool(title)
    cell_width = (width - margin) / columns
    figure, [[axes]] = new_figure(width, height, title)
    norm = None if centre is None else _matplotlib().colors.CenteredNorm(centre)
    colours = _matplotlib().colormaps["RdBu_r" if norm else "Blues"].with_extremes(bad="#E8E8E8")
    image = axes.pcolormesh(values, cmap=colours, norm=norm, edgecolors="white", linewidth=0.8)
    bar = figure.colorbar(image, ax=axes, label=label, aspect=max(8, rows * 3), pad=0.02, fraction=0.04)
    bar.outline.set_visible(False)
    digits = digits_for(values) if digits is None else digits
    has_bounds = bool(bounds) and cell_width >= 0.6
    has_values = cell_width >= 0.3
    for i, j in np.ndindex(rows, columns):
        if not has_values:
            break
        lower, upper = (part[i, j] for part in bounds) if has_bounds else (None, None)
        text = interval_text(values[i, j], lower, upper, digits, typographic=True).replace(" ", "\n", 1)
        ink = _readable(image.to_rgba(values[i, j]))
        axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=ink)
    for axis, names in ((axes.xaxis, frame.columns), (axes.yaxis, frame.index)):
        texts = [name if isinstance(name, str) else f"{name:g}".replace("-", MINUS) for name in names]
        every = max(1, math.ceil(0.17 / cell_width)) if axis is axes.xaxis else 1
        texts = texts[::every]
        axis.set_ticks(np.arange(len(names))[::every] + 0.5, texts)
        axis.set_label_text(str(names.name or ""))
        if axis is axes.xaxis and 0.06 * max(map(len, texts)) > cell_width * every:
            axis.set_ticks(axis.get_ticklocs(), texts, rotation=40, ha="right", rotation_mode="anchor")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.set_ylim(rows, 0)
    notes = ["In brackets 95 % intervals." if has_bounds else "95 % intervals are in the table."] if bounds else []
    if n is not None:
        notes.append(f"n = {_range_text(n)} prompt groups.")
    figure.supxlabel(" ".join(notes), x=0.01, ha="left", size=SMALLEST)
    return figure


def patching(table: pd.DataFrame, site: str, title: str | None = None) -> Figure:
    """Draw the effects of patching one site as a heat map, layers x positions; positions x layers of many layers.

    An effect is the share of the difference between two runs that the patch makes up for: white is 0, the unpatched
    run; 1 is the run that activations are taken from.

    Args:
        table: `PatchResult.table`; without `head` and `token` too.
        site: one of its sites; of `"z"` each row is a head.
        title: printed above the axes.

    Raises:
        ValueError: the table has no row of the site.

    Example:
        >>> plots.patching(sk.patch(model, tokenizer, clean, corrupted, answers).table, "resid_post")
    """
    _check_columns(table, ["site", "layer", "position", "effect", "n"])
    rows = table[table["site"] == site].reindex(columns=[*dict.fromkeys((*table.columns, "head", "token"))])
    if rows.empty:
        raise ValueError(f"expected a site among {sorted(set(table['site']))}; got {site!r}. Patch it first.")
    head = pd.to_numeric(rows["head"], errors="coerce").astype("Int64")  # in a CSV file a missing one is empty
    heads = head.notna().any()
    place = rows["layer"].astype(str) + "." + head.astype(str) if heads else rows["layer"]
    named = rows["token"].notna() & (rows["token"] != "") & rows["position"].map(lambda one: not isinstance(one, str))
    shown = rows["position"].astype(str).where(~named, rows["position"].astype(str) + " " + rows["token"].astype(str))
    frame = rows.assign(place=place, shown=shown).pivot(index="place", columns="shown", values="effect")
    frame = frame.loc[list(dict.fromkeys(place)), list(dict.fromkeys(shown))]
    frame.index.name, frame.columns.name = "layer.head" if heads else "layer", "position"
    frame = frame.T if len(frame) > MOST_ROWS else frame
    label = f"effect of patching {site}\n(0: unpatched run, 1: other run)"
    return heat_map(frame, label, centre=0.0, n=rows["n"], title=title, digits=2)


@styled()
def intervals(frame: pd.DataFrame, label_x: str, title: str | None = None) -> Figure:
    """Draw a forest plot, two columns of a page wide: a mean with its 95 % interval per comparison, and a line at 0.

    Args:
        frame: one row per name and comparison: name (its rows are grouped below it), comparison, gain (the mean), low,
            high, n (prompt groups), p (of the sign-flip test; already adjusted, by `steerkit.stats.multiple.holm`,
            where it must be), and optionally p_rank, a column of its own.
        label_x: what the gain is, with its unit.
        title: printed above the axes.

    Raises:
        ValueError: a missing column, or no rows.
    """
    _check_columns(frame, ["name", "comparison", "gain", "low", "high", "n", "p"])
    digits = digits_for(frame["gain"])
    left = [""]
    tests = {"p": "p", **({"p_rank": "p by rank"} if "p_rank" in frame else {})}
    widths = {name: max(7, len(text)) for name, text in tests.items()}
    heads = "  ".join(f"{text:>{widths[name]}}" for name, text in tests.items())
    right = [f"{'mean [95 % interval]':>20} {'n':>3} {heads}"]
    lines = len(frame) + frame["name"].nunique()
    figure, [[axes]] = new_figure(TWO_COLUMNS, 0.17 * lines + 0.75 + 0.2 * bool(title), title)
    for name, part in frame.groupby("name", sort=False):
        left.append(str(name))
        right.append("")
        for row in part.to_dict("records"):
            axes.hlines(len(left), row["low"], row["high"], color=PALETTE[0], lw=1.2)
            axes.plot(row["gain"], len(left), "o", color=PALETTE[0], markersize=4)
            estimate = interval_text(row["gain"], row["low"], row["high"], digits, typographic=True)
            left.append(str(row["comparison"]))
            cells = (f"{DASH if pd.isna(row[name]) else p_text(row[name]):>{widths[name]}}" for name in tests)
            right.append(f"{estimate:>20} {row['n']:>3.0f} {'  '.join(cells)}")
    axes.axvline(0, color=INK, lw=0.7, zorder=1)
    axes.set_yticks(range(len(left)), left)
    for text, tick in zip(right, axes.get_yticklabels(), strict=True):
        tick.set_weight("normal" if text else "bold")
    table = axes.secondary_yaxis("right")
    table.set_yticks(range(len(right)), right, family="DejaVu Sans Mono")
    for axis in (axes, table):
        axis.tick_params(axis="y", length=0)
        axis.spines[:].set_visible(False)
    axes.grid(False, axis="y")
    axes.set(xlabel=label_x, ylim=(len(left) - 0.5, -0.5))
    return figure


@styled()
def token_projections(
    table: pd.DataFrame | Mapping[str, pd.DataFrame], title: str | None = None, longest: int = 50
) -> Figure:
    """Draw the projection on each vector at each token of one text, two columns of a page wide; a panel per vector.

    The solid line is the projection after the steering of the vector's layer; where it differs, a dashed line is the
    one before. A vertical line marks the end of the prompt. One text has no interval.

    Args:
        table: rows of one text of `sk.project`, or `Generation.projections`.
        title: printed above the panels.
        longest: tokens that are shown, the last ones of a longer text.

    Raises:
        ValueError: a missing column, no rows, or several texts.

    Example:
        >>> plots.token_projections(generation.projections)
        >>> plots.token_projections(table[table["text"] == 0])
    """
    if isinstance(table, Mapping):
        table = pd.concat([part.assign(vector=name) for name, part in table.items()]) if table else pd.DataFrame()
    _check_columns(table, ["vector", "token", "before", "after"])
    if "text" in table and table["text"].nunique() > 1:
        raise ValueError(f"expected one text; got {table['text'].nunique()}. Select one: table[table['text'] == 0].")
    keys = ["vector", "layer"] if "layer" in table else ["vector"]
    panels = dict(list(table.groupby(keys, sort=False)))
    figure, grid = new_figure(
        TWO_COLUMNS, 0.75 + 1.05 * len(panels) + 0.2 * bool(title), title, len(panels), sharex=True
    )
    for (key, part), axes in zip(panels.items(), grid[:, 0], strict=True):
        shown = part.tail(longest).reset_index(drop=True)
        name = str(key[0]) + (f", layer {key[1]}" if len(key) > 1 else "")
        if not shown["before"].equals(shown["after"]):
            axes.plot(shown["before"], color=PALETTE[1], ls=DASHES[0], label="before the steering of the layer")
            axes.plot(shown["after"], color=PALETTE[0], marker="o", label="after it")
            axes.legend(ncols=2, loc="best")
        else:
            axes.plot(shown["after"], color=PALETTE[0], marker="o")
        axes.axhline(0, color=GREY, lw=0.6, zorder=1)
        if "prompt_end" in shown:
            for end in shown.index[shown["prompt_end"].astype(bool)]:
                axes.axvline(end + 0.5, color=INK, lw=0.7, ls=(0, (2, 2)), zorder=1)
                place = {"textcoords": "offset points", "xytext": (2, -1), "va": "top", "color": INK}
                axes.annotate("end of the prompt", (end + 0.5, 1), xycoords=("data", "axes fraction"), **place)
        axes.set_ylabel(f"projection on\n{name}")
        axes.grid(False, axis="x")
    tokens = [token.replace("\n", "\u21b5") for token in shown["token"].astype(str)]
    grid[-1, 0].set_xticks(range(len(tokens)), tokens, rotation=90)
    grid[-1, 0].set_xlim(-0.5, len(tokens) - 0.5)
    return figure


def _check_columns(frame: pd.DataFrame, wanted: Sequence[str]) -> None:
    missing = [column for column in wanted if column not in frame]
    if missing or frame.empty:
        raise ValueError(
            f"expected rows with the columns {list(wanted)}; got {len(frame)}, and {missing} are missing. Add them."
        )


def _looks(frames: Sequence[pd.DataFrame], series: str, controls: Sequence[str]) -> dict[str, _Look]:
    """The look of each series by its name, controls last.

    Raises:
        ValueError: a missing column, two rows of one series and coefficient, or a control that is no series.
    """
    for frame in frames:
        _check_columns(frame, [series, "coefficient", "mean", "low", "high", "n"])
        if frame.duplicated([series, "coefficient"]).any():
            raise ValueError(
                f"expected one row per {series} and coefficient; got several. Select one layer before drawing."
            )
    names = dict.fromkeys(str(name) for frame in frames for name in frame[series])
    if absent := [name for name in controls if name not in names]:
        raise ValueError(f"expected controls among the series {list(names)}; got {absent}. Remove them.")
    vectors = [name for name in names if name not in controls]
    looks = {
        name: _Look(PALETTE[i % 7], 0.18, ("-", *DASHES)[i // 7 % 5], MARKERS[i % 7]) for i, name in enumerate(vectors)
    }
    return looks | {name: _Look(GREYS[i % 4], 0.12, DASHES[i % 4]) for i, name in enumerate(controls)}


def _draw_line(axes: Any, points: pd.DataFrame, look: _Look) -> tuple[Any, Any]:
    """Draw a line with its band, and an error bar where there is a single point.

    Args:
        points: columns x, mean, low, high.

    Returns:
        The band and the line, for the legend.
    """
    x, mean, low, high = (points[column].astype(float) for column in points)
    is_single = len(x) == 1
    axes.vlines(x, low, high, color=look.color, lw=is_single)
    marker = look.marker or "_" * is_single
    (line,) = axes.plot(x, mean, color=look.color, ls=look.linestyle, marker=marker, zorder=3 if look.marker else 2)
    return axes.fill_between(x, low, high, color=look.color, alpha=look.band, lw=0), line


def _over_doses(frame: pd.DataFrame) -> pd.DataFrame:
    """A curve with its dose, where it has one, in the place of the coefficient."""
    return frame.assign(coefficient=frame["dose"]) if "dose" in frame else frame


def _dose_per_coefficient(frames: Sequence[pd.DataFrame]) -> float | None:
    """Relative dose per unit of |coefficient|; None unless it is one number, within 0.1 %, in all rows."""
    rows = pd.concat([frame.reindex(columns=["coefficient", "relative_dose"]) for frame in frames]).astype(float)
    ratio = (rows["relative_dose"] / rows["coefficient"].abs())[rows["coefficient"] != 0].to_numpy()
    return float(ratio[0]) if len(ratio) and ratio[0] > 0 and np.allclose(ratio, ratio[0], rtol=1e-3, atol=0) else None


def _draw_legend(
    figure: Figure, handles: Mapping[str, Any], sample: str, columns: int, bands: Sequence[str] = ()
) -> None:
    """Draw the legend below the axes.

    Args:
        bands: names of what is drawn with the prediction interval of a further control.
    """
    lines = [f"Mean and 95 % interval, {sample}."]
    if bands:
        lines += wrap(
            f"95 % prediction interval of one further control: {', '.join(bands)}.", int(18 * figure.get_figwidth())
        )
    options: Any = {"title": "\n".join(lines), "alignment": "left", "ncols": columns, "loc": "outside lower left"}
    figure.legend(list(handles.values()), list(handles), **options)


def _range_text(values: pd.Series | int) -> str:
    """The smallest and the largest of some counts, `38\u201340`, or the one count."""
    return "\u2013".join(str(int(end)) for end in sorted({np.min(values), np.max(values)}))


def _readable(rgba: Sequence[float]) -> str:
    """Black or white, whichever has more contrast on a colour (relative luminance of WCAG 2.2)."""
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgba[:3])
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.179 else "black"
