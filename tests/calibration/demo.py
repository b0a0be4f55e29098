"""`python -m tests.calibration.demo RUN`: random directions against random directions on the demo's model and prompts.

At each persona's frozen setting 220 random directions are swept on the test questions; each is compared with 19 others
as a vector would be. How many are flagged is the error rate on real texts. Writes docs/calibration-demo.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

import steerkit as sk
from steerkit.demo.questions import read_questions
from steerkit.demo.selection import prompt_rows, scored
from steerkit.demo.traits import PERSONAS
from steerkit.io.json import read_json
from steerkit.stats.controls import against_controls
from steerkit.stats.sign import shown_sign
from steerkit.sweeps.result import SweepResult

PAGE = Path("docs/calibration-demo.md")
DIRECTIONS, CONTROLS = 220, 19
MOVED = 0.5
"""A persona whose setting changes a smaller share of texts says little about error rates: the sum leaves it out."""
SCORES = ("trait", "rouge_l", "rouge_l_symbols", "distance", "repeated_4grams")


def swept(run: Path) -> pd.DataFrame:
    """All texts with their scores: the persona's vector and 220 random directions at its frozen setting."""
    summary = read_json(run / "summary.json")
    model, tokenizer = sk.load(summary["checkpoint"])
    splits = read_json(run / "splits.json")
    questions = [one for one in read_questions() if one.id in set(splits["test"])]
    parts = []
    for persona in PERSONAS:
        choice = summary["choices"][persona]
        vector = sk.SteeringVector.load(run / "vectors" / f"{persona}-{choice['source']}.safetensors")
        vector = vector.at(choice["layer"])
        named = {persona: vector, **sk.controls.random({persona: vector}, n=DIRECTIONS, seed=10_000)}
        result = sk.sweep(
            model,
            tokenizer,
            named,
            prompt_rows(questions),
            coefficients=[0.0, choice["coefficient"]],
            positions=choice["positions"],
            max_new_tokens=32,
            out=run / "random-directions" / persona,
        )
        parts.append(scored(SweepResult(result.table, result.meta), model, tokenizer, perplexity=False).table)
    return pd.concat(parts, ignore_index=True)


def judged(table: pd.DataFrame) -> Iterator[dict[str, object]]:
    """For each persona and score: the numbers of random directions that are flagged, and whether the vector is.

    Flagged by the interval are directions with a sign that is shown (`shown_sign`). `rule` is the demo's: that sign is
    positive, and the rank is the first. `tied`: more than half of the controls' means are equal, so that there is no
    interval, and p by rank decides. `changed`: the share of the random directions' texts that differ from the
    unsteered ones.
    """
    for persona in PERSONAS:
        mine = table[table["persona"] == persona]
        some = mine[mine["coefficient"] != 0]
        plain = mine[(mine["coefficient"] == 0) & (mine["vector"] == persona)].set_index("prompt_id")["text"]
        steered = some[some["vector"] != persona]
        changed = float((steered["text"].to_numpy() != plain.loc[steered["prompt_id"]].to_numpy()).mean())
        for score in SCORES:
            wide = some.pivot_table(index="prompt_id", columns="vector", values=score, dropna=False)
            own, random = wide[persona].to_numpy(), wide.drop(columns=persona).to_numpy()
            rng, found = np.random.default_rng(0), []
            for k in range(DIRECTIONS):
                others = rng.choice(np.delete(np.arange(DIRECTIONS), k), CONTROLS, replace=False)
                found.append(against_controls(random[:, k], random[:, others]))
            signs = [shown_sign(one.gain, one.low, one.high, one.p) for one in found]
            by_interval = sum(sign != 0 for sign in signs)
            by_rank = sum(one.p_rank <= 0.05 + 1e-9 for one in found)
            by_rule = sum(sign > 0 and one.p_rank <= 0.05 + 1e-9 for sign, one in zip(signs, found, strict=True))
            real = against_controls(own, random[:, :CONTROLS])
            yield {
                "persona": persona,
                "score": score,
                "n": len(found),
                "interval": by_interval,
                "rank": by_rank,
                "rule": by_rule,
                "tied": sum(bool(np.isnan(one.low)) for one in found),
                "changed": changed,
                "vector_by_interval": shown_sign(real.gain, real.low, real.high, real.p) != 0,
                "vector_by_rank": bool(real.p_rank <= 0.05 + 1e-9),
            }


def share(flagged: int, n: int) -> str:
    """A share with its Clopper-Pearson interval."""
    interval = stats.binomtest(flagged, n).proportion_ci()
    return f"{flagged / n:.1%} [{interval.low:.1%}, {interval.high:.1%}]"


def page(rows: pd.DataFrame, about: str) -> str:
    """The text of the page."""
    lines = [
        "# Random directions against random directions",
        "",
        f"Written by `python -m tests.calibration.demo` from {about}. At each persona's frozen setting, "
        f"{DIRECTIONS} random directions of the vector's norm were swept on the demo's test questions, and each was "
        f"compared with {CONTROLS} others, drawn at random, as the vector is: by the prediction interval of a further "
        "direction, and by rank (larger scores only). At a level of 5 %, a test that is right flags 5 %, or fewer "
        "where many directions change nothing and tie. Brackets: 95 % Clopper-Pearson intervals; comparisons share "
        "controls, so that they are not quite independent. The demo's rule needs both, on the side of larger scores. "
        "Ties: comparisons in which more than half of the controls have one mean; there is no interval there, and p by "
        "rank decides. The last columns say whether the persona's own vector is flagged.",
        "",
        "| persona | texts changed | score | random: by interval | random: by rank | random: by the demo's rule | ties "
        "| vector: by interval | vector: by rank |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.itertuples():
        own = [("no", "yes")[flag] for flag in (row.vector_by_interval, row.vector_by_rank)]
        shares = [share(flagged, row.n) for flagged in (row.interval, row.rank, row.rule)]
        cells = [row.persona, f"{row.changed:.0%}", row.score, *shares, f"{row.tied / row.n:.0%}", *own]
        lines.append(f"| {' | '.join(cells)} |")
    moved = rows[rows["changed"] >= MOVED]
    if len(moved):
        total = moved[["n", "interval", "rank", "rule", "tied", "vector_by_interval", "vector_by_rank"]].sum()
        shares = [share(int(total[name]), int(total["n"])) for name in ("interval", "rank", "rule")]
        own = [f"{int(total[name])} of {len(moved)}" for name in ("vector_by_interval", "vector_by_rank")]
        cells = [f"**all with at least {MOVED:.0%}**", "", "", *shares, f"{total['tied'] / total['n']:.0%}", *own]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.calibration.demo", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished demo")
    given = parser.parse_args()
    summary = read_json(given.run / "summary.json")
    rows = pd.DataFrame(judged(swept(given.run)))
    text = page(rows, f"a finished demo of {Path(summary['checkpoint']).name} ({summary['weights']})")
    PAGE.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
