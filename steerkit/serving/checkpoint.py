"""The checkpoint that a server reads: a folder in transformers' format, and the fingerprint of its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from steerkit.models.checkpoint import explained
from steerkit.models.hub import offline_options
from steerkit.models.identity import fingerprint_of_tensors

SOURCE = "steerkit_source.txt"
"""In a written checkpoint: path, size and time of the GGUF file that it is of."""


def checkpoint_folder(checkpoint: str, cache: Path) -> Path | str:
    """The folder that vLLM opens: the checkpoint's own, or, for a GGUF file, one that is written once into `cache`.

    It is written again where the file is another one than that it was written from.

    Args:
        checkpoint: hub id, folder or GGUF file.
        cache: folder of written checkpoints.
    """
    if not checkpoint.endswith(".gguf"):
        return checkpoint
    file = Path(checkpoint).resolve()
    about = f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}"  # files of one name in two folders, or replaced
    folder = cache / file.stem
    known = folder / SOURCE
    if not known.is_file() or known.read_text(encoding="utf-8") != about:
        import steerkit as sk

        model, tokenizer = sk.load(checkpoint)
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / SOURCE).write_text(about, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    return folder


def check_hub(checkpoint: str) -> None:
    """Check that the hub, or what is kept of it here, has this checkpoint: vLLM says after a minute that it has not.

    Raises:
        OSError: it has not, or it cannot be reached.
    """
    from transformers.utils import cached_file

    if "://" in checkpoint:  # an address, which vLLM reads itself
        return
    options = offline_options(checkpoint)
    try:
        cached_file(checkpoint, "config.json", **options)
    except OSError as error:
        raise explained(error, checkpoint, bool(options)) from error


def fingerprint_of_folder(folder: Path) -> str | None:
    """The fingerprint of a checkpoint's weights without loading them; equal to that of the loaded model.

    Returns:
        The fingerprint; None where transformers renames or fuses weights when it loads them, so that the file's names
        are not the model's.
    """
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    if not all(file.is_file() for file in files):
        return None
    tensors = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no dict
                if name in shapes:
                    tensors[name] = opened.get_tensor(name)
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
        return None
    return fingerprint_of_tensors(tensors)
