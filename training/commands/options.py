"""Options that the stages share: the run's folder, a preset's settings, checkpoints and servers."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import steerkit as sk
from steerkit.io.ranks import is_distributed, is_first
from steerkit.io.run_folder import ConfigurationChanged, RunFolderBusy
from steerkit.text.traces import DebateTrace, read_traces
from training.debates.answerers import Answerer, LocalModel
from training.debates.debate import TRACES
from training.debates.judge import CRITERIA, YesNo
from training.debates.personas import CASTS, Cast, cast_of
from training.debates.server import Server
from training.presets import Preset, get_preset, preset_names
from training.problems.problem import Problem, read_problems
from training.settings import shell
from training.train.distributed import process_count

DEFAULT = "llama-3.1-8b"


@dataclass(frozen=True)
class Stages:
    """The files of a run, by stage.

    Args:
        folder: the run's folder.
    """

    folder: Path

    def problems(self, part: str) -> Path:
        """File of the problems of a part, `train` or `test`."""
        return self.folder / "problems" / f"{part}.jsonl"

    @property
    def debates(self) -> Path:
        """Run folder of the debates."""
        return self.folder / "debates"

    @property
    def traces(self) -> Path:
        """File of the debates with a consensus."""
        return self.debates / TRACES

    @property
    def learned(self) -> Path:
        """File of the debates that `sft` has learned; that of the stage debates where `sft` has not written one."""
        own = self.checkpoint("sft").with_name(TRACES)
        return own if own.is_file() else self.traces

    def checkpoint(self, name: str) -> Path:
        """Checkpoint that a training stage of this name writes."""
        return self.folder / name / "checkpoint"


def stage_parser(stage: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every stage."""
    parser = argparse.ArgumentParser(
        prog=f"python -m training {stage}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the run; each stage has files in it")
    parser.add_argument("--seed", type=int, default=0, help="seed of draws, sampling and training (default: 0)")
    return parser


def stage_command(stage: str, *options: object) -> str:
    """Return the command of a stage as a shell reads it, for messages."""
    return shell("python", "-m", "training", stage, *options)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options of a preset and its fields."""
    parser.add_argument(
        "--preset",
        choices=preset_names(),
        default=DEFAULT,
        help=f"whose settings are used, see training/presets.py (default: {DEFAULT}, for most settings the paper's)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a setting, e.g. sft.micro_batch=2"
    )


def add_cast(parser: argparse.ArgumentParser) -> None:
    """Add the options of the agents."""
    parser.add_argument("--cast", choices=sorted(CASTS), help="the agents' personas (default: the preset's)")
    parser.add_argument("--agents", type=positive, help="number of agents (default: that of the run's debates, else 3)")


def cast_from(given: argparse.Namespace, preset: Preset, traces: Path | None = None) -> Cast:
    """Return the cast that the options name, with as many agents as the debates of a file have.

    Args:
        given: the options.
        preset: names the cast where the options name none.
        traces: the file; default: that of the stage debates. Without it, or with one agent in it, there are three.
    """
    traces = traces or Stages(given.run).traces
    found = agents_of(read_traces(traces)) if traces.is_file() else 1
    agents = given.agents or (found if found > 1 else 3)
    return cast_of(given.cast or ("diverse" if preset.cast == "world" else preset.cast), agents)


def agents_of(traces: Sequence[DebateTrace]) -> int:
    """Return the number of agents of debates."""
    return max(turn.agent for trace in traces for turn in trace.turns)


def add_server(parser: argparse.ArgumentParser, role: str, does: str) -> None:
    """Add an option that names an OpenAI-compatible server, e.g. `--answerer URL MODEL`."""
    parser.add_argument(
        f"--{role}", nargs=2, metavar=("URL", "MODEL"), help=f"OpenAI-compatible server and its model that {does}"
    )
    if not any(action.dest == "concurrency" for action in parser._actions):
        parser.add_argument("--concurrency", type=int, default=8, help="simultaneous requests to a server (default: 8)")


def add_judge(parser: argparse.ArgumentParser, does: str) -> None:
    """Add the options of a judge of open questions."""
    add_server(parser, "judge", does)
    parser.add_argument(
        "--criterion", default="ethical", help=f"question of the judge: {', '.join(CRITERIA)}, or a text of your own"
    )
    parser.add_argument(
        "--judge-tokens",
        type=positive,
        default=8,
        help="longest reply of the judge in tokens (default: 8); one that thinks first needs e.g. 2048",
    )


def judge_of(given: argparse.Namespace, problems: Sequence[Problem]) -> YesNo | None:
    """Return the judge that the options name; processes share its calls in the evaluation alone.

    Raises:
        ValueError: an open question without a judge.
    """
    server = server_of(given, "judge")
    if server is not None:
        return YesNo(server, CRITERIA.get(given.criterion, given.criterion), given.judge_tokens)
    if any(problem.kind == "open" for problem in problems):
        raise ValueError("expected --judge URL MODEL for open questions; got none. Pass a judge.")
    return None


def check_alone(stage: str) -> None:
    """End with exit code 2 and one line where torchrun started several processes for a stage of one."""
    if process_count() > 1:
        refuse(stage, f"expected one process; got {process_count()}, started by torchrun. Run it without torchrun.")


def report_used(used: Sequence[Problem], problems: Sequence[Problem], settings: str) -> None:
    """Print how many of the problems a stage uses, where these are not all."""
    if len(used) < len(problems):
        show(f"Using {len(used):,} of {len(problems):,} problems, the preset's number. Pass {settings} for others.")


def show(*texts: object) -> None:
    """Print in the first process."""
    if is_first():
        print(*texts)


def positive(text: str) -> int:
    """Type of an option: an integer of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more; got {number}")
    return number


def settings_of(given: argparse.Namespace) -> Preset:
    """Return the preset with the changed fields.

    Raises:
        ValueError: an unknown field, or a value of the wrong type.
    """
    return get_preset(given.preset, None, given.set)


def checkpoint_of(given: argparse.Namespace, preset: Preset) -> str | Path:
    """Return the checkpoint that the options name, or the preset's own.

    Raises:
        ValueError: neither names one.
    """
    checkpoint = given.checkpoint or preset.checkpoint
    if checkpoint is None:
        raise ValueError(f"expected --checkpoint with the preset {preset.name}, which has none; got none. Pass one.")
    if checkpoint == "smollm2":
        from steerkit.demo.checkpoint import default_checkpoint

        return default_checkpoint()
    if str(checkpoint).startswith((".", "/", "~")) and not Path(checkpoint).expanduser().exists():
        raise FileNotFoundError(f"expected a checkpoint at {checkpoint}; there is none. Check the path.")
    return checkpoint


def server_of(given: argparse.Namespace, role: str) -> Server | None:
    """Return the server of a role, e.g. `answerer`, if the options name one."""
    named = getattr(given, role)
    if named is None:
        return None
    url, model = named
    return Server(url, model, concurrency=given.concurrency)


def answerer_of(given: argparse.Namespace, preset: Preset) -> Answerer:
    """Return the server that the options name, else the checkpoint in this process."""
    server = server_of(given, "answerer")
    if server is not None:
        server.about()  # a server that does not answer is an error here, before anything is written
        return server
    return LocalModel(*sk.load(checkpoint_of(given, preset), dtype=preset.dtype))


def problems_of(given: argparse.Namespace, part: str) -> list[Problem]:
    """Return the problems of `--problems`, or those that the stage `problems` has written for a part."""
    path = given.problems or Stages(given.run).problems(part)
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"expected problems at {path}; there are none. Run "
            f"`{stage_command('problems', '--run', given.run, '--problems', 'SOURCE')}` first, or pass --problems "
            "FILE.jsonl."
        )
    return read_problems(path)


def kinds_of(problems: Sequence[Problem], traces: Sequence[DebateTrace], default: str = "number") -> dict[str, str]:
    """Return the kind of the answers to the question of each debate.

    A question that is not among the problems has the most frequent kind; without problems, the default.
    """
    kinds = [problem.kind for problem in problems]
    most = max(dict.fromkeys(kinds), key=kinds.count) if kinds else default
    known = {problem.question: problem.kind for problem in problems}
    return {trace.question: known.get(trace.question, most) for trace in traces}


@contextlib.contextmanager
def one_line_errors(stage: str) -> Iterator[None]:
    """End with exit code 2 and one line where input is refused or a file is missing.

    Several processes of torchrun meet first: each has chosen its GPU before it loads a model.
    """
    is_distributed()
    try:
        yield
    except (ValueError, OSError, ImportError, RunFolderBusy, ConfigurationChanged) as error:
        refuse(stage, error)


def refuse(stage: str, error: Any) -> NoReturn:
    """End with exit code 2 and an error in one line; only changes of a configuration have a line each."""
    text = str(error) if isinstance(error, ConfigurationChanged) else " ".join(str(error).split())
    print(f"python -m training {stage}: {text}", file=sys.stderr)
    sys.exit(2)
