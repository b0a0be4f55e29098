"""Train a fine-tuned checkpoint by GRPO with a fading format reward and a shrinking length limit: `grpo/checkpoint`.

It starts from `sft/checkpoint` and uses the problems of the run. Open questions are rewarded by a judge: a server
(--judge URL MODEL) that answers the --criterion about each response with YES or NO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import steerkit as sk
from steerkit.text.traces import DebateTrace, read_traces
from training.commands.options import (
    Stages,
    add_judge,
    add_settings,
    agents_of,
    checkpoint_of,
    judge_of,
    kinds_of,
    one_line_errors,
    problems_of,
    report_used,
    settings_of,
    show,
    stage_command,
    stage_parser,
)
from training.debates.debate import TRACES
from training.presets import Preset
from training.problems.problem import Problem

if TYPE_CHECKING:
    from training.train.grpo import GRPO


def main(arguments: list[str] | None = None) -> None:
    from training.train.distributed import process_count
    from training.train.grpo import check_clip, check_division, check_rollouts, train_grpo
    from training.train.sft import short_finished

    parser = stage_parser("grpo", __doc__)
    add_settings(parser)
    parser.add_argument("--problems", metavar="FILE", help="problems (default: those of the stage problems)")
    parser.add_argument("--checkpoint", help="policy to train (default: the run's sft/checkpoint)")
    add_judge(parser, "rewards open questions")
    parser.add_argument("--name", default="grpo", help="folder of this stage in the run (default: grpo)")
    given = parser.parse_args(arguments)
    stages = Stages(given.run)
    with one_line_errors("grpo"):
        preset = settings_of(given)
        every = problems_of(given, "train")
        problems = rewarded(every, preset)
        report_used(problems, every, "--set debates=N and --set fresh=N")
        if not given.checkpoint and not stages.checkpoint("sft").exists():
            raise FileNotFoundError(
                f"expected a fine-tuned checkpoint at {stages.checkpoint('sft')}; there is none. Run "
                f"`{stage_command('sft', '--run', given.run)}` first, or pass --checkpoint."
            )
        judge = judge_of(given, problems)
        judged_by = None if judge is None else judge.about()  # a server that does not answer is an error here
        start = checkpoint_of(given, preset) if given.checkpoint else stages.checkpoint("sft")
        setting = replace(preset.grpo, seed=given.seed)
        check_rollouts(setting)
        check_division(setting, process_count())
        learned = next((path for path in (Path(start).parent / TRACES, stages.traces) if path.is_file()), None)
        traces = [] if learned is None else read_traces(learned)
        _check_agents(setting, traces)
        model, tokenizer = sk.load(start)
        if traces and any(problem.kind != "open" for problem in problems):
            check_clip(short_finished(tokenizer, traces, preset.sft, kinds_of(every, traces)), setting)
        done = train_grpo(model, tokenizer, problems, setting, stages.folder / given.name, judge, judged_by)
    show(f"Checkpoint: {done}")


def _check_agents(setting: GRPO, traces: Sequence[DebateTrace]) -> None:
    """`ValueError` where the format reward is of other agents or fewer rounds than the run's debates have."""
    if not traces or not setting.format:
        return
    agents, rounds = agents_of(traces), max(turn.round for trace in traces for turn in trace.turns)
    if agents != setting.agents or rounds > setting.rounds:
        raise ValueError(
            f"expected the agents and rounds of the run's debates, {agents} and {rounds}; got "
            f"grpo.agents={setting.agents} and grpo.rounds={setting.rounds}. Pass --set grpo.agents={agents} --set "
            f"grpo.rounds={rounds} --set debate.rounds={rounds}."
        )


def rewarded(problems: list[Problem], preset: Preset) -> list[Problem]:
    """Return the problems of GRPO: those after the debated ones if the preset has some, else the debated ones."""
    fresh = problems[preset.debates : preset.debates + preset.fresh]
    return fresh or problems[: preset.debates]
