"""Estimate of a run before it starts: texts, tokens, memory and hours of each stage, computed from the preset alone."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from steerkit.models.gguf_model import gguf_config
from training.devices import Device
from training.memory import MARGIN, blank, generation, kv_width, training_step
from training.presets import Preset
from training.train.grpo import GRPO
from training.train.sft import SFT

GIB = 2**30
QUESTION = 200
"""Tokens of a question with its instructions that are assumed where the problems are not known."""
ROWS = {"cpu": 72, "cuda": 256}
"""Texts that the engine generates at once, where they fit (`steerkit.generation.batches`)."""
EFFICIENCY = 0.4
"""Share of a device's speed that a stage is assumed to reach; not measured on large models."""


@dataclass(frozen=True)
class Shape:
    """Size of a model.

    Args:
        parameters: number of parameters.
        layers: number of decoder blocks.
        width: d_model.
        kv_width: cached numbers per token and layer, keys and values together.
        config: configuration of transformers.
    """

    parameters: int
    layers: int
    width: int
    kv_width: int
    config: Any = field(repr=False, compare=False)


KNOWN: Mapping[str, Mapping[str, Any]] = {
    "smollm2": {
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "meta-llama/Llama-3.1-8B-Instruct": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "mistralai/Mistral-Nemo-Instruct-2407": {
        "model_type": "mistral",
        "vocab_size": 131_072,
        "hidden_size": 5120,
        "intermediate_size": 14_336,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
"""Configurations of the presets' checkpoints, so that an estimate of a preset needs no network."""


def shape_of(preset: Preset) -> Shape:
    """Return the size of a preset's model.

    Its configuration is in `KNOWN`, that of the toy base model, or the checkpoint's own. No weights are loaded.

    Example:
        >>> shape_of(get_preset("smollm2")).layers
        30
    """
    from transformers import AutoConfig

    config: Any
    if preset.checkpoint is None:
        from training.toy.base_model import fresh_model, tokenizer_of
        from training.toy.worlds import WORLDS

        with torch.device("meta"):
            config = fresh_model(tokenizer_of(WORLDS[preset.family]), preset.base).config
    elif preset.checkpoint in KNOWN:
        config = AutoConfig.for_model(**KNOWN[preset.checkpoint])
    elif preset.checkpoint.endswith(".gguf"):
        config = gguf_config(Path(preset.checkpoint))
    else:
        config = AutoConfig.from_pretrained(preset.checkpoint)
    text = config.get_text_config(decoder=True)
    parameters: Any = blank(config)
    return Shape(parameters.num_parameters(), text.num_hidden_layers, text.hidden_size, kv_width(config), config=config)


@dataclass(frozen=True)
class Stage:
    """One line of an estimate.

    Args:
        name: name of the stage.
        texts: generated texts, or texts that are trained on, each time counted.
        tokens_each: most tokens of one of them.
        rows: texts that are generated, or trained on, at once.
        memory: bytes on one device.
        seconds: on one device.
        fixes: settings that need less memory, the least change first.
    """

    name: str
    texts: int
    tokens_each: int
    rows: int
    memory: int
    seconds: float
    fixes: tuple[str, ...] = ()


def estimate(preset: Preset, shape: Shape, device: Device, memory: float | None = None) -> pd.DataFrame:
    """Estimate texts, tokens, memory and hours of each stage of a run on one device.

    All texts have the greatest length that their stage allows. Weights are float32 on a CPU, and held twice while
    texts are generated there (packed); they are bfloat16 on a GPU. The memory of a training step and of generation is
    that of `training.memory`, and 10 % for the allocator. With P parameters, a token costs 2 P operations to read or to
    write, 4 P to train with an adapter and 6 P without. Writing reads all weights and the cache once per step of a
    batch. The hours assume that 40 % of the device's speed is reached.

    Args:
        preset: the run.
        shape: size of its model, see `shape_of`.
        device: where it runs, see `training.devices`.
        memory: GiB of the device; default: its own. Generation takes as many rows as fit.

    Returns:
        One row per stage: `stage`, `texts`, `tokens_each`, `tokens`, `rows` (at once), `memory_gib`, `hours`, and
        `change`: empty where the stage fits, else the setting to change.

    Example:
        >>> preset = get_preset("llama-3.1-8b")
        >>> estimate(preset, shape_of(preset), DEVICES["h100"])
    """
    limit = device.memory_gib if memory is None else memory
    most = math.inf if limit is None else limit * GIB / MARGIN
    rows = []
    for stage in _stages(preset, shape, device, most):
        change = "" if stage.memory <= most else (stage.fixes or ("a larger device, or training/nodes/fsdp.yaml",))[0]
        rows.append(
            {
                "stage": stage.name,
                "texts": stage.texts,
                "tokens_each": stage.tokens_each,
                "tokens": stage.texts * stage.tokens_each,
                "rows": stage.rows,
                "memory_gib": MARGIN * stage.memory / GIB,
                "hours": stage.seconds / 3600,
                "change": change,
            }
        )
    return pd.DataFrame(rows)


def to_write(shape: Shape, device: Device, texts: int, prompt: int, new: int) -> Stage:
    """Estimate the generation of texts, as many at once as fit the device.

    Args:
        shape: size of the model.
        device: where it runs, see `training.devices`.
        texts: number of texts.
        prompt: tokens of a prompt.
        new: new tokens of a text.

    Example:
        >>> to_write(shape_of(get_preset("llama-3.1-8b")), DEVICES["h100"], texts=1000, prompt=500, new=200).seconds
    """
    most = math.inf if device.memory_gib is None else device.memory_gib * GIB / MARGIN
    rows = _rows_that_fit(shape, device, texts, prompt, new, most)
    seconds = seconds_to_write(shape, device, texts, rows, prompt, new)
    return Stage("writing", texts, new, rows, _writing(shape, device, rows, prompt, new), seconds)


def _stages(preset: Preset, shape: Shape, device: Device, most: float) -> Iterator[Stage]:
    sft, grpo, agents = preset.sft, preset.grpo, preset.grpo.agents
    calls, answer = agents * preset.debate.rounds, preset.debate.sampling.max_new_tokens
    test = preset.sampling.max_new_tokens
    trace = min(QUESTION + calls * answer, sft.max_length or math.inf)
    sft_texts = sft.steps * sft.batch if sft.steps is not None else round(sft.epochs * preset.debates)
    clip = grpo.anneal.at(0.0)[1]
    steps = grpo.steps_for(preset.fresh or preset.debates)
    asked = math.ceil(steps / grpo.inner) * grpo.prompts * grpo.generations
    trained = steps * grpo.prompts * grpo.generations

    def written(name: str, texts: int, prompt: int, new: int, setting: str) -> Stage:
        rows = _rows_that_fit(shape, device, texts, prompt, new, most)
        bytes_ = _writing(shape, device, rows, prompt, new)
        seconds = seconds_to_write(shape, device, texts, rows, prompt, new)
        return Stage(name, texts, new, rows, bytes_, seconds, (f"{setting}={new // 2}",))

    # in later rounds an agent reads its own last answer and those of all others
    yield written(
        "debates", preset.debates * calls, QUESTION + agents * answer, answer, "debate.sampling.max_new_tokens"
    )
    sft_step = _step(shape, device, sft.lora, int(trace), embeddings=True, checkpointing=bool(sft.checkpointing))
    yield Stage(
        "SFT",
        sft_texts,
        int(trace),
        sft.micro_batch,
        sft_step(sft.micro_batch),
        _seconds_to_train(shape, device, sft_texts * trace, sft),
        tuple(_training_fixes("sft", sft.batch, sft, sft_step, most)),
    )
    grpo_step = _step(
        shape,
        device,
        grpo.lora,
        QUESTION + clip,
        reference=grpo.beta > 0,
        checkpointing=bool(grpo.checkpointing),
    )
    rollouts = written("", asked, QUESTION, clip, "grpo.anneal.clip")
    packed = _packed(shape, device)
    yield Stage(
        "GRPO",
        trained,
        clip,
        rollouts.rows,
        max(rollouts.memory, grpo_step(grpo.micro_batch) + packed),
        rollouts.seconds + _seconds_to_train(shape, device, trained * (QUESTION + clip), grpo),
        tuple(_training_fixes("grpo", grpo.prompts * grpo.generations, grpo, grpo_step, most - packed)),
    )
    name = "sampling.max_new_tokens"
    yield written("evaluation, one method", preset.test, QUESTION, test, name)
    turn, name = (preset.turn_tokens, "turn_tokens") if preset.turn_tokens else (test, name)
    yield written("evaluation, debates", preset.test * calls, QUESTION + agents * turn, turn, name)


def _dtype(device: Device) -> torch.dtype:
    return torch.float32 if device.on_cpu else torch.bfloat16


def _weights(shape: Shape, device: Device) -> int:
    return shape.parameters * _dtype(device).itemsize


def _packed(shape: Shape, device: Device) -> int:
    """Bytes of the packed copy of the weights that generation on a CPU keeps, where its kernels can be used."""
    from steerkit.models.kernels import missing

    return _weights(shape, device) if device.on_cpu and missing() is None else 0


def _writing(shape: Shape, device: Device, rows: int, prompt: int, new: int) -> int:
    needed = generation(shape.config, rows, prompt, new, _dtype(device), device.on_cpu)
    return _weights(shape, device) + _packed(shape, device) + needed


def _rows_that_fit(shape: Shape, device: Device, texts: int, prompt: int, new: int, most: float) -> int:
    """Return the rows of a batch: as many as the engine takes, halved until they fit."""
    rows = min(texts, ROWS["cpu" if device.on_cpu else "cuda"])
    while rows > 1 and _writing(shape, device, rows, prompt, new) > most:
        rows //= 2
    return rows


def _step(
    shape: Shape,
    device: Device,
    lora: Any,
    tokens: int,
    embeddings: bool = False,
    reference: bool = False,
    checkpointing: bool = False,
) -> Callable[[int], int]:
    """Return a function from a micro-batch to the bytes of a training step."""
    known: dict[int, int] = {}

    def bytes_of(rows: int) -> int:
        if rows not in known:
            known[rows] = training_step(
                shape.config,
                lora,
                rows,
                tokens,
                train_embeddings=embeddings,
                dtype=_dtype(device),
                autocast=not device.on_cpu,
                reference=reference,
                checkpointing=checkpointing,
            ).total
        return known[rows]

    return bytes_of


def _training_fixes(
    stage: str, batch: int, setting: SFT | GRPO, step: Callable[[int], int], most: float
) -> Iterator[str]:
    """Yield a setting with which a training step takes less: the largest micro-batch that fits, checkpointing, LoRA."""
    if step(setting.micro_batch) <= most:
        return
    smaller = [rows for rows in range(1, setting.micro_batch) if batch % rows == 0]
    fitting = bisect.bisect_right(smaller, most, key=step)
    if fitting:
        yield f"{stage}.micro_batch={smaller[fitting - 1]}"
        return
    if not setting.checkpointing:
        yield f"{stage}.checkpointing=true"
    if setting.lora is None:
        yield f'{stage}.lora={{"r": 32, "alpha": 32}}'


def seconds_to_write(shape: Shape, device: Device, texts: int, rows: int, prompt: int, new: int) -> float:
    """Return the seconds of generation: prompts at the speed of products, new tokens at the slower of both speeds."""
    read = 2 * shape.parameters * texts * prompt / device.flops
    cache = rows * (prompt + new / 2) * shape.layers * shape.kv_width * _dtype(device).itemsize
    step = max(2 * shape.parameters * rows / device.flops, (_weights(shape, device) + cache) / device.bandwidth)
    return (read + math.ceil(texts / rows) * new * step) / EFFICIENCY


def _seconds_to_train(shape: Shape, device: Device, tokens: float, setting: SFT | GRPO) -> float:
    """Return the seconds of training.

    Operations per weight and token: 2 in a forward, which checkpointing repeats; 2 in the backward pass of an adapter,
    4 in that of all weights.
    """
    operations = (6 if setting.lora is None else 4) + (2 if setting.checkpointing else 0)
    return operations * shape.parameters * tokens / device.flops / EFFICIENCY
