"""Page of an analysis of your own debates: what was found, in sentences, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from analysis.inputs import Inputs
from analysis.own_plan import Analysis, names_of
from steerkit.io.files import file_name
from steerkit.io.tables import read_table
from steerkit.show.report import write_report
from steerkit.stats.format import interval_text
from steerkit.sweeps.result import SweepResult

FEW = 10
"""Number of questions below which a sentence has a warning."""
WEAK = 0.1
"""Relative dose below which steering can hardly change a text."""
NOTES = (
    "Settings are chosen on validation questions and reported on test questions. One checkpoint is one training run: "
    "intervals are over questions or over control directions, and do not cover other training seeds.",
    "Controls have the mean norm of the agents' vectors: random directions, directions with the covariance of the "
    "stream, and vectors of shuffled agent labels.",
    "A text is scored up to the next agent's tag. ROUGE-L compares it with the agent's own first text of that "
    "question; 'speaks' is 1 where the first turn carries the agent's tag; fidelity is its mean log-probability "
    "per token minus that of the other agents' texts.",
    "The paper's protocol (arXiv 2604.24881, section 4): unit vectors of the last token of each turn, added to "
    "generated positions, with the trace up to the agent's tag as context. Its area is the mean score over the "
    "strengths. A relative dose is the length of what is added, as a share of the stream's mean norm.",
    "Where a probe at the embedding or of length and position alone names the agents, higher layers may read nothing "
    "else.",
)
TWO_AGENTS = (
    "With two agents the vector of the second is minus that of the first by construction: a positive coefficient of "
    "one is a negative coefficient of the other. The second axis of the plane is the first principal component of what "
    "the turns vary by besides."
)
CAPTIONS = (
    ("steering", "Scores over the coefficient: each agent's own direction and its controls, test questions."),
    ("cosines", "Cosines between the agents' vectors."),
    ("plane", "Turns of test questions in the plane of the agents' vectors."),
    ("protocol", "The paper's protocol: area under ROUGE-L by kind of direction."),
    ("probes", "Held-out accuracy of probes of the agents' names by layer, with their controls."),
    ("separability", "Held-out accuracy of probes of the agents' names, layer chosen in training folds."),
)


def write_page(tables: Mapping[str, pd.DataFrame], inputs: Inputs, setting: Analysis, out: Path) -> Path:
    """Write `out/report.html` from the tables and figures in `out`, and return its path."""
    names = names_of(inputs)
    agents = {str(turn.agent) for turn in inputs.train[0].turns}
    swept = SweepResult.load(out / "stages" / file_name(inputs.vectors_at) / "rouge_l-none.parquet")
    page = out / "report.html"
    write_report(
        page,
        title="The agents of your debates",
        sweep=SweepResult(_named(swept.table, names), swept.meta),
        summary=sentences(tables, inputs.vectors_at, setting, names),
        tables=shown_tables(tables, names),
        figures={caption_of(path.stem): path for path in sorted((out / "figures").glob("*.png"))},
        notes=(*NOTES, TWO_AGENTS) if len(agents) == 2 else NOTES,
    )
    return page


def _named(table: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """A table with the agents' names in place of their numbers."""
    if "agent" not in table or not names:
        return table
    agents = table["agent"].astype(str)
    return table.assign(agent=agents.map(names).fillna(agents))


def protocol_doses(out: Path) -> pd.DataFrame:
    """The relative dose of each strength of the paper's protocol: stage, grid, strength, relative_dose (mean)."""
    parts = [
        read_table(path)[0].assign(stage=path.stem.rpartition("-")[0])
        for path in sorted((out / "protocol").glob("*-*.parquet"))
    ]
    columns = ["stage", "grid", "strength"]
    table = pd.concat(parts, ignore_index=True)
    return table[table["kind"] == "own"].groupby(columns, sort=False)["relative_dose"].mean().reset_index()


def sentences(
    tables: Mapping[str, pd.DataFrame], stage: str, setting: Analysis, names: Mapping[str, str] | None = None
) -> list[str]:
    """What was found at a checkpoint, one sentence per question, with the number of questions."""
    probes = tables["separability"]
    best = probes[(probes["layer"].astype(str) == "nested") & (probes["labels"] == "true") & (probes["stage"] == stage)]
    best = best[best["position"] == "last"].set_index("source")
    found = [
        f"A linear probe of the last token of a first turn names its agent with held-out accuracy "
        f"{_of(line, 'accuracy', 'accuracy_low', 'accuracy_high')} ({source}); the largest class has "
        f"{line['majority']:.2f}{_questions(line['n_groups'])}"
        for source, line in best.iterrows()
    ]
    gains = tables["gains"]
    some = gains[(gains["stage"] == stage) & (gains["score"] == "rouge_l") & ~gains["identity"].astype(bool)]
    for agent, rows in some.groupby("agent", sort=True):
        over = rows.set_index("over")
        found.append(
            f"Agent {(names or {}).get(str(agent), agent)}, not named in the prompt: its direction changes ROUGE-L to "
            f"its own text by {_of(over.loc['coefficient 0'], 'gain', 'low', 'high')} over coefficient 0, and by "
            f"{_of(over.loc['random'], 'gain', 'low', 'high')} over random directions"
            f"{_questions(over.loc['coefficient 0', 'n'])}"
        )
    return [*found, *_of_protocol(tables, stage, setting)]


def _of_protocol(tables: Mapping[str, pd.DataFrame], stage: str, setting: Analysis) -> list[str]:
    """The area of the paper's protocol, at which strengths, and whether these can show an effect."""
    table, doses = tables["protocol"], tables["protocol_doses"]
    grid = "controls" if (table["grid"] == "controls").any() else "coefficient"
    strengths = setting.protocol.control_strengths or setting.protocol.coefficients
    kind = "relative doses" if setting.protocol.control_doses is not None else "coefficients"
    lines = table[(table["stage"] == stage) & (table["score"] == "rouge_l") & (table["grid"] == grid)]
    lines = lines[lines["context"] == "tagged"].set_index("measure")
    own = lines.loc["area, own"]
    found = [
        f"The paper's protocol, {kind} 0, {', '.join(f'{one:g}' for one in strengths)}: the area under ROUGE-L is "
        f"{_of(own, 'value', 'low', 'high')}; minus that of random directions "
        f"{_of(lines.loc['area over random'], 'value', 'low', 'high')}{_questions(own['n'])}"
    ]
    used = doses[(doses["stage"] == file_name(stage)) & (doses["grid"] == grid)]["relative_dose"]
    if used.max() < WEAK:
        found.append(
            f"The largest strength of the protocol is {used.max():.1%} of the stream's mean norm: so little can hardly "
            "change a text, and a missing effect shows nothing. Set protocol.control_doses."
        )
    return found


def _questions(n: float) -> str:
    """The number of questions at the end of a sentence, with a warning where there are few."""
    few = f" Fewer than {FEW} questions: the interval is not reliable." if n < FEW else ""
    return f"; n = {n:.0f} questions.{few}"


def _of(row: pd.Series, mean: str, low: str, high: str) -> str:
    return interval_text(row[mean], row[low], row[high], 2)


def shown_tables(tables: Mapping[str, pd.DataFrame], names: Mapping[str, str]) -> dict[str, pd.DataFrame]:
    """The tables of the page by caption."""
    captions = {
        "choice": "Chosen on validation",
        "gains": "Gains on test at the chosen coefficient",
        "protocol": "The paper's protocol",
        "protocol_doses": "Relative doses of the protocol's strengths",
        "separability": "Probes of the agents' names",
        "reliability": "Reliability of the vectors",
    }
    return {caption: _named(tables[name].round(3), names) for name, caption in captions.items()}


def caption_of(name: str) -> str:
    """The caption of a figure by its file name."""
    return next((f"{text} ({name})" for start, text in CAPTIONS if name.startswith(start)), name)
