"""Conditional steering on a real model: numbered steps in answers to questions, and a repetition task left as it is.

Target prompts are the demo's questions; the unrelated task is to repeat a text word for word. By default the text is
the same question: both prompts end with the same words, so that the condition cannot tell them apart by their topic or
their last words. With `repeat=answer` it is the plain answer to the question, which is easier. The vector is
the demo's: "numbered steps", read from instructions at the last token, with the layer, coefficient and positions that
the demo chose on its validation questions (results/demo). The condition reads the difference in means of both kinds of
prompts at their last token, at the layer with the largest ROC AUC on validation prompts, where its threshold is chosen
too. Every result is of test questions, which neither saw.

Source: Lee et al. 2024, "Programming Refusal with Conditional Activation Steering" (CAST), arXiv 2409.05907.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

import steerkit as sk
from analysis.published import published
from analysis.stored import stored_vectors
from steerkit.demo.checkpoint import default_checkpoint
from steerkit.demo.questions import SYSTEM, Question, instruction_texts, read_questions, split
from steerkit.demo.traits import steps
from steerkit.io.json import read_json, write_json
from steerkit.io.run_folder import run_folder
from steerkit.io.tables import write_table
from steerkit.models.identity import describe, fingerprint
from steerkit.scores.text import rouge_l
from steerkit.stats.controls import against_controls
from steerkit.stats.mean import accuracy_interval, mean_interval
from steerkit.stats.paired import ratio
from steerkit.steering.conditions import described
from training.settings import override

VECTOR = "steps"
TARGET, OTHER = "question", "repeat"
LABELS = (TARGET, OTHER)


@dataclass(frozen=True)
class Setting:
    """What is steered, and how much.

    Args:
        layer, coefficient, positions: those that the demo chose for numbered steps (results/demo/gains.csv).
        repeat: what the unrelated task repeats, the question or its plain answer.
        condition_layers: layers that the condition may read.
        train, test: numbers of questions of the demo's splits.
        validation: number of questions: the demo's, and those of its training split that `train` leaves over.
        controls: number of random directions; a rank of 5 % needs 19.
        max_new_tokens: of each text.
        seed: of the random directions.
    """

    layer: int = 20
    coefficient: float = 2.5
    positions: str = "from_last_prompt_token:4"
    repeat: Literal["question", "answer"] = "question"
    condition_layers: tuple[int, ...] = (2, 5, 8, 11, 14, 17, 20)
    train: int = 48
    validation: int = 32
    test: int = 32
    controls: int = 19
    max_new_tokens: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.repeat not in ("question", "answer"):
            raise ValueError(f"expected repeat 'question' or 'answer'; got {self.repeat!r}. Pass one of them.")


def repeated(question: Question, repeat: str) -> str:
    """The text that the unrelated task repeats."""
    return question.question if repeat == "question" else question.answers["plain"]


def prompts(questions: Sequence[Question], repeat: str) -> dict[str, list[Any]]:
    """Target prompts (questions) and prompts of the unrelated task (repeat a text), by label."""
    kind = "question" if repeat == "question" else "text"

    def asked(question: Question) -> list[dict[str, str]]:
        text = f"Repeat this {kind} word for word: {repeated(question, repeat)}"
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]

    return {TARGET: [one.messages() for one in questions], OTHER: [asked(one) for one in questions]}


def calibrated(model: Any, tokenizer: Any, parts: Mapping[str, Sequence[Question]], setting: Setting) -> sk.Calibration:
    """The condition of the best layer: direction from training prompts, layer and threshold from validation prompts."""

    def read(name: str) -> sk.Activations:
        texts, groups = prompts(parts[name], setting.repeat), [one.id for one in parts[name]] * 2
        return sk.collect(model, tokenizer, texts, layers=setting.condition_layers, position="last", groups=groups)

    train, validation = read("train"), read("validation")
    direction = sk.difference_in_means(train, TARGET, OTHER)
    found = [
        sk.calibrate_condition(direction, validation, layer, positive=TARGET) for layer in setting.condition_layers
    ]
    return max(found, key=lambda one: one.roc_auc)


def read_once(
    model: Any, tokenizer: Any, parts: Mapping[str, Sequence[Question]], setting: Setting, folder: Path
) -> tuple[sk.Condition, sk.SteeringVector, pd.DataFrame]:
    """The condition, the vector and the ROC curve; kept in `folder`, since another number of threads rounds otherwise.

    The sweeps of a resumed call need equal ones. A call with other settings or another model is refused.
    """
    with run_folder(folder / "read", {"setting": asdict(setting), "model": fingerprint(model)}) as kept:
        return _read(model, tokenizer, parts, setting, kept)


def _read(
    model: Any, tokenizer: Any, parts: Mapping[str, Sequence[Question]], setting: Setting, folder: Path
) -> tuple[sk.Condition, sk.SteeringVector, pd.DataFrame]:
    """What `read_once` returns, from `folder` if it is there."""
    file = folder / "condition.json"

    def make() -> dict[str, sk.SteeringVector]:
        found = calibrated(model, tokenizer, parts, setting)
        instructions = instruction_texts(tokenizer, parts["train"])
        acts = sk.collect(model, tokenizer, instructions, layers=[setting.layer], position="last")
        known = {name: getattr(found.condition, name) for name in ("layer", "above", "below", "decide", "meta")}
        write_json(file, {**known, "roc": found.roc.to_dict("list")})
        direction: Any = found.condition.direction  # a vector
        return {VECTOR: sk.difference_in_means(acts, "steps", "plain"), "condition": direction}

    vectors = stored_vectors(folder / "vectors", make)
    known = read_json(file)
    roc = pd.DataFrame(known.pop("roc"))
    return sk.Condition(vectors["condition"], **known), vectors[VECTOR], roc


def swept(
    model: Any,
    tokenizer: Any,
    vectors: Mapping[str, sk.SteeringVector],
    questions: Sequence[Question],
    when: sk.Condition | None,
    setting: Setting,
    out: Path,
    tasks: Sequence[str] = LABELS,
) -> pd.DataFrame:
    """Texts of the tasks with their score: numbered steps of an answer, ROUGE-L of a repetition to its text."""
    rows = [
        {
            "prompt": prompt,
            "id": f"{label}-{one.id}",
            "group": one.id,
            "task": label,
            "reference": repeated(one, setting.repeat),
        }
        for label, some in prompts(questions, setting.repeat).items()
        for one, prompt in zip(questions, some, strict=True)
        if label in tasks
    ]
    table = sk.sweep(
        model, tokenizer, vectors, rows, coefficients=[setting.coefficient], layers=[setting.layer], when=when,
        positions=setting.positions, max_new_tokens=setting.max_new_tokens, seed=setting.seed, out=out,
    ).table  # fmt: skip
    overlap = rouge_l(table["text"].tolist(), table["reference"].tolist())
    is_answer = table["task"] == TARGET
    score = table["text"].map(steps).where(is_answer, pd.Series(overlap, index=table.index))
    return table.assign(score=score)


def effects(always: pd.DataFrame, conditional: pd.DataFrame) -> pd.DataFrame:
    """Scores of the vector per task and way of steering, and how they compare.

    Returns:
        One row per task and quantity: task, quantity, mean, low, high, n (questions), k (random directions), p_rank.
        Quantities: `unsteered`, `unconditional`, `conditional` (mean scores); `unconditional gain`, `conditional gain`
        (over unsteered, paired); on target prompts also `kept` (gain with the condition over the gain without it; see
        `steerkit.stats.paired.ratio`) and `conditional over random` (over random directions of equal norm under the
        same condition; see `steerkit.stats.controls.against_controls`).
    """
    rows: list[tuple[Any, ...]] = []
    gains: dict[str, pd.Series] = {}
    for task in LABELS:
        own = {
            "unsteered": _scores(always, task, 0.0),
            "unconditional": _scores(always, task),
            "conditional": _scores(conditional, task),
        }
        gain = {name: own[name] - own["unsteered"] for name in ("unconditional", "conditional")}
        gains = gain if task == TARGET else gains
        for name, values in (*own.items(), *((f"{name} gain", one) for name, one in gain.items())):
            found = mean_interval(values.to_numpy())
            rows.append((task, name, found.mean, found.low, found.high, found.n, 0, None))
    kept = ratio(gains["conditional"].to_numpy(), gains["unconditional"].to_numpy())
    rows.append((TARGET, "kept", kept.value, kept.low, kept.high, len(gains["conditional"]), 0, None))
    steered = conditional[(conditional["role"] == "random") & (conditional["coefficient"] != 0)]
    wide = steered.pivot_table(index="group", columns="vector", values="score")
    over = against_controls(_scores(conditional, TARGET).loc[wide.index].to_numpy(), wide.to_numpy())
    rows.append((TARGET, "conditional over random", over.gain, over.low, over.high, over.n, over.k, over.p_rank))
    return pd.DataFrame(rows, columns=["task", "quantity", "mean", "low", "high", "n", "k", "p_rank"])


def rates(conditional: pd.DataFrame) -> pd.DataFrame:
    """The share of test prompts of each task where the condition held: task, rate, low, high, n, share of positions."""
    own, rows = conditional[(conditional["vector"] == VECTOR) & (conditional["coefficient"] != 0)], []
    for task in LABELS:
        part = own[own["task"] == task]
        found = accuracy_interval((part["share_steered"] > 0).astype(float), groups=part["group"].tolist())
        rows.append((task, found.mean, found.low, found.high, found.n, float(part["share_steered"].mean())))
    return pd.DataFrame(rows, columns=["task", "rate", "low", "high", "n", "share_steered"])


def _scores(table: pd.DataFrame, task: str, coefficient: float | None = None) -> pd.Series:
    """The vector's scores by question at a coefficient; None: steered."""
    part = table[(table["task"] == task) & (table["vector"] == VECTOR)]
    part = part[part["coefficient"] != 0 if coefficient is None else part["coefficient"] == coefficient]
    return part.set_index("group")["score"].sort_index()


def run(checkpoint: str | Path, out: Path, results: Path | None, setting: Setting) -> None:
    """Make vector and condition, sweep the test prompts, and write the tables to `out` (and `results`)."""
    model, tokenizer = sk.load(checkpoint)
    demo = split(read_questions(), {"train": 64, "validation": 16, "test": 32})  # as the demo splits them
    train, left = demo["train"][: setting.train], demo["train"][setting.train :]
    validation = [*demo["validation"], *left][: setting.validation]
    parts = {"train": train, "validation": validation, "test": demo["test"][: setting.test]}
    when, vector, roc = read_once(model, tokenizer, parts, setting, out)
    controls = sk.controls.random({VECTOR: vector}, n=setting.controls, seed=setting.seed)
    test = parts["test"]
    always = swept(model, tokenizer, {VECTOR: vector}, test, None, setting, out / "always")
    own = swept(model, tokenizer, {VECTOR: vector}, test, when, setting, out / "when")
    random = swept(model, tokenizer, controls, test, when, setting, out / "random", [TARGET])
    conditional = pd.concat([own, random], ignore_index=True)
    about = published({**describe(model, tokenizer), "setting": asdict(setting), "condition": described(when)})
    tables = {"effects": effects(always, conditional), "rates": rates(conditional), "roc": roc}
    for folder in (out, *([] if results is None else [results])):
        for name, table in tables.items():
            write_table(folder / f"{name}.csv", table, about)
    print(when, *tables.values(), sep="\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the analysis and write its tables."""
    parser = argparse.ArgumentParser(prog="python -m analysis conditional", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; the same call resumes it")
    parser.add_argument("--model", default=None, help="checkpoint; default: the demo's SmolLM2-135M-Instruct")
    parser.add_argument("--results", type=Path, default=None, help="folder that the tables are also written to")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of Setting, e.g. test=12"
    )
    parsed = parser.parse_args(arguments)
    try:
        setting = override(Setting(), parsed.set)
    except ValueError as error:
        parser.error(str(error))
    run(parsed.model or default_checkpoint(), parsed.out, parsed.results, setting)
