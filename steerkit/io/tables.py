"""Tables (Parquet or CSV), each with its provenance in a JSON file next to it."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from steerkit.io.files import atomic_path, read_bytes, sha256
from steerkit.io.json import jsonable, read_json, write_json

INTEGER = re.compile(r"0|-?[1-9][0-9]*")


def write_table(path: str | Path, table: Any, meta: Mapping[str, Any]) -> None:
    """Write a DataFrame as `.parquet` or `.csv`, and its provenance next to it as `NAME.meta.json`, each atomically.

    What a column of objects holds comes back: strings; integers and strings (the layers 8 and "8+10"); lists of numbers
    or of strings (token ids), as tuples; each also with None. In CSV lists and other objects, such as booleans with
    None, are JSON, a missing string becomes empty, and an empty one among integers becomes None.

    Raises:
        ValueError: a path that ends in neither `.parquet` nor `.csv`.

    Example: `write_table("curves.csv", frame, {"seed": 0})`
    """
    path = _table_path(path)
    kinds = {name: _kind(table[name]) for name in table.columns}
    mixed, lists, others = ([name for name in kinds if kinds[name] == kind] for kind in ("mixed", "list", "json"))
    table = table.assign(**{name: _as_text(table[name]) for name in mixed})
    if path.suffix == ".csv":
        table = table.assign(**{name: [json.dumps(_plain(row)) for row in table[name]] for name in lists})
        table = table.assign(**{name: [json.dumps(jsonable(row)) for row in table[name]] for name in others})
    with atomic_path(path) as temporary:
        if path.suffix == ".csv":
            table.to_csv(temporary, index=False)
        else:
            table.to_parquet(temporary, index=False, compression="zstd")
    description = {
        "file": path.name,
        "sha256": sha256(path),
        "columns": list(table.columns),
        "text_columns": [name for name in kinds if kinds[name] in ("text", "mixed")],
        "mixed_columns": mixed,
        "list_columns": lists,
        **({"json_columns": others} if others and path.suffix == ".csv" else {}),
    }
    write_json(path.with_suffix(".meta.json"), {**meta, **description})


def read_table(path: str | Path) -> tuple[Any, dict[str, Any]]:
    """Read a table written by `write_table` as `(DataFrame, meta)`; `meta` is empty if its file is missing.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: the file is not a table, or its hash is not the one in the meta file: it was cut off or changed.
    """
    import pandas as pd

    path = _table_path(path)
    data = read_bytes(path)
    meta_path = path.with_suffix(".meta.json")
    meta = read_json(meta_path) if meta_path.exists() else {}
    if not isinstance(meta, dict):
        raise ValueError(
            f"expected a JSON object in {meta_path}; got {type(meta).__name__}. Delete it, or write it again."
        )
    if "sha256" in meta and meta["sha256"] != sha256(data):
        what = (
            "cut off or changed" if meta.get("file") == path.name else f"as {meta_path.name} is of {meta.get('file')}"
        )
        raise ValueError(
            f"expected {path} as it was when {meta_path.name} was written; got other content, {what}. Write the table "
            f"again under a name of its own, or delete {meta_path.name} to read it as it is."
        )
    try:
        if path.suffix != ".csv":
            table = pd.read_parquet(io.BytesIO(data))
            return _with_integers(_with_tuples(table, meta), meta), meta
        lists = [*meta.get("list_columns", ()), *meta.get("json_columns", ())]
        texts = dict.fromkeys((*meta.get("text_columns", ()), *lists), str)
        numbers = {name: ["", "nan"] for name in meta.get("columns", ()) if name not in texts}
        newline = "\n" if meta else None  # strings in our files may hold a lone carriage return, unquoted
        table = pd.read_csv(
            io.BytesIO(data), dtype=texts, keep_default_na=not meta, na_values=numbers, lineterminator=newline
        )
        loaded = {name: [json.loads(row) for row in table[name]] for name in lists}
        table = table.assign(**{name: pd.Series(rows, dtype=object) for name, rows in loaded.items()})
        return _with_integers(_with_tuples(table, meta), meta), meta
    except (ValueError, OSError) as error:
        raise ValueError(f"expected a table in {path}; got something else ({error}). Write it again.") from error


def _kind(column: Any) -> str | None:
    """What a column holds: "text", "mixed" (integers and strings), "list", "json" (other objects), or None: numbers."""
    if str(column.dtype) in ("str", "string"):
        return "text"
    if str(column.dtype) not in ("object", "category"):
        return None
    values = [value for value in column if not _is_missing(value)]
    if all(isinstance(value, str) for value in values):
        return "text"
    if str(column.dtype) == "category":
        return None
    if all(isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1 for value in values):
        return "list"
    is_plain = all(isinstance(value, str | Integral) and not isinstance(value, bool) for value in values)
    return "mixed" if is_plain and any(isinstance(value, str) for value in values) else "json"


def _is_missing(value: Any) -> bool:
    """Whether a value is None, NaN, or pandas' NA or NaT."""
    is_nan = isinstance(value, float) and math.isnan(value)
    return is_nan or value is None or type(value).__name__ in ("NAType", "NaTType")


def _plain(row: Any) -> list[Any] | None:
    """A sequence as a list of Python's own numbers or strings; None where it is missing."""
    return None if _is_missing(row) else [value.item() if hasattr(value, "item") else value for value in row]


def _as_text(column: Any) -> Any:
    """A mixed column as strings, and None where a value is missing."""
    return type(column)([None if _is_missing(value) else str(value) for value in column], column.index, dtype=object)


def _with_tuples(table: Any, meta: Mapping[str, Any]) -> Any:
    """The table with its lists as tuples; equal ones are one object."""
    known: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for name in meta.get("list_columns", ()):
        rows = [None if _is_missing(row) else tuple(_plain(row)) for row in table[name]]  # type: ignore[arg-type]
        values = [None if row is None else known.setdefault(row, row) for row in rows]
        table[name] = type(table[name])(values, index=table.index, dtype=object)
    return table


def _with_integers(table: Any, meta: Mapping[str, Any]) -> Any:
    """The table with the integers of its mixed columns converted back from strings; None where one is missing."""
    for name in meta.get("mixed_columns", ()):
        values = [
            None if _is_missing(value) or value == "" else int(value) if INTEGER.fullmatch(value) else value
            for value in table[name]
        ]
        table[name] = type(table[name])(values, index=table.index, dtype=object)
    return table


def _table_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in (".parquet", ".csv"):
        raise ValueError(f"expected a table path that ends in .parquet or .csv; got {path.name!r}. Rename it.")
    return path
