"""Inputs of an analysis: checkpoints in the order of training, and debates that are split by question."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import steerkit
from analysis.agents.contexts import Context, by_cast, by_tag
from steerkit.io.files import file_name, sha256
from steerkit.io.json import canonical_json, read_json
from steerkit.text.traces import DebateTrace, read_traces
from training.debates.personas import Cast, cast_of
from training.problems.families import FAMILIES
from training.toy.worlds import WORLDS

BASE, SFT, IMAD = "base", "SFT", "IMAD"
CHECKPOINT = "checkpoint"
"""Name of a checkpoint of no run of `training.imad`."""
WEIGHTS = (".safetensors", ".gguf", ".json", ".jinja")
"""Suffixes of the files that a checkpoint's hash covers."""
UNTAGGED, TURNS = "SFT without tags", "SFT on single turns"


@dataclass(frozen=True)
class Inputs:
    """Checkpoints and debates. A question is in one of the three splits only.

    Args:
        stages: name -> checkpoint, in the order of training.
        train: debates that the vectors are extracted from.
        validation: debates on which settings are chosen.
        test: debates on which results are reported.
        base_context: the context that names an agent for checkpoints that were not trained on tags.
        dtype: of the checkpoints' weights when they are loaded; None is steerkit's default.
        openings: for each agent a regular expression that its texts begin with, see `analysis.agents.speaker`.
        adapters: name -> PEFT adapter of that checkpoint.
        load_options: further arguments of `steerkit.load`, e.g. `{"bits": 4}`.
        prompt: how the prompt before each trace was made where it is not the one of training, see `asked_as`.
        read: layers whose activations are held; None for all.

    Raises:
        ValueError: no checkpoint, an empty split, two names that give one file name, or a question in two splits.
    """

    stages: Mapping[str, str | Path]
    train: tuple[DebateTrace, ...]
    validation: tuple[DebateTrace, ...]
    test: tuple[DebateTrace, ...]
    base_context: Context = by_tag
    dtype: str | None = None
    openings: tuple[str, ...] = ()
    adapters: Mapping[str, str | Path] = field(default_factory=dict)
    load_options: Mapping[str, Any] = field(default_factory=dict)
    prompt: str | None = None
    read: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        questions = [{trace.question for trace in split} for split in (self.train, self.validation, self.test)]
        if not self.stages or not all(questions):
            raise ValueError(
                f"expected a checkpoint, and debates for vectors, validation and test; got {len(self.stages)} "
                f"checkpoints and {', '.join(str(len(split)) for split in questions)} debates. Pass more debates."
            )
        names = [file_name(name) for name in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"expected checkpoints whose names give different file names; got {names}. Rename one.")
        if questions[0] & questions[1] or questions[0] & questions[2] or questions[1] & questions[2]:
            raise ValueError("expected each question in one split only; got some in two splits. Split by question.")

    def load(self, stage: str) -> tuple[Any, Any]:
        """The model and tokenizer of a checkpoint."""
        gc.collect()  # the model before this one
        options = {"dtype": self.dtype, **self.load_options}
        if stage in self.adapters:
            options["adapter"] = self.adapters[stage]
        return steerkit.load(self.stages[stage], **options)

    def reading(self) -> dict[str, Any]:
        """How checkpoints are loaded and what precedes a trace, for a configuration: nothing where both are usual."""
        given = {"load": dict(self.load_options), "prompt": self.prompt}
        return {name: value for name, value in given.items() if value}

    def about(self, stage: str) -> dict[str, Any]:
        """Path and content hash of a checkpoint, and of its adapter, for the configuration of a run folder.

        The hash identifies the checkpoint: a moved one is the same, a retrained one is another. A name on a hub has no
        hash.
        """
        about: dict[str, Any] = files_of(self.stages[stage])
        return about | ({"adapter": files_of(self.adapters[stage])} if stage in self.adapters else {})

    @property
    def vectors_at(self) -> str:
        """The checkpoint whose vectors the paper's protocol adds to all: SFT, else the last one."""
        return SFT if SFT in self.stages else list(self.stages)[-1]

    def context(self, stage: str) -> Context:
        """The context that names an agent for a checkpoint."""
        return self.base_context if stage in (BASE, UNTAGGED) else by_tag


def files_of(checkpoint: str | Path) -> dict[str, str | None]:
    """Path and hash of the files of a checkpoint or an adapter, for a configuration: a moved one is the same."""
    path = Path(checkpoint)
    kept = [file for file in path.glob("*") if file.suffix in WEIGHTS and file.name != "trainer_state.json"]
    hashes = [sha256(path)] if path.is_file() else [[file.name, sha256(file)] for file in sorted(kept)]
    content = sha256(canonical_json(hashes)) if hashes else None
    return {"checkpoint": str(path), "files_sha256": content}


def asked_as(trace: DebateTrace, prompt: str) -> DebateTrace:
    """The trace with another prompt before it.

    Args:
        trace: a debate.
        prompt: a text in which `{question}` stands for the question; `"chat"`: the question as the user's message; or
            `"text"`: the trace's own text before its first tag.

    Raises:
        ValueError: a text without `{question}`, or `"text"` for a trace that begins with a tag.
    """
    if prompt == "chat":
        return replace(trace, asked=({"role": "user", "content": trace.question},))
    if prompt == "text":
        own = trace.text[: -len(trace.body)]
        if not own.strip():
            raise ValueError(
                f"expected text before the first tag of every debate, with the prompt 'text'; got none in that of "
                f"{trace.question!r:.80}. Pass a text with {{question}}, or chat."
            )
        return replace(trace, asked=own)
    if "{question}" not in prompt:
        raise ValueError(
            f"expected a prompt with {{question}}, or chat, or text; got {prompt!r:.80}. Pass one of them."
        )
    return replace(trace, asked=prompt.replace("{question}", trace.question))


def inputs_of_files(
    stages: Mapping[str, str | Path], path: str | Path, skip_incomplete: bool = False, **others: Any
) -> Inputs:
    """Any checkpoints and any traces file: 60 % of its questions for vectors, 15 % for validation, 25 % for test.

    The hash of a question decides its split and its place in it: the first debates of a split are a random part of it.

    Args:
        stages: name -> checkpoint.
        path: file of `steerkit.read_traces`.
        skip_incomplete: leave out debates in which an agent has no text in a round.
        others: further fields of `Inputs`.
    """
    traces = sorted(read_traces(path, skip_incomplete), key=lambda trace: sha256(trace.question))
    if skip_incomplete:
        every = {turn.agent for trace in traces for turn in trace.turns}
        traces = [trace for trace in traces if _is_complete(trace, every)]
    if prompt := others.get("prompt"):
        traces = [asked_as(trace, prompt) for trace in traces]
    percentile = {trace.question: _percentile(trace.question) for trace in traces}
    train, validation, test = (
        tuple(trace for trace in traces if low <= percentile[trace.question] < high)
        for low, high in ((0, 60), (60, 75), (75, 100))
    )
    return Inputs(stages, train, validation, test, **others)


def inputs_of_run(folder: str | Path, steps: Sequence[int] = (), only: Sequence[str] = ()) -> Inputs:
    """A run of `training.imad`: base, SFT, GRPO at the given steps and IMAD; also its SFT without tags and on turns.

    Vectors are extracted from its training debates. A quarter of its test debates is used for validation.

    Args:
        folder: the run's folder.
        steps: GRPO steps whose checkpoints are added.
        only: names of the checkpoints that must exist; default all.

    Raises:
        FileNotFoundError: a checkpoint does not exist yet.
    """
    folder = Path(folder)
    stages = {BASE: base_of(folder), SFT: folder / "sft" / "checkpoint"}
    stages |= {f"GRPO step {step}": folder / "grpo" / "trainer" / f"checkpoint-{step}" for step in steps}
    stages[IMAD] = folder / "grpo" / "checkpoint"
    preset = read_json(folder / "config.json")
    controls = {UNTAGGED: "untagged", TURNS: "turns"}
    stages |= {name: folder / f"sft-{short}" / "checkpoint" for name, short in controls.items() if preset.get(short)}
    required = [path for name, path in stages.items() if name in (only or stages)]
    if missing := [str(path) for path in required if isinstance(path, Path) and not path.exists()]:
        raise FileNotFoundError(
            f"expected a finished run of training.imad in {folder}; missing: {missing}. Finish the run first."
        )
    evaluated = read_traces(folder / "evaluation" / "sampled" / "debates" / "traces.jsonl")
    validation = tuple(trace for trace in evaluated if _percentile(trace.question) < 25)
    test = tuple(trace for trace in evaluated if _percentile(trace.question) >= 25)
    train = tuple(read_traces(folder / "debates" / "traces.jsonl"))
    cast, kind = _cast_of_run(preset)
    return Inputs(stages, train, validation, test, by_cast(cast, kind), preset.get("dtype"), cast.openings)


def _cast_of_run(preset: Mapping[str, Any]) -> tuple[Cast, str]:
    """The agents of a run's debates, and the kind of its answers."""
    world = WORLDS.get(preset["family"]) if preset["checkpoint"] is None else None
    family = preset["family"] if world is None else world.family
    cast = cast_of(preset["cast"]) if world is None else world.cast()
    return cast, FAMILIES[family](1, 0, "train")[0].kind


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the inputs of an analysis and its output folder."""
    parser.add_argument("--run", type=Path, help="folder of a run of training.imad")
    parser.add_argument("--step", type=int, action="append", default=[], help="also analyse this GRPO step of the run")
    parser.add_argument(
        "--stage", action="append", default=[], metavar="NAME=CHECKPOINT", help="a checkpoint, with --traces"
    )
    parser.add_argument("--traces", type=Path, help="traces file of the debates, with --stage")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")


def inputs_of(given: argparse.Namespace, parser: argparse.ArgumentParser, only: Sequence[str] = ()) -> Inputs:
    """The inputs that the command line names: a run of training.imad, or checkpoints and a traces file."""
    if (given.run is None) == (given.traces is None or not given.stage):
        parser.error(
            "expected either --run FOLDER, or --traces FILE with at least one --stage NAME=CHECKPOINT; got both or "
            "neither. Pass one of the two."
        )
    if given.run is not None:
        return inputs_of_run(given.run, given.step, only)
    pairs = [stage.partition("=") for stage in given.stage]
    return inputs_of_files({name: path for name, _, path in pairs}, given.traces)


def base_of(run: str | Path) -> str | Path:
    """The checkpoint that a run of `training.imad` starts from."""
    folder = Path(run)
    trained = folder / "base" / "checkpoint"
    if trained.exists():
        return trained
    checkpoint = read_json(folder / "config.json")["checkpoint"]
    if checkpoint == "smollm2":
        from steerkit.demo.checkpoint import default_checkpoint

        return default_checkpoint()
    return str(checkpoint)


def _is_complete(trace: DebateTrace, agents: set[int]) -> bool:
    """Whether each of these agents has a text in each round."""
    rounds = {turn.round for turn in trace.turns}
    return {(turn.agent, turn.round) for turn in trace.turns if turn.text} == {*product(agents, rounds)}


def _percentile(question: str) -> int:
    """A number from 0 to 99 that depends on the question alone."""
    return int(sha256(question)[:8], 16) % 100
