"""Estimate of a run before it starts: texts, tokens, memory and hours of each stage, computed from the preset alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from steerkit.models.gguf_model import gguf_config
from steerkit.text.traces import Turn
from training.debates.personas import cast_of
from training.devices import Device
from training.memory import MARGIN, StepMemory, blank, generation, kv_width, rollouts, training_step
from training.presets import DEBATEGPT_GRPO, EVOLVED, MATCHED, Preset
from training.problems.families import FAMILIES
from training.settings import override, shell
from training.train.evolve import Evolve
from training.train.grpo import GRPO
from training.train.sft import SFT

GIB = 2**30
QUESTION = 200
"""Tokens of a question with its instructions that are assumed where the problems are not known."""
ROWS = {"cpu": 72, "cuda": 256}
"""Texts that the engine generates at once, where they fit (`steerkit.generation.batches`)."""
PIECES = re.compile(r"[^\W\d_]+|\d|[^\w\s]|_|\n|\s(?=\d)")
"""Words and other parts of a text that are at least one token each."""
BOX = 16
"""Tokens of an answer alone."""
SHORTEST = 16
"""Least length of a text that is proposed where longer ones do not fit."""
LARGER, SHARDED = "a larger device", "a larger device, or training/nodes/fsdp.yaml"
EFFICIENCY = 0.4
"""Share of a device's speed that a stage is assumed to reach; not measured on large models."""
Lengths = Callable[[Preset], tuple[int, int, str]]
"""Tokens of a prompt and of its text, and the setting of the latter."""


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
        name: name of the stage: a trained method, or what is generated.
        texts: generated texts, or texts that are trained on, each time counted.
        tokens_each: most tokens of one of them.
        rows: texts that are generated, or trained on, at once.
        memory: bytes on one device.
        seconds: on one device.
        change: what to change where the stage does not fit the device; empty if it fits.
    """

    name: str
    texts: int
    tokens_each: int
    rows: int
    memory: int
    seconds: float
    change: str = ""


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
        `change`: empty where the stage fits, else options with which it does, or a larger device. A trained method is
        a stage; the evaluation has all methods and decodings of a kind in one.

    Raises:
        ValueError: a memory that is not above 0.

    Example:
        >>> preset = get_preset("llama-3.1-8b")
        >>> estimate(preset, shape_of(preset), DEVICES["h100"])
    """
    limit = device.memory_gib if memory is None else memory
    if limit is not None and not limit > 0:
        raise ValueError(f"expected a memory above 0 GiB; got {limit:g}. Pass --memory of the device in GiB.")
    most = math.inf if limit is None else limit * GIB / MARGIN
    rows = [
        {
            "stage": stage.name,
            "texts": stage.texts,
            "tokens_each": stage.tokens_each,
            "tokens": stage.texts * stage.tokens_each,
            "rows": stage.rows,
            "memory_gib": MARGIN * stage.memory / GIB,
            "hours": stage.seconds / 3600,
            "change": stage.change,
        }
        for stage in _Stages(preset, shape, device, most).all()
    ]
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


@dataclass(frozen=True)
class _Stages:
    """The stages of a run, each with its needs and with the least change with which it fits."""

    preset: Preset
    shape: Shape
    device: Device
    most: float
    known: dict[Any, StepMemory] = field(default_factory=dict)

    def all(self) -> Iterator[Stage]:
        """Debates, every trained method, and the evaluation."""
        preset = self.preset
        agents, decodings = preset.grpo.agents, (preset.decodings or 1) + 1  # greedy, too
        yield self._debates("debates", preset.debates * self._calls, agents)
        if preset.self_check:
            yield self._debates("debates: one self-check", preset.debates * preset.debate.rounds, 1)
        if EVOLVED in preset.what_helps:
            first = preset.checkpoint is None  # the first round's are those of the run
            yield self._debates(f"debates: {EVOLVED}", (Evolve().rounds - first) * preset.debates * self._calls, agents)
        if "SFT on right answers" in preset.what_helps:
            yield self._writing("right answers", 4 * preset.debates, _answers)
        for method in preset.trained:
            target = FINE_TUNED.get(method)
            if method == DEBATEGPT_GRPO:
                yield self._sft(f"SFT before {method}", BOX, matched=True)
            yield self._grpo(method) if target is None else self._sft(method, target(preset), method in MATCHED)
        singles = preset.test * decodings * (1 + len(preset.trained))
        yield self._writing("test: one answer", singles, _tests)
        yield self._writing("test: debates", preset.test * decodings * self._calls, _test_turns)
        if preset.self_check:
            yield self._writing("test: self-checks", preset.test * decodings * self._calls, _test_turns)
        if preset.controls:
            (asked, turn, _), (prompt, new, _) = _test_turns(preset), _tests(preset)
            samples = max(3, round(self._calls * (asked + turn) / (prompt + new)))  # as many tokens as debates
            texts = preset.test * (decodings - 1) * samples
            yield self._writing("test: self-consistency", texts, _tests)

    @property
    def _calls(self) -> int:
        return self.preset.grpo.agents * self.preset.debate.rounds

    def _debates(self, name: str, texts: int, agents: int) -> Stage:
        return self._writing(name, texts, partial(_turns, agents=agents))

    def _writing(self, name: str, texts: int, lengths: Lengths) -> Stage:
        """Generation by the model without an adapter."""
        shape, device = self.shape, self.device
        prompt, new, setting = lengths(self.preset)
        rows = _rows_that_fit(shape, device, texts, prompt, new, self.most)
        memory = _writing(shape, device, rows, prompt, new)
        change = ""
        if memory > self.most:

            def needed(preset: Preset) -> int:
                prompt, new, _ = lengths(preset)
                return _writing(shape, device, 1, prompt, new)

            change = self._fitting(([f"{setting}={length}"] for length in _halves(new)), needed) or LARGER
        seconds = seconds_to_write(shape, device, texts, rows, prompt, new)
        return Stage(name, texts, new, rows, memory, seconds, change)

    def _sft(self, method: str, target: int, matched: bool) -> Stage:
        """SFT on targets of so many tokens; a matched control has more of them in a batch, see `with_equal_tokens`."""
        preset, sft = self.preset, self.preset.sft
        tokens = int(min(QUESTION + target, sft.max_length or math.inf))
        factor = max(1.0, _of_trace(preset) / target) if matched else 1.0
        texts = round((sft.steps * sft.batch if sft.steps is not None else sft.epochs * preset.debates) * factor)

        def rows(of: SFT) -> int:
            return round(of.micro_batch * factor)

        def needed(changed: Preset) -> int:
            of = changed.sft
            return self._step(of, tokens, rows(of), train_embeddings=True).total

        memory = needed(preset)
        change = "" if memory <= self.most else self._fitting(_divisions("sft", sft, sft.batch), needed) or SHARDED
        seconds = _seconds_to_train(self.shape, self.device, texts * tokens, sft)
        return Stage(method, texts, tokens, rows(sft), memory, seconds, change)

    def _grpo(self, method: str) -> Stage:
        """Completions of the policy, and training steps on them; the larger need of both counts."""
        preset, shape, device, grpo = self.preset, self.shape, self.device, self.preset.grpo
        new = grpo.anneal.at(0.0)[1]
        steps, together = grpo.steps_for(preset.fresh or preset.debates), grpo.prompts * grpo.generations
        written, trained = math.ceil(steps / grpo.inner) * together, steps * together
        packed = _packed(shape, device)

        def parts(of: GRPO, at_once: int) -> tuple[int, int]:
            limit = of.anneal.at(0.0)[1]
            step = self._step(of, QUESTION + limit, of.micro_batch, reference=of.beta > 0)
            writing = rollouts(shape.config, of.lora, step, at_once, QUESTION, limit, _dtype(device), device.on_cpu)
            return packed + step.total, packed + writing

        rows = min(together, ROWS["cpu" if device.on_cpu else "cuda"])
        while rows > 1 and parts(grpo, rows)[1] > self.most:
            rows //= 2
        memory, change = max(parts(grpo, rows)), ""
        if memory > self.most:
            end = grpo.anneal.at(1.0)[1]
            shorter = ([f"grpo.anneal.clip=[{length},{min(length, end)}]"] for length in _halves(new))
            changes = chain(_divisions("grpo", grpo, together), shorter if grpo.anneal.kind != "staged" else ())
            change = self._fitting(changes, lambda changed: max(parts(changed.grpo, 1))) or SHARDED
        tokens = QUESTION + new
        forwards = 2 * shape.parameters * ((grpo.beta > 0) + (grpo.inner > 1)) * written * tokens  # reference, policy
        seconds = seconds_to_write(shape, device, written, rows, QUESTION, new) + forwards / device.flops / EFFICIENCY
        seconds += _seconds_to_train(shape, device, trained * tokens, grpo)
        return Stage(method, trained, new, rows, memory, seconds, change)

    def _step(self, setting: SFT | GRPO, tokens: int, rows: int, **more: bool) -> StepMemory:
        """`training_step` with these settings, counted once."""
        options: dict[str, Any] = {
            "dtype": _dtype(self.device),
            "autocast": not self.device.on_cpu,
            "checkpointing": bool(setting.checkpointing),
            **more,
        }
        key = setting.lora, rows, tokens, *options.values()
        if key not in self.known:
            self.known[key] = training_step(self.shape.config, setting.lora, rows, tokens, **options)
        return self.known[key]

    def _fitting(self, candidates: Iterable[Sequence[str]], needed: Callable[[Preset], int]) -> str:
        """Return the first candidate with which the stage fits, as options of the command line; else nothing."""
        for settings in candidates:
            if needed(override(self.preset, settings)) <= self.most:
                return shell(*(word for setting in settings for word in ("--set", setting)))
        return ""


def asked(preset: Preset) -> int:
    """Tokens of a debate's longest prompt without the turns that it quotes: instructions, worked examples and question.

    A word of up to six letters, a digit, a space before a digit, a sign and a line end count as one token each, and a
    message has eight of a chat template. The result is at least `QUESTION`, and `QUESTION` for a toy world.

    Example:
        >>> asked(get_preset("llama-3.1-8b"))
        200
    """
    if preset.checkpoint is None:
        return QUESTION
    return max(QUESTION, longest_prompt(preset.cast, preset.grpo.agents, preset.family))


@lru_cache(maxsize=64)
def longest_prompt(name: str, agents: int, family: str) -> int:
    """Tokens that `asked` counts for a cast of so many agents and a family of problems."""
    cast = cast_of(name, agents)
    silent = [Turn(agent, 1, "") for agent in range(1, agents + 1)]
    prompts: Any = (
        cast.ask(problem, turn.agent, number, silent[: agents * (number - 1)])
        for problem in FAMILIES[family](16, 0, "train")
        for turn in silent
        for number in (1, 2)
    )
    return max(sum(_tokens(message["content"]) + 8 for message in messages) for messages in prompts)


def _tokens(text: str) -> int:
    return sum(math.ceil(len(piece) / 6) for piece in PIECES.findall(text))


def _turns(preset: Preset, agents: int | None = None) -> tuple[int, int, str]:
    """Tokens of a debate's prompt and turn; in later rounds an agent reads the last answers of all."""
    new = preset.debate.sampling.max_new_tokens
    return asked(preset) + (agents or preset.grpo.agents) * new, new, "debate.sampling.max_new_tokens"


def _answers(preset: Preset) -> tuple[int, int, str]:
    return QUESTION, *_turns(preset)[1:]


def _tests(preset: Preset) -> tuple[int, int, str]:
    return QUESTION, preset.sampling.max_new_tokens, "sampling.max_new_tokens"


def _test_turns(preset: Preset) -> tuple[int, int, str]:
    new = preset.turn_tokens or preset.sampling.max_new_tokens
    return asked(preset) + preset.grpo.agents * new, new, "turn_tokens"


def _of_rounds(preset: Preset) -> int:
    return preset.debate.rounds * preset.debate.sampling.max_new_tokens


def _of_trace(preset: Preset) -> int:
    return preset.grpo.agents * _of_rounds(preset)


def _of_turn(preset: Preset) -> int:
    return preset.debate.sampling.max_new_tokens


def _of_box(preset: Preset) -> int:
    return BOX


FINE_TUNED: Mapping[str, Callable[[Preset], int]] = {
    "SFT": _of_trace,
    "SFT without tags": _of_trace,
    "SFT on single turns": _of_turn,
    "DebateGPT (answer)": _of_box,
    "DebateGPT (response)": _of_turn,
    "SFT on first answers": _of_turn,
    "SFT on shuffled turns": _of_trace,
    "SFT on gold answers": _of_box,
    "SFT on right answers": _of_turn,
    "SFT of one self-check": _of_rounds,
}
"""Methods of SFT -> tokens of a target; the other methods are GRPO."""


def _halves(length: int) -> Iterator[int]:
    """Halves, quarters, ... of a length, down to `SHORTEST`."""
    while (length := length // 2) >= SHORTEST:
        yield length


def _divisions(stage: str, setting: SFT | GRPO, batch: int) -> Iterator[list[str]]:
    """Settings with which a training step needs less: a smaller micro-batch, checkpointing, an adapter, or several."""
    checkpointing = [] if setting.checkpointing else [f"{stage}.checkpointing=true"]
    adapter = [] if setting.lora is not None else [f'{stage}.lora={{"r": 32, "alpha": 32}}']
    smaller = [rows for rows in range(setting.micro_batch - 1, 0, -1) if batch % rows == 0]
    for first in dict.fromkeys([(), tuple(checkpointing), tuple(adapter), (*adapter, *checkpointing)]):
        if first:
            yield [*first]
        yield from ([*first, f"{stage}.micro_batch={rows}"] for rows in smaller)


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
