"""Checkpoints between stages: tags added as ordinary tokens, adapters merged, standalone folders written."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoRA:
    """A low-rank adapter on the attention and MLP projections; the paper's SFT setting by default."""

    r: int = 32
    alpha: int = 32
    dropout: float = 0.0


def add_tags(model: Any, tokenizer: Any, tags: Sequence[str]) -> Any:
    """A copy of the tokenizer that has each tag as one ordinary token; the model's embeddings grow in place.

    Ordinary, not special: decoding keeps them, so that a reward which reads the text sees them. A new row starts as the
    mean of the old ones and a little noise; tied embeddings stay tied.
    """
    from tokenizers import AddedToken

    tagged = copy.deepcopy(tokenizer)
    tagged.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    if len(tagged) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tagged))
    for tag in tags:
        ids = tagged(tag, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or tagged.decode(ids, skip_special_tokens=True) != tag:
            raise ValueError(f"expected the tag {tag!r} to be one token that decoding keeps; got the ids {ids}.")
    return tagged


def adapted(model: Any, lora: LoRA | None, tokens: bool) -> Any:
    """The model with a fresh adapter to train, or itself, all of it trained, where `lora` is None.

    Args:
        tokens: train the embeddings too (new tags need it); tied ones stay tied, untied output rows are trained too.
    """
    if lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    extra: dict[str, Any] = {}
    if tokens:
        names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
        saved = [names[id(model.get_input_embeddings())]]
        saved += [] if tied else [names[id(model.get_output_embeddings())]]
        extra = {"modules_to_save": saved, "ensure_weight_tying": tied}
    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in MODULES if name in there] or "all-linear"
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM",
        **extra,
    )  # fmt: skip
    return get_peft_model(model, config)


def save(model: Any, tokenizer: Any, folder: str | Path) -> Path:
    """Merge an adapter if there is one, and write a folder that `steerkit.load` opens without anything else."""
    folder = Path(folder)
    whole = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    staging = folder.with_name(f".{folder.name}.part")
    whole.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    if folder.exists():
        raise FileExistsError(f"expected no checkpoint at {folder} yet; one is there. Remove it or use another folder.")
    staging.rename(folder)
    return folder


def last_checkpoint(folder: Path) -> str | None:
    """The trainer's newest whole checkpoint in a folder."""
    from transformers.trainer_utils import get_last_checkpoint

    return get_last_checkpoint(str(folder)) if folder.exists() else None


def device_options(bf16: bool) -> dict[str, Any]:
    """What a TRL configuration has to be told about the machine: TRL asks for bf16 even on a CPU."""
    on_gpu = torch.cuda.is_available()
    return {"use_cpu": not on_gpu, "bf16": on_gpu or bf16, "report_to": "none"}
