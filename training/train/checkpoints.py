"""Checkpoints of the training stages: tags as ordinary tokens, LoRA adapters, and standalone model folders."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import random
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from steerkit.io.json import canonical_json, read_json
from steerkit.io.run_folder import CONFIG, config_differences
from steerkit.models.ends import ends_of
from steerkit.models.model import unwrap
from steerkit.serving.checkpoint import fingerprint_of_folder
from training.settings import check_fields, check_shares

T = TypeVar("T")
NOISE = 0.02
"""Standard deviation of a new row around the mean row, in standard deviations of the old rows."""
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoRA:
    """A low-rank adapter on the attention and MLP projections (Hu et al. 2021, arXiv 2106.09685).

    The weight of a projection is `W + (alpha / r) B A`, with A `[r, d_in]` and B `[d_out, r]`. The defaults are the
    paper's SFT setting (arXiv 2604.24881, section 3).

    Args:
        r: rank.
        alpha: numerator of the scale.
        dropout: dropout probability of the adapter's input.
    """

    r: int = 32
    alpha: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, r=1, alpha=1)
        check_shares(self, "dropout")


def with_tags(tokenizer: Any, tags: Sequence[str]) -> Any:
    """Return a copy of the tokenizer in which each tag is one ordinary token.

    The tags are not special tokens, because decoding removes special tokens and the format reward reads the tags.

    Raises:
        ValueError: a tag that is not one token, or that decoding removes.
    """
    from tokenizers import AddedToken

    tagged = copy.deepcopy(tokenizer)
    tagged.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    for tag in tags:
        ids = tagged(tag, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or tagged.decode(ids, skip_special_tokens=True) != tag:
            raise ValueError(
                f"expected the tag {tag!r} to be one token that decoding keeps; got the ids {ids}. "
                "Use a tokenizer in which the tag is no special token."
            )
    return tagged


def add_tags(model: Any, tokenizer: Any, tags: Sequence[str]) -> Any:
    """Return `with_tags(tokenizer, tags)`, and give the model's embeddings rows for the new tokens in place.

    A new row, of the input embeddings and of untied output embeddings, is the mean of the rows of the old tokens plus a
    little noise, also where the checkpoint has spare rows. Tied embeddings stay tied. Tokens that the tokenizer had
    before keep their rows.

    Args:
        model: a causal language model; changed in place.
        tokenizer: its tokenizer; unchanged.
        tags: texts of the new tokens, e.g. `steerkit.text.tags.tags()`.

    Raises:
        ValueError: see `with_tags`.

    Example:
        >>> tokenizer = add_tags(model, tokenizer, tags(agents=3, rounds=2))
    """
    tagged = with_tags(tokenizer, tags)
    old, new = len(tokenizer), range(len(tokenizer), len(tagged))
    if len(tagged) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tagged), mean_resizing=False)
    generator = torch.Generator().manual_seed(0)
    layers = {id(layer.weight): layer for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    with torch.no_grad():
        for layer in layers.values():
            known = layer.weight[:old].float()
            mean, spread = known.mean(0), known.std(0)
            for row in new:
                noise = torch.randn(len(mean), generator=generator).to(mean)
                layer.weight[row] = mean + NOISE * spread * noise
            if getattr(layer, "bias", None) is not None:
                layer.bias[old : len(tagged)] = layer.bias[:old].mean()
    return tagged


def declare_ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Write all end tokens into the model's generation configuration, and return them.

    The trainer, other programs and the saved checkpoint then stop where `steerkit.generate` stops.
    """
    ends = ends_of(model, tokenizer)
    configuration = getattr(unwrap(model), "generation_config", None)
    if configuration is not None and ends:
        configuration.eos_token_id = sorted(ends) if len(ends) > 1 else min(ends)
    return ends


def check_batch(name: str, batch: int, micro_batch: int, processes: int = 1) -> None:
    """`ValueError` unless `processes` micro-batches divide the batch: rounding would train on another batch.

    Args:
        name: what the batch is called.
        batch: examples per optimisation step of all processes together.
        micro_batch: examples per backward pass of one process.
        processes: that train together.
    """
    if batch % processes:
        raise ValueError(
            f"expected {name} to be a multiple of the {processes} processes; got {batch}. Pass "
            f"{math.ceil(batch / processes) * processes}, or start another number of processes."
        )
    share = batch // processes
    if micro_batch < 1 or share % micro_batch:
        nearest = max(n for n in range(1, share + 1) if share % n == 0 and n <= max(micro_batch, 1))
        each = "" if processes == 1 else f" on each of {processes} processes"
        raise ValueError(
            f"expected a micro_batch that divides {name}, {share}{each}; got {micro_batch}. Pass "
            f"micro_batch={nearest}, or a multiple of {max(micro_batch, 1) * processes} as {name}."
        )


def with_adapter(model: Any, lora: LoRA | None, train_embeddings: bool, seed: int = 0) -> Any:
    """Return the model with a fresh LoRA adapter to train; with `lora=None` the model itself, all weights trainable.

    Trained weights are float32, whatever the model's data type is: an update of a bfloat16 weight that is less than
    about 1/256 of it is lost. `save` writes them in a data type of choice.

    Args:
        model: a causal language model.
        lora: the adapter.
        train_embeddings: train the embeddings too, as new tags require. Tied embeddings stay tied; untied output rows
            are trained too.
        seed: of the adapter's initial weights. They depend on nothing else, so that a resumed run begins with the same.

    Warns:
        UserWarning: the model lacks some of the projections `MODULES`; the adapter then covers all linear layers but
            the output matrix.

    Example:
        >>> policy = with_adapter(model, LoRA(r=32, alpha=64, dropout=0.1), train_embeddings=False)
    """
    if lora is None:
        return model.float()
    from peft import LoraConfig, get_peft_model
    from peft.utils import ModulesToSaveWrapper

    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    extra: dict[str, Any] = {}
    if train_embeddings:
        names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
        saved = [names[id(model.get_input_embeddings())]]
        saved += [] if tied else [names[id(model.get_output_embeddings())]]
        extra = {"modules_to_save": saved, "ensure_weight_tying": tied}
    found = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    lacking = [name for name in MODULES if name not in found]
    if lacking:
        warnings.warn(
            f"expected the projections {', '.join(MODULES)} for the adapter; {type(model).__name__} lacks "
            f"{', '.join(lacking)}. The adapter covers all its linear layers but the output matrix instead.",
            stacklevel=2,
        )
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if lacking else list(MODULES),
        task_type="CAUSAL_LM",
        **extra,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft reads it
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            _train_in_float32(module.modules_to_save["default"])
    return adapted


def _train_in_float32(layer: Any) -> None:
    """Bring trained embeddings to float32; their outputs keep the data type that the blocks read."""
    dtype, forward = layer.weight.dtype, layer.forward
    if dtype is torch.float32:
        return
    layer.float()
    reads_ids = isinstance(layer, torch.nn.Embedding)
    if reads_ids:
        layer.forward = lambda ids: forward(ids).to(dtype)


def save(model: Any, tokenizer: Any, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Merge an adapter if there is one, and write a folder that `steerkit.load` opens without other files.

    Args:
        model: the model, with or without an adapter.
        tokenizer: its tokenizer.
        folder: the folder to write.
        dtype: data type of the written weights; None keeps that of each weight.

    Raises:
        FileExistsError: the folder exists.

    Example:
        >>> model, tokenizer = sk.load(save(model, tokenizer, "runs/model/checkpoint"))
    """
    folder = Path(folder)
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    if dtype is not None:
        merged = merged.to(dtype)
    staging = folder.with_name(f".{folder.name}.part")
    merged.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    if folder.exists():
        raise FileExistsError(f"expected no checkpoint at {folder}; one exists. Remove it, or pass another folder.")
    staging.rename(folder)
    return folder


def weights_on_disk(checkpoint: str | Path) -> str | None:
    """Return the fingerprint of a checkpoint's weights, without loading them.

    Args:
        checkpoint: a folder, or a hub id of which this machine keeps the files.

    Returns:
        `model_fingerprint` of the loaded model (`steerkit.models.identity`). None where it cannot be told: for a GGUF
        file, an adapter, a hub id without files here, and weights that transformers renames.

    Example:
        >>> weights_on_disk("runs/sft/checkpoint")
        '0f3c2d1a9b8e7f60'
    """
    from huggingface_hub import try_to_load_from_cache

    folder = Path(checkpoint)
    with contextlib.suppress(ValueError):  # a path is no hub id
        if not folder.exists() and isinstance(kept := try_to_load_from_cache(str(checkpoint), "config.json"), str):
            folder = Path(kept).parent
    is_model = (folder / "config.json").is_file() and not (folder / "adapter_config.json").exists()
    return fingerprint_of_folder(folder) if is_model else None


def started_with(
    out: str | Path, config: Mapping[str, Any], model: str, checkpoint: str | Path, free: Collection[str] = ()
) -> bool:
    """Return whether a run folder was started with this configuration and these weights; no model is loaded.

    False also where the weights cannot be compared, see `weights_on_disk`. The run itself then loads the model, and
    refuses another one.

    Args:
        out: the run folder.
        config: what determines the results, without the model.
        model: key of the configuration under which the model's identity is stored.
        checkpoint: the model's checkpoint.
        free: see `steerkit.io.run_folder.run_folder`.
    """
    path = Path(out) / CONFIG
    stored = read_json(path) if path.is_file() else {}
    known = (stored.get(model) or {}).get("model_fingerprint")
    if known is None or known != weights_on_disk(checkpoint):
        return False
    same = {name: stored.get(name) for name in config}
    changes = config_differences(same, json.loads(canonical_json(config)))
    return all(name in free for name, _, _ in changes)


def in_rounds(rows: Sequence[T], n: int, seed: int) -> list[T]:
    """Return `n` rows in rounds: each round holds every row once, in an order of its own; the last one may be cut.

    A trainer that reads them one after the other sees whole batches in every step, and a resumed one the same batches
    as an uninterrupted one.

    Args:
        rows: at least one.
        n: number of rows that are wanted.
        seed: of the orders.

    Example:
        >>> sorted(in_rounds("abc", 6, seed=0))
        ['a', 'a', 'b', 'b', 'c', 'c']
    """
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < n:
        order += rng.sample(range(len(rows)), len(rows))
    return [rows[index] for index in order[:n]]


def in_epochs(rows: Sequence[T], epochs: float, batch: int, seed: int, blank: T) -> list[T]:
    """Return the rows of `epochs` passes, each in an order of its own and filled with `blank` to whole batches.

    Each batch is one optimisation step, so that the last one of a pass has fewer rows. The orders are those of a
    trainer that draws them itself in one process: `torch.randperm` with the seed `seed + pass`.

    Args:
        rows: at least one.
        epochs: passes; of a broken pass, the first batches.
        batch: rows of an optimisation step.
        seed: of the orders.
        blank: a row that adds nothing to the loss.

    Example:
        >>> in_epochs([3, 3, 3], epochs=2, batch=2, seed=0, blank=0)
        [3, 3, 3, 0, 3, 3, 3, 0]
    """
    per_pass = math.ceil(len(rows) / batch)
    found: list[T] = []
    for number in range(math.ceil(epochs)):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + number)).tolist()
        found += [rows[index] for index in order] + [blank] * (per_pass * batch - len(rows))
    return found[: math.ceil(epochs * per_pass) * batch]


class NoFinalSave(TrainerCallback):
    """Callback that saves no checkpoint after the last step.

    The trainer would train one step too many if it resumed from it.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take back what the trainer's own callback has asked for."""
        if state.global_step >= state.max_steps:
            control.should_save = False


class KeepAt(TrainerCallback):
    """Callback that keeps the model after chosen steps in `folder/STEP`: all weights, or the adapter without its base.

    Args:
        steps: the steps.
        folder: where they are kept.

    `trainer` has to be set before the training.
    """

    def __init__(self, steps: Sequence[int], folder: Path) -> None:
        self.steps = frozenset(steps)
        self.folder = folder
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save the model if this step is one of the chosen."""
        if state.global_step in self.steps:
            self.trainer.save_model(str(self.folder / str(state.global_step)))


def last_checkpoint(folder: Path, needed: Sequence[str] = (TRAINER_STATE_NAME,)) -> str | None:
    """Return the trainer's newest complete checkpoint in a folder; None without one.

    Args:
        folder: the trainer's.
        needed: files that a complete checkpoint has; a run may have been killed while it wrote one.
    """
    found = [
        (int(path.name.rpartition("-")[2]), path)
        for path in folder.glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdecimal() and all((path / name).is_file() for name in needed)
    ]
    return str(max(found)[1]) if found else None


def checkpointing_options(on: bool | None) -> dict[str, Any]:
    """Return the settings of gradient checkpointing of a TRL configuration; None is off."""
    return {
        "gradient_checkpointing": bool(on),
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if on else None,
    }


def device_options(bf16: bool) -> dict[str, Any]:
    """Return the device settings of a TRL configuration; TRL's own default is bfloat16 even on a CPU.

    Args:
        bf16: compute in bfloat16 on a CPU too; a GPU always does.
    """
    on_gpu = torch.cuda.is_available()
    return {"use_cpu": not on_gpu, "bf16": on_gpu or bf16, "report_to": "none"}
