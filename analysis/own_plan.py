"""Plan of an analysis of your own debates: checks, sizes, settings, hours and memory, without loading weights."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis.agents.choose import Grid
from analysis.agents.contexts import by_tag, first_texts, other_ids, unnamed
from analysis.inputs import Inputs
from analysis.paper.protocol import Protocol
from steerkit.scores.text import tokenize
from steerkit.text.prompt import encode_prompt, render
from steerkit.text.tokens import encode
from steerkit.text.traces import NAMES
from training.devices import Device
from training.estimate import EFFICIENCY, GIB, Shape, to_write
from training.memory import MARGIN, blank, kv_width

LEAST = {"vectors": 12, "validation": 4, "test": 8}
"""Least number of questions of each split. With fewer, intervals and Holm's correction have no value."""
ROUGE_TOKENIZERS = ("rouge_score", "symbols", "unicode")
DROPPED = 0.03
"""Share of the references' letters from which on the default tokenizer of ROUGE-L is replaced by `unicode`."""
POSITIONS = 4
"""Read positions of a turn that are held."""


@dataclass(frozen=True)
class Analysis:
    """What is computed; the defaults suit models of 7 billion parameters on one GPU.

    Args:
        grid: the agents' own directions, see `analysis.agents.choose.Grid`.
        protocol: the paper's protocol, see `analysis.paper.protocol.Protocol`. Controls have relative doses: where the
            stream has a large norm, coefficients from 1 to 5 are a small share of it.
        layers: number of layers that are tried, evenly spaced.
        probed: largest number of debates for the probes.
    """

    grid: Grid = Grid(  # noqa: RUF009  frozen
        sources=("trace",),
        positions=("last", "mean"),
        extents=("all", "generated"),
        coefficients=(0.5, 1.0, 2.0),
        negative=(-1.0,),
        train=200,
        validation=12,
        test=24,
        bands=2,
        max_new_tokens=None,
    )
    protocol: Protocol = Protocol(  # noqa: RUF009  frozen
        control_doses=(0.2, 0.5), train=200, validation=12, test=24, plant=None
    )
    layers: int = 7
    probed: int = 100


@dataclass(frozen=True)
class Sizes:
    """Sizes that are known before the weights are loaded.

    Args:
        shape: size of the checkpoint.
        context: the smallest context of the checkpoints in tokens; None if no configuration states it.
        lengths: tokens of each first text.
        longest: tokens of the longest debate with its prompt.
        longest_context: tokens of the longest context that is continued.
        agents: number of agents.
        prompt: the first prompt, as the checkpoint reads it.
        other_ids: number of first texts whose context ends within a token of the whole debate.
        dropped: share of the letters of the first texts that the default tokenizer of ROUGE-L drops.
    """

    shape: Shape
    context: int | None
    lengths: tuple[int, ...] = field(repr=False)
    longest: int
    longest_context: int
    agents: int
    prompt: str
    other_ids: int
    dropped: float

    @property
    def continuation(self) -> int:
        """New tokens of each text: one and a half times the 95th percentile of the first texts."""
        return max(1, round(1.5 * float(np.percentile(self.lengths, 95))))


def sampled_layers(n: int, count: int) -> tuple[int, ...]:
    """`count` layers of a model of `n`, evenly spaced between its first and last.

    Example:
        >>> sampled_layers(32, 7)
        (4, 8, 12, 16, 20, 24, 28)
    """
    return tuple(sorted({n * k // (count + 1) for k in range(1, count + 1)}))


def check_debates(inputs: Inputs) -> int:
    """Check the debates, and return the number of agents.

    Raises:
        ValueError: a question twice, too few questions in a split, or debates with different agents.
    """
    splits = dict(zip(LEAST, (inputs.train, inputs.validation, inputs.test), strict=True))
    traces = [trace for split in splits.values() for trace in split]
    questions = [trace.question for trace in traces]
    if repeated := len(questions) - len(set(questions)):
        raise ValueError(f"expected one debate per question; got {repeated} repeated questions. Keep one of each.")
    if any(len(splits[name]) < least for name, least in LEAST.items()):
        raise ValueError(
            f"expected at least {LEAST} questions, split by their text; got {len(traces)} debates, "
            f"{ {name: len(split) for name, split in splits.items()} }. About 60 debates are enough; 300 are better."
        )
    every = {agent for trace in traces for agent in first_texts(trace)}
    silent = [trace.question for trace in traces if set(first_texts(trace)) != every]
    if silent or len(every) < 2:
        raise ValueError(
            "expected the same two or more agents in every debate, each with a text in round 1; got the agents "
            f"{', '.join(sorted(every)) or 'none'}, and {len(silent)} of {len(traces)} debates without one of them, "
            f"e.g. {silent[:1]!r:.80}. Pass --skip-incomplete to leave such debates out."
        )
    return len(every)


def names_of(inputs: Inputs) -> dict[str, str]:
    """The name of each agent by its number; empty where the debates name none."""
    traces = (*inputs.train, *inputs.validation, *inputs.test)
    found = {tuple(trace.extra.get(NAMES, ())) for trace in traces}
    return {str(number): str(name) for number, name in enumerate(found.pop(), 1)} if len(found) == 1 else {}


def sizes_of(inputs: Inputs, agents: int) -> Sizes:
    """The sizes of the checkpoint that gives the vectors, and of the debates in its tokens.

    Raises:
        OSError: no such checkpoint.
        ValueError: checkpoints of different sizes, or a tokenizer that cannot write a prompt.
    """
    read = {stage: _config_and_tokenizer(inputs, stage) for stage in inputs.stages}
    config, tokenizer = read[inputs.vectors_at]
    texts = {stage: one.get_text_config(decoder=True) for stage, (one, _) in read.items()}
    own = texts[inputs.vectors_at]
    for stage, text in texts.items():
        sizes = [(one.num_hidden_layers, one.hidden_size) for one in (own, text)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"expected checkpoints of the same size; got {sizes[0]} layers and width for {inputs.vectors_at}, and "
                f"{sizes[1]} for {stage}. Pass the base model of the checkpoint."
            )
    traces = (*inputs.train, *inputs.validation, *inputs.test)
    longest_context = 0
    for stage, (_, of_stage) in read.items():
        try:
            for trace in traces:
                for agent in first_texts(trace):
                    several = {by_tag, unnamed, inputs.context(stage)}
                    lengths = [len(context(of_stage, trace, agent).ids) for context in several]
                    longest_context = max(longest_context, *lengths)
        except ValueError as error:
            raise ValueError(f"{stage} ({inputs.stages[stage]}): {error}") from error
    first = [text for trace in traces for text in first_texts(trace).values()]
    parameters: Any = blank(config)
    contexts = [length for one in texts.values() if (length := getattr(one, "max_position_embeddings", None))]
    return Sizes(
        Shape(parameters.num_parameters(), own.num_hidden_layers, own.hidden_size, kv_width(config), config=config),
        min(contexts, default=None),
        tuple(len(encode(tokenizer, text)) for text in first),
        max(len(encode_prompt(tokenizer, trace.prompt)) + len(encode(tokenizer, trace.body)) for trace in traces),
        longest_context,
        agents,
        render(tokenizer, traces[0].prompt).text,
        other_ids(tokenizer, traces),
        dropped_letters(first),
    )


def _config_and_tokenizer(inputs: Inputs, stage: str) -> tuple[Any, Any]:
    """Configuration and tokenizer of a checkpoint without weights; a GGUF file is loaded whole."""
    checkpoint = str(inputs.stages[stage])
    if checkpoint.endswith(".gguf"):
        model, tokenizer = inputs.load(stage)
        return model.config, tokenizer
    from transformers import AutoConfig, AutoTokenizer

    from steerkit.models.adapters import base_of_adapter
    from steerkit.models.checkpoint import check_folder
    from steerkit.models.hub import offline_options

    adapter = inputs.adapters.get(stage)
    if adapter is None and (base := base_of_adapter(checkpoint)) is not None:
        checkpoint, adapter = base, checkpoint
    check_folder(checkpoint, trust_pickle=False)
    is_path = adapter is not None and (str(adapter).startswith((".", "/", "~")) or Path(adapter).exists())
    if adapter is not None and is_path and not Path(adapter, "adapter_config.json").is_file():
        raise FileNotFoundError(f"expected a PEFT adapter at {adapter}; there is none. Check the path.")
    options = offline_options(checkpoint)
    own = adapter is not None and Path(adapter, "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(str(adapter) if own else checkpoint, **options)
    return AutoConfig.from_pretrained(checkpoint, **options), tokenizer


def dropped_letters(texts: Iterable[str]) -> float:
    """The share of the letters, marks and digits of texts that the default tokenizer of ROUGE-L drops.

    Example:
        >>> dropped_letters(["abc \u0434"])
        0.25
    """
    letters = seen = 0
    for text in texts:
        letters += sum(unicodedata.category(character)[0] in "LMN" for character in text)
        seen += sum(map(len, tokenize(text)))
    return max(0.0, 1 - seen / letters) if letters else 0.0


def planned(setting: Analysis, sizes: Sizes) -> Analysis:
    """The setting with its layers, continuation length and tokenizer of ROUGE-L where they are not given.

    Raises:
        ValueError: a setting that the checkpoint or the analysis does not have.
    """
    layers = sampled_layers(sizes.shape.layers, setting.layers)
    grid, protocol = setting.grid, setting.protocol
    words = "unicode" if sizes.dropped > DROPPED else None
    complete = replace(
        setting,
        grid=replace(
            grid,
            layers=grid.layers or layers,
            max_new_tokens=sizes.continuation if grid.max_new_tokens is None else grid.max_new_tokens,
            rouge_tokenizer=grid.rouge_tokenizer or words,
        ),
        protocol=replace(
            protocol,
            layers=protocol.layers or tuple(layer for layer in layers if layer < sizes.shape.layers - 1),
            max_new_tokens=sizes.continuation if protocol.max_new_tokens is None else protocol.max_new_tokens,
            rouge_tokenizer=protocol.rouge_tokenizer or words,
        ),
    )
    _check(complete, sizes)
    return complete


def _check(setting: Analysis, sizes: Sizes) -> None:
    """`ValueError` for a setting with which the analysis would end late."""
    grid, protocol = setting.grid, setting.protocol
    for name, layers in (("grid.layers", grid.layers), ("protocol.layers", protocol.layers)):
        every = range(sizes.shape.layers)
        if not isinstance(layers, tuple) or not layers or not all(one in every for one in layers):
            raise ValueError(
                f"expected {name} as a list of layers from 0 to {every[-1]}; got {layers!r}. Pass e.g. {name}=[0]."
            )
    numbers = {
        "grid.controls": (grid.controls, 1),
        "protocol.controls": (protocol.controls, 1),
        "grid.bands": (grid.bands, 1),
        "grid.train": (grid.train, 4),
        "protocol.train": (protocol.train, 4),
        "grid.validation": (grid.validation, 2),
        "protocol.validation": (protocol.validation, 1),
        "grid.test": (grid.test, 2),
        "protocol.test": (protocol.test, 2),
        "layers": (setting.layers, 1),
        "probed": (setting.probed, 10),
        "grid.max_new_tokens": (grid.max_new_tokens, 1),
        "protocol.max_new_tokens": (protocol.max_new_tokens, 1),
    }
    for name, (value, least) in numbers.items():
        if type(value) is not int or value < least:
            raise ValueError(f"expected {name} as an integer of at least {least}; got {value!r}. Correct it.")
    strengths = {
        "grid.coefficients": grid.coefficients,
        "protocol.coefficients": protocol.coefficients,
        "protocol.doses": protocol.doses,
    }
    for name, several in strengths.items():
        if not several or not all(isinstance(one, int | float) and one > 0 for one in several):
            raise ValueError(f"expected {name} as a list of numbers above 0; got {list(several)}. Correct it.")
    if not all(isinstance(one, int | float) and one < 0 for one in grid.negative):
        raise ValueError(f"expected grid.negative as a list of numbers below 0; got {list(grid.negative)}. Correct it.")
    for name, words in (("grid", grid.rouge_tokenizer), ("protocol", protocol.rouge_tokenizer)):
        blind = words == "rouge_score" and sizes.dropped > 0.5
        if words is not None and (words not in ROUGE_TOKENIZERS or blind):
            raise ValueError(
                f"expected {name}.rouge_tokenizer among {ROUGE_TOKENIZERS} that sees the letters of the debates; got "
                f"{words!r}. Pass {name}.rouge_tokenizer=unicode, or leave it out."
            )
    new = max(grid.max_new_tokens or 0, protocol.max_new_tokens or 0)
    if sizes.context is not None and max(sizes.longest, sizes.longest_context + new) > sizes.context:
        raise ValueError(
            f"expected debates, and contexts with a continuation, that fit the checkpoint's context of {sizes.context};"
            f" got {sizes.longest}, and {sizes.longest_context} + {new} tokens. Leave long debates out, lower "
            "grid.max_new_tokens and protocol.max_new_tokens, or use a model with a longer context."
        )


def layers_read(setting: Analysis) -> tuple[int, ...]:
    """The layers whose activations the analysis needs."""
    return tuple(sorted({*(setting.grid.layers or ()), *(setting.protocol.layers or ())}))


def texts_written(setting: Analysis, inputs: Inputs, agents: int) -> dict[str, int]:
    """The number of texts that each part writes, all checkpoints together."""
    grid, protocol = setting.grid, setting.protocol
    validation, test = min(grid.validation, len(inputs.validation)), min(grid.test, len(inputs.test))
    places = len(grid.layers or ()) * len(grid.positions) * len(grid.sources) * len(grid.extents)
    screened = places * max(4, validation // 4) + max(1, places // 4) * validation
    curves = 1 + agents * (len(grid.coefficients) + len(grid.negative)) * 1
    curves += 3 * grid.bands * (len(grid.coefficients) + len(grid.negative))
    frozen = 1 + agents + 3 * grid.controls
    few = protocol.control_strengths
    strengths = len(protocol.coefficients) + len(protocol.doses)
    controls = 2 * protocol.controls * (strengths if few is None else len(few))
    per_context = agents * min(protocol.test, len(inputs.test)) * (1 + strengths + controls)
    contexts = len(inputs.stages) + (inputs.base_context is not by_tag)
    of_layers = agents * min(protocol.validation, len(inputs.validation)) * (1 + strengths)
    return {
        "choice of the setting": len(inputs.stages) * agents * len(grid.coefficients) * screened,
        "curves and gains": len(inputs.stages) * (1 + agents) * test * (curves + frozen),
        "the paper's protocol": of_layers * len(protocol.layers or ()) + contexts * per_context,
    }


def texts_read(setting: Analysis, inputs: Inputs, agents: int) -> dict[str, int]:
    """The number of forwards without generation: whole debates, and texts that are scored for fidelity."""
    grid = setting.grid
    stages, train = len(inputs.stages), min(grid.train, len(inputs.train))
    test, probed = min(grid.test, len(inputs.test)), inputs.train[: setting.probed]
    debates = stages * (4 * train + 2 * test + sum(3 + len(trace.turns) for trace in probed))
    debates += 2 * min(setting.protocol.train, len(inputs.train))
    strengths = len(grid.coefficients) + len(grid.negative)
    cells = 1 + (agents + 3 * grid.bands) * strengths + agents + 3 * grid.controls
    cases = stages * agents**2 + (agents if inputs.base_context is not by_tag else 0)
    return {"debates": debates, "scored": cells * test * cases}


def cost_text(setting: Analysis, inputs: Inputs, sizes: Sizes, device: Device) -> str:
    """Forwards, hours and memory in one line."""
    read = texts_read(setting, inputs, sizes.agents)
    texts = sum(texts_written(setting, inputs, sizes.agents).values())
    new = max(setting.grid.max_new_tokens or 0, setting.protocol.max_new_tokens or 0)
    writing = to_write(sizes.shape, device, texts, sizes.longest_context, new)
    tokens = read["debates"] * sizes.longest + read["scored"] * (sizes.longest_context + max(sizes.lengths))
    seconds = writing.seconds + 2 * sizes.shape.parameters * tokens / device.flops / EFFICIENCY
    turns = sum(len(trace.turns) for trace in inputs.train[: setting.grid.train])
    held = 4 * POSITIONS * turns * len(layers_read(setting)) * sizes.shape.width
    return (
        f"Forwards without writing: {read['debates']:,} of debates, {read['scored']:,} of texts scored for fidelity. "
        f"At most about {seconds / 3600:.1f} hours on {device.name}, {MARGIN * writing.memory / GIB:.1f} GB for "
        f"{writing.rows} texts at once, {held / GIB:.2f} GB for activations."
    )


def plan_text(setting: Analysis, inputs: Inputs, sizes: Sizes, skipped: int = 0) -> str:
    """What will be computed, in lines."""
    written = texts_written(setting, inputs, sizes.agents)
    total = sum(written.values())
    new = setting.grid.max_new_tokens or sizes.continuation
    longer = sum(length > new for length in sizes.lengths)
    lines = [
        f"Debates: {len(inputs.train)} for vectors, {len(inputs.validation)} to choose settings, {len(inputs.test)} "
        f"to report; {sizes.agents} agents; the longest debate has {sizes.longest} tokens.",
        f"Checkpoints: {', '.join(f'{name} ({path})' for name, path in inputs.stages.items())}; {sizes.shape.layers} "
        f"layers, tried: {', '.join(map(str, setting.grid.layers or ()))}.",
        f"First prompt: {sizes.prompt!r}",
        f"Continuations: at most {new} new tokens (one and a half times the 95th percentile of the first texts unless "
        f"set); {longer} of {len(sizes.lengths)} first texts are longer.",
        f"Tokenizer of ROUGE-L: {setting.grid.rouge_tokenizer or 'rouge_score'} (rouge_score drops {sizes.dropped:.1%} "
        "of the letters of the first texts).",
        *(f"Texts, {name}: {count:,}" for name, count in written.items()),
        f"Texts in all: {total:,}, at most {total * new:,} new tokens.",
    ]
    if names := names_of(inputs):
        lines.insert(1, f"Agents: {', '.join(f'{number} is {name}' for number, name in names.items())}.")
    if skipped:
        lines.insert(1, f"Left out: {skipped} debates in which an agent has no text in a round.")
    if sizes.other_ids:
        lines.append(
            f"Warning: for {sizes.other_ids} of {len(sizes.lengths)} first texts the context ends within a token of "
            "the whole debate: there the model reads other tokens than it was trained on."
        )
    return "\n".join(lines)
