"""Answer the test problems by every method, and compare the methods: tables in `evaluation/`.

Methods: Single, Self-consistency (--samples K) and Debate of the untrained model, which is --checkpoint or a server
(--answerer URL MODEL); and every trained checkpoint: the run's SFT and IMAD, or those of --trained NAME=CHECKPOINT. A
finished method is read from disk, and an interrupted one resumes; processes of torchrun share the questions. The tables
have the methods of the call: with --method, these only. Accuracies are means over the preset's decoding seeds. A right
answer to an open question is one that a judge passes (--judge URL MODEL); debates of open questions are not evaluated.
Calls to a server that failed are counted in the tables (exit code 2); the same command asks them again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd

from steerkit.io.files import file_name, sha256
from steerkit.io.json import canonical_json
from steerkit.io.ranks import barrier, in_first_process
from steerkit.io.run_folder import run_folder
from steerkit.io.tables import read_table, write_table
from steerkit.models.kernels import resume_kernels
from training.commands.options import (
    Stages,
    add_cast,
    add_judge,
    add_server,
    add_settings,
    answerer_of,
    cast_from,
    judge_of,
    one_line_errors,
    positive,
    problems_of,
    refuse,
    settings_of,
    stage_parser,
)
from training.debates.answerers import Answerer, LocalModel, Sampling, loaded
from training.debates.debate import answerer_identity
from training.debates.judge import YesNo
from training.debates.personas import Cast
from training.debates.shared import Shared
from training.evaluate.methods import DEBATES, PLURALITIES, Ask, debates, one_answer, self_consistency
from training.evaluate.recorded import Recorded
from training.evaluate.results import write_results
from training.presets import Preset
from training.problems.problem import Problem
from training.toy.worlds import bare
from training.train.checkpoints import started_with

SINGLE, SEVERAL, DEBATE = "Single", "Self-consistency", "Debate"
DECIDED = (*DEBATES, *PLURALITIES)
"""The same debates, decided by a strict majority and by the most frequent answer."""
TRAINED = {"SFT": "sft", "IMAD": "grpo"}
"""Methods whose checkpoints are found in the run -> folder of their stage."""
Work = Callable[[Answerer, Sampling, Path], list[pd.DataFrame]]
"""Answerer, sampling and a folder -> a table for each method that is evaluated together."""


@dataclass(frozen=True)
class Job:
    """Methods that are evaluated together.

    Args:
        methods: their names.
        load: loads what answers.
        work: evaluates them.
        named: the method after which the folder is named and by which a finished one is known; default: the first.
        cast: what determines the prompts of the agents and of single answers; None where no cast is used.
        checkpoint: checkpoint that `load` loads; None for a server. A finished method whose checkpoint is known to be
            the same is read without loading it.
        turn_tokens: longest turn of debates, where it is not that of an answer.
    """

    methods: tuple[str, ...]
    load: Callable[[], Answerer]
    work: Work
    cast: Mapping[str, Any] | None = None
    named: tuple[str, ...] | None = None
    checkpoint: str | Path | None = None
    turn_tokens: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """What is answered, and where its tables are.

    Args:
        problems: the test problems.
        preset: settings of sampling and debates.
        seed: seed of the run; the decoding seeds follow from it.
        folder: folder of the evaluation.
        judge: judge of open questions.
        about: what determines the judge's verdicts.
    """

    problems: Sequence[Problem]
    preset: Preset
    seed: int
    folder: Path
    judge: YesNo | None
    about: Mapping[str, Any] | None

    def one_answer(self, ask: Ask) -> Work:
        """Return how a job asks each problem once; replies of the answerer and of the judge are on disk on arrival."""

        def work(answerer: Answerer, sampling: Sampling, calls: Path) -> list[pd.DataFrame]:
            judge = self.judge
            if judge is not None:
                judge = replace(judge, answerer=Shared(Recorded(judge.answerer, calls / "judge")))
            return [one_answer(self.problems, Shared(Recorded(answerer, calls)), ask, sampling, judge)]

        return work

    def rows(self, job: Job) -> list[pd.DataFrame]:
        """Return the rows of methods that are evaluated together, with their names and decoding seeds."""
        named = job.named or job.methods
        place = self.folder / file_name(named[0])
        seeds = self.preset.decoding_seeds(self.seed)
        paths = [[place / f"{file_name(method)}-{n}.parquet" for method in job.methods] for n in range(len(seeds))]
        config = {
            "problems": sha256(canonical_json([asdict(problem) for problem in self.problems])),
            "preset": {name: asdict(getattr(self.preset, name)) for name in ("sampling", "debate")},
            "seed": self.seed,
            "methods": list(named),
            "judge": self.about,
            "cast": job.cast,
            "turn_tokens": job.turn_tokens,
        }
        known = job.checkpoint is not None and self.preset.dtype is None and all(map(self._finished, paths))
        if not (known and started_with(place, config, "answerer", str(job.checkpoint))):
            self._answer(job, config, place, dict(zip(seeds, paths, strict=True)))
        family = {problem.id: problem.family.partition("/")[0] for problem in self.problems}
        found = []
        for number, some in enumerate(paths):
            for method, path in zip(job.methods, some, strict=True):
                table = read_table(path)[0]
                found.append(table.assign(method=method, sample=number, family=table["id"].map(family)))
        return found

    def _answer(self, job: Job, config: Mapping[str, Any], place: Path, paths: Mapping[int, Sequence[Path]]) -> None:
        """Write the tables of a job that are not finished; `paths` has those of each decoding seed."""
        answerer = job.load()
        if isinstance(answerer, LocalModel):
            resume_kernels(answerer.model, place)
        config = {**config, "answerer": answerer_identity(answerer.about())}
        with run_folder(place, config) as folder:
            for number, (seed, some) in enumerate(paths.items()):
                finished = self._finished(some)
                barrier()  # all processes have looked before the first one writes
                if not finished:
                    sampling = replace(self.preset.sampling, seed=seed)
                    tables = job.work(answerer, sampling, folder / f"calls-{number}")
                    in_first_process(partial(_write, some, tables, config))

    def _finished(self, paths: Sequence[Path]) -> bool:
        """Whether all tables are there, without a failed call, and with a verdict on each answer to an open question.

        Of a method that is not finished, replies and verdicts on disk are not asked for again.
        """
        if not all(path.is_file() for path in paths):
            return False
        tables = [read_table(path)[0] for path in paths]
        opened = [problem.id for problem in self.problems if problem.kind == "open"]
        return not any(
            table.get("failed", pd.Series(0)).any() or (~table["parsed"] & table["id"].isin(opened)).any()
            for table in tables
        )


def _write(paths: Sequence[Path], tables: Sequence[pd.DataFrame], config: Mapping[str, Any]) -> None:
    for path, table in zip(paths, tables, strict=True):
        write_table(path, table, dict(config))


def main(arguments: list[str] | None = None) -> None:
    parser = stage_parser("evaluate", __doc__)
    add_settings(parser)
    parser.add_argument("--problems", metavar="FILE", help="problems (default: the test problems of the run)")
    parser.add_argument("--checkpoint", help="untrained model: hub id, folder or GGUF file (default: the preset's)")
    add_server(parser, "answerer", "is the untrained model")
    parser.add_argument(
        "--trained", action="append", default=[], metavar="NAME=CHECKPOINT", help="a trained checkpoint, instead"
    )
    parser.add_argument("--method", action="append", default=[], metavar="NAME", help="evaluate this method only")
    parser.add_argument(
        "--samples", type=positive, action="append", default=[], help="also self-consistency of K answers"
    )
    add_cast(parser)
    add_judge(parser, "judges answers to open questions")
    given = parser.parse_args(arguments)
    with one_line_errors("evaluate"):
        preset = settings_of(given)
        problems = problems_of(given, "test")
        judge = judge_of(given, problems)
        about = None if judge is None else judge.about()
        folder = Stages(given.run).folder / "evaluation"
        evaluation = Evaluation(problems, preset, given.seed, folder, judge, about)
        cast = cast_from(given, preset, Stages(given.run).learned)
        rows = evaluate(evaluation, given, cast)
        methods = list(dict.fromkeys(rows["method"]))
        of_interest = "IMAD" if "IMAD" in methods else methods[-1]
        meta = {"seed": given.seed, "judge": about}
        table = in_first_process(lambda: write_results(folder, rows, of_interest, meta))
    if table is None:
        return
    print(table.round(3).to_string(index=False))
    print(f"Tables in {folder}: results.csv, results.md, results.tex, differences.csv, questions.parquet.")
    lacking = table[(table["failed"] > 0) & ~table["method"].isin(trained_checkpoints(given))]
    if given.answerer is not None and len(lacking):
        counts = ", ".join(f"{row.failed} of {row.method}" for row in lacking.itertuples())
        refuse(
            "evaluate",
            f"expected a reply to every call; got failed ones: {counts}. In the tables they are no answers. Run the "
            "same command to ask these calls again.",
        )


def evaluate(evaluation: Evaluation, given: argparse.Namespace, cast: Cast) -> pd.DataFrame:
    """Return one row per method, decoding seed and problem.

    Raises:
        ValueError: an unknown method, or no method.
    """
    problems, preset = evaluation.problems, evaluation.preset
    checkpoints = trained_checkpoints(given)
    untrained = cache(partial(answerer_of, given, preset))
    checkpoint = None if given.answerer is not None else given.checkpoint or preset.checkpoint
    by_cast = {"name": cast.name, "personas": [asdict(persona) for persona in cast.personas]}
    jobs: dict[str, Job] = {}
    samples = sorted(set(given.samples))

    def several(answerer: Answerer, sampling: Sampling, calls: Path) -> list[pd.DataFrame]:
        return self_consistency(problems, Shared(Recorded(answerer, calls)), cast.plain, sampling, samples)

    def debate(answerer: Answerer, sampling: Sampling, calls: Path) -> list[pd.DataFrame]:
        tables = debates(problems, answerer, cast, preset.test_debates(sampling), calls, shared=True)
        return [tables[method] for method in DECIDED]

    jobs[SINGLE] = Job((SINGLE,), untrained, evaluation.one_answer(cast.plain), by_cast, checkpoint=checkpoint)
    if not any(problem.kind == "open" for problem in problems):
        if samples:
            names = tuple(f"Self-consistency of {k}" for k in samples)
            of_largest = names[-1:]  # the others are of its answers
            jobs[SEVERAL] = Job(names, untrained, several, by_cast, of_largest, checkpoint)
        jobs[DEBATE] = Job(DECIDED, untrained, debate, by_cast, None, checkpoint, preset.turn_tokens)
    for name, path in checkpoints.items():
        load = partial(_local, path, preset.dtype)
        jobs[name] = Job((name,), load, evaluation.one_answer(bare), checkpoint=path)
    if unknown := [method for method in given.method if method not in jobs]:
        raise ValueError(f"expected methods among {list(jobs)}; got {unknown}. Pass one of these.")
    parts = []
    chosen = dict.fromkeys(given.method or jobs)
    for name in sorted(chosen, key=lambda name: name in checkpoints):
        if name in checkpoints:
            untrained.cache_clear()  # one model at a time is in memory
        parts += evaluation.rows(jobs[name])
    decoding = "greedy" if preset.sampling.temperature == 0 else "sampled"
    return pd.concat(parts, ignore_index=True).assign(decoding=decoding, seed=given.seed)


def trained_checkpoints(given: argparse.Namespace) -> dict[str, str]:
    """Return the trained checkpoints: those of the options, else those that the stages of the run have written.

    Raises:
        ValueError: an option that is not NAME=CHECKPOINT, or a name of another method.
    """
    named: dict[str, str] = {}
    for text in given.trained:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ValueError(
                f"expected --trained NAME=CHECKPOINT; got {text!r}. Pass e.g. IMAD=runs/mine/grpo/checkpoint."
            )
        others = {file_name(other) for other in (SINGLE, *DECIDED, *named)}
        if file_name(name) in others or name.startswith(SEVERAL):
            raise ValueError(f"expected --trained with a name that no other method has; got {name!r}. Pass another.")
        named[name] = path
    stages = Stages(given.run)
    return named or {name: str(stages.checkpoint(f)) for name, f in TRAINED.items() if stages.checkpoint(f).exists()}


def _local(path: str, dtype: str | None) -> LocalModel:
    return LocalModel(*loaded(path, dtype=dtype))
