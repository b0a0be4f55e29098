"""The dense cache: dequantised GGUF models as ordinary checkpoint folders, beside the hub's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
import warnings
from pathlib import Path
from typing import Any

from steerkit.io.json import read_json
from steerkit.io.versions import versions
from steerkit.models.checkpoint import quiet

ABOUT = "steerkit.json"
FORMAT = 1
KEPT = ("transformers", "tokenizers")  # another version may convert a file otherwise


def cache_folder() -> Path:
    """Where dense models are kept: `steerkit/gguf` in the folder of the Hugging Face caches (`HF_HOME`)."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "steerkit" / "gguf"


def content_sha256(paths: list[Path]) -> str:
    """The SHA-256 of the content of some files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def entry_of(paths: list[Path], dtype: str) -> Path:
    """The folder of a GGUF model in this dtype, whether or not it exists: named by content, dtype and versions."""
    known = versions()
    about = {"format": FORMAT, "dtype": dtype, **{name: known.get(name) for name in KEPT}}
    made_by = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"{content_sha256(paths)[:32]}-{dtype}-{made_by[:8]}"


def is_complete(entry: Path) -> bool:
    """Whether a folder holds all files that were written, with their sizes. A damaged one is removed."""
    if not entry.is_dir():
        return False
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        files = read_json(entry / ABOUT)["files"]
        if files and all((entry / name).stat().st_size == size for name, size in files.items()):
            return True
    shutil.rmtree(entry, ignore_errors=True)
    return False


def write_entry(entry: Path, model: Any, tokenizer: Any, about: dict[str, Any]) -> None:
    """Write a model and its tokenizer to the cache, as a whole or not at all.

    The folder is written under another name and renamed. Of two processes that write the same entry, the first one's
    is kept.

    Warns:
        UserWarning: the entry cannot be written, e.g. on a full disk. Nothing of it stays.
    """
    part = entry.with_name(f".{entry.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.mkdir(parents=True)
        with quiet():
            model.save_pretrained(part, max_shard_size="1TB")
            tokenizer.save_pretrained(part)
        files = {file.name: file.stat().st_size for file in sorted(part.iterdir()) if file.is_file()}
        (part / ABOUT).write_text(json.dumps({**about, "files": files}, indent=1), encoding="utf-8")
        with contextlib.suppress(FileExistsError):
            os.rename(part, entry)
    except Exception as error:  # safetensors raises its own errors for a full disk
        if isinstance(error, OSError) and entry.is_dir():
            return  # another process was first
        warnings.warn(
            f"the dense model cannot be kept in {entry.parent} ({error}); the next load converts the file again. Free "
            "some space, set HF_HOME to another disk, or pass gguf_cache=False.",
            UserWarning,
            stacklevel=4,
        )
    finally:
        shutil.rmtree(part, ignore_errors=True)
