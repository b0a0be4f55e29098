"""One self-contained page of results: provenance, summary, texts to compare, figures, tables. Imports no torch."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from steerkit import artifacts
from steerkit.results import KEYS, SweepResult

DASH, MINUS = "\u2013", "\u2212"
PNG = b"\x89PNG\r\n\x1a\n"
SETTINGS = ("positions", "operation", "temperature", "top_p", "max_new_tokens", "seed")
NO_SCORES = (*KEYS, *SETTINGS, "group", "prompt", "chat", "reference", "text", "finished", "relative_dose")


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: Sequence[str],
    tables: Mapping[str, pd.DataFrame],
    figures: Mapping[str, str | Path],
    sweep: SweepResult,
    notes: Sequence[str] = (),
) -> None:
    """Write one HTML page that needs no other file and no network, atomically; equal data gives equal bytes.

    All text is data: markup in it is shown, never run. The page's policy forbids every script but its own, and every
    request.

    Args:
        title: the heading.
        summary: plain sentences.
        tables: caption -> table. An index with a name, or of text, is its first column.
        figures: caption, which is the alternative text too -> path of a PNG.
        sweep: its `meta` is the provenance in the header; its rows are the texts that the reader goes through by
            vector, layer, prompt and coefficient, beside the one at coefficient 0; its numeric columns are scores.
        notes: sentences for the end of the page.

    Raises:
        TypeError: a single str in place of `summary` or `notes`.
        ValueError: a figure is no PNG, or the sweep has no rows.
    """
    for name, sentences in (("summary", summary), ("notes", notes)):
        if isinstance(sentences, str):
            raise TypeError(f"expected a list of sentences as {name}; got one str. Put it in a list.")
    if sweep.table.empty:
        raise ValueError("expected a sweep with rows; got none. Sweep one coefficient at least.")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("steerkit"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["csp_hash"] = _csp_hash
    page = environment.get_template("report.html").render(
        title=title,
        facts=_facts(sweep.meta),
        summary=list(summary),
        notes=list(notes),
        data=_inert(_texts(sweep.table)),
        figures=[_figure(caption, Path(file)) for caption, file in figures.items()],
        tables=[_table(caption, table) for caption, table in tables.items()],
    )
    artifacts.write_text(path, page.encode("utf-8", "backslashreplace").decode())  # lone surrogates as JSON escapes


def _csp_hash(script: str) -> str:
    """The source expression that lets exactly this inline script run (Content Security Policy Level 3)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()


def _inert(value: Any) -> Markup:
    """JSON that no HTML parser takes for markup, nor JavaScript for a line end."""
    text = artifacts.canonical_json(value)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _facts(meta: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The provenance in words, in the order of the header; what was not recorded says so."""
    missing = "not recorded"
    weights, dtype, device = (meta.get(key) for key in ("weights", "dtype", "device"))
    computed = f"computed in {dtype}" + (f" on {device}" if device else "") if dtype else ""
    fingerprint = str(meta.get("model_fingerprint") or missing)
    if adapter := meta.get("adapter_fingerprint"):
        fingerprint += f", adapter {adapter}"
    facts = [
        ("Checkpoint", str(meta.get("checkpoint") or missing)),
        ("Weights", "; ".join(str(part) for part in (weights, computed) if part and part != dtype) or missing),
        ("Fingerprint", fingerprint),
    ]
    if "n_layers" in meta:
        facts.append(("Model", f"{meta['n_layers']} blocks, width {meta.get('d_model', missing)}"))
    if "operation" in meta:
        facts.append(("Steering", f"{meta['operation']}, positions: {meta.get('positions', missing)}"))
    if "max_new_tokens" in meta:
        greedy = not meta.get("temperature")
        how = "greedy" if greedy else f"temperature {meta['temperature']:g}, top p {meta.get('top_p', 1):g}"
        facts.append(("Decoding", f"{how}, up to {meta['max_new_tokens']} new tokens"))
    if "n_prompts" in meta:
        samples = meta.get("samples", 1)
        facts.append(("Prompts", f"{meta['n_prompts']}" + (f", {samples} samples each" if samples != 1 else "")))
    versions = ", ".join(f"{name} {version}" for name, version in (meta.get("versions") or {}).items())
    seed = meta.get("seed")
    return [*facts, ("Seed", missing if seed is None else str(seed)), ("Versions", versions or missing)]


def _texts(table: pd.DataFrame) -> dict[str, Any]:
    """The rows as columns of small numbers, each distinct string once: what the page's script reads."""
    strings: dict[str, int] = {}

    def place(value: Any) -> int | None:
        return None if pd.isna(value) else strings.setdefault(str(value), len(strings))

    def codes(column: str) -> tuple[list[int], list[str]]:
        numbers, names = pd.factorize(table[column].astype(str))
        return numbers.tolist(), list(names)

    columns: dict[str, Any] = {"coefficient": table["coefficient"].astype(float).tolist()}
    names = {}
    for column in ("vector", "layer", "prompt_id", "sample"):
        columns[column], names[column] = codes(column)
    columns["text"] = [place(text) for text in table["text"]]
    for column in ("relative_dose", "finished"):
        columns[column] = table[column].tolist() if column in table else [None] * len(table)
    scores = [name for name in table if name not in NO_SCORES and pd.api.types.is_numeric_dtype(table[name])]
    columns["scores"] = [[_rounded(value) for value in table[name]] for name in scores]
    first = table.drop_duplicates("prompt_id")
    prompts = first["prompt"].tolist() if "prompt" in first else first["prompt_id"].astype(str).tolist()
    references = first["reference"].tolist() if "reference" in first else [None] * len(first)
    return {
        "rows": columns,
        "names": names,
        "scores": [str(name) for name in scores],
        "labels": [f"{name}: {label}" for name, label in zip(names["prompt_id"], _labels(prompts), strict=True)],
        "prompts": [place(prompt) for prompt in prompts],
        "references": [place(reference) for reference in references],
        "strings": list(strings),
    }


def _rounded(value: Any) -> float | None:
    return None if pd.isna(value) or math.isinf(value) else float(f"{value:.6g}")


def _labels(prompts: Sequence[str], width: int = 70) -> list[str]:
    """What tells a prompt from the others: its lines that not all of them have, without tags, cut to a width."""
    lines = [prompt.split("\n") for prompt in prompts]
    shared = set.intersection(*map(set, lines))
    own = ("\n".join(line for line in part if line not in shared) for part in lines)
    labels = (
        " ".join(re.sub(r"<[^<>\n]{1,40}>", " ", mine or prompt).split())
        for mine, prompt in zip(own, prompts, strict=True)
    )
    return [label if len(label) <= width else label[: width - 1] + "\u2026" for label in labels]


def _figure(caption: str, path: Path) -> dict[str, Any]:
    """A PNG for the page, its size there in CSS pixels: text of 6.5 points at 200 dpi becomes 12 of them high."""
    data = path.read_bytes()
    if not data.startswith(PNG):
        raise ValueError(f"expected a PNG at {path}; it begins with {data[:8]!r}. Save the figure as PNG.")
    width, height = (round(pixels * 0.65) for pixels in struct.unpack(">II", data[16:24]))
    return {"caption": caption, "width": width, "height": height, "data": base64.b64encode(data).decode()}


def _table(caption: str, frame: pd.DataFrame) -> dict[str, Any]:
    """Column names, whether each is of numbers, and the cells as text, row by row."""
    named = any(name is not None for name in frame.index.names)
    if named or not pd.api.types.is_integer_dtype(frame.index):
        frame = frame.reset_index(names=None if named or frame.index.nlevels > 1 else "")
    columns = [frame.iloc[:, place] for place in range(frame.shape[1])]
    numeric = [_is_number(column) for column in columns]
    rows = list(zip(*map(_cells, columns), strict=True))
    return {"caption": caption, "head": list(map(_name, frame)), "numeric": numeric, "rows": rows}


def _name(column: Any) -> str:
    """A column's name; those of several levels joined, and a float without its `.0`."""
    if isinstance(column, tuple):
        return " / ".join(_name(part) for part in column if part != "")
    return f"{column:g}".replace("-", MINUS) if isinstance(column, float) else str(column)


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _cells(column: pd.Series) -> list[str]:
    """A column as text: whole numbers as such, others with some four figures of the largest; missing, a dash."""
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
        return (f"{x:.2g}" if small else f"{x:.{digits}f}").replace("-", MINUS)

    return [DASH if pd.isna(x) else cell(x) for x in column]
