"""The checkpoint that a server reads: a folder in transformers' format, and the fingerprint of its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from steerkit.models.identity import fingerprint_of_tensors


def checkpoint_folder(checkpoint: str, cache: Path) -> Path | str:
    """The folder that vLLM opens: the checkpoint's own, or, for a GGUF file, one that is written once into `cache`.

    Args:
        checkpoint: hub id, folder or GGUF file.
        cache: folder of written checkpoints.
    """
    if not checkpoint.endswith(".gguf"):
        return checkpoint
    folder = cache / Path(checkpoint).stem
    if not (folder / "config.json").is_file():
        import steerkit as sk

        model, tokenizer = sk.load(checkpoint)
        part = folder.with_name(f".{folder.name}.part")
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(folder)
    return folder


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
