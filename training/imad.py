"""`python -m training.imad PRESET`: base, debates, SFT, GRPO, every baseline and control, evaluation; resumable."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd

import steerkit as sk
from steerkit import artifacts
from steerkit.traces import DebateTrace, read_traces
from training.chat import LocalModel, Sampling
from training.debate import TRACES, Setting, hold
from training.evaluate import DEBATES, debates, one_answer, self_consistency, write_results
from training.grpo import train_grpo
from training.personas import Cast, cast_of
from training.presets import PRESETS, Preset, changed
from training.problems import FAMILIES, Problem
from training.sft import SFT, train_sft
from training.tiny import train_base
from training.worlds import WORLDS, asked


@dataclass(frozen=True)
class Run:
    """A preset with a seed and a folder."""

    preset: Preset
    seed: int
    folder: Path

    def problems(self, n: int, split: str) -> list[Problem]:
        if self.preset.checkpoint is None:
            return WORLDS[self.preset.family].problems(n, self.seed, split)
        return FAMILIES[self.preset.family](n, self.seed, split)

    @property
    def cast(self) -> Cast:
        return WORLDS[self.preset.family].cast() if self.preset.checkpoint is None else cast_of(self.preset.cast)

    @property
    def sampling(self) -> Sampling:
        return replace(self.preset.sampling, seed=self.seed)


def base_checkpoint(run: Run) -> str | Path:
    """Where the run begins: the preset's checkpoint, or a base model trained for its small world."""
    if run.preset.checkpoint == "smollm2":
        from steerkit.demo.checkpoint import default_checkpoint

        return default_checkpoint()
    if run.preset.checkpoint is not None:
        return run.preset.checkpoint
    return train_base(WORLDS[run.preset.family], replace(run.preset.base, seed=run.seed), run.folder / "base")


def collect_debates(run: Run, base: str | Path) -> list[DebateTrace]:
    """Debates of the base model on training problems; the kept traces."""
    model, tokenizer = sk.load(base)
    setting = replace(run.preset.debate, sampling=replace(run.preset.debate.sampling, seed=run.seed))
    hold(
        run.problems(run.preset.debates, "train"),
        LocalModel(model, tokenizer),
        run.cast,
        setting,
        run.folder / "debates",
    )
    return read_traces(run.folder / "debates" / TRACES)


def train(run: Run, base: str | Path, traces: list[DebateTrace]) -> dict[str, Path]:
    """All trained checkpoints by name: SFT, IMAD, both DebateGPTs, and the same GRPO without any debate."""
    problems = run.problems(run.preset.debates, "train")
    kind = problems[0].kind
    sft = replace(run.preset.sft, seed=run.seed)
    grpo = replace(run.preset.grpo, seed=run.seed)

    def tuned(name: str, setting: SFT) -> Path:
        return train_sft(*sk.load(base), traces, setting, run.folder / name, kind)

    found = {"SFT": tuned("sft", sft)}
    found["IMAD"] = train_grpo(*sk.load(found["SFT"]), problems, grpo, run.folder / "grpo")
    found["DebateGPT (answer)"] = tuned("debategpt-answer", replace(sft, target="answer"))
    found["DebateGPT (response)"] = tuned("debategpt-response", replace(sft, target="response"))
    alone = replace(grpo, format=False)
    found["GRPO without debate"] = train_grpo(*sk.load(base), problems, alone, run.folder / "grpo-alone")
    return found


def evaluate(run: Run, base: str | Path, checkpoints: dict[str, Path]) -> pd.DataFrame:
    """Every method on the same test questions, sampled and greedy."""
    problems = run.problems(run.preset.test, "test")
    base_model = LocalModel(*sk.load(base))
    own = run.preset.checkpoint is None
    ask: Callable[[Problem], Any] = asked if own else lambda p: run.cast.ask(p, 1, 1, ())
    k = run.preset.consistency
    parts = []
    for decoding in ("sampled", "greedy"):
        sampling = run.sampling if decoding == "sampled" else replace(run.sampling, temperature=0.0)
        methods: dict[str, Callable[[], pd.DataFrame]] = {
            "Single": partial(one_answer, problems, base_model, ask, sampling),
            **{name: partial(_trained, path, problems, sampling) for name, path in checkpoints.items()},
        }
        if decoding == "sampled":  # greedy samples would all be equal
            methods[f"Self-consistency of {k}"] = partial(self_consistency, problems, base_model, ask, sampling, k)
        folder = run.folder / "evaluation" / decoding
        setting = Setting(run.preset.debate.rounds, run.preset.debate.early_stop, sampling)
        held = cache(partial(debates, problems, base_model, run.cast, setting, folder / "debates"))
        methods |= {name: partial(lambda name, held: held()[name], name, held) for name in DEBATES}
        for method, work in methods.items():
            path = folder / f"{method.lower().replace(' ', '-')}.parquet"
            if not path.exists():
                artifacts.write_table(path, work(), {"method": method, "sampling": asdict(sampling)})
            table, _ = artifacts.read_table(path)
            parts.append(table.assign(method=method, decoding=decoding, seed=run.seed, family=run.preset.family))
    return pd.concat(parts, ignore_index=True)


def _trained(checkpoint: Path, problems: list[Problem], sampling: Sampling) -> pd.DataFrame:
    return one_answer(problems, LocalModel(*sk.load(checkpoint)), asked, sampling)


def run_all(run: Run) -> pd.DataFrame:
    """All stages, each skipped if its output is there; returns the results table."""
    run.folder.mkdir(parents=True, exist_ok=True)
    artifacts.check_config(run.folder, {**asdict(run.preset), "seed": run.seed})
    base = base_checkpoint(run)
    traces = collect_debates(run, base)
    checkpoints = train(run, base, traces)
    rows = evaluate(run, base, checkpoints)
    meta = {
        "preset": asdict(run.preset),
        "seed": run.seed,
        "kept_traces": len(traces),
        "versions": artifacts.versions(),
    }
    return write_results(run.folder, rows, "IMAD", meta)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.imad", description=__doc__)
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: runs/imad-PRESET/FAMILY/seed-SEED")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="e.g. grpo.steps=60")
    given = parser.parse_args(arguments)
    preset = changed(PRESETS[given.preset], given.set)
    out = given.out or Path("runs") / f"imad-{preset.name}" / preset.family / f"seed-{given.seed}"
    table = run_all(Run(preset, given.seed, out))
    print(table.round(3).to_string(index=False))
    print(f"Tables in {out}: results.csv, results.md, results.tex, differences.csv, questions.parquet.")


if __name__ == "__main__":
    main()
