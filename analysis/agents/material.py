"""What an analysis reads: checkpoints in the order of training, and debates that are split by question."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import steerkit
from analysis.agents.fidelity import Named, by_cast, by_tag
from steerkit.io.files import file_name, sha256
from steerkit.io.json import canonical_json, read_json
from steerkit.text.traces import DebateTrace, read_traces
from training.debates.personas import cast_of
from training.problems.families import FAMILIES
from training.toy.worlds import WORLDS

BASE, SFT, IMAD = "base", "SFT", "IMAD"
WEIGHTS = (".safetensors", ".gguf", ".json", ".jinja")
UNTAGGED, TURNS = "SFT without tags", "SFT on single turns"


@dataclass(frozen=True)
class Material:
    """Checkpoints and debates.

    Args:
        stages: name -> checkpoint, in the order of training.
        train: debates from which vectors are made.
        validation: debates that choose settings.
        test: debates that judge them.
        base_identity: how stages that were trained on no tags are told who speaks; by default by the tag too.
        dtype: of the checkpoints' weights when they are loaded; None is steerkit's default.

    No question stands in two of the three.
    """

    stages: Mapping[str, str | Path]
    train: tuple[DebateTrace, ...]
    validation: tuple[DebateTrace, ...]
    test: tuple[DebateTrace, ...]
    base_identity: Named = by_tag
    dtype: str | None = None

    def load(self, stage: str) -> tuple[Any, Any]:
        """A checkpoint's model and tokenizer."""
        return steerkit.load(self.stages[stage], dtype=self.dtype)

    def about(self, stage: str) -> dict[str, str | None]:
        """Where a checkpoint lies, and what its files hold: one that was moved is the same, one trained anew another.

        A name on a hub stands for itself.
        """
        path = Path(self.stages[stage])
        kept = [one for one in path.glob("*") if one.suffix in WEIGHTS and one.name != "trainer_state.json"]
        files = [sha256(path)] if path.is_file() else [[f.name, sha256(f)] for f in sorted(kept)]
        held = sha256(canonical_json(files)) if files else None
        return {"checkpoint": str(path), "files_sha256": held}

    def identity(self, stage: str) -> Named:
        """How a checkpoint is told who speaks."""
        return self.base_identity if stage in (BASE, UNTAGGED) else by_tag

    def __post_init__(self) -> None:
        parts = [{trace.question for trace in part} for part in (self.train, self.validation, self.test)]
        if not self.stages or not all(parts):
            raise ValueError(
                f"expected a checkpoint, and debates for vectors, validation and test; got {len(self.stages)}, "
                f"{', '.join(str(len(part)) for part in parts)}."
            )
        names = [file_name(name) for name in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"expected checkpoints whose names give files of their own; got {names}. Rename one.")
        if parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2]:
            raise ValueError("expected questions that stand in one part only; some stand in two. Split by question.")


def of_files(stages: Mapping[str, str | Path], path: str | Path) -> Material:
    """Any checkpoints and any traces file: 60 % of its questions for vectors, 15 % for validation, 25 % for test."""
    traces = read_traces(path)
    part = {trace.question: _share(trace.question) for trace in traces}
    train, validation, test = (
        tuple(t for t in traces if low <= part[t.question] < high) for low, high in ((0, 60), (60, 75), (75, 100))
    )
    return Material(stages, train, validation, test)


def of_run(folder: str | Path, steps: Sequence[int] = (), only: Sequence[str] = ()) -> Material:
    """A run of `training.imad`: base, SFT, GRPO at the given steps, IMAD; with its preset SFT without tags, on turns.

    Vectors are made from its training debates; of its test debates a quarter is for validation.

    Raises:
        FileNotFoundError: the run has not got so far; of `only` some stages these are looked for alone.
    """
    folder = Path(folder)
    stages = {BASE: base_of(folder), SFT: folder / "sft" / "checkpoint"}
    stages |= {f"GRPO step {step}": folder / "grpo" / "trainer" / f"checkpoint-{step}" for step in steps}
    stages[IMAD] = folder / "grpo" / "checkpoint"
    preset = read_json(folder / "config.json")
    others = {UNTAGGED: "untagged", TURNS: "turns"}
    stages |= {name: folder / f"sft-{short}" / "checkpoint" for name, short in others.items() if preset.get(short)}
    wanted = [path for name, path in stages.items() if name in (only or stages)]
    if missing := [str(path) for path in wanted if isinstance(path, Path) and not path.exists()]:
        raise FileNotFoundError(f"expected a finished run of training.imad in {folder}; missing: {missing}.")
    held = read_traces(folder / "evaluation" / "sampled" / "debates" / "traces.jsonl")
    validation = tuple(trace for trace in held if _share(trace.question) < 25)
    test = tuple(trace for trace in held if _share(trace.question) >= 25)
    train = tuple(read_traces(folder / "debates" / "traces.jsonl"))
    return Material(stages, train, validation, test, _asked(folder), preset.get("dtype"))


def _asked(folder: Path) -> Named:
    """How the agents of a run's debates were asked."""
    preset = read_json(folder / "config.json")
    world = WORLDS.get(preset["family"]) if preset["checkpoint"] is None else None
    family = preset["family"] if world is None else world.family
    cast = cast_of(preset["cast"]) if world is None else world.cast()
    return by_cast(cast, FAMILIES[family](1, 0, "train")[0].kind)


def add_material(parser: argparse.ArgumentParser) -> None:
    """The arguments that name what an analysis reads and where it writes."""
    parser.add_argument("--run", type=Path, help="a folder of training.imad")
    parser.add_argument("--step", type=int, action="append", default=[], help="a GRPO step of the run, too")
    parser.add_argument("--stage", action="append", default=[], metavar="NAME=CHECKPOINT")
    parser.add_argument("--traces", type=Path, help="debates, with --stage")
    parser.add_argument("--out", type=Path, required=True)


def material_of(given: argparse.Namespace, parser: argparse.ArgumentParser, only: Sequence[str] = ()) -> Material:
    """What the command line names: a run of training.imad, or checkpoints and a traces file."""
    if (given.run is None) == (given.traces is None or not given.stage):
        parser.error("expected --run FOLDER, or --traces FILE with one --stage NAME=CHECKPOINT at least, and not both.")
    if given.run is not None:
        return of_run(given.run, given.step, only)
    pairs = [stage.partition("=") for stage in given.stage]
    return of_files({name: path for name, _, path in pairs}, given.traces)


def base_of(run: str | Path) -> str | Path:
    """The checkpoint that a run of `training.imad` begins with."""
    folder = Path(run)
    own = folder / "base" / "checkpoint"
    if own.exists():
        return own
    checkpoint = read_json(folder / "config.json")["checkpoint"]
    if checkpoint == "smollm2":
        from steerkit.demo.checkpoint import default_checkpoint

        return default_checkpoint()
    return str(checkpoint)


def _share(question: str) -> int:
    """A number from 0 to 99 that hangs on the question alone."""
    return int(sha256(question)[:8], 16) % 100
