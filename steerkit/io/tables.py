"""Tables (Parquet or CSV), each with its provenance in a JSON file next to it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from steerkit.io.files import atomic_path, read_bytes, sha256
from steerkit.io.json import read_json, write_json


def write_table(path: str | Path, table: Any, meta: Mapping[str, Any]) -> None:
    """Write a DataFrame as `.parquet` or `.csv`, and its provenance next to it as `NAME.meta.json`, each atomically.

    A column that mixes integers and strings (the layers 8 and "8+10") is written as strings and read back in both
    types. A column of lists of numbers or of strings (token ids) is read back as tuples; in CSV it is JSON. Strings
    read back from CSV are unchanged, except that a missing one becomes empty.

    Raises:
        ValueError: a path that ends in neither `.parquet` nor `.csv`.

    Example: `write_table("curves.csv", frame, {"seed": 0})`
    """
    path = _table_path(path)
    mixed = [name for name in table.columns if _is_mixed(table[name])]
    table = table.assign(**{name: table[name].astype(str) for name in mixed})
    lists = [name for name in table.columns if _is_list(table[name])]
    if path.suffix == ".csv":
        table = table.assign(**{name: [json.dumps(_plain(row)) for row in table[name]] for name in lists})
    with atomic_path(path) as temporary:
        if path.suffix == ".csv":
            table.to_csv(temporary, index=False)
        else:
            table.to_parquet(temporary, index=False, compression="zstd")
    kinds = {name: str(kind) for name, kind in table.dtypes.items()}
    texts = [name for name, kind in kinds.items() if kind in ("object", "str", "string") and name not in lists]
    description = {
        "file": path.name,
        "sha256": sha256(path),
        "columns": list(table.columns),
        "text_columns": texts,
        "mixed_columns": mixed,
        "list_columns": lists,
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
        lists = meta.get("list_columns", ())
        texts = dict.fromkeys((*meta.get("text_columns", ()), *lists), str)
        numbers = {name: ["", "nan"] for name in meta.get("columns", ()) if name not in texts}
        newline = "\n" if meta else None  # strings in our files may hold a lone carriage return, unquoted
        table = pd.read_csv(
            io.BytesIO(data), dtype=texts, keep_default_na=not meta, na_values=numbers, lineterminator=newline
        )
        table = table.assign(**{name: [json.loads(row) for row in table[name]] for name in lists})
        return _with_integers(_with_tuples(table, meta), meta), meta
    except (ValueError, OSError) as error:
        raise ValueError(f"expected a table in {path}; got something else ({error}). Write it again.") from error


def _is_mixed(column: Any) -> bool:
    """Whether a column holds integers and strings and nothing else."""
    kinds = {type(value) for value in column} if column.dtype == object else set()
    return str in kinds and len(kinds) > 1 and all(issubclass(kind, str | Integral) for kind in kinds)


def _plain(row: Any) -> list[Any]:
    """A sequence as a list of Python's own numbers or strings."""
    return [value.item() if hasattr(value, "item") else value for value in row]


def _is_list(column: Any) -> bool:
    """Whether a column holds sequences."""
    is_list = [isinstance(row, list | tuple) or getattr(row, "ndim", 0) == 1 for row in column]
    return column.dtype == object and len(is_list) > 0 and all(is_list)


def _with_tuples(table: Any, meta: Mapping[str, Any]) -> Any:
    """The table with its lists of integers as tuples; equal ones are one object."""
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    for name in meta.get("list_columns", ()):
        rows = [tuple(row.tolist() if hasattr(row, "tolist") else row) for row in table[name]]
        table[name] = [known.setdefault(row, row) for row in rows]
    return table


def _with_integers(table: Any, meta: Mapping[str, Any]) -> Any:
    """The table with the integers of its mixed columns converted back from strings."""
    for name in meta.get("mixed_columns", ()):
        values = [int(value) if re.fullmatch(r"0|-?[1-9][0-9]*", str(value)) else value for value in table[name]]
        table[name] = type(table[name])(values, index=table.index, dtype=object)
    return table


def _table_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in (".parquet", ".csv"):
        raise ValueError(f"expected a table path that ends in .parquet or .csv; got {path.name!r}. Rename it.")
    return path
