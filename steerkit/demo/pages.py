"""The demo's figures and its page, drawn from its tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from steerkit.demo.contrasts import SOURCES
from steerkit.demo.questions import PERSONAS
from steerkit.demo.summary import sentences
from steerkit.io.tables import read_table
from steerkit.show.plots import curve_grid, intervals, layer_profile, save_figure
from steerkit.show.report import write_report
from steerkit.sweeps.result import SweepResult

AXES = {
    "trait": "trait score",
    "rouge_l_symbols": "ROUGE-L",
    "repeated_4grams": "repeated 4-grams",
    "perplexity": "perplexity",
}
CONTROLS = ("random-0", "shuffled")


def draw(
    folder: Path, summary: Mapping[str, Any], dose: SweepResult, test: SweepResult, projections: pd.DataFrame
) -> None:
    """Write `figures/*.png` and `.pdf`, and `report.html`."""
    tables = folder / "tables"
    gains, probes = pd.read_csv(tables / "gains.csv"), {}
    for source in ("answers-mean", "instructions-last"):
        table, found = read_table(tables / f"probes-{source}.csv")
        layers = [int(layer) if str(layer).isdigit() else layer for layer in table["layer"]]
        probes[source] = (table.assign(layer=layers), found)
    weights = f"{Path(summary['checkpoint']).name}, {summary['weights']}"
    meta = {"weights": summary["weights"], "model_fingerprint": dose.meta["model_fingerprint"]}
    figures = {
        "dose": (
            curve_grid(
                dose_panels(dose), "coefficient", controls=CONTROLS, log=["perplexity"], title=f"validation, {weights}"
            ),
            "Validation: every score over the coefficient, for each persona's vector, one random direction of the same "
            "norm and the shuffled-label direction; bands are 95 % intervals over questions.",
        ),
        "gains": (
            intervals(gain_rows(gains), "gain in trait score on test", title=f"test, {weights}"),
            "Test, one run with everything frozen: gain in trait score, paired within questions, 95 % intervals; over "
            "random directions the directions are resampled too; p is Holm-adjusted over the personas.",
        ),
        **{
            f"probes-{source}": (
                layer_profile(table, title=SOURCES[source], majority=found.get("majority_accuracy")),
                f"Which manner is it? Held-out accuracy of a linear probe by layer ({SOURCES[source]}), with shuffled "
                "labels, length and position only, and the embedding.",
            )
            for source, (table, found) in probes.items()
        },
    }
    shown = {}
    for name, (figure, caption) in figures.items():
        png, _ = save_figure(figure, folder / "figures" / name, meta)
        shown[caption] = png
    write_report(
        folder / "report.html",
        title="steerkit demo: three personas",
        summary=sentences(summary),
        tables={
            f"Gains on test ({weights})": gains.drop(columns=["weights"]),
            f"Frozen on validation ({weights})": pd.DataFrame(list(summary["choices"].values())),
            f"Means on test ({weights})": pd.read_csv(tables / "means.csv").drop(columns=["weights"]),
            f"Settings compared on validation ({weights})": pd.read_csv(tables / "places.csv").drop(
                columns=["weights"]
            ),
        },
        figures=shown,
        sweep=dose,
        projections=projections,
        notes=notes(summary),
    )


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What the numbers mean, and what they do not."""
    return [
        f"The weights are {summary['weights']}: the figures are of those weights, not of the original checkpoint.",
        "The trait score is the share of a text's words that stand in the persona's manner, by rule (numbered lines; "
        "sentences with a word of checking; lines of code). It says nothing about whether the answer is right.",
        "Source, layer, extent and coefficient were chosen on validation questions; the test questions were run once.",
        "Steering acts on the last token of the prompt too, since that position decides the first new token.",
        "A gain counts only if the share of repeated 4-grams rises by at most 0.10 and the perplexity under the "
        "unsteered model at most doubles (geometric mean).",
        "Of the random directions on test only the first has a perplexity.",
        "Tokens are shaded by the projection of the unsteered model's stream on the persona's vector; the texts of its "
        "controls are not.",
        "The probes read the manner from the tokens alone (embedding) as well where whole answers are read: there a "
        "probe shows the style of the text, not a state of the model. At the last token of the prompt the embedding "
        "is the same for all, and is at chance.",
    ]


def dose_panels(dose: SweepResult) -> dict[str, dict[str, pd.DataFrame]]:
    """Score -> persona -> curves of the vector and its two controls, named alike in every panel."""
    panels: dict[str, dict[str, pd.DataFrame]] = {}
    for score, label in AXES.items():
        curve = dose.curve(score)
        persona, _, control = (curve["vector"].str.partition("/")[i] for i in range(3))
        curve = curve.assign(persona=persona, vector=control.where(control != "", "persona's vector"))
        panels[label] = {
            title: curve[curve["persona"] == name].drop(columns="persona") for name, title in PERSONAS.items()
        }
    return panels


def gain_rows(gains: pd.DataFrame) -> pd.DataFrame:
    """The trait's gains as rows of a forest plot."""
    rows = gains[gains["score"] == "trait"]
    return pd.DataFrame(
        {
            "name": rows["persona"].map(PERSONAS),
            "comparison": "over " + rows["over"],
            **{key: rows[key] for key in ("gain", "low", "high", "n")},
            "p": rows["p_holm"],
        }
    ).reset_index(drop=True)
