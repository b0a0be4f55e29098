"""Run folders: a folder that one run holds, with the configuration that the run was started with."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from steerkit.io.json import canonical_json, read_json, short_json, write_json

LOCK = ".lock"
CONFIG = "config.json"
PROVENANCE = "provenance.json"


class RunFolderBusy(RuntimeError):
    """Another run holds the folder."""


class ConfigurationChanged(ValueError):
    """The folder belongs to a run with another configuration."""


@contextlib.contextmanager
def run_folder(
    folder: str | Path,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any] | None = None,
    free: Collection[str] = (),
) -> Iterator[Path]:
    """Hold a folder for one run, and write its `config.json` or check that the configuration is the same.

    Args:
        folder: the run's folder; made if it is missing.
        config: what determines the results; another configuration is refused.
        provenance: what the run was started with and may differ when it is resumed, e.g. the kind of device and the
            versions of packages. A difference warns; the stored one stays.
        free: dotted names of the configuration that may differ from the stored ones: they do not determine results.

    The operating system releases the lock when the process ends, also when it is killed. Of several processes that
    torchrun started as one run, the first (`RANK` 0) holds the lock for all.

    Example:
        with run_folder("runs/a", {"seed": 0}) as folder:
            write_json(folder / "result.json", result)

    Raises:
        RunFolderBusy: another process holds the folder.
        ConfigurationChanged: `config.json` differs; the message lists each differing key with both values.
        NotADirectoryError: `folder` is a file.

    Warns:
        UserWarning: the provenance differs, with each differing key and both values.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"expected a folder for the run at {folder}; got a file. Use another path.")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or os.environ.get("RANK", "0") == "0":
            stack.enter_context(_lock(folder))
        check_config(folder, config, free)
        if provenance is not None:
            _compare_provenance(folder, provenance)
        yield folder


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """The folder's lock, held inside the `with`; `RunFolderBusy` if another process holds it."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise RunFolderBusy(
            f"expected {folder} to be free; got a folder that another run holds. Wait, or use another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def check_config(folder: Path, config: Mapping[str, Any], free: Collection[str] = ()) -> None:
    """Write `config.json`, or raise `ConfigurationChanged` with the differences from the existing one.

    Names in `free` are stored but not compared. The path of a checkpoint is not compared where the model's fingerprint
    or the hash of its files is known: folders may be moved.
    """
    path = folder / CONFIG
    current = json.loads(canonical_json(config))
    if not path.exists():
        write_json(path, current)
        return
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise ValueError(f"expected a JSON object in {path}; got {type(stored).__name__}. Use another folder.")
    changes = [change for change in config_differences(stored, current) if change[0] not in free]
    if changes:
        lines = "\n".join(f"  {name}: {short_json(old)} -> {short_json(new)}" for name, old, new in changes)
        raise ConfigurationChanged(
            f"expected the configuration that {folder} was started with; got these differences (stored -> now):\n"
            f"{lines}\nUse another folder, or the stored configuration."
        )


def _compare_provenance(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Write `provenance.json`, or warn of the differences from the existing one."""
    path = folder / PROVENANCE
    current = json.loads(canonical_json(provenance))
    if not path.exists():
        write_json(path, current)
        return
    if changes := list(config_differences(read_json(path), current)):
        lines = "\n".join(f"  {name}: {short_json(old)} -> {short_json(new)}" for name, old, new in changes)
        warnings.warn(
            f"the run in {folder} was started elsewhere (stored -> now):\n{lines}\nIts rows may differ by rounding.",
            UserWarning,
            stacklevel=5,
        )


def config_differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The leaves in which two configurations differ, as `(dotted name, old value, new value)`.

    Of two lists with different entries, only the entries that the other list lacks are given.
    """
    if isinstance(old, list) and isinstance(new, list):
        removed = [entry for entry in old if entry not in new]
        added = [entry for entry in new if entry not in old]
        if removed or added:
            yield name, removed, added
            return
    if not (isinstance(old, dict) and isinstance(new, dict) and old and new):
        if old != new:
            yield name, old, new
        return
    same_weights_known = any(old.get(key) and new.get(key) for key in ("model_fingerprint", "files_sha256"))
    ignored = {"checkpoint"} if same_weights_known else set()
    for key in sorted({*old, *new} - ignored):
        yield from config_differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
