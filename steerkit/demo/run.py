"""The demo: three personas on a real model, from contrast pairs to a report, in stages that resume."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steerkit.capture.activations import Layer
from steerkit.demo.contrasts import make_vectors
from steerkit.demo.pages import draw
from steerkit.demo.questions import INSTRUCTIONS, Question, read_questions, split
from steerkit.demo.selection import Choice, Vectors, choose, near_unsteered, prompt_rows, scored
from steerkit.demo.summary import unmet
from steerkit.demo.traits import PERSONAS, TRAITS
from steerkit.generation.generate import generate
from steerkit.io.files import sha256
from steerkit.io.json import canonical_json, read_json, write_json
from steerkit.io.run_folder import run_folder
from steerkit.io.tables import read_table, write_table
from steerkit.models.identity import describe, identity, provenance
from steerkit.models.kernels import resume_kernels
from steerkit.stats.mean import mean_interval
from steerkit.stats.multiple import holm
from steerkit.stats.paired import ratio
from steerkit.sweeps.projections import sweep_projections
from steerkit.sweeps.result import SweepResult
from steerkit.sweeps.sweep import sweep
from steerkit.vectors import controls

SCORES = ("trait", "right", "rouge_l", "rouge_l_symbols", "distance", "repeated_4grams", "perplexity")


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo; the defaults are for two cores and the 135M model.

    Args:
        train: number of questions that the vectors are extracted from.
        choose: number of questions to choose source, layer and positions.
        dose: number of questions to choose the coefficient.
        test: number of held-out questions for the one reported run.
        max_new_tokens: maximum number of new tokens per text.
        first_coefficients: coefficients at which sources, layers and positions are compared.
        coefficients: grid of the dose sweep, 0 included.
        controls: number of random directions, and of shuffled-label vectors, on test; a rank of 5 % needs 19.
        seed: seed of the shuffled labels and of the probes' folds.
    """

    train: int = 64
    choose: int = 6
    dose: int = 10
    test: int = 32
    max_new_tokens: int = 32
    first_coefficients: tuple[float, ...] = (1.0, 1.75, 2.5)
    coefficients: tuple[float, ...] = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
    controls: int = 19
    seed: int = 0


def run_demo(model: Any, tokenizer: Any, out: str | Path, settings: DemoSettings | None = None) -> dict[str, Any]:
    """Run or resume the demo in the folder `out`.

    Stages: pairs and vectors (`pairs/`, `vectors/`), choices (`validation/`, `choice.json`), one run on test
    (`test/`), tables (`tables/`), figures (`figures/`, PNG and PDF), `report.html`, `summary.json`.

    Returns:
        The content of `summary.json`.

    Raises:
        ConfigurationChanged: the folder holds a run of another model or of other settings.
        RunFolderBusy: another process is running in the folder.

    Example:
        >>> run_demo(*sk.load("HuggingFaceTB/SmolLM2-135M-Instruct"), "runs/demo")
    """
    settings = settings or DemoSettings()
    began = time.monotonic()
    resume_kernels(model, out)
    about = describe(model, tokenizer)
    questions = read_questions()
    config = {
        **asdict(settings),
        **identity(about),
        "weights": about["weights"],
        "questions": sha256(canonical_json([asdict(q) for q in questions])),
    }
    sizes = {name: getattr(settings, name) for name in ("train", "choose", "dose", "test")}
    parts = split(questions, sizes)
    with run_folder(out, config, provenance(about)) as folder:
        write_json(folder / "splits.json", {name: [q.id for q in part] for name, part in parts.items()})
        vectors = make_vectors(model, tokenizer, parts["train"], folder, settings.seed, settings.controls)
        choices, dose, norms = choose(model, tokenizer, vectors, parts, settings, folder)
        test = run_test(model, tokenizer, vectors, choices, parts["test"], norms, settings, folder)
        asked = ask(model, tokenizer, parts["test"], settings, folder)
        projections = project(model, tokenizer, vectors, choices, dose, folder)
        gains = gain_table(test, choices)
        meta = {**about, "n_test": len(parts["test"]), "settings": asdict(settings)}
        for name, table in {"gains": gains, "dose_curves": dose_curves(dose), "means": means(test, asked)}.items():
            write_table(folder / "tables" / f"{name}.csv", table.assign(weights=about["weights"]), meta)
        verdicts = {persona: verdict(persona, gains, test, choices[persona], asked[persona]) for persona in PERSONAS}
        write_table(folder / "tables" / "verdicts.csv", verdict_rows(verdicts, choices), meta)
        summary = {
            "checkpoint": about["checkpoint"],
            "weights": about["weights"],
            "n_test": len(parts["test"]),
            "choices": {name: asdict(choice) for name, choice in choices.items()},
            "verdicts": verdicts,
            "seconds_this_time": round(time.monotonic() - began, 1),
        }
        write_json(folder / "summary.json", summary)
        draw(folder, summary, dose, projections)
    return summary


def run_test(
    model: Any,
    tokenizer: Any,
    vectors: Vectors,
    choices: Mapping[str, Choice],
    questions: Sequence[Question],
    norms: Mapping[str, Mapping[Layer, float]],
    settings: DemoSettings,
    out: Path,
    engine: Any = None,
) -> SweepResult:
    """Sweep the test questions once with the chosen settings: each vector, its random and its shuffled controls.

    `engine` is that of `sk.sweep`: what generates instead of this process.
    """
    tables = []
    for persona, choice in choices.items():
        whole, shuffled = vectors[persona, choice.source]
        vector = whole.at(choice.layer)
        named = {persona: vector, **controls.random({persona: vector}, n=settings.controls, seed=100)}
        named |= {f"{persona}/shuffled-{k}": one.at(choice.layer) for k, one in enumerate(shuffled)}
        result = sweep(
            model,
            tokenizer,
            named,
            prompt_rows(questions),
            coefficients=[0.0, choice.coefficient],
            positions=choice.positions,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            stream_norms=norms[choice.positions],
            out=out / "test" / persona,
            engine=engine,
        )
        tables.append(result)
    path = out / "tables" / "test.parquet"
    if path.exists():
        return SweepResult.load(path)
    test = scored(SweepResult.merge(tables), model, tokenizer)
    test.save(path)
    return test


def ask(
    model: Any, tokenizer: Any, questions: Sequence[Question], settings: DemoSettings, out: Path
) -> dict[str, list[float]]:
    """Trait per test question without steering when the prompt asks for the persona: an upper reference."""
    path = out / "tables" / "asked.json"
    if not path.exists():
        prompts = [q.messages(INSTRUCTIONS[persona]) for persona in PERSONAS for q in questions]
        texts = iter(generate(model, tokenizer, prompts, max_new_tokens=settings.max_new_tokens))
        write_json(path, {persona: [TRAITS[persona](next(texts)) for _ in questions] for persona in PERSONAS})
    traits: dict[str, list[float]] = read_json(path)
    return traits


def project(
    model: Any, tokenizer: Any, vectors: Vectors, choices: Mapping[str, Choice], dose: SweepResult, out: Path
) -> pd.DataFrame:
    """Projections of the dose sweep's tokens on their persona's vector, without the texts of controls."""
    path = out / "tables" / "projections.parquet"
    if not path.exists():
        mine = dose.table[dose.table["vector"].isin(list(choices))]
        named = {persona: vectors[persona, choice.source][0] for persona, choice in choices.items()}
        projections = sweep_projections(model, tokenizer, mine, named)
        about = {key: dose.meta[key] for key in ("model_fingerprint", "adapter_fingerprint")}
        write_table(path, projections, {"kind": "projections", **about})
    table: pd.DataFrame = read_table(path)[0]
    return table


def gain_table(test: SweepResult, choices: Mapping[str, Choice]) -> pd.DataFrame:
    """Gains in trait, right answers and ROUGE-L over coefficient 0, random and shuffled directions.

    See `SweepResult.gain`.

    `p_holm` is p adjusted over the personas within each score and comparison.
    """
    rows = []
    for persona, choice in choices.items():
        table = test.table[test.table["persona"] == persona]
        mine = SweepResult(table, test.meta)
        comparisons = {
            "coefficient 0": None,
            "random directions": mine.controls_of(persona, "random"),
            "shuffled labels": mine.controls_of(persona, "shuffled"),
        }
        for score in ("trait", "right", "rouge_l", "rouge_l_symbols"):
            for comparison, over in comparisons.items():
                gain = mine.gain(score, over=over, vectors=[persona]).iloc[0]
                rows.append(
                    {
                        "persona": persona,
                        "score": score,
                        "over": comparison,
                        "layer": choice.layer,
                        "coefficient": choice.coefficient,
                        "positions": choice.positions,
                        "source": choice.source,
                        **{key: gain[key] for key in ("gain", "low", "high", "p", "p_rank", "n", "k")},
                    }
                )
    table = pd.DataFrame(rows)
    known = table[table["p"].notna()]  # a single control has no spread, and no p
    table["p_holm"] = known.groupby(["score", "over"])["p"].transform(lambda p: holm(p.to_numpy()))
    return table


def dose_curves(dose: SweepResult) -> pd.DataFrame:
    """Curves of every score over the coefficients on validation, with intervals, for vectors and their single controls.

    The columns `persona` and `role` say whose vector or control it is.
    """
    roles = dose.roles()
    table = pd.concat([dose.curve(score).assign(score=score) for score in SCORES], ignore_index=True)
    persona = table["vector"].map({name: control_of or name for name, (_, control_of) in roles.items()})
    return table.assign(persona=persona, role=table["vector"].map({name: role for name, (role, _) in roles.items()}))


def verdict_rows(verdicts: Mapping[str, Mapping[str, Any]], choices: Mapping[str, Choice]) -> pd.DataFrame:
    """The verdicts and the chosen settings as a table, one row per persona; intervals as three columns."""
    rows = []
    for persona, found in verdicts.items():
        line: dict[str, Any] = {"persona": persona, **asdict(choices[persona])}
        for name, value in found.items():
            endings = {2: ("_unsteered", "_steered"), 3: ("", "_low", "_high")}
            if isinstance(value, list):
                line |= {f"{name}{ending}": one for ending, one in zip(endings[len(value)], value, strict=True)}
            else:
                line[name] = value
        rows.append(line)
    return pd.DataFrame(rows)


def means(test: SweepResult, asked: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """Mean and interval of every score on test by vector and coefficient; the trait when the prompt asks for it.

    The controls of a kind are one row: their mean, and the interval of a further control.
    """
    own = SweepResult(test.table[test.table["role"] == "vector"], test.meta)
    parts = [curve.assign(score=score) for score in SCORES for curve in (own.curve(score), test.control_curve(score))]
    table = pd.concat(parts, ignore_index=True)
    rows = []
    for persona, traits in asked.items():
        interval = mean_interval(np.array(traits))
        rows.append(
            {
                "vector": f"{persona}/asked",
                "coefficient": 0.0,
                "score": "trait",
                "mean": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "n": interval.n,
                "n_missing": interval.n_missing,
            }
        )
    return pd.concat([table, pd.DataFrame(rows)], ignore_index=True)


def verdict(
    persona: str, gains: pd.DataFrame, test: SweepResult, choice: Choice, asked: Sequence[float]
) -> dict[str, Any]:
    """Whether steering worked: the trait rises, more than under the controls, and the text is fluent.

    The trait rises where the interval of its gain over coefficient 0 lies above 0 and p, Holm-adjusted over personas,
    is at most 0.05. It rises more than under a kind of controls where the prediction interval lies above 0 (if there is
    one, see `steerkit.stats.sign.shown_sign`) and the rank p-value is at most 0.05. `unmet` names the conditions that
    do not hold.
    """
    rows = gains[(gains["persona"] == persona) & (gains["score"] == "trait")]
    mine = rows.set_index("over")
    table = test.table[test.table["vector"] == persona]
    fluent = bool(near_unsteered(table)[choice.coefficient])
    missing = [*unmet(rows), *([] if fluent else ["the text is repetitive or not fluent"])]
    right = table.pivot_table(index="prompt_id", columns="coefficient", values="right")
    kept = ratio(right[choice.coefficient], right[0.0])
    mean_trait = table.groupby("coefficient")["trait"].mean()
    perplexity = np.exp(np.log(table["perplexity"]).groupby(table["coefficient"]).mean())
    repetition = table.groupby("coefficient")["repeated_4grams"].mean()
    steered = float(choice.coefficient)
    return {
        "steered": not missing,
        "unmet": "; ".join(missing),
        "trait_unsteered": float(mean_trait[0.0]),
        "trait_steered": float(mean_trait[steered]),
        "trait_when_asked": float(np.mean(asked)),
        "gain_over_zero": [float(mine.loc["coefficient 0", key]) for key in ("gain", "low", "high")],
        "gain_over_random": [float(mine.loc["random directions", key]) for key in ("gain", "low", "high")],
        "gain_over_shuffled": [float(mine.loc["shuffled labels", key]) for key in ("gain", "low", "high")],
        "right": [float(right[coefficient].mean()) for coefficient in (0.0, steered)],
        "right_kept": [kept.value, kept.low, kept.high],
        "fluent": fluent,
        "repetition": [float(repetition[0.0]), float(repetition[steered])],
        "perplexity": [float(perplexity[0.0]), float(perplexity[steered])],
        "relative_dose": float(table.loc[table["coefficient"] == steered, "relative_dose"].mean()),
    }
