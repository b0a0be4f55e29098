"""`python -m training.imad PRESET`: base, debates, SFT, GRPO, every baseline and control, evaluation; resumable."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

import steerkit as sk
from steerkit.io.files import sha256
from steerkit.io.ranks import in_first_process
from steerkit.io.run_folder import check_config
from steerkit.io.tables import read_table, write_table
from steerkit.io.versions import versions
from steerkit.text.traces import DebateTrace, read_traces
from training.debates.answerers import LocalModel, Sampling
from training.debates.debate import TRACES, hold
from training.debates.personas import Cast, alone, cast_of
from training.estimate import estimate, shape_of
from training.evaluate.methods import DEBATES, debates, one_answer, self_consistency
from training.evaluate.results import write_results
from training.presets import Preset, chosen, names
from training.problems.families import FAMILIES
from training.problems.problem import Problem
from training.toy.model import train_base
from training.toy.worlds import WORLDS, bare
from training.train.grpo import GRPO, train_grpo
from training.train.sft import SFT, train_sft

CHECKING = "Self-checking agents"


@dataclass(frozen=True)
class Run:
    """A preset with a seed and a folder."""

    preset: Preset
    seed: int
    folder: Path

    @property
    def in_a_small_world(self) -> bool:
        return self.preset.checkpoint is None

    def problems(self, n: int, split: str) -> list[Problem]:
        if self.in_a_small_world:
            return WORLDS[self.preset.family].problems(n, self.seed, split)
        return FAMILIES[self.preset.family](n, self.seed, split)

    @property
    def debated(self) -> list[Problem]:
        return self.problems(self.preset.debates, "train")

    @property
    def rewarded(self) -> list[Problem]:
        fresh = self.preset.fresh
        return self.problems(self.preset.debates + fresh, "train")[-fresh:] if fresh else self.debated

    @property
    def cast(self) -> Cast:
        return WORLDS[self.preset.family].cast() if self.in_a_small_world else cast_of(self.preset.cast)

    def answerer(self, checkpoint: str | Path) -> LocalModel:
        """The model that debates, or is judged."""
        return LocalModel(*sk.load(checkpoint, dtype=self.preset.dtype))

    def seeded(self, sampling: Sampling) -> Sampling:
        return replace(sampling, seed=self.seed)


def base_checkpoint(run: Run) -> str | Path:
    """Where the run begins: the preset's checkpoint, or a base model trained for its small world.

    One that is there is not locked: several processes may train on it.
    """
    if run.preset.checkpoint == "smollm2":
        from steerkit.demo.checkpoint import default_checkpoint

        return default_checkpoint()
    if run.preset.checkpoint is not None:
        return run.preset.checkpoint
    if (done := run.folder / "base" / "checkpoint").exists():
        return done
    return train_base(WORLDS[run.preset.family], replace(run.preset.base, seed=run.seed), run.folder / "base")


def collect_debates(run: Run, base: str | Path, cast: Cast, name: str = "debates") -> list[DebateTrace]:
    """Debates of the base model on training problems; the kept traces. Those that are there are not locked."""
    if (done := run.folder / name / TRACES).exists():
        return read_traces(done)
    setting = replace(run.preset.debate, sampling=run.seeded(run.preset.debate.sampling))
    problems = run.debated
    hold(problems, run.answerer(base), cast, setting, run.folder / name, shared=True)
    return read_traces(done)


def recipes(run: Run, base: str | Path) -> dict[str, Callable[[], Path]]:
    """How each checkpoint of the preset is trained, by name; what is done is only found."""
    problems = run.rewarded
    sft: SFT = replace(run.preset.sft, seed=run.seed)
    grpo: GRPO = replace(run.preset.grpo, seed=run.seed)
    traces = collect_debates(run, base, run.cast)

    def checks() -> list[DebateTrace]:
        one = alone(Cast(f"{run.cast.name}-one", run.cast.personas[:1], run.cast.ask))
        return collect_debates(run, base, one, "self-checks")

    def tuned(
        name: str, debates: Callable[[], list[DebateTrace]] = lambda: traces, **fields: Any
    ) -> Callable[[], Path]:
        setting = replace(sft, **fields)
        return lambda: train_sft(*sk.load(base), debates(), setting, run.folder / name, problems[0].kind)

    def rewarded(name: str, start: Callable[[], str | Path], **fields: Any) -> Callable[[], Path]:
        setting = replace(grpo, **fields)
        return lambda: train_grpo(*sk.load(start()), problems, setting, run.folder / name)

    debated, checked, own = tuned("sft"), tuned("sft-self-check", checks), tuned("sft-first", target="first")
    start = (lambda: base) if run.in_a_small_world else own  # others have to learn the form of an answer first
    every = {
        "SFT": debated,
        "IMAD": rewarded("grpo", debated),
        "SFT without tags": tuned("sft-untagged", target="untagged"),
        "SFT on single turns": tuned("sft-turns", structure_dropout=1.0, cut_to="turn"),
        "DebateGPT (answer)": tuned("debategpt-answer", target="answer"),
        "DebateGPT (response)": tuned("debategpt-response", target="response"),
        "SFT on first answers": own,
        "GRPO without debate": rewarded("grpo-alone", start, format=False),
        "SFT of one self-check": checked,
        "IMAD of one self-check": rewarded("grpo-self-check", checked, agents=1),
    }
    return {method: every[method] for method in run.preset.trained}


def evaluate(run: Run, base: str | Path, checkpoints: Mapping[str, Path]) -> pd.DataFrame:
    """Every method on the same test questions, sampled and greedy; a finished method is not run again."""
    problems = run.problems(run.preset.test, "test")
    parts = []
    for decoding in ("sampled", "greedy"):
        sampling = run.seeded(run.preset.sampling)
        if decoding == "greedy":
            sampling = replace(sampling, temperature=0.0)
        for method, rows in _methods(run, base, checkpoints, problems, sampling, run.folder / "evaluation" / decoding):
            parts.append(rows.assign(method=method, decoding=decoding, seed=run.seed, family=run.preset.family))
    return pd.concat(parts, ignore_index=True)


def _debate_test(run: Run, base: str | Path) -> None:
    sampling = run.seeded(run.preset.sampling)
    problems, place = run.problems(run.preset.test, "test"), run.folder / "evaluation" / "sampled" / "debates"
    debates(problems, run.answerer(base), run.cast, replace(run.preset.debate, sampling=sampling), place)


def _methods(
    run: Run,
    base: str | Path,
    checkpoints: Mapping[str, Path],
    problems: list[Problem],
    sampling: Sampling,
    folder: Path,
) -> list[tuple[str, pd.DataFrame]]:
    answerer = run.answerer(base)
    ask: Callable[[Problem], Any] = bare if run.in_a_small_world else lambda p: run.cast.ask(p, 1, 1, ())
    setting = replace(run.preset.debate, sampling=sampling)
    found: dict[str, pd.DataFrame] = {}

    def keep(methods: tuple[str, ...], work: Callable[[], list[pd.DataFrame]]) -> None:
        paths = [folder / f"{sha256(method)[:8]}.parquet" for method in methods]
        if not all(path.exists() for path in paths):
            for method, path, table in zip(methods, paths, work(), strict=True):
                write_table(path, table, {"method": method, "sampling": asdict(sampling)})
        found.update({m: read_table(path)[0] for m, path in zip(methods, paths, strict=True)})

    def held(cast: Cast, name: str) -> dict[str, pd.DataFrame]:
        return debates(problems, answerer, cast, setting, folder / name)

    keep(("Single",), lambda: [one_answer(problems, answerer, ask, sampling)])
    keep(DEBATES, lambda: [held(run.cast, "debates")[name] for name in DEBATES])
    if run.preset.self_check:
        keep((CHECKING,), lambda: [held(alone(run.cast), "self-checks")[DEBATES[0]]])
    for name, path in checkpoints.items():
        keep((name,), partial(lambda path: [one_answer(problems, run.answerer(path), bare, sampling)], path))
    if run.preset.controls and sampling.temperature > 0:  # greedy samples would all be equal
        cost = {method: float((rows["tokens_in"] + rows["tokens_out"]).mean()) for method, rows in found.items()}
        paid = {like: max(1, round(cost[like] / cost["Single"])) for like in ("IMAD", "Debate")}
        counts = {"Self-consistency of 3": 3} | {f"Self-consistency at {m}'s tokens": k for m, k in paid.items()}
        keep(tuple(counts), lambda: self_consistency(problems, answerer, ask, sampling, list(counts.values())))
    return list(found.items())


def run_all(run: Run, only: Sequence[str] = ()) -> pd.DataFrame | None:
    """All stages, each skipped if its output is there; returns the results table.

    Of several processes that torchrun started, all train together; the first does the rest and returns the table.

    Args:
        only: train these methods and judge nothing, so that several processes can share a run; `Debate` holds the
            debates, of training and of the sampled test. Once they are held, others may run beside each other.

    Raises:
        ValueError: a method that this preset does not train.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    preset = {**asdict(run.preset), "seed": run.seed}
    check_config(run.folder, preset)
    in_first_process(lambda: base_checkpoint(run))
    base = base_checkpoint(run)
    trained = recipes(run, base)
    if only:
        work = {DEBATES[0]: lambda: in_first_process(lambda: _debate_test(run, base)), **trained}
        if unknown := [method for method in only if method not in work]:
            raise ValueError(f"expected methods among {list(work)}; got {unknown}. Choose among these.")
        for method in only:
            work[method]()
        return None
    checkpoints = {method: recipe() for method, recipe in trained.items()}

    def judge() -> pd.DataFrame:
        kept = len(read_traces(run.folder / "debates" / TRACES))
        meta = {"preset": preset, "kept_traces": kept, "versions": versions()}
        return write_results(run.folder, evaluate(run, base, checkpoints), "IMAD", meta)

    return in_first_process(judge)


def _quiet() -> None:
    """No bars of the libraries' own: each stage tells its progress itself, and a log stays readable."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.imad", description=__doc__)
    parser.add_argument("preset", choices=names())
    parser.add_argument("--family", help="of problems; tiny has a recipe for each of its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: runs/imad-PRESET/FAMILY/seed-SEED")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="e.g. grpo.steps=60")
    parser.add_argument("--only", action="append", default=[], metavar="METHOD", help="train it, and judge nothing")
    parser.add_argument("--dry-run", action="store_true", help="print estimates of tokens and memory, and do nothing")
    given = parser.parse_args(arguments)
    try:
        preset = chosen(given.preset, given.family, given.set)
    except ValueError as error:
        parser.error(str(error))
    if given.dry_run:
        shape = shape_of(preset)
        print(f"{preset.name}: {shape.parameters:,} parameters, {shape.layers} layers, d_model {shape.width}; at most:")
        print(estimate(preset, shape).round(2).to_string(index=False))
        return
    out = given.out or Path("runs") / f"imad-{preset.name}" / preset.family / f"seed-{given.seed}"
    _quiet()
    table = run_all(Run(preset, given.seed, out), given.only)
    if table is None:
        return
    print(table.round(3).to_string(index=False))
    print(f"Tables in {out}: results.csv, results.md, results.tex, differences.csv, questions.parquet.")


if __name__ == "__main__":
    main()
