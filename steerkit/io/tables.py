"""Tables (Parquet or CSV) with their provenance in a file beside them."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from steerkit.io.files import atomic_path, read_bytes, sha256
from steerkit.io.json import read_json, write_json


def write_table(path: str | Path, table: Any, meta: Mapping[str, Any]) -> None:
    """Write a DataFrame as `.parquet` or `.csv` and its provenance beside it as `NAME.meta.json`, each atomically.

    A column that holds integers and texts (the layers 8 and "8+10") is written as text and read back in both types.
    Read back from CSV, texts are as they were, except that a missing one becomes empty.
    """
    path = _table_path(path)
    mixed = [name for name in table.columns if _is_mixed(table[name])]
    table = table.assign(**{name: table[name].astype(str) for name in mixed})
    with atomic_path(path) as temporary:
        if path.suffix == ".csv":
            table.to_csv(temporary, index=False)
        else:
            table.to_parquet(temporary, index=False)
    texts = [name for name, kind in table.dtypes.items() if str(kind) in ("object", "str", "string")]
    about = {"file": path.name, "sha256": sha256(path), "columns": list(table.columns), "text_columns": texts}
    about["mixed_columns"] = mixed
    write_json(path.with_suffix(".meta.json"), {**meta, **about})


def read_table(path: str | Path) -> tuple[Any, dict[str, Any]]:
    """Read a table written by `write_table`: `(DataFrame, meta)`; a table without meta gives an empty one.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: no table, or not the one that the meta beside it is of: cut off, or changed since.
    """
    import pandas as pd

    path = _table_path(path)
    data, beside = read_bytes(path), path.with_suffix(".meta.json")
    meta = read_json(beside) if beside.exists() else {}
    if not isinstance(meta, dict):
        raise ValueError(f"expected a JSON object in {beside}; got {type(meta).__name__}. Delete it, or write it anew.")
    if meta.get("file") == path.name and meta.get("sha256") != sha256(data):
        raise ValueError(
            f"expected {path} as it was when {beside.name} was written; its content is another, cut off or changed. "
            f"Write it anew, or delete {beside.name} to read it as it is."
        )
    try:
        if path.suffix != ".csv":
            return _with_integers(pd.read_parquet(io.BytesIO(data)), meta), meta
        texts = dict.fromkeys(meta.get("text_columns", ()), str)
        numbers = {name: ["", "nan"] for name in meta.get("columns", ()) if name not in texts}
        ends = "\n" if meta else None  # what we wrote may have a lone carriage return in a text, unquoted
        table = pd.read_csv(
            io.BytesIO(data), dtype=texts, keep_default_na=not meta, na_values=numbers, lineterminator=ends
        )
        return _with_integers(table, meta), meta
    except (ValueError, OSError) as error:
        raise ValueError(f"expected a table in {path}; got something else ({error}). Write it anew.") from error


def _is_mixed(column: Any) -> bool:
    """Whether a column holds integers and texts and nothing else."""
    kinds = {type(value) for value in column} if column.dtype == object else set()
    return str in kinds and len(kinds) > 1 and all(issubclass(kind, str | Integral) for kind in kinds)


def _with_integers(table: Any, meta: Mapping[str, Any]) -> Any:
    """The table with the integers among its mixed columns as integers again."""
    for name in meta.get("mixed_columns", ()):
        values = [int(value) if re.fullmatch(r"-?[0-9]+", str(value)) else value for value in table[name]]
        table[name] = type(table[name])(values, index=table.index, dtype=object)
    return table


def _table_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in (".parquet", ".csv"):
        raise ValueError(f"expected a table path that ends in .parquet or .csv; got {path.name!r}. Name it so.")
    return path
