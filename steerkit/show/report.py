"""Reports: one self-contained HTML page with texts, curves, provenance, figures and tables. Imports no torch."""

from __future__ import annotations

import base64
import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from steerkit.io.files import write_text
from steerkit.io.tables import read_table, write_table
from steerkit.show.explorer import LAST, explorer_data, tokens_by_row
from steerkit.show.pages import environment, inert_json
from steerkit.stats.format import DASH, MINUS, number_text
from steerkit.sweeps.join import without_score
from steerkit.sweeps.result import SweepResult, check_swept_model

PNG = b"\x89PNG\r\n\x1a\n"
SCRIPTS = ("state.js", "difference.js", "paint.js", "curves.js", "search.js", "explorer.js")
PROJECTIONS = "projections.parquet"
SCORED = "scored.parquet"
PAGE = "report.html"


def write_report(
    path: str | Path,
    *,
    title: str,
    sweep: SweepResult,
    summary: Sequence[str] | pd.DataFrame = (),
    opens_on: Mapping[str, Any] | None = None,
    texts_of: str = "",
    tables: Mapping[str, pd.DataFrame] | None = None,
    figures: Mapping[str, str | Path] | None = None,
    notes: Sequence[str] = (),
    projections: pd.DataFrame | None = None,
) -> None:
    """Write a sweep as one HTML page that needs no other file and no network.

    The file is written atomically; equal data gives equal bytes. Model output is escaped. The page's content security
    policy forbids all requests, and all scripts and styles but its own.

    Args:
        path: the file to write.
        title: the heading.
        sweep: `meta` becomes the provenance. The texts can be browsed by vector, layer, prompt, sample and coefficient,
            next to the text at coefficient 0. The numeric columns are scores, drawn over the coefficient with controls.
        summary: sentences, or a table, at the top of the page.
        opens_on: `vector`, `layer` and `coefficient` of the text that is shown first; default: the first vector that is
            no control, at its smallest positive coefficient.
        texts_of: which prompts the texts are of, e.g. "10 validation questions".
        tables: caption -> table. A named index, or an index of texts, becomes the first column.
        figures: caption, also the alternative text -> path of a PNG.
        notes: sentences at the end of the page.
        projections: result of `steerkit.sweeps.projections.sweep_projections`; shades the tokens of the texts.

    Raises:
        TypeError: `summary` or `notes` is a single str.
        ValueError: a figure is not a PNG, the sweep has no rows, the projections are of other texts, or the sweep has
            no row of `opens_on`.

    Example:
        >>> write_report("report.html", title="Calm", sweep=result, summary=["Trait rises at layer 14."])
    """
    for name, sentences in (("summary", summary), ("notes", notes)):
        if isinstance(sentences, str):
            raise TypeError(f"expected a list of sentences as {name}; got one str. Put it in a list.")
    if sweep.table.empty:
        raise ValueError("expected a sweep with rows; got none. Sweep at least one coefficient.")
    templates = environment()
    templates.filters["csp_hash"] = _csp_hash
    data = explorer_data(sweep, projections, opens_on)
    results = _table("Results", summary) if isinstance(summary, pd.DataFrame) else None
    page = templates.get_template("report.html").render(
        title=title,
        style=_source("report.css"),
        script=_source(*SCRIPTS),
        lede=_lede(sweep),
        facts=_facts(sweep),
        summary=results is not None or len(summary) > 0,
        results=results,
        sentences=[] if results else list(summary),
        texts_of=texts_of,
        notes=list(notes),
        data=inert_json(data),
        axis=sweep.axis,
        shaded=projections is not None,
        scored=any(score not in LAST for score in data["scores"]),
        figures=[_figure(caption, Path(file)) for caption, file in (figures or {}).items()],
        tables=[_table(caption, table) for caption, table in (tables or {}).items()],
    )
    write_text(path, page.encode("utf-8", "backslashreplace").decode())  # lone surrogates as JSON escapes


def report_run(run: str | Path, out: str | Path | None = None, loaded: tuple[Any, Any] | None = None) -> Path:
    """Write the report of a sweep's run folder, with the scores of its `scored.parquet` if it exists.

    The rows are those of the finished sweep. Where it has grown since it was scored, or since its projections were
    read, the new rows have none, and the page says so.

    Args:
        run: the folder of a finished sweep.
        out: the page to write; default `report.html` in the folder.
        loaded: the sweep's `(model, tokenizer)`. With it, the projections of all tokens on their rows' vectors are
            computed and stored as `projections.parquet` in the folder. Without it, stored projections are used.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: no finished sweep, or a model is passed and the folder does not hold the sweep's vectors.
        ValueError: the model is not the sweep's.

    Example:
        >>> report_run("runs/calm", loaded=(model, tokenizer))
    """
    folder = Path(run)
    table = SweepResult.load(folder)
    sweep = table.with_scores_of(folder / SCORED)
    if loaded is not None:
        _write_projections(folder, sweep, *loaded)
    stored = folder / PROJECTIONS
    projections = _projections_of(sweep, *read_table(stored)) if stored.is_file() else None
    page = folder / PAGE if out is None else Path(out)
    scores = [column for column in sweep.table if column not in table.table]
    added = table.added_since(folder / SCORED) if scores else np.zeros(len(table.table), bool)
    notes = _missing(sweep, scores, added, projections)
    write_report(page, title=f"Sweep: {folder.resolve().name}", sweep=sweep, projections=projections, notes=notes)
    return page


def _missing(
    sweep: SweepResult, scores: Sequence[str], added: np.ndarray, projections: pd.DataFrame | None
) -> list[str]:
    """Sentences about rows with a text that lack a score or projections.

    Args:
        added: for each row, whether it was added after scoring.
    """
    count = len(sweep.table)
    sentences = [
        f"{lacking} of {count} rows have no {name}. They were added after scoring, and have none until they are scored."
        for name, lacking in without_score(sweep.table[added], scores).items()
    ]
    sentences += [
        f"{lacking} of {count} rows have no value of {name}."
        for name, lacking in without_score(sweep.table[~added], scores).items()
    ]
    if projections is not None:
        shaded = [part is not None for part in tokens_by_row(sweep.table, projections)]
        if lacking := int((sweep.table["text"].notna() & ~np.array(shaded)).sum()):
            sentences.append(
                f"The tokens of {lacking} of {count} rows are not shaded. Rows that were added after the projections "
                "were read are shaded after another steerkit report with --checkpoint."
            )
    return sentences


def _projections_of(sweep: SweepResult, projections: pd.DataFrame, meta: Mapping[str, Any]) -> pd.DataFrame:
    """Stored projections on the sweep's vectors, without those on another vector that had one of the names."""
    was, now = meta.get("vectors") or {}, sweep.meta.get("vectors") or {}
    return projections[~projections["vector"].isin([name for name in was if now.get(name, was[name]) != was[name]])]


def _write_projections(folder: Path, sweep: SweepResult, model: Any, tokenizer: Any) -> None:
    from steerkit.sweeps.projections import sweep_projections
    from steerkit.sweeps.store import swept_vectors

    about = check_swept_model(sweep.meta, model)
    table = sweep_projections(model, tokenizer, sweep.table, swept_vectors(folder))
    write_table(
        folder / PROJECTIONS, table, {"kind": "projections", **about, "vectors": sweep.meta.get("vectors") or {}}
    )


def _source(*names: str) -> Markup:
    """The concatenated content of template files, unescaped."""
    folder = resources.files("steerkit.show") / "templates"
    return Markup("\n".join((folder / name).read_text(encoding="utf-8") for name in names))


def _csp_hash(source: str) -> str:
    """The source expression that allows exactly this inline script or style (Content Security Policy Level 3)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(source).encode()).digest()).decode()


def _lede(sweep: SweepResult) -> str:
    """The size of the sweep in one sentence: texts, vectors, layers, coefficients, prompts, samples."""
    table = sweep.table
    texts = next(iter(sweep.counts().values()))  # without the repeated ones at coefficient 0
    rows = f" ({len(table)} rows)" if texts < len(table) else ""
    words = {"vector": "vector", "layer": "layer", sweep.axis: sweep.axis, "prompt_id": "prompt"}
    parts = []
    scored = "choice" in table
    for column, word in {**words, "sample": "choice" if scored else "sample"}.items():
        count = table[column].nunique()
        if count > 1 or column in ("vector", "prompt_id"):
            parts.append(f"{count} {word}" + "s" * (count > 1))
    checkpoint = sweep.meta.get("checkpoint")
    names = [Path(str(one)).name for one in _values(checkpoint)] if checkpoint else []
    of = f" of {_each(names)}" if names else ""
    return f"{texts} {'scored choices' if scored else 'texts'}{rows}{of}: {', '.join(parts)}."


def _facts(sweep: SweepResult) -> list[tuple[str, str]]:
    """The provenance as `(name, text)`, in the order of the page; missing values are "not recorded"."""
    meta = sweep.meta
    missing = "not recorded"
    weights, dtype, device = (_each(meta.get(key) or "") for key in ("weights", "dtype", "device"))
    computed = f"computed in {dtype}" + (f" on {device}" if device else "") if dtype else ""
    fingerprint = str(meta.get("model_fingerprint") or missing)
    if adapter := meta.get("adapter_fingerprint"):
        fingerprint += f", adapter {adapter}"
    facts = [
        ("Checkpoint", _each(meta.get("checkpoint") or missing)),
        ("Weights", "; ".join(str(part) for part in (weights, computed) if part and part != dtype) or missing),
        ("Fingerprint", fingerprint),
    ]
    if "n_layers" in meta:
        facts.append(("Model", f"{meta['n_layers']} blocks, width {meta.get('d_model', missing)}"))
    if "operation" in meta:
        facts.append(("Steering", f"{_each(meta['operation'])}, positions: {_positions(sweep) or missing}"))
    if "max_new_tokens" in meta:
        greedy = not meta.get("temperature")
        how = "greedy" if greedy else f"temperature {meta['temperature']:g}, top p {meta.get('top_p', 1):g}"
        facts.append(("Decoding", f"{how}, up to {meta['max_new_tokens']} new tokens"))
    if "n_prompts" in meta:
        samples = _each(meta.get("samples", 1))
        facts.append(("Prompts", _each(meta["n_prompts"]) + (f", {samples} samples each" if samples != "1" else "")))
    versions = _each(
        [", ".join(f"{name} {v}" for name, v in (one or {}).items()) for one in _values(meta.get("versions"))]
    )
    seed = meta.get("seed")
    return [*facts, ("Seed", missing if seed is None else str(seed)), ("Versions", versions or missing)]


def _positions(sweep: SweepResult) -> str:
    """The steered positions; where vectors differ in them, those of each vector that is no control."""
    table = sweep.table
    if "positions" not in table:
        return _each(sweep.meta.get("positions", ""))
    own = [name for name, (role, _) in sweep.roles().items() if role == "vector"]
    several = {str(name): " and ".join(part.unique()) for name, part in table.groupby("vector")["positions"]}
    if len(set(several.values())) == 1:
        return next(iter(several.values()))
    return "; ".join(f"{name}: {several[name]}" for name in own or several)


def _values(value: Any) -> list[Any]:
    """The values of a setting: of joined sweeps that differ in it, one of each."""
    return value if isinstance(value, list) else [value]


def _each(value: Any) -> str:
    """A setting as text; of joined sweeps that differ in it, the value of each."""
    return " and ".join(dict.fromkeys(map(str, _values(value))))


def _figure(caption: str, path: Path) -> dict[str, Any]:
    """A PNG with its size on the page in CSS pixels: text of 6.5 points at 200 dpi becomes 12 pixels high."""
    data = path.read_bytes()
    if not data.startswith(PNG) or len(data) < 24:
        raise ValueError(
            f"expected a whole PNG at {path}; got a file that begins with {data[:8]!r}. Save the figure as PNG."
        )
    width, height = (round(pixels * 0.65) for pixels in struct.unpack(">II", data[16:24]))
    return {"caption": caption, "width": width, "height": height, "data": base64.b64encode(data).decode()}


def _table(caption: str, frame: pd.DataFrame) -> dict[str, Any]:
    """Column names, which columns are numeric, and the cells as text, row by row."""
    named = any(name is not None for name in frame.index.names)
    if named or not pd.api.types.is_integer_dtype(frame.index):
        frame = frame.reset_index(names=None if named or frame.index.nlevels > 1 else "")
    columns = [frame.iloc[:, index] for index in range(frame.shape[1])]
    numeric = [_is_number(column) for column in columns]
    rows = list(zip(*map(_cells, columns), strict=True))
    return {"caption": caption, "head": list(map(_name, frame)), "numeric": numeric, "rows": rows}


def _name(column: Any) -> str:
    """A column's name; several levels are joined by slashes, and floats lose their `.0`."""
    if isinstance(column, tuple):
        return " / ".join(_name(part) for part in column if part != "")
    return f"{column:g}".replace("-", MINUS) if isinstance(column, float) else str(column)


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _cells(column: pd.Series) -> list[str]:
    """A column as text: integers as such, other numbers with about four significant figures; missing is a dash."""
    if not _is_number(column):
        words = {True: "yes", False: "no"} if pd.api.types.is_bool_dtype(column) else {}
        return [
            DASH if pd.api.types.is_scalar(x) and pd.isna(x) else str(words.get(x, x) if words else x) for x in column
        ]
    finite = [float(x) for x in column if not pd.isna(x) and math.isfinite(x)]
    power = math.floor(math.log10(max(map(abs, finite), default=0) or 1))
    digits = 0 if all(x.is_integer() for x in finite) else min(6, max(1, 3 - power if power >= 0 else 2 - power))

    def cell(x: float) -> str:
        small = x != 0 and abs(x) < 10**-digits and not float(x).is_integer()
        return f"{x:.2g}".replace("-", MINUS) if small else number_text(x, digits, typographic=True)

    return [DASH if pd.isna(x) else cell(x) for x in column]
