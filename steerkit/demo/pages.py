"""The demo's figures and its report, drawn from its tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from steerkit.demo.contrasts import SOURCES
from steerkit.demo.figures import dose_figure, dose_title, gain_figure, gain_title, probe_title
from steerkit.demo.summary import results
from steerkit.demo.traits import PERSONAS
from steerkit.io.tables import read_table
from steerkit.show.explorer import TITLES
from steerkit.show.plots import layer_profile, save_figure
from steerkit.show.report import write_report
from steerkit.stats.format import interval_text, p_text
from steerkit.sweeps.result import SweepResult


def draw(folder: Path, summary: Mapping[str, Any], dose: SweepResult, projections: pd.DataFrame) -> None:
    """Write `figures/*.png` and `.pdf`, and `report.html`."""
    tables = folder / "tables"
    gains = read_table(tables / "gains.csv")[0]
    probes = {}
    for source in ("answers-mean", "instructions-last"):
        table, about = read_table(tables / f"probes-{source}.csv")
        layers = [int(layer) if str(layer).isdigit() else layer for layer in table["layer"]]
        probes[source] = (table.assign(layer=layers), about)
    curves = read_table(tables / "dose_curves.csv")[0]
    chosen = {name: choice["coefficient"] for name, choice in summary["choices"].items()}
    weights = f"{Path(summary['checkpoint']).name}, {summary['weights']}"
    meta = {"weights": summary["weights"], "model_fingerprint": dose.meta["model_fingerprint"]}
    figures = {
        "dose": (
            dose_figure(curves, dose_title(curves), chosen),
            f"Validation ({weights}): every score over the coefficient, for each persona's vector, one random "
            "direction of the same norm and one vector from shuffled labels; bands are 95 % intervals over questions.",
        ),
        "gains": (
            gain_figure(gains, gain_title(gains)),
            f"Test ({weights}), one run with the chosen settings: gain in trait score, paired within questions, 95 % "
            "intervals. Over controls: the interval of a further control, and p by rank among the controls. Over "
            "coefficient 0: p of the sign-flip test, Holm-adjusted over the personas.",
        ),
        **{
            f"probes-{source}": (
                layer_profile(table, title=probe_title(table), majority=about.get("majority_accuracy")),
                f"Held-out accuracy by layer of a linear probe for the persona ({SOURCES[source]}), with shuffled "
                "labels, length and position only, and the embedding.",
            )
            for source, (table, about) in probes.items()
        },
    }
    images = {}
    for name, (figure, caption) in figures.items():
        png, _ = save_figure(figure, folder / "figures" / name, meta)
        images[caption] = png
    write_report(
        folder / "report.html",
        title="steerkit demo: three personas",
        summary=results(summary),
        opens_on=shown_first(summary),
        texts_of=f"{dose.table['prompt_id'].nunique()} validation questions",
        tables={
            f"Gains on test ({weights})": shown_gains(gains),
            f"Chosen on validation ({weights})": shown_settings(pd.DataFrame(list(summary["choices"].values()))),
            f"Means on test ({weights})": shown_means(read_table(tables / "means.csv")[0]),
            f"Settings compared on validation ({weights})": shown_settings(read_table(tables / "places.csv")[0]),
        },
        figures=images,
        sweep=dose,
        projections=projections,
        notes=notes(summary),
    )


def shown_gains(gains: pd.DataFrame) -> pd.DataFrame:
    """The gains as the report shows them; over controls with p by rank only, which 19 controls can give."""
    plain = gains["over"] == "coefficient 0"
    return pd.DataFrame(
        {
            "persona": gains["persona"].map(PERSONAS),
            "score": gains["score"].map(TITLES),
            "over": gains["over"],
            "gain [95 % interval]": _intervals(gains, "gain"),
            "questions": gains["n"],
            "controls": gains["k"].where(~plain),
            "p (sign-flip, Holm)": gains["p_holm"].where(plain).map(p_text, na_action="ignore"),
            "p by rank": gains["p_rank"].map(p_text, na_action="ignore"),
        }
    )


def shown_means(means: pd.DataFrame) -> pd.DataFrame:
    """The means as the report shows them."""
    return pd.DataFrame(
        {
            "vector": means["vector"].map(_plain_name),
            "score": means["score"].map(TITLES),
            "coefficient": means["coefficient"],
            "relative dose": means["relative_dose"],
            "mean [95 % interval]": _intervals(means, "mean"),
            "questions": means["n"],
            "controls": means["k"],
        }
    )


def shown_settings(settings: pd.DataFrame) -> pd.DataFrame:
    """Settings of validation as the report shows them."""
    plain = {"trait": "trait score", "tried": "settings compared"}
    named = settings.assign(persona=settings["persona"].map(PERSONAS), source=settings["source"].map(SOURCES))
    return named.drop(columns="weights", errors="ignore").rename(columns=plain)


def _plain_name(vector: str) -> str:
    """`steps/random` as "numbered steps: random directions"."""
    persona, _, kind = vector.partition("/")
    kinds = {"random": "random directions", "shuffled": "shuffled labels", "asked": "asked for in the prompt"}
    return f"{PERSONAS[persona]}: {kinds[kind]}" if kind else PERSONAS[persona]


def _intervals(table: pd.DataFrame, mean: str) -> list[str]:
    rows = zip(table[mean], table["low"], table["high"], strict=True)
    texts = (interval_text(float(value), float(low), float(high), 3, typographic=True) for value, low, high in rows)
    return [text.replace(", ", ",\u00a0") for text in texts]


def shown_first(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Vector, layer and coefficient of the first persona that was steered, as chosen; of the first one if none was."""
    steered = [name for name, verdict in summary["verdicts"].items() if verdict["steered"]]
    name = (steered or list(summary["verdicts"]))[0]
    choice = summary["choices"][name]
    return {"vector": name, "layer": choice["layer"], "coefficient": choice["coefficient"]}


def notes(summary: Mapping[str, Any]) -> list[str]:
    """Notes on the numbers: definitions, what was chosen where, and limits."""
    return [
        f"The weights are {summary['weights']}: the results are for these weights, not for the original checkpoint.",
        "The trait score is the share of a text's words in passages in the persona's style, found by rule (numbered "
        "lines; sentences with a word for checking; lines of code). It does not measure whether the answer is right.",
        "Right answers: texts that name the question's number, by rule, within the new tokens that were allowed.",
        "Source, layer, positions and coefficient were chosen on validation questions; the test questions were run "
        "once.",
        "Steering also acts on the last token of the prompt, since that position decides the first new token.",
        "A gain counts only if the share of repeated 4-grams rises by at most 0.10 and the perplexity under the "
        "unsteered model at most doubles (geometric mean).",
        "On test only the first control of each kind and persona has a perplexity.",
        "Tokens are shaded by the projection of the unsteered model's stream on the persona's vector; the texts of its "
        "controls are not shaded.",
        "Where whole answers are read, a probe on the embedding is as accurate: there the probe measures the style of "
        "the text, not a state of the model. At the last token of the prompt the embedding is the same for all "
        "texts, and its accuracy is at chance.",
    ]
