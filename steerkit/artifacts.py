"""Files: atomic writes, append-only row logs, tables with provenance."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("imad-steerkit", "torch", "transformers", "peft", "tokenizers", "numpy", "pandas")


def sha256(data: bytes | str | Path) -> str:
    """SHA-256 in hexadecimal of bytes, of a text's UTF-8, or of a file's content (`Path`)."""
    if isinstance(data, Path):
        with data.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(utf8(data) if isinstance(data, str) else data).hexdigest()


def utf8(text: str) -> bytes:
    """A text as UTF-8; `ValueError` where it holds half a surrogate pair, which JSON can say and no file can hold."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"expected text that UTF-8 can hold; got half a surrogate pair, {text[error.start]!r}, at character "
            f"{error.start}. Take it out."
        ) from error


def file_name(name: object) -> str:
    """A name as part of a file's: in lower case, `-` for spaces.

    Raises:
        ValueError: a name that would lead out of its folder, or hide its file.
    """
    plain = str(name).lower().replace(" ", "-")
    if not plain or not plain.isprintable() or plain != Path(plain).name or plain.startswith("."):
        raise ValueError(
            f"expected a name that can be part of a file's; got {name!r:.80}. Take out slashes, control characters "
            "and dots at its begin."
        )
    return plain


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text, so it can be hashed and compared."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """`value` in JSON's own types; NaN and infinities become null, paths and other objects their text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        if hasattr(value, "tolist"):
            return _plain(value.tolist())
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        return _plain(value.item())
    return str(value)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, synced to disk, if the `with` body succeeds.

    A reader sees the old file or the whole new one, never half of it; on an exception the old file is untouched.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"expected a file to write at {path}; got a folder. Name a file in it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    data = utf8(text)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinities become null."""
    write_text(path, json.dumps(_plain(value), indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; `ValueError` naming the file and the place where it is not JSON."""
    data = _content(path)
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}; got something else ({error}). Mend or delete the file.") from error


def parse_json(data: str | bytes) -> Any:
    """A JSON text, in UTF-8 with or without a byte order mark, as Python's own types.

    Raises:
        ValueError: no JSON, a key that stands twice in one object (one of the two would be lost), or too deep a nest.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r:.80} stands twice")
    return found


def _content(path: str | Path) -> bytes:
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"expected a file at {path}; got a folder. Name a file in it.")
    if not path.exists():
        raise FileNotFoundError(f"expected a file at {path}; there is none. Check the path.")
    return path.read_bytes()


def append_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a JSON-lines file and sync it to disk, so that they outlive the process.

    A torn last line (a write that was cut off) is dropped before the first new row is written; one that lacks only its
    newline is kept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(utf8(json.dumps(_plain(row), ensure_ascii=False)) + b"\n" for row in rows)
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                whole, _, torn = file.read().rpartition(b"\n")
                if _is_row(torn):
                    data = b"\n" + data
                else:
                    file.truncate(len(whole) + 1 if whole else 0)
        file.seek(0, os.SEEK_END)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: str | Path, complete: bool = False) -> list[dict[str, Any]]:
    """Read a JSON-lines file of objects.

    Args:
        complete: refuse a torn last line (no newline at its end, and no whole object), which is left out otherwise: a
            log that was being written may end in one, a file that somebody gives should not.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: a whole line is not a JSON object; the message names file and line.
    """
    lines = _content(path).split(b"\n")
    torn = lines.pop()  # what follows the last newline: nothing, a line that was cut off, or one written by hand
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if torn.strip() and (complete or _is_row(torn)):
        rows.append(_row(path, len(lines) + 1, torn))
    return rows


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _row(path: str | Path, number: int, line: bytes) -> dict[str, Any]:
    why = ""
    try:
        row = parse_json(line)
    except ValueError as error:
        row, why = None, f" ({error})"
    if not isinstance(row, dict):
        raise ValueError(
            f"expected a JSON object in {path}, line {number}; got {line[:80]!r}{why}. Mend or delete that line."
        )
    return row


def write_table(path: str | Path, table: Any, meta: Mapping[str, Any]) -> None:
    """Write a DataFrame as `.parquet` or `.csv` and its provenance beside it as `NAME.meta.json`, each atomically.

    Read back from CSV, texts are as they were, but for a missing one, which becomes empty.
    """
    path = _table_path(path)
    with atomic_path(path) as temporary:
        if path.suffix == ".csv":
            table.to_csv(temporary, index=False)
        else:
            table.to_parquet(temporary, index=False)
    texts = [name for name, kind in table.dtypes.items() if str(kind) in ("object", "str", "string")]
    about = {"file": path.name, "sha256": sha256(path), "columns": list(table.columns), "text_columns": texts}
    write_json(path.with_suffix(".meta.json"), {**meta, **about})


def read_table(path: str | Path) -> tuple[Any, dict[str, Any]]:
    """Read a table written by `write_table`: `(DataFrame, meta)`; a table without meta gives an empty one.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: no table, or not the one that the meta beside it is of: cut off, or changed since.
    """
    import pandas as pd

    path = _table_path(path)
    data, beside = _content(path), path.with_suffix(".meta.json")
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
            return pd.read_parquet(io.BytesIO(data)), meta
        texts = dict.fromkeys(meta.get("text_columns", ()), str)
        numbers = {name: ["", "nan"] for name in meta.get("columns", ()) if name not in texts}
        ends = "\n" if meta else None  # what we wrote may have a lone carriage return in a text, unquoted
        return pd.read_csv(
            io.BytesIO(data), dtype=texts, keep_default_na=not meta, na_values=numbers, lineterminator=ends
        ), meta
    except (ValueError, OSError) as error:
        raise ValueError(f"expected a table in {path}; got something else ({error}). Write it anew.") from error


def _table_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in (".parquet", ".csv"):
        raise ValueError(f"expected a table path that ends in .parquet or .csv; got {path.name!r}. Name it so.")
    return path


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a number can depend on."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
