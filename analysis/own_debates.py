"""Steer the agents of your own debates: vectors, probes, the paper's protocol, controls, figures and a page.

With --traces and --checkpoint, sizes are checked before a model is loaded, and everything is written into one folder:
`report.html`, tables, figures, and the vectors of each agent. The same command resumes. With --run or --stage, only the
agents' own directions and their controls are analysed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from analysis.agents.contexts import by_cast
from analysis.agents.steer import add_options, analyse, configuration, run_options
from analysis.inputs import BASE, CHECKPOINT, Inputs, add_inputs, inputs_of_files
from analysis.own_page import protocol_doses, write_page
from analysis.own_plan import (
    Analysis,
    check_debates,
    cost_text,
    layers_read,
    names_of,
    plan_text,
    planned,
    sizes_of,
)
from analysis.paper.pooling import pool_protocol
from analysis.paper.protocol import run_protocol
from analysis.probes.separability import probe_checkpoints
from steerkit.io.json import write_json
from steerkit.io.run_folder import ConfigurationChanged, RunFolderBusy, run_folder
from steerkit.io.tables import write_table
from steerkit.text.traces import DebateTrace, read_records, write_traces
from training.debates.personas import CASTS, cast_of
from training.devices import this_device
from training.problems.answers import KINDS
from training.settings import override


def analyse_debates(inputs: Inputs, setting: Analysis, out: str | Path) -> Path:
    """Run everything, and write the tables, the figures and the page; finished parts are not computed again.

    Args:
        inputs: checkpoints and debates.
        setting: see `analysis.own_plan.planned`.
        out: folder of the results.

    Returns:
        The page, `out/report.html`.

    Raises:
        ConfigurationChanged, RunFolderBusy: see `steerkit.io.run_folder`.
    """
    out = Path(out)
    with run_folder(out, configuration(inputs, setting.grid)):
        copy_of_debates(inputs, out)
    tables = analyse(inputs, setting.grid, out)
    probed = {"debates": inputs.train[: setting.probed]}
    tables["separability"] = probe_checkpoints(inputs, probed, out, setting.grid.layers)
    run_protocol(inputs, setting.protocol, out / "protocol")
    tables["protocol"], tables["protocol_doses"] = pool_protocol({0: out}), protocol_doses(out)
    for name in ("protocol", "protocol_doses"):
        write_table(out / f"{name}.csv", tables[name], {})
    subprocess.run([sys.executable, "-m", "figures", str(out)], check=True, stdout=subprocess.DEVNULL)
    return write_page(tables, inputs, setting, out)


def read_inputs(given: argparse.Namespace) -> Inputs:
    """The checkpoints and debates of the command line.

    Raises:
        OSError: no such file.
        ValueError: a record that is no debate.
    """
    if given.cast and not given.base:
        raise ValueError("expected --base MODEL with --cast, whose prompts are for it; got none. Pass it too.")
    stages = ({BASE: given.base} if given.base else {}) | {CHECKPOINT: given.checkpoint}
    options = {name: getattr(given, name) for name in ("dtype", "device", "bits") if getattr(given, name) is not None}
    others: dict[str, Any] = {"adapters": {CHECKPOINT: given.adapter}} if given.adapter else {}
    others["prompt"] = given.prompt and given.prompt.replace("\\n", "\n")
    inputs = inputs_of_files(stages, given.traces, given.skip_incomplete, load_options=options, **others)
    if given.cast:
        cast = cast_of(given.cast, check_debates(inputs))
        inputs = replace(inputs, base_context=by_cast(cast, given.kind), openings=cast.openings)
    return inputs


def copy_of_debates(inputs: Inputs, out: Path) -> None:
    """Write the debates with their tags to `out/traces.jsonl`, and the agents' names to `out/agents.json`."""
    traces: Sequence[DebateTrace] = (*inputs.train, *inputs.validation, *inputs.test)
    write_traces(out / "traces.jsonl", traces)
    if names := names_of(inputs):
        write_json(out / "agents.json", names)


def _refuse(error: Exception) -> NoReturn:
    """End with exit code 2 and the error in one line; only changes of a configuration have a line each."""
    text = str(error) if isinstance(error, ConfigurationChanged) else " ".join(str(error).split())
    print(f"python -m analysis agents: {text}", file=sys.stderr)
    sys.exit(2)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", help="hub id, folder or GGUF file, with --traces: analyse everything")
    parser.add_argument("--adapter", help="PEFT adapter of the checkpoint, hub id or folder")
    parser.add_argument("--base", help="checkpoint before training, compared in every table")
    parser.add_argument("--cast", choices=sorted(CASTS), help="cast whose prompts name an agent for --base")
    parser.add_argument("--kind", choices=(*KINDS, "open"), default="number", help="kind of the answers, with --cast")
    parser.add_argument(
        "--prompt",
        help="what precedes each debate: a text with {question}, chat (the question through the chat template), or "
        "text (the debate's own text before its first tag); default: 'Problem: {question}\\n\\n'",
    )
    parser.add_argument(
        "--skip-incomplete", action="store_true", help="leave out debates in which an agent has no text in a round"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "auto"), help="of the weights")
    parser.add_argument("--device", help="e.g. cuda:1, cpu, or auto for several GPUs")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="quantise the weights; needs a GPU and bitsandbytes")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the sizes, print what would be computed, and exit"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis agents", description=__doc__)
    add_inputs(parser)
    _add_options(parser)
    add_options(parser)
    given = parser.parse_args(arguments)
    if given.checkpoint is None:
        run_options(given, parser)
        return
    if given.traces is None or given.run or given.stage:
        parser.error("expected --traces FILE with --checkpoint, without --run and --stage; got others. Pass these two.")
    try:
        inputs = read_inputs(given)
        sizes = sizes_of(inputs, check_debates(inputs))
        setting = planned(override(Analysis(), given.set), sizes)
        inputs = replace(inputs, read=layers_read(setting))
        every = len(read_records(given.traces))
        held = len(inputs.train) + len(inputs.validation) + len(inputs.test)
        print(plan_text(setting, inputs, sizes, every - held), file=sys.stderr)
        print(cost_text(setting, inputs, sizes, this_device()), file=sys.stderr)
        if given.dry_run:
            return
        page = analyse_debates(inputs, setting, given.out)
    except subprocess.CalledProcessError as error:
        _refuse(
            RuntimeError(
                f"expected figures in {given.out}; `python -m figures` ended with exit code {error.returncode}. Its "
                "message is above. Correct it, and repeat the command."
            )
        )
    except (ValueError, OSError, ImportError, RunFolderBusy) as error:
        _refuse(error)
    print(f"Page: {page}. Vectors: {given.out}/stages/*/agent-*.safetensors. Tables: {given.out}/*.csv.")
