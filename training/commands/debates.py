"""Run debates on the training problems, and keep the traces with a consensus: `debates/traces.jsonl`.

The agents are a model in this process (--checkpoint) or a server's (--answerer URL MODEL): vLLM, llama.cpp,
transformers serve, or a hosted API; the key is read from the environment variable OPENAI_API_KEY. The same command
resumes, also with the same model at another address. Processes of torchrun share the problems. An open question needs a
moderator, by default the agents' model.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from training.commands.options import (
    Stages,
    add_cast,
    add_server,
    add_settings,
    answerer_of,
    cast_from,
    one_line_errors,
    problems_of,
    report_used,
    server_of,
    settings_of,
    show,
    stage_parser,
)
from training.debates.debate import run_debates


def main(arguments: list[str] | None = None) -> None:
    parser = stage_parser("debates", __doc__)
    add_settings(parser)
    parser.add_argument("--problems", metavar="FILE", help="problems (default: those of the stage problems)")
    parser.add_argument("--checkpoint", help="hub id, folder or GGUF file of the agents' model (default: the preset's)")
    add_server(parser, "answerer", "plays all agents, a teacher")
    add_server(parser, "moderator", "says whether the answers to an open question agree")
    add_cast(parser)
    given = parser.parse_args(arguments)
    stages = Stages(given.run)
    with one_line_errors("debates"):
        preset = settings_of(given)
        every = problems_of(given, "train")
        problems = every[: preset.debates]
        report_used(problems, every, "--set debates=N")
        cast = cast_from(given, preset)
        setting = replace(preset.debate, sampling=replace(preset.debate.sampling, seed=given.seed))
        answerer = answerer_of(given, preset)
        moderator = server_of(given, "moderator")
        debates = run_debates(problems, answerer, cast, setting, stages.debates, shared=True, moderator=moderator)
    reasons = Counter(debate.no_trace for debate in debates if debate.no_trace)
    kept = len(debates) - reasons.total()
    right = sum(debate.correct for debate in debates)
    show(f"{kept} of {len(debates)} debates kept in {stages.traces}; {right} have the right majority.")
    for reason, count in reasons.most_common(3):
        show(f"  left out, {count}: {reason}")
    if not kept:
        raise SystemExit(1)
