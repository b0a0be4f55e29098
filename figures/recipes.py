"""Figures and tables of the recipes, and what their scripts print and draw on real checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd

from steerkit.io.json import read_json
from steerkit.io.markdown import markdown_table
from steerkit.io.tables import read_table
from steerkit.show.plots import curve_grid
from steerkit.stats.format import interval_text
from steerkit.stats.sign import shown_sign

CAA, RANDOM = "CAA", "random directions"
OPTIONS = ("letters", "yes or no")
"""Measures of the options as a question names them."""
MODELS = {"smollm2": "SmolLM2-135M-Instruct", "gemma": "Gemma 3 270M", "qwen": "Qwen2.5-Coder-0.5B-Instruct"}
"""End of a folder's name, as in `results/recipes/caa-smollm2` -> the model."""
LEAST = 150
"""Number of test questions or prompts that is asked for; a table says where there are fewer."""
JOBS = ("checkpoints", "growing-sweep", "lm-eval", "monitoring", "persona-vectors")
"""Recipes whose scripts `python -m analysis jobs` runs."""
JOB_FOLDER = "recipes/jobs"
GAINS = ("gain over coefficient 0", "gain over random directions")
WRONG = "share that moves the wrong way"
Measured = dict[str, tuple[pd.DataFrame, dict[str, Any]]]


def measured(recipe: str, name: str, folder: Path) -> Measured:
    """Model -> table and provenance, of the models that a recipe was measured on.

    Args:
        recipe: such as `caa`; its folders are `recipes/RECIPE-MODEL`.
        name: of the table, without suffix.
        folder: the folder of results.

    Raises:
        FileNotFoundError: no model has this table.
    """
    files = {file.parent.name.partition("-")[2]: file for file in folder.glob(f"recipes/{recipe}-*/{name}.csv")}
    if not files:
        raise FileNotFoundError(f"expected {name}.csv in a folder recipes/{recipe}-MODEL of {folder}; got none.")
    known = [model for model in MODELS if model in files]
    return {MODELS.get(model, model): read_table(files[model]) for model in [*known, *sorted({*files} - {*known})]}


def caa_table(folder: Path) -> str:
    """The gain of each measure at each dose over coefficient 0 and over random directions, and its verdict."""
    rows = []
    for model, (table, meta) in measured("caa", "verdicts", folder).items():
        called = meta.get("matching_answers", {})
        for row in table.sort_values(["behavior", "measure"], kind="stable").to_dict("records"):
            behavior, gains = row["behavior"], ("gain", "over_random")
            told = f"{behavior} ({called[behavior]})" if called.get(behavior) else behavior
            shown = [interval_text(*(row[f"{gain}{end}"] for end in ("", "_low", "_high"))) for gain in gains]
            start = [model, told, row["measure"], f"{row['dose']:+g}", f"{row['unsteered']:.2f}"]
            rows.append([*start, *shown, f"{row['wrong_way']:.2f}", row["verdict"], _count(row["questions"])])
    about = (
        "behavior (what matching answers do)" if any("(" in row[1] for row in rows) else "behavior (name of the file)"
    )
    header = ("model", about, "measure", "dose", "unsteered value", *GAINS)
    return markdown_table((*header, WRONG, "verdict", "questions"), rows)


def refusal_table(folder: Path) -> str:
    """The unsteered rates of refusal, and the gains where the direction is added or ablated, per model."""
    rows = []
    for model, (rates, meta) in measured("refusal", "rates", folder).items():
        for row in rates.itertuples():
            rate = interval_text(row.refused, row.low, row.high)
            rows.append([model, f"unsteered, {row.kind}", rate, "", "", "", _count(row.n)])
        if not meta["testable"]:
            rows.append([model, "ablated, harmful", "", "not testable on this model", "", "", ""])
        rows += _refusal_gains(model, meta["testable"], folder)
    header = ["model", "steering and prompts", "unsteered rate", *GAINS, WRONG, "prompts"]
    if not any(row[header.index(WRONG)] for row in rows):  # an earlier run without this column
        header, rows = [*header[:-2], header[-1]], [[*row[:-2], row[-1]] for row in rows]
    return markdown_table(header, rows)


def _refusal_gains(model: str, testable: bool, folder: Path) -> list[list[str]]:
    """The verdicts and gains of one model; none where it was not steered."""
    try:
        gains, about = measured("refusal", "gains", folder)[model]
    except (FileNotFoundError, KeyError):
        return []
    rows = [
        [model, f"verdict on operation `{operation}`", "", verdict, "", "", ""]
        for operation, verdict in about.get("verdicts", {}).items()
        if testable or operation != "ablate"
    ]
    for (operation, kind, coefficient), part in gains.groupby(["operation", "kind", "coefficient"], sort=False):
        text = f"{operation}, coefficient {coefficient:g}, {kind}"
        rows.append([model, text, *_gain_cells(part), _count(part["n"].max())])
    return rows


def persona_table(folder: Path) -> str:
    """The gains of the judge's score and of repetition by coefficient, on the test questions, per model."""
    rows = []
    try:
        found = measured("persona", "gains", folder)
    except FileNotFoundError:
        return "Not run yet; `python -m analysis persona` measures all questions against 19 random directions."
    for model, (gains, _) in found.items():
        for (score, coefficient), part in gains.groupby(["score", "coefficient"], sort=False):
            rows.append([model, str(score), f"{coefficient:+g}", *_gain_cells(part), _count(part["n"].max())])
    return markdown_table(("model", "score", "coefficient", "unsteered", *GAINS, WRONG, "questions"), rows)


def judges_table(folder: Path) -> str:
    """Agreement of each judge with the labelled texts."""
    rows = []
    for model, (table, _) in measured("judge", "agreement", folder).items():
        row = table.iloc[0]
        area, share = (
            interval_text(*(row[f"{name}{end}"] for end in ("", "_low", "_high"))) for name in ("roc_auc", "right_side")
        )
        rank = "" if pd.isna(row["spearman"]) else f"{row['spearman']:.2f}"
        counts = (f"{row[name]:.0f}" for name in ("n", "n_unread", "n_distinct"))
        rows.append([model, *counts, area, share, rank])
    header = ("judge", "texts", "answers that are no score", "distinct scores", "ROC AUC")
    return markdown_table((*header, "share of texts on the correct side of 50", "rank correlation"), rows)


def job_block(folder: Path, name: str) -> str:
    """What the script of a recipe printed and drew on a real checkpoint, with the sizes that were changed."""
    file = folder / JOB_FOLDER / f"{name}.json"
    if not file.is_file():
        return f"Not run yet; `python -m analysis jobs {name} --out OUT` runs the script on real checkpoints."
    found = read_json(file)
    on = ", ".join(found["models"])
    if "run" in found:
        family = f"[{found['run']['family']}](../glossary.md#debate-and-training)"
        on += f" (problem family {family}, training seed {found['run']['seed']})"
    on += f" with {found['judge']} as judge" if "judge" in found else ""
    changes = "; ".join(f"`{new}` for `{old}`" for old, new in found["changes"].items())
    told = (
        f"`{found['command']}` ran this script on {on}, at commit {found['commit']}. {found['data']} The "
        f"script was run with these replacements: {changes}. It printed:"
    )
    printed = [line.rstrip() for line in found["printed"].rstrip().splitlines()]
    lines = [*wrap(told, 120, break_long_words=False, break_on_hyphens=False), "", "```text", *printed, "```"]
    for picture in found["pictures"]:
        lines += ["", f"![{found['pictures'][picture]}]({picture})"]
    return "\n".join(lines)


def pictures(folder: Path) -> dict[str, Path]:
    """Picture of a page, below the root of the project -> the file that a recipe's script drew."""
    return {f"docs/recipes/{file.name}": file for file in sorted((folder / JOB_FOLDER).glob("*.png"))}


def _gain_cells(part: pd.DataFrame) -> list[str]:
    """Unsteered mean, gains over coefficient 0 and over random directions, and the share that moves the wrong way."""
    over = part.set_index("over")
    gains = [
        interval_text(*(over.loc[name, end] for end in ("gain", "low", "high"))) if name in over.index else ""
        for name in ("coefficient 0", "random")
    ]
    values = [part[name].iloc[0] if name in part else np.nan for name in ("unsteered", "wrong_way")]
    unsteered, wrong = ("" if np.isnan(value) else f"{value:.2f}" for value in values)
    return [unsteered, *gains, wrong]


def _count(n: float) -> str:
    """A number of questions, and whether it is below the one that is asked for."""
    return f"{n:.0f}" if n >= LEAST else f"{n:.0f} (fewer than {LEAST})"


def caa_curves(tables: Mapping[str, pd.DataFrame], axis: str) -> Any:
    """Gain in the probability of the matching option by layer or dose: a row per model, a column per behavior.

    The title is the finding. In grey the mean of the random directions, with the interval of a further one.

    Args:
        tables: model -> the table `by_layer` or `by_dose` of `analysis.recipes.caa`.
        axis: `layer` or `dose`.
    """
    panels = {
        f"gain in probability\nof the matching answer,\n{model}": {
            name.partition("-")[0]: against_random(part, axis) for name, part in _options(table).items()
        }
        for model, table in tables.items()
    }
    label = "steered layer, at a dose of 0.2" if axis == "layer" else "dose"
    return curve_grid(panels, label, controls=[RANDOM], title=_finding(tables, axis), sample=_sample(tables.values()))


def _finding(tables: Mapping[str, pd.DataFrame], axis: str) -> str:
    """At how many layers or doses both gains have the sign of the dose, with intervals that exclude 0."""
    every = pd.concat([table[table["measure"].isin(OPTIONS)].assign(model=model) for model, table in tables.items()])
    every = every[every["over"].isin(["coefficient 0", "random"])]
    sign = every[axis].map(lambda dose: 1 if axis == "layer" or dose > 0 else -1)
    intended = every[["gain", "low", "high", "p"]].apply(lambda row: shown_sign(*row), axis=1) == sign
    found = intended.groupby([every["model"], every["behavior"], every[axis]]).all()
    return (
        f"CAA moves the answer as intended, and more than random directions, at {found.sum()} of {len(found)} {axis}s"
    )


def against_random(gains: pd.DataFrame, axis: str) -> pd.DataFrame:
    """The gains of a vector over coefficient 0, and those of random directions, as a curve of `plots.curve_grid`.

    With `g` the gain over coefficient 0 and `r [low, high]` that over random directions, these gain `g - r` on average,
    and a further one `[g - high, g - low]`.

    Args:
        gains: columns `axis`, over, gain, low, high, n, k.
    """
    plain, random = (gains[gains["over"] == over].set_index(axis) for over in ("coefficient 0", "random"))
    own = plain.loc[:, ["gain", "low", "high", "n"]].rename(columns={"gain": "mean"}).assign(vector=CAA)
    gain = plain.loc[random.index, "gain"]
    band = {"mean": gain - random["gain"], "low": gain - random["high"], "high": gain - random["low"]}
    both = pd.concat([own, pd.DataFrame({**band, "n": random["n"], "k": random["k"], "vector": RANDOM})])
    curve = both.rename_axis("coefficient").reset_index()
    if axis == "layer":
        return curve
    unsteered = [{"vector": one, "coefficient": 0.0, "mean": 0.0, "low": 0.0, "high": 0.0} for one in (CAA, RANDOM)]
    return pd.concat([curve, pd.DataFrame(unsteered).assign(n=curve["n"].max())], ignore_index=True)


def _options(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    options = table[table["measure"].isin(OPTIONS)]
    return {str(name): part for name, part in options.groupby("behavior", sort=False)}


def _sample(tables: Any) -> str:
    every = pd.concat(list(tables))
    options = every[every["measure"].isin(OPTIONS)]
    groups = "\u2013".join(str(n) for n in sorted({int(options["n"].min()), int(options["n"].max())}))
    return f"n = {groups} question groups, k = {int(options['k'].max())} random directions"
