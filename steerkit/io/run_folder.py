"""Run folders: who holds one, and which run it was begun with."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from steerkit.io.json import canonical_json, read_json, write_json


class RunFolderBusy(RuntimeError):
    """Another run holds the folder."""


class ConfigurationChanged(ValueError):
    """The folder belongs to a run with another configuration."""


@contextlib.contextmanager
def run_folder(folder: str | Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """Hold a folder for one run: writes `config.json`, or checks that it is the same run that is resumed.

    The lock is released by the operating system when the process ends, however it ends. Of several processes that
    torchrun has started as one run, the first (`RANK` 0) holds it for all.

    Raises:
        RunFolderBusy: another process holds the folder.
        ConfigurationChanged: `config.json` differs; the message lists each differing key with both values.
    """
    import fcntl

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"expected a folder for the run at {folder}; got a file. Name another place.")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            if os.environ.get("RANK", "0") == "0":
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunFolderBusy(
                f"expected {folder} to be free; another run holds it. Wait, or use another folder."
            ) from error
        check_config(folder, config)
        yield folder


def check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json`, or raise `ConfigurationChanged` with the differences if another one is there.

    Where a model's fingerprint or its files' hash is known, the path it was loaded from is not compared: folders may be
    moved.
    """
    path = folder / "config.json"
    wanted = json.loads(canonical_json(config))
    if not path.exists():
        write_json(path, wanted)
        return
    there = read_json(path)
    if not isinstance(there, dict):
        raise ValueError(f"expected a JSON object in {path}; got {type(there).__name__}. Use another folder.")
    if changed := list(_differences(there, wanted)):
        lines = "\n".join(f"  {name}: {_short(old)} -> {_short(new)}" for name, old, new in changed)
        raise ConfigurationChanged(
            f"expected the configuration that {folder} was begun with; these differ (there -> now):\n{lines}\n"
            "Use another folder, or the old configuration."
        )


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The leaves that differ, by dotted name; of two lists, what stands in one only, if anything does."""
    if isinstance(old, list) and isinstance(new, list):
        gone, come = [one for one in old if one not in new], [one for one in new if one not in old]
        if gone or come:
            yield name, gone, come
            return
    if not (isinstance(old, dict) and isinstance(new, dict) and old and new):
        if old != new:
            yield name, old, new
        return
    known = any(old.get(key) and new.get(key) for key in ("model_fingerprint", "files_sha256"))
    moved = {"checkpoint"} if known else set()
    for key in sorted({*old, *new} - moved):
        yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)


def _short(value: Any, width: int = 120) -> str:
    text = canonical_json(value)
    return text if len(text) <= width else f"{text[: width - 12]}... ({len(text)} characters)"
