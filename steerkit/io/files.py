"""Files: atomic writes, hashes, and names that are safe as part of a file name."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


def sha256(data: bytes | str | Path) -> str:
    """SHA-256, as 64 hexadecimal digits, of bytes, of a string's UTF-8 or of a file's content (`Path`)."""
    if isinstance(data, Path):
        with data.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(utf8(data) if isinstance(data, str) else data).hexdigest()


def utf8(text: str) -> bytes:
    """A string as UTF-8.

    Raises:
        ValueError: the string has half of a surrogate pair, which a JSON escape can express and UTF-8 cannot.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"expected text that UTF-8 can hold; got half a surrogate pair, {text[error.start]!r}, at character "
            f"{error.start}. Take it out."
        ) from error


def file_name(name: object) -> str:
    """A name as part of a file name: in lower case, with `-` for spaces.

    Example: `file_name("Agent 1")` is `"agent-1"`.

    Raises:
        ValueError: a name that would lead out of its folder, or make a hidden file.
    """
    plain = str(name).lower().replace(" ", "-")
    if not plain or not plain.isprintable() or plain != Path(plain).name or plain.startswith("."):
        raise ValueError(
            f"expected a name that can be part of a file name; got {name!r:.80}. Take out slashes, control characters "
            "and leading dots."
        )
    return plain


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path that replaces `path`, synced to disk, if the `with` body succeeds.

    A reader sees the old file or the complete new one, never a part of it. On an exception the old file is unchanged.
    Of a symbolic link the file that it names is written. An existing file keeps its permissions.

    Example:
        with atomic_path("table.csv") as temporary:
            table.to_csv(temporary)
    """
    path = Path(path).resolve() if Path(path).is_symlink() else Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"expected a file to write at {path}; got a folder. Name a file in it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask())
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


def read_bytes(path: str | Path) -> bytes:
    """The content of a file; `FileNotFoundError` or `IsADirectoryError` if `path` is no file."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"expected a file at {path}; got a folder. Name a file in it.")
    if not path.exists():
        raise FileNotFoundError(f"expected a file at {path}; there is none. Check the path.")
    return path.read_bytes()
