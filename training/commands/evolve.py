"""Train a checkpoint on the majority answers of its own debates, round by round: the baseline Debate, Train, Evolve.

No right answer is used in training, and no debate is learned: the model writes single answers. Each round debates the
problems by the last checkpoint and trains that one by GRPO, whose reward is 1 for the majority answer. A round that
gains less than one point on held-out problems is the last. The checkpoint must answer `Problem: ...` in a box, as after
`sft --set sft.target=first`. Files: `evolve/round-1/grpo/checkpoint`, ..., `evolve/evolve.json`.
"""

from __future__ import annotations

import random
from dataclasses import replace

from steerkit.io.json import read_json
from training.commands.options import (
    Stages,
    add_cast,
    add_settings,
    cast_from,
    checkpoint_of,
    one_line_errors,
    positive,
    problems_of,
    report_used,
    settings_of,
    show,
    stage_parser,
)
from training.debates.answerers import LocalModel, loaded
from training.train.distributed import process_count


def main(arguments: list[str] | None = None) -> None:
    from training.train.evolve import HELD, LOG, Evolve, evolve
    from training.train.grpo import check_division, check_rollouts

    parser = stage_parser("evolve", __doc__)
    add_settings(parser)
    parser.add_argument("--problems", metavar="FILE", help="problems (default: those of the stage problems)")
    parser.add_argument("--checkpoint", help="model that debates and is trained (default: the preset's)")
    add_cast(parser)
    parser.add_argument("--rounds", type=positive, default=3, help="rounds at most (default: 3)")
    parser.add_argument(
        "--held",
        type=positive,
        default=HELD,
        help=f"problems on which rounds are measured, drawn (default: {HELD})",
    )
    parser.add_argument("--name", default="evolve", help="folder of this stage in the run (default: evolve)")
    given = parser.parse_args(arguments)
    out = Stages(given.run).folder / given.name
    with one_line_errors("evolve"):
        preset = settings_of(given)
        check_rollouts(preset.grpo)
        check_division(preset.grpo, process_count())
        every = problems_of(given, "train")
        if len(every) <= given.held or any(problem.kind == "open" for problem in every):
            raise ValueError(
                f"expected more than {given.held} problems with right answers; got {len(every)}, "
                f"{sum(problem.kind == 'open' for problem in every)} of them open. Pass more, or a smaller --held."
            )
        drawn = random.Random(given.seed).sample(every, len(every))  # a file may have one task after the other
        held, rest = drawn[: given.held], drawn[given.held :]
        problems = rest[: preset.debates]
        report_used(problems, rest, "--set debates=N")
        cast = cast_from(given, preset)
        debate = replace(preset.debate, sampling=replace(preset.debate.sampling, seed=given.seed))
        setting = Evolve.sharing(replace(preset.grpo, seed=given.seed), len(problems), given.rounds)
        best = evolve(
            checkpoint_of(given, preset),
            problems,
            held,
            cast,
            debate,
            setting,
            out,
            load=lambda checkpoint: LocalModel(*loaded(checkpoint, dtype=preset.dtype)),
        )
    start, *rounds = read_json(out / LOG)
    show(f"Start: accuracy {start['accuracy']:.3f} on {len(held)} held-out problems.")
    for row in rounds:
        show(
            f"Round {row['round']}: {row['labels']} problems with a majority, {row['steps']} steps, accuracy "
            f"{row['accuracy']:.3f}."
        )
    show(f"Checkpoint: {best}")
