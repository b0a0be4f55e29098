"""`python -m training.imad PRESET`: base model, debates, SFT, GRPO, baselines, controls and evaluation; resumable."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import AutoTokenizer

from steerkit.io.files import sha256
from steerkit.io.ranks import barrier, in_first_process
from steerkit.io.run_folder import CONFIG, check_config
from steerkit.io.signals import restore_interrupt
from steerkit.io.tables import read_table, write_table
from steerkit.io.versions import versions
from steerkit.models.hub import offline_options
from steerkit.text.tags import tags
from steerkit.text.traces import DebateTrace, read_traces
from training.commands.options import one_line_errors, refuse, show
from training.debates.answerers import Answerer, LocalModel, Sampling, loaded, one_at_a_time
from training.debates.debate import TRACES, Setting, run_debates
from training.debates.personas import Cast, cast_of, self_checking
from training.debates.shared import Shared
from training.devices import DEVICES, Device, this_device
from training.estimate import FINE_TUNED, estimate, shape_of
from training.evaluate.methods import DEBATES, PLURALITIES, Ask, debates, one_answer, self_consistency
from training.evaluate.recorded import Recorded
from training.evaluate.results import write_results
from training.memory import KEPT
from training.presets import EVOLVED, ON_ANSWERS, SELF_CHECKED, Preset, get_preset, preset_names
from training.problems.families import FAMILIES, drawn_once, questions_of_seed
from training.problems.problem import Kinds, Problem
from training.toy.base_model import train_base
from training.toy.worlds import WORLDS, bare
from training.train.checkpoints import check_batch, weights_on_disk, with_tags
from training.train.controls import gold_answers, right_answers, with_equal_tokens, with_foreign_turns
from training.train.distributed import process_count
from training.train.evolve import HELD, Evolve, evolve
from training.train.grpo import GRPO, check_clip, check_division, check_rollouts, finished_grpo, train_grpo
from training.train.sft import SFT, finished_sft, short_finished, tags_of, train_sft

SELF_CHECKING = ("Self-checking agents", "Self-checking agents, plurality")
RIGHT_ANSWERS = "right-answers.jsonl"
SELF_CHECKS = "self-checks"


@dataclass(frozen=True)
class Run:
    """A preset with a seed and a folder.

    Args:
        preset: all settings.
        seed: seed of the problems, the sampling and the training.
        folder: run folder.
    """

    preset: Preset
    seed: int
    folder: Path

    @property
    def is_toy(self) -> bool:
        """Whether the run starts from a toy base model that it trains itself."""
        return self.preset.checkpoint is None

    @property
    def family(self) -> str:
        """The family of problems; a toy world has the name of its recipe, and a family of another name."""
        return WORLDS[self.preset.family].family if self.is_toy else self.preset.family

    def problems(self, n: int, split: str) -> list[Problem]:
        """Return `n` problems of a split: train, validation or test."""
        return list(drawn_once(FAMILIES[self.family], n, self.seed, split))

    @property
    def debate_problems(self) -> list[Problem]:
        """Problems of the training debates."""
        return self.problems(self.preset.debates, "train")

    @property
    def grpo_problems(self) -> list[Problem]:
        """Problems of GRPO: problems without a debate, or the debated ones if the preset has none."""
        fresh = self.preset.fresh
        return self.problems(self.preset.debates + fresh, "train")[-fresh:] if fresh else self.debate_problems

    @property
    def test_problems(self) -> list[Problem]:
        """Test questions of all methods; see `training.problems.families.questions_of_seed`."""
        return questions_of_seed(self.family, self.preset.test, self.seed)

    @property
    def cast(self) -> Cast:
        """The agents of the debates."""
        return WORLDS[self.preset.family].cast() if self.is_toy else cast_of(self.preset.cast)

    def load_answerer(self, checkpoint: str | Path) -> LocalModel:
        """Load a model that debates or is evaluated."""
        return LocalModel(*loaded(checkpoint, dtype=self.preset.dtype))

    def sampling(self, temperature: float | None = None) -> Sampling:
        """Return the evaluation's sampling with the run's seed, at the preset's temperature or another."""
        sampling = replace(self.preset.sampling, seed=self.seed)
        return sampling if temperature is None else replace(sampling, temperature=temperature)

    def debate_setting(self, sampling: Sampling) -> Setting:
        """Return the settings of debates with this sampling."""
        return replace(self.preset.debate, sampling=sampling)


def base_checkpoint(run: Run) -> str | Path:
    """Return the checkpoint that the run starts from; a toy base model is trained first if necessary.

    An existing checkpoint is not locked, so that several processes can train from it.
    """
    if run.preset.checkpoint == "smollm2":
        from steerkit.demo.checkpoint import default_checkpoint

        return default_checkpoint()
    if run.preset.checkpoint is not None:
        return run.preset.checkpoint
    if (checkpoint := run.folder / "base" / "checkpoint").exists():
        return checkpoint
    return train_base(WORLDS[run.preset.family], replace(run.preset.base, seed=run.seed), run.folder / "base")


def collect_debates(run: Run, base: str | Path, cast: Cast, name: str = "debates") -> list[DebateTrace]:
    """Run the base model's debates on the training problems, and return the traces with a consensus.

    Args:
        run: the run.
        base: checkpoint of the debating model.
        cast: the agents.
        name: subfolder of the run folder. Existing traces there are read without a lock.
    """
    path = run.folder / name / TRACES
    if not path.exists():
        setting = run.debate_setting(replace(run.preset.debate.sampling, seed=run.seed))
        run_debates(run.debate_problems, run.load_answerer(base), cast, setting, run.folder / name, shared=True)
    return read_traces(path)


def ask_single(run: Run) -> Ask:
    """Return how the base is asked for a single answer: a plain prompt, without an agent's character.

    A checkpoint whose agents have worked examples needs them to answer in a box; it gets those of the first agent.
    """
    if run.is_toy:
        return bare
    return run.cast.plain


def self_checks(run: Run, base: str | Path) -> list[DebateTrace]:
    """The kept traces of one agent that checks its own answer, from disk if they are there."""
    cast = self_checking(Cast(f"{run.cast.name}-one", run.cast.personas[:1], run.cast.ask))
    return collect_debates(run, base, cast, SELF_CHECKS)


def _singles(run: Run, base: str | Path) -> list[DebateTrace]:
    """Right single answers of the base, from disk if they are there."""
    sampling = replace(run.preset.debate.sampling, seed=run.seed)
    file = run.folder / RIGHT_ANSWERS

    def write() -> None:
        if not file.exists():
            right_answers(run.debate_problems, run.load_answerer(base), ask_single(run), sampling, 4, file)

    in_first_process(write)
    return read_traces(file)


def _tokenizer(checkpoint: str | Path) -> Any:
    """The tokenizer of a checkpoint; the model is loaded only where its weights cannot be compared without that."""
    if weights_on_disk(checkpoint) is None:
        return loaded(checkpoint)[1]
    return AutoTokenizer.from_pretrained(checkpoint, **offline_options(str(checkpoint)))


def _fine_tuned(
    base: str | Path,
    traces: Sequence[DebateTrace],
    setting: SFT,
    out: Path,
    kind: Kinds,
    cut_like: Sequence[DebateTrace] | None = None,
) -> Path:
    """`train_sft`; the model is not loaded where the training is finished."""
    done = finished_sft(base, traces, setting, out, kind, cut_like)
    return done or train_sft(*loaded(base), traces, setting, out, kind, cut_like)


def _reinforced(start: str | Path, problems: Sequence[Problem], setting: GRPO, out: Path) -> Path:
    """`train_grpo`; the model is not loaded where the training is finished."""
    return finished_grpo(start, problems, setting, out) or train_grpo(*loaded(start), problems, setting, out)


def recipes(run: Run, base: str | Path) -> dict[str, Callable[[], Path]]:
    """Return a function per trained method that trains its checkpoint, or returns the finished one.

    Args:
        run: the run; its preset selects the methods.
        base: checkpoint to start from.

    Returns:
        Method -> function that returns the checkpoint's folder.
    """
    problems = run.grpo_problems
    kind = {problem.question: problem.kind for problem in (*run.debate_problems, *problems)}
    sft: SFT = replace(run.preset.sft, seed=run.seed)
    grpo: GRPO = replace(run.preset.grpo, seed=run.seed)
    traces = collect_debates(run, base, run.cast)

    def rate(method: str) -> float:
        return run.preset.rates.get(method, sft.learning_rate)

    def fine_tuned(
        name: str, debates: Callable[[], list[DebateTrace]] = lambda: traces, **fields: Any
    ) -> Callable[[], Path]:
        setting = replace(sft, **fields)
        return lambda: _fine_tuned(base, debates(), setting, run.folder / name, kind)

    def matched(
        name: str,
        method: str,
        debates: Callable[[], list[DebateTrace]],
        cut_like: Sequence[DebateTrace] | None = None,
        **fields: Any,
    ) -> Callable[[], Path]:
        """SFT of a control, with as many steps and target tokens as SFT on the traces."""

        def work() -> Path:
            setting = replace(sft, learning_rate=rate(method), **fields)
            tagged = with_tags(_tokenizer(base), tags_of(traces))
            setting = with_equal_tokens(sft, traces, setting, debates(), tagged, kind, cut_like)
            return _fine_tuned(base, debates(), setting, run.folder / name, kind, cut_like)

        return work

    def shuffled() -> list[DebateTrace]:
        return with_foreign_turns(traces, run.seed)

    def golds() -> list[DebateTrace]:
        return gold_answers([*run.debate_problems, *(problems if run.preset.fresh else ())])

    def reinforced(name: str, start: Callable[[], str | Path], **fields: Any) -> Callable[[], Path]:
        setting = replace(grpo, **fields)
        return lambda: _reinforced(start(), problems, setting, run.folder / name)

    def on_debates() -> Path:
        out = run.folder / "sft"
        if (done := finished_sft(base, traces, sft, out, kind)) is not None:
            return done
        model, tokenizer = loaded(base)
        tagged = with_tags(tokenizer, tags_of(traces))
        check_clip(short_finished(tagged, traces, sft, kind), grpo)
        return train_sft(model, tokenizer, traces, sft, out, kind)

    def evolved() -> Path:
        """Rounds share the steps of one GRPO training: no method with GRPO has more."""
        setting = Evolve.sharing(grpo, len(problems))
        debate = run.debate_setting(replace(run.preset.debate.sampling, seed=run.seed))
        held, first = run.problems(HELD, "validation"), run.folder / "debates"
        start = grpo_start()
        own = first if start == base else None
        return evolve(
            start, run.debate_problems, held, run.cast, debate, setting, run.folder / "evolve", own, run.load_answerer
        )

    on_self_checks = fine_tuned("sft-self-check", lambda: self_checks(run, base), learning_rate=rate(SELF_CHECKED))
    on_answers = fine_tuned("debategpt-answer", target="answer", learning_rate=rate(ON_ANSWERS))
    on_first_answers = fine_tuned("sft-first", target="first")
    of_one_agent = tuple(tag for tag in grpo.kept if tag in tags(1, grpo.rounds))
    # A chat checkpoint has to learn to box its answers first. The toy base model already does.
    grpo_start = (lambda: base) if run.is_toy else on_first_answers
    methods = {
        "SFT": on_debates,
        "IMAD": reinforced("grpo", on_debates),
        "SFT without tags": fine_tuned("sft-untagged", target="untagged"),
        "SFT on single turns": fine_tuned("sft-turns", structure_dropout=1.0, cut_to="turn"),
        "DebateGPT (answer)": on_answers,
        "DebateGPT (response)": fine_tuned("debategpt-response", target="response"),
        "SFT on first answers": on_first_answers,
        "GRPO without debate": reinforced("grpo-alone", grpo_start, format=False),
        "SFT on shuffled turns": matched("sft-shuffled", "SFT on shuffled turns", shuffled, traces),
        "SFT on gold answers": matched("sft-gold", "SFT on gold answers", golds, target="gold"),
        "SFT on right answers": matched(
            "sft-right", "SFT on right answers", partial(_singles, run, base), target="first"
        ),
        "DebateGPT + GRPO": reinforced(
            "grpo-debategpt",
            matched("debategpt-matched", "DebateGPT + GRPO", lambda: traces, target="answer"),
            format=False,
        ),
        ON_ANSWERS: reinforced("grpo-debategpt-answer", on_answers, format=False),
        EVOLVED: evolved,
        "SFT of one self-check": on_self_checks,
        SELF_CHECKED: reinforced("grpo-self-check", on_self_checks, agents=1, kept=of_one_agent),
    }
    return {method: methods[method] for method in run.preset.trained}


def evaluate(run: Run, base: str | Path, checkpoints: Mapping[str, Path]) -> pd.DataFrame:
    """Evaluate every method on the same test questions, sampled and greedy; finished methods are read from disk.

    Processes started by torchrun share the questions; each makes this call.

    Args:
        run: the run.
        base: checkpoint of the untrained methods.
        checkpoints: trained method -> checkpoint.

    Returns:
        One row per method, decoding, decoding seed and question, with the columns of
        `training.evaluate.methods.one_answer` and `method`, `decoding`, `seed`, `family`.
    """
    seeds = run.preset.decoding_seeds(run.seed)
    samplings = {f"sampled-{i}" if i else "sampled": replace(run.sampling(), seed=seed) for i, seed in enumerate(seeds)}
    samplings["greedy"] = run.sampling(temperature=0.0)
    stored = _Stored(run, one_at_a_time(run.load_answerer), cache(weights_on_disk))
    tables: dict[str, dict[str, pd.DataFrame]] = {decoding: {} for decoding in samplings}
    for decoding, sampling in samplings.items():
        tables[decoding] |= _of_base(stored, base, decoding, sampling)
    for method, checkpoint in checkpoints.items():  # one model after the other is in memory
        for decoding, sampling in samplings.items():
            tables[decoding] |= stored.answers(method, checkpoint, bare, decoding, sampling)
    for decoding, sampling in samplings.items():
        if run.preset.controls and sampling.temperature > 0:  # greedy samples are all equal
            tables[decoding] |= _of_several(stored, base, decoding, sampling, tables[decoding])
    parts = []
    for decoding, found in tables.items():
        about = {"decoding": decoding.partition("-")[0], "seed": run.seed, "family": run.preset.family}
        parts += [rows.assign(method=method, **about) for method, rows in found.items()]
    return pd.concat(parts, ignore_index=True)


def _debate_test_questions(run: Run, base: str | Path) -> None:
    folder = run.folder / "evaluation" / "sampled" / "debates"
    if not (folder / TRACES).exists():
        setting = run.preset.test_debates(run.sampling())
        debates(run.test_problems, run.load_answerer(base), run.cast, setting, folder, shared=True)


@dataclass(frozen=True)
class _Stored:
    """Tables of evaluated methods, and the replies from which they are made, in `evaluation/` of a run.

    Args:
        run: the run.
        load: loads a checkpoint.
        weights: returns the fingerprint of a checkpoint, see `weights_on_disk`.
    """

    run: Run
    load: Callable[[str | Path], LocalModel]
    weights: Callable[[str | Path], str | None]

    def tables(
        self,
        methods: Sequence[str],
        checkpoint: str | Path,
        decoding: str,
        sampling: Sampling,
        work: Callable[[Answerer, Path], list[pd.DataFrame]],
        **about: Any,
    ) -> dict[str, pd.DataFrame]:
        """Return the tables of methods that are evaluated together.

        They are read from disk, or made and written. Those of another checkpoint, or of other numbers of samples, are
        made again, with a line that says so. Tables of earlier versions name neither, and are accepted.

        Args:
            methods: names of the methods.
            checkpoint: checkpoint that answers.
            decoding: name of the decoding, a folder in `evaluation/`.
            sampling: its sampling.
            work: makes the tables, from an answerer and a folder of its replies.
            about: what else determines the tables.
        """
        folder = self.run.folder / "evaluation" / decoding
        paths = {method: folder / f"{sha256(method)[:8]}.parquet" for method in methods}
        meta = {"checkpoint": self.weights(checkpoint), **about}
        found = {method: read_table(path) for method, path in paths.items() if path.exists()}
        others = [method for method, (_, of) in found.items() if _other(of, meta)]
        barrier()  # all processes have looked before the first one writes
        if others:
            show(
                f"Evaluating again, since the tables are of another checkpoint or number of samples: "
                f"{', '.join(others)} ({decoding})."
            )
        elif len(found) == len(paths):
            return {method: table for method, (table, _) in found.items()}
        calls = folder / f"{sha256(methods[0])[:8]}-{meta['checkpoint'] or 'calls'}"
        made = dict(zip(methods, work(self.load(checkpoint), calls), strict=True))

        def write() -> None:
            for method, table in made.items():
                write_table(paths[method], table, {"method": method, "sampling": asdict(sampling), **meta})

        in_first_process(write)
        return {method: read_table(path)[0] for method, path in paths.items()}

    def answers(
        self, method: str, checkpoint: str | Path, ask: Ask, decoding: str, sampling: Sampling
    ) -> dict[str, pd.DataFrame]:
        """Return the table of a method with one answer to each test question."""

        def work(answerer: Answerer, calls: Path) -> list[pd.DataFrame]:
            return [one_answer(self.run.test_problems, Shared(Recorded(answerer, calls)), ask, sampling)]

        return self.tables((method,), checkpoint, decoding, sampling, work)


def _other(stored: Mapping[str, Any], meta: Mapping[str, Any]) -> bool:
    """Whether the metadata of a table has another value; what one of both does not have is no difference."""
    return any(None not in (value, stored.get(name)) and stored[name] != value for name, value in meta.items())


def _of_base(stored: _Stored, base: str | Path, decoding: str, sampling: Sampling) -> dict[str, pd.DataFrame]:
    """The tables of single answers and debates of the base model."""
    run = stored.run

    def debated(cast: Cast, name: str, methods: Sequence[str], decided: Sequence[str]) -> dict[str, pd.DataFrame]:
        folder, setting = run.folder / "evaluation" / decoding / name, run.preset.test_debates(sampling)

        def work(answerer: Answerer, _: Path) -> list[pd.DataFrame]:
            found = debates(run.test_problems, answerer, cast, setting, folder, shared=True)
            return [found[rule] for rule in decided]

        return stored.tables(methods, base, decoding, sampling, work)

    both = (*DEBATES, *PLURALITIES)
    tables = stored.answers("Single", base, ask_single(run), decoding, sampling)
    tables |= debated(run.cast, "debates", both, both)
    if run.preset.self_check:
        last = (DEBATES[0], PLURALITIES[0])
        tables |= debated(self_checking(run.cast), SELF_CHECKS, SELF_CHECKING, last)
    return tables


def _of_several(
    stored: _Stored,
    base: str | Path,
    decoding: str,
    sampling: Sampling,
    tables: Mapping[str, pd.DataFrame],
) -> dict[str, pd.DataFrame]:
    """The tables of self-consistency, with three answers and with about as many tokens as other methods."""
    run = stored.run
    samples = {"Self-consistency of 3": 3}
    for method in ("IMAD", "Debate"):
        ratio = _mean_tokens(tables[method]) / _mean_tokens(tables["Single"])
        samples[f"Self-consistency at {method}'s tokens"] = max(1, round(ratio))
    counts = list(samples.values())

    def work(answerer: Answerer, calls: Path) -> list[pd.DataFrame]:
        asked = Shared(Recorded(answerer, calls))
        return self_consistency(run.test_problems, asked, ask_single(run), sampling, counts)

    return stored.tables(tuple(samples), base, decoding, sampling, work, samples=counts)


def _mean_tokens(rows: pd.DataFrame) -> float:
    return float((rows["tokens_in"] + rows["tokens_out"]).mean())


def run_all(run: Run, only: Sequence[str] = ()) -> pd.DataFrame | None:
    """Run all stages; a stage whose output exists is skipped.

    Processes started by torchrun train together, and share debates and test questions. The first process writes.

    Args:
        run: the run.
        only: train these methods and evaluate nothing, so that several processes can share a run. `Debate` runs the
            training debates and the sampled test debates; afterwards the other methods can run in parallel.

    Returns:
        The results table in the first process. None in the others, and with `only`.

    Raises:
        ValueError: a method that this preset does not train, settings with which so many processes cannot train, or
            more questions than the family has; nothing is written then.

    Example:
        >>> run_all(Run(get_preset("tiny", "clues"), seed=0, folder=Path("runs/imad-tiny/clues/seed-0")))
    """
    _check_methods(run.preset, only)
    if not (run.folder / CONFIG).exists():
        _check_problems(run)
    run.folder.mkdir(parents=True, exist_ok=True)
    preset = {**asdict(run.preset), "seed": run.seed}
    check_config(run.folder, preset, run.preset.free)
    in_first_process(lambda: base_checkpoint(run))
    base = base_checkpoint(run)
    trained = recipes(run, base)
    if only:
        work = {DEBATES[0]: lambda: _debate_test_questions(run, base), **trained}
        for method in only:
            work[method]()
        return None
    checkpoints = {method: recipe() for method, recipe in trained.items()}
    rows = evaluate(run, base, checkpoints)

    def write() -> pd.DataFrame:
        kept = len(read_traces(run.folder / "debates" / TRACES))
        meta = {"preset": preset, "kept_traces": kept, "versions": versions()}
        return write_results(run.folder, rows, "IMAD", meta)

    return in_first_process(write)


def _check_methods(preset: Preset, only: Sequence[str]) -> None:
    """`ValueError` for a method that the preset does not train, or a batch that the processes cannot share."""
    known = (DEBATES[0], *preset.trained)
    if unknown := [method for method in only if method not in known]:
        raise ValueError(f"expected methods among {list(known)}; got {unknown}. Pass one of these.")
    trained = set(only or preset.trained) - {DEBATES[0]}
    if trained:
        check_batch("sft.batch", preset.sft.batch, preset.sft.micro_batch, process_count())
    if trained - FINE_TUNED.keys():
        check_rollouts(preset.grpo)
        check_division(preset.grpo, process_count())


def _check_problems(run: Run) -> None:
    """`TooFewProblems` before anything is trained, where the family has too few for one of the stages."""
    _ = run.debate_problems, run.grpo_problems, run.test_problems


def _hide_library_progress() -> None:
    """Hide the progress bars of datasets and transformers; each stage reports its own progress."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.imad", description=__doc__)
    parser.add_argument("preset", choices=preset_names(), help="settings of the run, see training/presets.py")
    parser.add_argument("--family", help="family of problems; tiny has one recipe per family")
    parser.add_argument("--seed", type=int, default=0, help="seed of problems, sampling and training (default: 0)")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/imad-PRESET/FAMILY/seed-SEED)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a setting, e.g. grpo.steps=60"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="METHOD", help="train this method only, without evaluation"
    )
    parser.add_argument("--dry-run", action="store_true", help="print estimated tokens, memory and hours, then exit")
    parser.add_argument("--device", choices=DEVICES, help="of --dry-run (default: this machine, measured)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of --dry-run (default: the device's memory)")
    return parser


def dry_run(preset: Preset, device: Device, memory: float | None) -> str:
    """Return the estimate of a run as text, with the setting to change for each stage that does not fit.

    Args:
        preset: the run.
        device: where it runs.
        memory: GiB of the device; default: its own.

    Example:
        >>> print(dry_run(get_preset("qwen2.5-7b"), DEVICES["a100"], memory=40))
    """
    shape = shape_of(preset)
    table = estimate(preset, shape, device, memory)
    limit = device.memory_gib if memory is None else memory
    where = f"{device.name}, {limit:g} GiB" if limit else device.name
    lines = [
        f"{preset.name}: {shape.parameters:,} parameters, {shape.layers} layers, d_model {shape.width}. Estimate for "
        f"one device ({where}):",
        table.drop(columns="change").round(2).to_string(index=False),
        f"All stages: {table['tokens'].sum():,} tokens, {table['hours'].sum():.1f} hours, at most "
        f"{table['memory_gib'].max():.1f} GiB.",
    ]
    if device.on_cpu:
        lines.append(
            f"This is the memory in use. A process also keeps freed memory for its next step: up to {KEPT} times as "
            "much (benchmarks/TRAINING_MEMORY.md)."
        )
    for change, rows in table[table["change"] != ""].groupby("change", sort=False):
        needs = ", ".join(f"{row.stage} ({row.memory_gib:.1f} GiB)" for row in rows.itertuples())
        lines.append(f"Above {limit:g} GiB: {needs}. Pass {change}.")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line: run a preset, or print its estimate.

    Args:
        arguments: command-line arguments; default: those of the process.
    """
    restore_interrupt()
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        preset = get_preset(options.preset, options.family, options.set)
    except ValueError as error:
        parser.error(str(error))
    if options.dry_run:
        device = DEVICES[options.device] if options.device else this_device()
        try:
            print(dry_run(preset, device, options.memory))
        except (ValueError, OSError) as error:
            refuse("imad", error)
        return
    if options.device or options.memory is not None:
        parser.error("expected --device and --memory with --dry-run only. Leave them out, or add --dry-run.")
    out = options.out or Path("runs") / f"imad-{preset.name}" / preset.family / f"seed-{options.seed}"
    _hide_library_progress()
    with one_line_errors("imad"):
        table = run_all(Run(preset, options.seed, out), options.only)
    if table is None:
        return
    print(table.round(3).to_string(index=False))
    print(f"Tables in {out}: results.csv, results.md, results.tex, differences.csv, questions.parquet.")


if __name__ == "__main__":
    main()
