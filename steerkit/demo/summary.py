"""The demo's summary, in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerkit.demo.questions import PERSONAS


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """One sentence per persona: what was frozen, what came of it on test, and the verdict."""
    found = []
    for persona, verdict in summary["verdicts"].items():
        choice = summary["choices"][persona]
        word = "steered" if verdict["steered"] else "not steered"
        why = "" if verdict["steered"] else _why_not(verdict)
        extent = "its first four positions" if choice["positions"].endswith(":4") else "all its positions"
        found.append(
            f"{PERSONAS[persona].capitalize()}: {word}{why}. Trait {verdict['trait_unsteered']:.2f} -> "
            f"{verdict['trait_steered']:.2f} ({verdict['trait_when_asked']:.2f} when simply asked for); gain over "
            f"coefficient 0 {_interval(verdict['gain_over_zero'])}, over random directions "
            f"{_interval(verdict['gain_over_random'])}, over shuffled labels "
            f"{_interval(verdict['gain_over_shuffled'])}; layer {choice['layer']}, coefficient "
            f"{choice['coefficient']:g} (relative dose {verdict['relative_dose']:.2f}) on the last prompt "
            f"token and the answer, {extent}; vector: {choice['source']}; repetition {_change(verdict['repetition'])}, "
            f"perplexity {_change(verdict['perplexity'])}."
        )
    return found


def _interval(values: list[float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*values)


def _change(values: list[float]) -> str:
    return "{:.2f} -> {:.2f}".format(*values)


def _why_not(verdict: Mapping[str, Any]) -> str:
    if verdict["trait_when_asked"] < 0.1:
        return " (this model does not show it even when it is asked to)"
    if not verdict["fluent"]:
        return " (only in text that repeats itself or has lost its fluency)"
    return " (a gain is not clear of zero)"


def print_summary(summary: Mapping[str, Any], out: Path) -> None:
    """Print the table, the sentences and where the files are."""
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
            _interval(verdict["gain_over_zero"]),
            _interval(verdict["gain_over_random"]),
            "yes" if verdict["steered"] else "no",
        )
    console.print(table)
    for sentence in sentences(summary):
        console.print(f"- {sentence}", highlight=False)
    console.print(f"Page {out / 'report.html'}, figures {out / 'figures'}, tables {out / 'tables'}.", highlight=False)
