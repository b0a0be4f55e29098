"""GGUF files whose content is passed over, or that pass for others."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from steerkit.models.dense_cache import ABOUT, content_sha256, is_complete
from steerkit.models.gguf import read_header
from steerkit.models.gguf_model import _dequantised
from tests.models.test_gguf import llama, off, rope_case, write

OPTIONS: dict[str, Any] = {"trust_remote_code": False}
Load = Callable[[Path], tuple[Any, Any]]


def ours(path: Path) -> tuple[Any, Any]:
    model, tokenizer, _ = _dequantised(read_header(path), OPTIONS, {"dtype": torch.float32})
    return model.eval(), tokenizer


def without(name: str) -> Load:
    """The load without one of its steps, as transformers alone does it."""

    def load(path: Path) -> tuple[Any, Any]:
        with mock.patch(f"steerkit.models.gguf_model.{name}", lambda *_: None):
            return ours(path)

    return load


def check_a_rope_scaling_is_applied(load: Load, folder: Path) -> None:
    for name in ("linear", "yarn", "llama3"):
        reference, values, tensors = rope_case(name)
        assert off(load(write(folder / f"{name}.gguf", reference, values, tensors))[0], reference) < 1e-3


def check_no_tensor_is_passed_over(load: Load, folder: Path) -> None:
    extra = {"blk.0.attn_q_norm.weight": np.full(16, 2.0, np.float32)}
    with pytest.raises(ValueError, match="got 1 more"):
        load(write(folder / "m.gguf", llama(), tensors=extra))


def check_a_cut_entry_is_noticed(complete: Callable[[Path], bool], folder: Path) -> None:
    for cut in (False, True):
        entry = folder / f"entry-{cut}"
        entry.mkdir(parents=True)
        (entry / "model.safetensors").write_bytes(b"x" * (9 if cut else 10))
        (entry / ABOUT).write_text('{"files": {"model.safetensors": 10}}')
        assert complete(entry) is not cut


def is_there(entry: Path) -> bool:
    return entry.is_dir() and (entry / ABOUT).is_file()


def check_a_file_is_known_by_its_content(key: Callable[[list[Path]], str], folder: Path) -> None:
    folder.mkdir(parents=True)
    path = folder / "m.gguf"
    path.write_bytes(b"a" * 100)
    before = key([path])
    stamp = path.stat()
    path.write_bytes(b"b" * 100)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert key([path]) != before


def by_size_and_time(paths: list[Path]) -> str:
    return str([(path.stat().st_size, path.stat().st_mtime_ns) for path in paths])


SILENT: dict[str, tuple[Callable[[Any, Path], None], Any, Any]] = {
    "a RoPE scaling is applied": (check_a_rope_scaling_is_applied, ours, without("apply_rope")),
    "no tensor is passed over": (check_no_tensor_is_passed_over, ours, without("check_tensors")),
    "a cut entry of the cache is noticed": (check_a_cut_entry_is_noticed, is_complete, is_there),
    "a file is known by its content": (check_a_file_is_known_by_its_content, content_sha256, by_size_and_time),
}
