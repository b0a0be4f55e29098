"""A broken installation is reported as one, with the original message and the fix, and not as a damaged checkpoint."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import steerkit as sk
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
NMS = "operator torchvision::nms does not exist"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_torchvision_built_for_another_torch_is_named_and_the_checkpoint_is_not_blamed(folder, tmp_path) -> None:
    package = tmp_path / "packages" / "torchvision"
    metadata = tmp_path / "packages" / "torchvision-0.1.0.dist-info"
    package.mkdir(parents=True)
    metadata.mkdir()
    (package / "__init__.py").write_text(f"raise RuntimeError({NMS!r})\n")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1.0\n")
    code = "import sys, steerkit as sk\ntry:\n  sk.load(sys.argv[1])\nexcept ImportError as error: print(error)"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{package.parent}"}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    assert "expected an installation that can import the code of" in done.stdout
    assert f"RuntimeError: {NMS}" in done.stdout and "Could not import module" in done.stdout
    assert "pip uninstall torchvision" in done.stdout and "whole checkpoint" not in done.stdout


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("import absent_package", "No module named 'absent_package'"),
        (f"raise RuntimeError({NMS!r})", NMS),
        ("raise OSError('libcudart.so.12: cannot open')", "libcudart.so.12: cannot open"),
        ("raise AttributeError('torch has no attribute library')", "torch has no attribute library"),
    ],
)
def test_any_error_of_a_module_that_is_imported_is_the_installations(
    folder, tmp_path, monkeypatch, statement: str, message: str
) -> None:
    (tmp_path / "broken_module.py").write_text(f"{statement}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: importlib.import_module("broken_module"))
    with pytest.raises(ImportError, match=r"expected an installation .* reinstall") as raised:
        sk.load(folder)
    assert message in str(raised.value)


def test_an_error_about_the_weights_is_the_checkpoints(folder, monkeypatch) -> None:
    def mismatch(*_: Any, **__: Any) -> None:
        raise RuntimeError("size mismatch for lm_head.weight")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", mismatch)
    with pytest.raises(ValueError, match=r"expected a whole checkpoint .* RuntimeError: size mismatch"):
        sk.load(folder)


def test_transformers_itself_that_cannot_be_imported_is_the_installations(folder, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="expected an installation"):
        sk.load(folder)
