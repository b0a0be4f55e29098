"""Fine-tune a checkpoint on debates, yours (--traces FILE) or those of the stage debates: `sft/checkpoint`.

The debates that were learned are in `sft/traces.jsonl`; `grpo` and `evaluate` read the number of agents there.

A record of --traces has `question` and `debate_trace`, the tagged text, or turns without tags (docs/own-debates.md).
A debate without a consensus gets that of its last round's majority, or is left out. Targets other than the whole trace
are baselines (`--set sft.target=answer`: DebateGPT) and the tag ablation (`--set sft.target=untagged`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import steerkit as sk
from steerkit.io.ranks import in_first_process
from steerkit.text.traces import DebateTrace, read_traces, write_traces
from training.commands.options import (
    Stages,
    add_settings,
    checkpoint_of,
    kinds_of,
    one_line_errors,
    settings_of,
    show,
    stage_command,
    stage_parser,
)
from training.debates.debate import TRACES, consensus_text
from training.problems.answers import KINDS, majority, read_answer
from training.problems.problem import Kinds, kind_for, read_problems


def main(arguments: list[str] | None = None) -> None:
    from training.train.checkpoints import check_batch
    from training.train.distributed import process_count
    from training.train.sft import check_kept_steps, examples, train_sft

    parser = stage_parser("sft", __doc__)
    add_settings(parser)
    parser.add_argument("--traces", type=Path, metavar="FILE", help="debates (default: those of the stage debates)")
    parser.add_argument("--checkpoint", help="model to fine-tune: hub id, folder or GGUF file (default: the preset's)")
    parser.add_argument("--kind", choices=(*KINDS, "open"), help="kind of the answers (default: that of the problems)")
    parser.add_argument("--name", default="sft", help="folder of this stage in the run (default: sft)")
    given = parser.parse_args(arguments)
    stages = Stages(given.run)
    with one_line_errors("sft"):
        preset = settings_of(given)
        path = given.traces or stages.traces
        if not path.is_file():
            raise FileNotFoundError(
                f"expected debates at {path}; there are none. Run `{stage_command('debates', '--run', given.run)}` "
                "first, or pass --traces FILE."
            )
        problems = stages.problems("train")
        read = read_traces(path)
        kind = given.kind or kinds_of(read_problems(problems) if problems.is_file() else [], read)
        traces = with_consensus(read, kind)
        checkpoint = checkpoint_of(given, preset)
        show(f"{len(traces)} of {len(read)} debates have a consensus. Fine-tuning {checkpoint}.")
        setting = replace(preset.sft, seed=given.seed)
        check_batch("batch", setting.batch, setting.micro_batch, process_count())  # before a model is loaded
        rows = examples(traces, setting, kind)
        check_kept_steps(setting, len(rows))
        if len(rows) < len(traces):
            show(f"{len(traces) - len(rows)} of these have no text for the target {setting.target!r}; left out.")
        done = train_sft(*sk.load(checkpoint), traces, setting, stages.folder / given.name, kind)
        in_first_process(lambda: write_traces(done.with_name(TRACES), traces))  # grpo and evaluate read their agents
    show(f"Checkpoint: {done}")


def with_consensus(traces: list[DebateTrace], kind: Kinds) -> list[DebateTrace]:
    """Return the debates with a consensus, written after the last round's majority where it is missing.

    Args:
        traces: the debates.
        kind: kind of the answers, or a mapping from each question to it.

    Raises:
        ValueError: no debate has one.

    Example:
        >>> traces = with_consensus(read_traces("my.jsonl"), "number")
    """
    kept = []
    for trace in traces:
        consensus, own = trace.consensus, kind_for(kind, trace.question)
        if consensus is None and own in KINDS:
            last = max(turn.round for turn in trace.turns)
            votes = [read_answer(turn.text, own) for turn in trace.turns if turn.round == last]
            answer = majority(votes)
            consensus = None if answer is None else consensus_text(answer, len(set(votes)) == 1)
        if consensus is not None:
            kept.append(
                trace
                if trace.consensus is not None
                else DebateTrace.of(trace.question, trace.turns, consensus, trace.gold, trace.extra)
            )
    if not kept:
        raise ValueError(
            f"expected debates with a consensus, or answers in \\boxed{{}} of which most agree; got none among "
            f"{len(traces)}. Add `consensus` to the records, or pass the --kind of their answers."
        )
    return kept
