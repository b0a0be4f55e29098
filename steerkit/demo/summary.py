"""The demo's summary, printed in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from steerkit.demo.traits import PERSONAS
from steerkit.stats.format import interval_text, p_text
from steerkit.stats.sign import shown_sign

LEVEL = 0.05
"""The largest p at which a gain is shown."""


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """One paragraph per persona: the verdict, the results on test and the settings chosen on validation."""
    paragraphs = []
    for persona, verdict in summary["verdicts"].items():
        choice = summary["choices"][persona]
        word = "steered" if verdict["steered"] else "not steered"
        reason = "" if verdict["steered"] else _reason(verdict)
        extent = "its first four positions" if choice["positions"].endswith(":4") else "all its positions"
        paragraphs.append(
            f"{PERSONAS[persona].capitalize()}: {word}{reason}. Trait {verdict['trait_unsteered']:.2f} -> "
            f"{verdict['trait_steered']:.2f} ({verdict['trait_when_asked']:.2f} when the prompt asks for it); gain "
            f"over coefficient 0 {_gain(verdict, 'zero')}, over random directions "
            f"{_gain(verdict, 'random')}, over shuffled labels "
            f"{_gain(verdict, 'shuffled')}; layer {choice['layer']}, coefficient "
            f"{choice['coefficient']:g} (relative dose {verdict['relative_dose']:.2f}) on the last prompt "
            f"token and the answer, {extent}; vector: {choice['source']}; repetition {_change(verdict['repetition'])}, "
            f"perplexity {_change(verdict['perplexity'])}; right answers {_change(verdict['right'])}, kept "
            f"{interval_text(*verdict['right_kept'])}."
        )
    return paragraphs


def results(summary: Mapping[str, Any]) -> pd.DataFrame:
    """A column per persona: verdict, trait, gains with intervals, cost, and the setting chosen on validation."""
    rows = []
    for persona, verdict in summary["verdicts"].items():
        choice = summary["choices"][persona]
        rows.append(
            {
                "persona": PERSONAS[persona],
                "verdict": "steered" if verdict["steered"] else f"not steered{_reason(verdict)}",
                "trait score: unsteered \u2192 steered": _change(
                    [verdict["trait_unsteered"], verdict["trait_steered"]]
                ),
                "trait score when the prompt asks": f"{verdict['trait_when_asked']:.2f}",
                "gain over coefficient 0": _gain(verdict, "zero"),
                "gain over random directions": _gain(verdict, "random"),
                "gain over shuffled labels": _gain(verdict, "shuffled"),
                "right answers": _change(verdict["right"]),
                "perplexity": _change(verdict["perplexity"]),
                "repeated 4-grams": _change(verdict["repetition"]),
                "setting": f"layer {choice['layer']}, coefficient {choice['coefficient']:g} "
                f"(relative dose {verdict['relative_dose']:.2f}), {choice['positions']}",
            }
        )
    table = pd.DataFrame(rows).replace(" -> ", " \u2192 ", regex=True)
    return table.set_index("persona").rename_axis(None).T.rename_axis("on test")


def _gain(verdict: Mapping[str, Any], over: str) -> str:
    mean, low, high = verdict[f"gain_over_{over}"]
    return interval_text(mean, low, high, 2)


def _change(values: list[float]) -> str:
    return "{:.2f} -> {:.2f}".format(*values)


def unmet(gains: pd.DataFrame) -> list[str]:
    """The conditions on the trait gains of one persona that do not hold, in words; see `steerkit.demo.run.verdict`.

    Args:
        gains: its rows of the demo's `gains`, of the trait score.
    """
    rows = gains.to_dict("records")
    below = [row["over"] for row in rows if shown_sign(row["gain"], row["low"], row["high"], row["p"]) <= 0]
    found = [f"the gain over {', '.join(below)} is not shown to be above zero"] if below else []
    for row in rows:
        name, p = ("p (Holm)", row["p_holm"]) if row["over"] == "coefficient 0" else ("p by rank", row["p_rank"])
        if row["over"] not in below and not p <= LEVEL + 1e-9:
            found.append(f"{name} of the gain over {row['over']} is {p_text(p)}")
    return found


def _reason(verdict: Mapping[str, Any]) -> str:
    """What `verdict` says is missing, in brackets; and whether the model shows the trait at all."""
    asked = ["the model does not show the trait even when the prompt asks for it"]
    return f" ({'; '.join([verdict['unmet'], *(asked if verdict['trait_when_asked'] < 0.1 else [])])})"


def print_summary(summary: Mapping[str, Any], out: Path) -> None:
    """Print the table, the paragraphs and the paths of the files."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    title = f"{Path(summary['checkpoint']).name} ({summary['weights']}), n = {summary['n_test']}, 95 % intervals"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in ("persona", "trait", "gain over 0", "over random", "steered"):
        table.add_column(column, no_wrap=True)
    for persona, verdict in summary["verdicts"].items():
        table.add_row(
            persona,
            f"{verdict['trait_unsteered']:.2f} -> {verdict['trait_steered']:.2f}",
            _gain(verdict, "zero"),
            _gain(verdict, "random"),
            "yes" if verdict["steered"] else "no",
        )
    console.print(table)
    for sentence in sentences(summary):
        console.print(f"- {sentence}", highlight=False)
    console.print(f"Report {out / 'report.html'}, figures {out / 'figures'}, tables {out / 'tables'}.", highlight=False)
