"""Checks of the scores: on texts whose agent is known, and against labels given by hand.

`python -m analysis agreement --run RUN --out ANALYSIS --labels FILE` writes 50 texts to label where FILE is missing;
afterwards it writes `agreement.csv` beside the other tables of the analysis.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.agents.contexts import first_texts
from analysis.agents.speaker import first_turn
from analysis.inputs import add_inputs, inputs_of
from steerkit.io.files import write_text
from steerkit.io.tables import write_table
from steerkit.scores.text import rouge_l
from steerkit.stats.mean import accuracy_interval
from steerkit.sweeps.result import SweepResult
from steerkit.text.traces import DebateTrace

GOLD, OTHER_QUESTION, OTHER_AGENT = "the agent's own text", "the agent, another question", "another agent"
NO_AGENT = "0"
"""The label of a text that is no agent's."""


def known_texts(
    traces: Sequence[DebateTrace], openings: Sequence[str], rouge_tokenizer: str | None = None
) -> pd.DataFrame:
    """The scores on texts whose agent is known, a row per kind of text.

    Args:
        traces: at least two debates.
        openings: for each agent what its texts begin with.
        rouge_tokenizer: tokenizer of ROUGE-L; None is `rouge_score`.

    Returns:
        Columns text, rouge_l and speaks (means over agents and questions), n. A good score has 1 and 1 on the first
        kind, less ROUGE-L and speaks 1 on the second, less ROUGE-L and speaks 0 on the third.
    """
    rows = []
    words: Any = rouge_tokenizer or "rouge_score"
    for trace, next_trace in zip(traces, [*traces[1:], traces[0]], strict=True):
        own, other = first_texts(trace), first_texts(next_trace)
        agents = sorted(own)
        for agent, next_agent in zip(agents, [*agents[1:], agents[0]], strict=True):
            texts = {GOLD: own[agent], OTHER_QUESTION: other.get(agent), OTHER_AGENT: own[next_agent]}
            for kind, text in texts.items():
                if text is None or (kind == OTHER_AGENT and agent == next_agent):
                    continue
                (score,) = rouge_l([text], [own[agent]], words)
                speaks = str(first_turn(text, openings).agent) == agent if openings else np.nan
                rows.append({"text": kind, "rouge_l": score, "speaks": float(speaks)})
    table = pd.DataFrame(rows).groupby("text", sort=False)
    return table.mean().assign(n=table.size()).reset_index()


def texts_to_label(folders: Mapping[str, Path], n: int = 50, seed: int = 0) -> pd.DataFrame:
    """Different continuations of the frozen settings, as many of each checkpoint, in random order, without a name.

    Args:
        folders: checkpoint -> its folder of the analysis `agents`.
        n: number of texts.
        seed: of the draw.

    Returns:
        Columns id, text (tags included) and label, which is empty.
    """
    rng = random.Random(seed)
    drawn: list[str] = []
    for number, folder in enumerate(folders.values()):
        table = SweepResult.load(folder / "rouge_l-none-frozen.parquet").table
        steered = table[table["coefficient"] != 0]
        pool = sorted({str(text) for text in steered["whole"].dropna()} - set(drawn))
        share = n * (number + 1) // len(folders) - n * number // len(folders)
        drawn += rng.sample(pool, min(share, len(pool)))
    rng.shuffle(drawn)
    return pd.DataFrame({"id": range(len(drawn)), "text": drawn, "label": ""})


def agreement(labels: pd.DataFrame, openings: Sequence[str]) -> pd.DataFrame:
    """How often the rule for the first speaker and the hand agree.

    Args:
        labels: columns text and label: the number of the agent that speaks first, "0" if no agent speaks.
        openings: for each agent what its texts begin with.

    Returns:
        One row: agree, low, high (Wilson's interval), kappa (Cohen's), n, and by_hand (how often each label was given).
    """
    hand = labels["label"].astype(str).to_numpy()
    rule = np.array([str(first_turn(text, openings).agent or NO_AGENT) for text in labels["text"]])
    equal = hand == rule
    interval = accuracy_interval(equal.astype(float))
    chance = sum(float((hand == name).mean() * (rule == name).mean()) for name in set(hand) | set(rule))
    kappa = (equal.mean() - chance) / (1 - chance) if chance < 1 else float("nan")
    counts = pd.Series(hand).value_counts().sort_index()
    by_hand = " ".join(f"{name}:{count}" for name, count in counts.items())
    line = {"agree": equal.mean(), "low": interval.low, "high": interval.high, "kappa": kappa, "n": len(hand)}
    return pd.DataFrame([{**line, "by_hand": by_hand}])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis agreement", description=__doc__)
    add_inputs(parser)
    parser.add_argument("--labels", type=Path, required=True, help="CSV with id, text and label")
    given = parser.parse_args(arguments)
    inputs = inputs_of(given, parser, ())
    if not given.labels.exists():
        folders = {path.name: path for path in sorted((given.out / "stages").iterdir())}
        write_text(given.labels, texts_to_label(folders).to_csv(index=False))
        print(f"Write the agent that speaks first ({NO_AGENT}: none) into the column label of {given.labels}.")
        return
    labels = pd.read_csv(given.labels, dtype={"label": str}, keep_default_na=False)
    if (missing := int((labels["label"] == "").sum())) > 0:
        parser.error(f"expected a label for every text of {given.labels}; {missing} have none. Fill them in.")
    table = agreement(labels, inputs.openings)
    write_table(given.out / "agreement.csv", table, {"labels": given.labels.name})
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
