"""Figures for papers, outside pyplot's state, each with its n and its intervals. Imports no torch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from steerkit.io.files import atomic_path
from steerkit.io.json import canonical_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure


ONE_COLUMN, TWO_COLUMNS, DPI = 3.3, 6.9, 200
INK, GREY = "#262626", "#6E6E6E"
# Okabe and Ito, "Color Universal Design", 2008, without the yellow: a thin line of it is not seen on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, GREYS = "os^DvPX", ("#5A5A5A", "#8A8A8A", "#737373", "#A0A0A0")
DASHES = ((0, (4, 2)), (0, (1, 1.5)), (0, (4, 1.5, 1, 1.5)), (0, (7, 2)))
STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"], "font.size": 6.5, "text.color": INK, "text.parse_math": False, "pdf.fonttype": 42,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelcolor": INK, "axes.edgecolor": GREY,
    "axes.linewidth": 0.6, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#E8E8E8", "grid.linewidth": 0.5, "lines.linewidth": 1.2, "lines.markersize": 3.2,
    "xtick.color": GREY, "xtick.labelcolor": INK, "xtick.major.size": 2.5, "legend.frameon": False, "figure.dpi": DPI,
    "ytick.color": GREY, "ytick.labelcolor": INK, "ytick.major.size": 2.5, "legend.handlelength": 2.4,
}  # fmt: skip


def _matplotlib() -> Any:
    """The library, loaded when the first figure is drawn."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure

    return matplotlib


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """`STYLE` over matplotlib's defaults: the user's settings change no figure, and are not changed."""
    with _matplotlib().rc_context():
        _matplotlib().rcdefaults()
        _matplotlib().rcParams.update(STYLE)
        yield


def new_figure(width: float, height: float, title: str | None, rows: int = 1, columns: int = 1, **share: Any) -> Any:
    """A figure of a size in inches, outside pyplot's state, under its title, and its axes `[row, column]`."""
    figure = _matplotlib().figure.Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title or "", x=0.01, ha="left", size=8, weight="bold", wrap=True)
    _matplotlib().backends.backend_agg.FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **share)


@styled()
def save_figure(figure: Figure, path: str | Path, meta: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write `PATH.png` (200 dpi) and `PATH.pdf` (fonts embedded), each atomically, and return these two paths.

    Equal data gives equal bytes. `meta`, the provenance, goes into both files as JSON (the PNG's "Description", the
    PDF's "Subject"). The layout of the figure is settled by this call.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    about, undated = canonical_json(meta), {"Creator": None, "Producer": None, "CreationDate": None}
    png, pdf = (Path(path).with_name(Path(path).name + suffix) for suffix in (".png", ".pdf"))
    for file, metadata in ((png, {"Software": None, "Description": about}), (pdf, {**undated, "Subject": about})):
        with atomic_path(file) as temporary:
            figure.savefig(temporary, format=file.suffix[1:], dpi=DPI, metadata=metadata)
    return png, pdf


def curves(
    curve: pd.DataFrame, label_x: str, label_y: str, series: str = "vector", controls: Sequence[str] = (),
    title: str | None = None, zero: float | None = None, areas: pd.DataFrame | None = None, log: bool = False,
) -> Figure:  # fmt: skip
    """The mean of a score over the coefficient, a line per series in its 95 % interval as a band; one column wide.

    An axis on top gives the relative dose, where that is the same multiple of |coefficient| in all series. `ValueError`
    if a column is missing, a coefficient stands twice in a series, or a control is not among the series.

    Args:
        curve: what `SweepResult.curve` gives: `series`, coefficient, mean, low, high, n (groups), and optionally
            n_missing and relative_dose. One row per series and coefficient.
        label_x, label_y: what the coefficient is; the score and its unit.
        series, controls: the column that tells the lines apart; those of its values to draw in grey, dashed or dotted.
        zero, log: a score to draw a horizontal line at, such as chance; whether the score's axis is logarithmic.
        areas: what `SweepResult.curve_auc` gives for these series; goes into the legend.
    """
    labels, zeros, logs = {}, {} if zero is None else {label_y: zero}, [label_y] if log else []
    for name, *area in [] if areas is None else areas[[series, "curve_auc", "low", "high"]].itertuples(index=False):
        labels[str(name)] = f"{name}: area {_estimate(_digits(area[0]), *area)}"
    panels = {label_y: {"": curve}}
    return curve_grid(panels, label_x, series, controls, title, zeros, logs, labels, ONE_COLUMN)


@styled()
def curve_grid(
    panels: Mapping[str, Mapping[str, pd.DataFrame]], label_x: str, series: str = "vector",
    controls: Sequence[str] = (), title: str | None = None, zero: Mapping[str, float] | None = None,
    log: Sequence[str] = (), labels: Mapping[str, str] | None = None, width: float = TWO_COLUMNS,
) -> Figure:  # fmt: skip
    """A grid of `curves`: a row per score, a column per persona, x shared by all, and the scale of a score by its row.

    A column has the axis of the relative dose that `curves` has. `ValueError` if a panel is missing, and as there.

    Args:
        panels: score -> persona -> frame as for `curves`; the same personas for every score.
        label_x, series, controls: as for `curves`; a series looks the same in all panels.
        zero, log: score -> where its horizontal line goes; the scores with a logarithmic axis.
        labels, width: series -> its text in the legend, if not its name; the figure's width in inches.
    """
    columns, frames = [list(row) for row in panels.values()], [x for row in panels.values() for x in row.values()]
    if not frames or columns != columns[:1] * len(columns):
        raise ValueError(f"expected the same personas for every score, one at least; got {columns}.")
    looks, handles = _looks(frames, series, controls), dict[str, Any]()
    names = {name: (labels or {}).get(name, name) for name in looks}
    across = max(1, min(len(names), int(width * 16) // (max(map(len, names.values())) + 8)))
    doses = {persona: _dose([row[persona] for row in panels.values()]) for persona in columns[0]}
    height = max(1.65, 1.1 * len(panels)) + 0.14 * math.ceil(len(names) / across) + 0.25 * any(doses.values())
    height += 0.55 + 0.2 * bool(title) + 0.15 * any(doses)
    figure, grid = new_figure(width, height, title, len(panels), len(doses), sharex=True, sharey="row")
    ticker = _matplotlib().ticker
    for (score, row), line in zip(panels.items(), grid, strict=True):
        line[0].set_ylabel(f"{score} (log)" if score in log else score)
        for frame, axes in zip(row.values(), line, strict=True):
            for name, look in looks.items():
                part = frame[frame[series].astype(str) == name].sort_values("coefficient")
                handles[names[name]] = _line(axes, part[["coefficient", "mean", "low", "high"]], **look)
            axes.axvline(0, color=GREY, lw=0.6, zorder=1)
            if zero and score in zero:
                axes.axhline(zero[score], color=INK, lw=0.7, ls=(0, (2, 2)), zorder=1)
            if score in log:
                axes.set_yscale("log", subs=[])
                low, high = axes.get_ylim()
                ticks = ticker.LogLocator(subs=(1, 2, 5) if high < 1e4 * low else (1,), numticks=99)
                axes.yaxis.set(major_locator=ticks, major_formatter="{x:g}", minor_formatter=ticker.NullFormatter())
            axes.xaxis.set_major_locator(ticker.MaxNLocator(8 if len(doses) == 1 else 5, steps=[1, 2, 4, 5, 10]))
    for (persona, dose), top, bottom in zip(doses.items(), grid[0], grid[-1], strict=True):
        top.set_title(persona)
        bottom.set_xlabel(label_x)
        if dose:
            axis = top.secondary_xaxis("top", functions=(lambda c, k=dose: c * k, lambda d, k=dose: d / k))
            axis.set_xlabel("relative dose |c|\u00b7\u2016v\u2016 / \u2016h\u2016", size=6, color=GREY)
            axis.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
            axis.tick_params(labelsize=5.5, labelcolor=GREY)
    figure.align_ylabels(list(grid[:, 0]))
    missing = max(int(frame["n_missing"].max()) if "n_missing" in frame else 0 for frame in frames)
    size = f"n = {_span(pd.concat([frame['n'] for frame in frames]))} prompt groups"
    _legend(figure, handles, size + f", {missing} missing at most" * bool(missing), across)
    return figure


@styled()
def layer_profile(table: pd.DataFrame, title: str | None = None, majority: float | None = None) -> Figure:
    """Held-out accuracy of a probe by layer with its controls; one column wide.

    The embedding has a tick of its own at the left. The layer chosen within the training folds is a point at the
    right, under "nested", and a line at its height. `ValueError` if a column is missing or no row is of a block.

    Args:
        table: `ProbeResult.table`.
        majority: share of the largest class (`ProbeResult.meta["majority_accuracy"]`); a thin line.
    """
    means, handles = ["accuracy", "accuracy_low", "accuracy_high"], dict[str, Any]()
    _check(table, ["layer", "features", "labels", *means, "n", "n_groups"])
    layers = pd.to_numeric(table["layer"], errors="coerce")
    if layers.isna().all():
        raise ValueError(f"expected rows of block layers; got {list(table['layer'])}. Pass the table of probe_layers.")
    first, last = layers.min(), layers.max()
    gap = max(1.0, (last - first) / 8)
    x = layers.mask(table["layer"] == "embed", first - gap).mask(table["layer"] == "nested", last + gap)
    kind = table["labels"].where(table["features"] == "resid", "length").mask(table["layer"] == "nested", "nested")
    figure, [[axes]] = new_figure(ONE_COLUMN, 2.85 + 0.15 * bool(title), title)
    for name, text, color, ls, marker, band in (
        ("true", "probe at each layer", PALETTE[0], "-", "o", 0.2),
        ("nested", "layer chosen in training folds", PALETTE[1], DASHES[1], "D", 0.0),
        ("length", "length and position alone", PALETTE[2], DASHES[2], "", 0.12),
        ("shuffled", "shuffled labels", GREYS[1], DASHES[0], "", 0.22),
    ):
        part = table.assign(x=x)[kind == name].sort_values("x")
        if name in ("nested", "length") and len(part):
            mean, low, high = map(float, part[means].iloc[0])
            text += f": {_estimate(2, mean, low, high)}"
            axes.axhline(mean, color=color, ls=ls, lw=1, zorder=1.5)
            axes.axhspan(low, high, color=color, alpha=band, lw=0)
        for _, some in part.groupby(part["layer"] != "embed"):
            handles[text] = _line(axes, some[["x", *means]].dropna(), color, band, ls, marker)
    if majority is not None:
        handles[f"largest class: {_estimate(2, majority)}"] = axes.axhline(majority, color=INK, lw=0.6, zorder=1)
    numbers = _matplotlib().ticker.MaxNLocator(6, integer=True).tick_values(first, last)
    ticks = {at: f"{at:.0f}" for at in numbers if first <= at <= last}
    ticks |= {at: str(layer) for at, layer in zip(x, table["layer"], strict=True) if at < first or at > last}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set(xlabel="layer", ylabel="held-out accuracy", xlim=(x.min() - gap / 2, x.max() + gap / 2))
    _legend(figure, handles, f"n = {_span(table['n'])} items in {_span(table['n_groups'])} groups", 1)
    return figure


@styled()
def heat_map(
    frame: pd.DataFrame, label: str, centre: float | None = None, low: pd.DataFrame | None = None,
    high: pd.DataFrame | None = None, n: int | pd.Series | None = None, title: str | None = None,
) -> Figure:  # fmt: skip
    """A matrix in colours with its values in the cells; as wide as it needs, two columns of a page at most.

    Args:
        frame: rows x columns of numbers, NaN a dash, not all NaN. The names of its two axes become the labels.
        label: what the numbers are, with their unit; stands at the colour bar.
        centre: the value that is white, with a colour on either side of it; None for one scale of brightness.
        low, high: the ends of the 95 % intervals, both or neither, in the frame's shape (else `ValueError`).
        n: prompt groups of each value, all alike or one by one. Exact numbers, such as cosines of vectors, have none.
    """
    values, *bounds = (part.to_numpy(dtype=float) for part in (frame, low, high) if part is not None)
    if not np.isfinite(values).any() or len(bounds) == 1 or any(part.shape != values.shape for part in bounds):
        raise ValueError(f"expected finite values {values.shape}, and low and high both or neither, in that shape.")
    digits, (rows, columns) = _digits(values), values.shape
    margin = 1.0 + 0.055 * max(len(str(name)) for name in frame.index)
    width = min(TWO_COLUMNS, max(ONE_COLUMN, margin + (0.65 if bounds else 0.36) * columns))
    cell = (width - margin) / columns
    figure, [[axes]] = new_figure(width, rows * (0.3 if bounds else 0.24) + 0.75 + 0.2 * bool(title), title)
    norm = None if centre is None else _matplotlib().colors.CenteredNorm(centre)
    cmap = _matplotlib().colormaps["RdBu_r" if norm else "Blues"].with_extremes(bad="#E8E8E8")
    image = axes.pcolormesh(values, cmap=cmap, norm=norm, edgecolors="white", linewidth=0.8)
    bar = figure.colorbar(image, ax=axes, label=label, aspect=max(8, rows * 3), pad=0.02, fraction=0.04)
    bar.outline.set_visible(False)
    size = min(6.5, max(3.5, cell * (9 if bounds else 16)))
    for i, j in np.ndindex(rows, columns):
        text = _estimate(digits, *(float(part[i, j]) for part in (values, *bounds))).replace(" ", "\n", 1)
        ink = _readable(image.to_rgba(values[i, j]))
        axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=ink, size=size)
    for axis, names in ((axes.xaxis, frame.columns), (axes.yaxis, frame.index)):
        texts = [name if isinstance(name, str) else f"{name:g}".replace("-", "\u2212") for name in names]
        axis.set_ticks(np.arange(len(names)) + 0.5, texts)
        axis.set_label_text(str(names.name or ""))
        if axis is axes.xaxis and 0.06 * max(map(len, texts)) > cell:
            axis.set_ticks(axis.get_ticklocs(), texts, rotation=40, ha="right", rotation_mode="anchor")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.set_ylim(rows, 0)
    note = ["In brackets 95 % intervals."] * bool(bounds) + ([] if n is None else [f"n = {_span(n)} prompt groups."])
    figure.supxlabel(" ".join(note), x=0.01, ha="left", size=6.5)
    return figure


@styled()
def intervals(frame: pd.DataFrame, label_x: str, title: str | None = None) -> Figure:
    """A forest plot, two columns of a page wide: a mean with its 95 % interval per comparison, and a line at 0.

    `ValueError` if a column is missing or there are no rows.

    Args:
        frame: a row per name and comparison: name (its rows stand together under it), comparison, gain (the mean), low,
            high, n (prompt groups), p (adjusted already, by `steerkit.stats.multiple.holm`).
        label_x: what the gain is, with its unit.
    """
    _check(frame, ["name", "comparison", "gain", "low", "high", "n", "p"])
    digits, left, right = _digits(frame["gain"]), [""], [f"{'mean [95 % interval]':>24} {'n':>5} {'p (Holm)':>9}"]
    lines = len(frame) + frame["name"].nunique()
    figure, [[axes]] = new_figure(TWO_COLUMNS, 0.17 * lines + 0.75 + 0.2 * bool(title), title)
    for name, part in frame.groupby("name", sort=False):
        left, right = [*left, str(name)], [*right, ""]
        for row in part.to_dict("records"):
            axes.hlines(len(left), row["low"], row["high"], color=PALETTE[0], lw=1.2)
            axes.plot(row["gain"], len(left), "o", color=PALETTE[0], markersize=4)
            left.append(str(row["comparison"]))
            p = "<0.001" if row["p"] < 0.001 else _estimate(3, row["p"])
            right.append(f"{_estimate(digits, row['gain'], row['low'], row['high']):>24} {row['n']:>5.0f} {p:>9}")
    axes.axvline(0, color=INK, lw=0.7, zorder=1)
    axes.set_yticks(range(len(left)), left)
    for text, tick in zip(right, axes.get_yticklabels(), strict=True):
        tick.set_weight("normal" if text else "bold")
    table = axes.secondary_yaxis("right")
    table.set_yticks(range(len(right)), right, family="DejaVu Sans Mono", size=6)
    for axis in (axes, table):
        axis.tick_params(axis="y", length=0)
        axis.spines[:].set_visible(False)
    axes.grid(False, axis="y")
    axes.set(xlabel=label_x, ylim=(len(left) - 0.5, -0.5))
    return figure


def _check(frame: pd.DataFrame, wanted: Sequence[str]) -> None:
    missing = [column for column in wanted if column not in frame]
    if missing or frame.empty:
        raise ValueError(f"expected rows with the columns {list(wanted)}; got {len(frame)}, and {missing} are missing.")


def _looks(frames: Sequence[pd.DataFrame], series: str, controls: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each series is drawn, by name, controls last; `ValueError` if the frames cannot be drawn."""
    for frame in frames:
        _check(frame, [series, "coefficient", "mean", "low", "high", "n"])
        if frame.duplicated([series, "coefficient"]).any():
            raise ValueError(f"expected one row per {series} and coefficient; some have more. Choose one layer first.")
    names = dict.fromkeys(str(name) for frame in frames for name in frame[series])
    if absent := [name for name in controls if name not in names]:
        raise ValueError(f"expected controls among the series {list(names)}; got {absent}. Leave those out.")
    shown = [name for name in names if name not in controls]
    bright = {x: {"color": PALETTE[i % 7], "band": 0.18, "marker": MARKERS[i % 7]} for i, x in enumerate(shown)}
    return bright | {x: {"color": GREYS[i % 4], "band": 0.12, "ls": DASHES[i % 4]} for i, x in enumerate(controls)}


def _line(axes: Any, points: pd.DataFrame, color: str, band: float, ls: Any = "-", marker: str = "") -> tuple[Any, Any]:
    """Columns x, mean, low, high: a line in its band, with a bar where a point is alone; both, for the legend."""
    x, mean, low, high = (points[column].astype(float) for column in points)
    lone = len(x) == 1
    axes.vlines(x, low, high, color=color, lw=lone)
    (line,) = axes.plot(x, mean, color=color, ls=ls, marker=marker or "_" * lone, zorder=3 if marker else 2)
    return axes.fill_between(x, low, high, color=color, alpha=band, lw=0), line


def _dose(frames: Sequence[pd.DataFrame]) -> float | None:
    """Relative dose per unit of |coefficient|; None unless it is one number, within 0.1 %, in all rows."""
    rows = pd.concat([frame.reindex(columns=["coefficient", "relative_dose"]) for frame in frames]).astype(float)
    ratio = (rows["relative_dose"] / rows["coefficient"].abs())[rows["coefficient"] != 0].to_numpy()
    return float(ratio[0]) if len(ratio) and ratio[0] > 0 and np.allclose(ratio, ratio[0], rtol=1e-3, atol=0) else None


def _legend(figure: Figure, handles: Mapping[str, Any], size: str, columns: int) -> None:
    about: Any = {"title": f"Mean and 95 % interval, {size}.", "alignment": "left", "ncols": columns}
    figure.legend(list(handles.values()), list(handles), loc="outside lower left", **about)


def _span(values: pd.Series | int) -> str:
    return "\u2013".join(str(int(end)) for end in sorted({np.min(values), np.max(values)}))


def _digits(values: Any) -> int:
    """Decimals that show the middling value, its sign and zeros apart, with two or three figures."""
    sizes = np.abs(np.atleast_1d(np.asarray(values, dtype=float)))
    power = math.floor(math.log10(np.median(sizes[(sizes > 0) & (sizes < np.inf)].tolist() or [1])))
    return min(4, max(0, 2 - power if power >= 0 else 1 - power))


def _estimate(digits: int, mean: float, low: float | None = None, high: float | None = None) -> str:
    """`0.42`, or with an interval `0.42 [0.31, 0.53]`; NaN is a dash."""
    ends = (np.nan if x is None else x for x in (mean, low, high))
    shown = ["\u2013" if np.isnan(x) else f"{x:z.{digits}f}".replace("-", "\u2212") for x in ends]
    return shown[0] if low is None or np.isnan(mean) else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _readable(rgba: Sequence[float]) -> str:
    """Black or white, whichever has more contrast on a colour (relative luminance of WCAG 2.2)."""
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgba[:3])
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.179 else "black"
