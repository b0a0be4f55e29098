"""`python -m figures.pages`: draw the pictures and write the generated tables of README and docs, from `results/`.

It needs matplotlib and pandas, no torch; equal tables give equal bytes.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from figures import agents, debate, debate_tables, dose, growth, recipes, suppression
from figures.numbers import GENERATED, regenerate
from steerkit.demo.figures import dose_figure, dose_title, gain_figure, gain_title
from steerkit.demo.traits import PERSONAS
from steerkit.io.files import write_text
from steerkit.io.json import read_json
from steerkit.io.markdown import markdown_table
from steerkit.io.tables import read_table
from steerkit.show.plots import curve_grid, patching, save_figure
from steerkit.stats.format import interval_text, p_text
from steerkit.stats.sign import shown_sign

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
HALF = 0.5
"""Effect of a patch from which on a title says that the answer depends on a position."""
Drawn = tuple[Any, Mapping[str, Any]]


def _read(name: str, folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    return read_table(folder / f"{name}.csv")


def _demo_gains(folder: Path) -> Drawn:
    table, meta = _read("demo/gains", folder)
    return gain_figure(table, gain_title(table)), meta


def _demo_dose(folder: Path) -> Drawn:
    table, meta = _read("demo/dose_curves", folder)
    chosen = _read("demo/verdicts", folder)[0].set_index("persona")["coefficient"]
    return dose_figure(table, dose_title(table), chosen.to_dict()), meta


def _tutorial(folder: Path) -> Drawn:
    table, meta = _read("tutorial/curves", folder)
    place = f"layer {table['layer'].iloc[0]}"
    units = {"mood": "cheerful minus\ngloomy words\nper text", "perplexity": "perplexity"}
    panels = {units[str(score)]: {place: part} for score, part in table.groupby("score", sort=False)}
    title = "Steering adds cheerful words, random directions do not"
    return curve_grid(panels, "coefficient", controls=["cheerful/random"], title=title, log=["perplexity"]), meta


def _from_table(name: str, draw: Callable[[pd.DataFrame], Any], folder: Path) -> Drawn:
    table, meta = _read(name, folder)
    return draw(table), meta


def _growth(folder: Path) -> Drawn:
    stored = read_json(folder / "speed" / "growth.json")
    return growth.growth(pd.DataFrame(stored["rows"])), {"date": stored["date"]}


def _dose(folder: Path) -> Drawn:
    curves, meta = _read("demo/dose_curves", folder)
    means, _ = _read("demo/means", folder)
    controls, _ = _read("demo/controls", folder)
    own = means[(means["score"] == "trait") & (means["coefficient"] != 0)].set_index("vector").loc["steps", "mean"]
    others = controls.loc[controls["persona"] == "steps", "trait"]
    below = int((others < own).sum())
    share = f"each of {below}" if below == len(others) else f"{below} of {len(others)}"
    title = f"Steering adds numbered lists, more than {share} control directions"
    return dose.dose_with_controls(curves, means, controls, "steps", title), meta


def _protocols(folder: Path) -> Drawn:
    found = {family: _read(f"miniature/{family}/protocol", folder) for family in ("clues", "malice")}
    return debate.protocol_areas({family: table for family, (table, _) in found.items()}), found["clues"][1]


def _caa(axis: str, folder: Path) -> Drawn:
    found = recipes.measured("caa", f"by_{axis}", folder)
    tables = {model: table for model, (table, _) in found.items()}
    return recipes.caa_curves(tables, axis), {model: meta for model, (_, meta) in found.items()}


def _fact_recall(folder: Path) -> Drawn:
    table, meta = _read("patching/fact_recall", folder)
    denoising = table[(table["mode"] == "denoising") & (table["method"] == "exact")]
    stream = denoising[denoising["site"] == "resid_post"].set_index(["position", "layer"])["effect"]
    subject = int(stream["country"].loc[lambda effect: effect > HALF].index.max())
    last = int(stream["last (of)"].loc[lambda effect: effect > HALF].index.min())
    title = f"The answer depends on the country's position up to layer {subject},\non the last one from layer {last}"
    return patching(denoising, "resid_post", title), meta


PICTURES: Mapping[str, Callable[[Path], Drawn]] = {
    "docs/dose.png": _dose,
    "docs/demo-gains.png": _demo_gains,
    "docs/demo-dose.png": _demo_dose,
    "docs/tutorial-curves.png": _tutorial,
    "docs/agents-read.png": lambda folder: _from_table("miniature/clues/separability", agents.separability, folder),
    "docs/agents-steered.png": lambda folder: _from_table(
        "miniature/clues/curves", lambda table: agents.steering_curves(table, "base", False), folder
    ),
    "docs/agents-suppressed.png": lambda folder: _from_table(
        "miniature/malice/suppression_curves", lambda table: suppression.suppression_curves(table, "forced"), folder
    ),
    "docs/agents-suppressed-smollm2.png": lambda folder: _from_table(
        "smollm2/malice/suppression_curves", lambda table: suppression.suppression_curves(table, "forced"), folder
    ),
    "docs/debate-controls.png": lambda folder: _from_table("miniature/main_table", debate.accuracy_by_seed, folder),
    "docs/protocol-areas.png": _protocols,
    "docs/caa-by-layer.png": partial(_caa, "layer"),
    "docs/caa-by-dose.png": partial(_caa, "dose"),
    "docs/fact-recall.png": _fact_recall,
    "benchmarks/growth.png": _growth,
}
"""Picture, below the root of the project -> what draws it from the tables of `results/`."""


def _interval(row: Any, names: tuple[str, str, str] = ("gain", "low", "high"), digits: int = 2) -> str:
    mean, low, high = (row[name] if isinstance(row, pd.Series) else getattr(row, name) for name in names)
    return interval_text(mean, low, high, digits)


RANKED = {"random": "random directions", "shuffled": "shuffled labels"}
"""Kind of controls in the demo's verdicts -> its name in the demo's gains."""


def _trait_ranks(folder: Path) -> pd.Series:
    """The p by rank of the demo's trait scores, by persona and kind of controls."""
    gains, _ = _read("demo/gains", folder)
    ranks: pd.Series = gains[gains["score"] == "trait"].set_index(["persona", "over"])["p_rank"]
    return ranks


def demo_table(folder: Path) -> str:
    """The demo's verdicts, one row per persona."""
    table, _ = _read("demo/verdicts", folder)
    ranks = _trait_ranks(folder)
    rows = [
        [
            PERSONAS[row.persona],
            f"{row.trait_unsteered:.2f} -> {row.trait_steered:.2f} ({row.trait_when_asked:.2f})",
            *(
                _interval(row, (f"gain_over_{over}", f"gain_over_{over}_low", f"gain_over_{over}_high"))
                + (f", {p_text(ranks[row.persona, RANKED[over]])}" if over in RANKED else "")
                for over in ("zero", "random", "shuffled")
            ),
            f"{row.right_unsteered:.2f} -> {row.right_steered:.2f}",
            f"{row.perplexity_unsteered:.1f} -> {row.perplexity_steered:.1f}",
            "yes" if row.steered else "no",
        ]
        for row in table.itertuples()
    ]
    trait = "trait score: unsteered -> steered (in brackets: unsteered, with a prompt that asks for the style)"
    header = ("persona", trait)
    controls = ("coefficient 0", "random directions, p by rank", "shuffled labels, p by rank")
    over = (f"gain over {control}" for control in controls)
    return markdown_table((*header, *over, "right answers", "perplexity", "counts as steered"), rows)


def demo_texts(folder: Path) -> str:
    """The demo's first three test texts of numbered steps, unsteered and steered, with trait score and correctness."""
    table, _ = _read("demo/texts", folder)
    rows = [
        [row.question, _as_cell(row.text_unsteered), _as_cell(row.text_steered), f"{row.trait_steered:.2f}",
         " to ".join("right" if value else "wrong" for value in (row.right_unsteered, row.right_steered))]
        for row in table[table["persona"] == "steps"].itertuples()
    ]  # fmt: skip
    header = ("question", "unsteered", "steered", "trait score, steered", "answer: unsteered to steered")
    return markdown_table(header, rows)


def demo_texts_short(folder: Path) -> str:
    """README's part of `demo_texts`: the steered texts with trait score and correctness."""
    table, _ = _read("demo/texts", folder)
    rows = [
        [row.question, _as_cell(row.text_steered), f"{row.trait_steered:.2f}", row.answer,
         "yes" if row.right_steered else "no"]
        for row in table[table["persona"] == "steps"].itertuples()
    ]  # fmt: skip
    header = ("question", "text, steered to numbered steps", "trait score", "right answer", "is it in the text?")
    return markdown_table(header, rows)


def _as_cell(text: str) -> str:
    """A text in a cell of a table: line breaks are kept, and nothing in it is Markdown or HTML."""
    for sign, written in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        ("|", "&#124;"),
        ("*", "&#42;"),
        ("_", "&#95;"),
        ("`", "&#96;"),
    ):
        text = text.replace(sign, written)
    return text.strip().replace("\n", "<br>")


def dose_table(folder: Path) -> str:
    """README's sweep: the gain in words at each dose, over dose 0 and over random directions."""
    table, _ = _read("readme/gains", folder)
    zero, random = (table[table["over"] == over].set_index("dose") for over in ("coefficient 0", "random"))
    rows = [
        [f"{at:g}", _interval(zero.loc[at]), _interval(random.loc[at]), p_text(random.loc[at, "p_rank"])]
        for at in zero.index
        if at
    ]
    header = ("dose", "listed words per text, gain over dose 0", "gain over the mean of 19 random directions")
    return markdown_table((*header, "p by rank"), rows)


def sizes_table(folder: Path) -> str:
    """Memory and time of a sweep by model size: measured on a CPU, estimated for a GPU."""
    table, _ = _read("readme/sizes", folder)
    sweep = read_json(folder / "speed" / "sweep.json")["rows"]
    line = next(row for row in sweep if "the same 72 rows" in row["against"] and "may end" not in row["job"])
    peak = read_json(folder / "speed" / "footprint.json")["rows"][0]["ours"] / 1024
    memory = f"{peak:.1f} (measured in a sweep of 128 texts x 16 tokens)"
    rows = [
        ["SmolLM2-135M", "2 CPU cores", "float32", memory, f"{line['ours']:.1f} (measured, 72 texts x 64 tokens)", ""]
    ]
    for row in table.itertuples():
        dtype, flag = ("bfloat16", "") if row.bits == 16 else ("4 bits", "`bits=4` (`--bits 4`)")
        seconds = f"not estimated for {dtype}" if pd.isna(row.seconds) else f"at least {row.seconds:.1f} (estimated)"
        memory = f"{row.memory_gib:.0f} (estimated)"
        rows.append([row.model, f"1 {row.device.upper()}", dtype, memory, seconds, flag])
        if row.memory_gib > 80:
            rows[-1][1], rows[-1][5] = "2 H100", '`device="auto"` (`--device auto`)'
            rows[-1][4] = "not estimated for 2 GPUs"
    return markdown_table(("model", "machine", "weights", "memory, GiB", "seconds", "option"), rows)


ASKED = {
    "can steer the new tokens only; the text is the same with and without a key-value cache": "restricts steering to "
    "the new tokens, and then gives the same text with and without a key-value cache",
}
"""Question of the stored comparison -> how the pages say it."""


def comparison_table(folder: Path) -> str:
    """What packages do, in their versions; the answers are those of `python -m tests.comparison`."""
    table, _ = _read("comparison/cells", folder)
    table = table.assign(question=table["question"].replace(ASKED))
    packages = table.drop_duplicates("package")
    header = ("", *(f"{row.package} {row.version}" for row in packages.itertuples()))
    rows = [
        [str(question), *(f"**{answer}**" if answer == "yes" else str(answer) for answer in part["answer"])]
        for question, part in table.groupby("question", sort=False)
    ]
    return markdown_table(header, rows)


HOLDS, FAILS, NOT_SHOWN = "holds", "does not hold", "not shown"
"""Verdicts, see docs/glossary.md."""


def _verdict(sign: int) -> str:
    """The verdict on an effect by its sign, 0 where none is shown."""
    return {1: HOLDS, -1: FAILS, 0: NOT_SHOWN}[sign]


def findings_table(folder: Path) -> str:
    """What was found, negative results included: claim, result, n, training seeds, verdict."""
    verdicts, meta = _read("demo/verdicts", folder)
    controls, _ = _read("demo/controls", folder)
    ranks = _trait_ranks(folder)
    rows = []
    for row in verdicts.itertuples():
        best = controls.loc[controls["vector"].str.startswith(f"{row.persona}/shuffled"), "trait"].max()
        random, shuffled = (
            _interval(row, (f"gain_over_{kind}", f"gain_over_{kind}_low", f"gain_over_{kind}_high")) for kind in RANKED
        )
        p_random, p_shuffled = (p_text(ranks[row.persona, name]) for name in RANKED.values())
        result = (
            f"unsteered -> steered: trait score {row.trait_unsteered:.2f} -> {row.trait_steered:.2f}; {random} above "
            f"the mean of random directions (p by rank {p_random}), {shuffled} above the mean of vectors from shuffled "
            f"labels (p by rank {p_shuffled}; the best of these has the score {best:.2f}); right answers "
            f"{row.right_unsteered:.2f} -> {row.right_steered:.2f}; "
            f"perplexity {row.perplexity_unsteered:.1f} -> {row.perplexity_steered:.1f}"
        )
        claim = f"[demo](docs/demo.md): steering raises the trait score of {PERSONAS[row.persona]}"
        rows.append([claim, result, str(meta["n_test"]), "", HOLDS if row.steered else NOT_SHOWN])
    effects, _ = _read("recipes/conditional/effects", folder)
    gain = effects.set_index(["quantity", "task"]).loc["conditional over random", "question"]
    fired = _read("recipes/conditional/rates", folder)[0].set_index("task")["rate"]
    result = (
        "trait score of numbered steps on questions (the vector was computed from 48 other questions, that of the demo "
        f"from 64): {_interval(gain, ('mean', 'low', 'high'))} above the mean of random directions "
        f"(p by rank {p_text(gain['p_rank'])}); condition met by {fired['question']:.0%} of the questions "
        f"and {fired['repeat']:.0%} of the prompts of the second task"
    )
    claim = (
        "[condition](docs/concepts/conditions.md): a vector that is added only if the prompt's stream meets a "
        "condition changes the answers to questions. It changes no output of a second task (repeat a text)"
    )
    spared = fired["repeat"] == 0
    holds = _verdict(shown_sign(*gain[["mean", "low", "high", "p_rank"]])) if spared else FAILS
    rows.append([claim, result, f"{gain['n']:.0f}", "", holds])
    judges = []
    for judge, (table, _) in recipes.measured("judge", "agreement", folder).items():
        one = table.iloc[0]
        given = recipes.measured("judge", "texts", folder)[judge][0]["score"].dropna().unique()
        area = _interval(one, ("roc_auc", "roc_auc_low", "roc_auc_high"))
        result = f"{judge}: ROC AUC {area}, {one.n_unread:.0f} of {one.n:.0f} answers without a number"
        result += f", each number is {given[0]:g}" if len(given) == 1 else ""
        sign = int(one.roc_auc_low > 0.5) - int(one.roc_auc_high < 0.5)
        judges.append((judge, result, f"{one.n:.0f}", _verdict(sign)))
    if judges:
        claim = (
            f"[judge](docs/concepts/scores.md): {' and '.join(one[0] for one in judges)} as judges give cheerful texts "
        )
        claim += "higher numbers than other texts"
        verdicts = [one[3] for one in judges]
        shown = verdicts[0] if len(set(verdicts)) == 1 else "; ".join(f"{one[0]} {one[3]}" for one in judges)
        counts = ", ".join(dict.fromkeys(one[2] for one in judges))
        measured = "; ".join(one[1] for one in judges)
        measured += "; brackets: 95 % interval over texts; it must be above 0.5, the value of random numbers"
        rows.append([claim, measured, counts, "", shown])
    header = ["claim", "result", "test questions or texts", "training seeds", "verdict"]
    rows += _training_findings(folder)
    if not any(row[3] for row in rows):
        header, *rows = ([*row[:3], row[4]] for row in (header, *rows))
    return markdown_table(header, rows)


FOUND = {
    "IMAD needs fewer tokens than Debate": "IMAD needs at least 10 % fewer tokens than Debate, prompts included",
    "IMAD is as accurate as Debate, or at most 3 points below": "the accuracy of IMAD is at most 3 points below that "
    "of Debate",
    "training on debates before GRPO gives a higher accuracy than GRPO alone (control: other trainings)": "IMAD is "
    "more accurate than GRPO alone (no SFT on debates). A third training is the control: SFT on only the answers of "
    "the debates, then the same GRPO",
    "the paper's protocol: the agents' directions add more after IMAD": "adding an agent's direction (mean stream at "
    "the last token of its turns minus that of the other agents' turns) raises the ROUGE-L of the model's text to this "
    "agent's turn in the debate on the same question. The increase in IMAD minus that in the base (the model "
    "before SFT and GRPO) is at least 0.02",
    "IMAD's answer depends on the first round that it writes": "IMAD's answer depends on the first round in its text. "
    "Measure: share of answers that change if this round is replaced by that of a text on another question, minus "
    "the share that change if the model's own first round is kept and the rest is generated again",
    "the paper's experiment: the base's vector removes the malicious trait from IMAD's texts": "the vector of the "
    "malicious trait, read in the base (the model before SFT and GRPO) and subtracted in IMAD, removes this trait",
}
"""Claims about training that README shows -> how it says them; the pages of results have all claims."""
IN_WORDS = {
    r" % \((\d+) against (\d+) tokens\)": r" % fewer (\1 instead of \2)",
    r"(.+) \(IMAD - Debate, plurality\)": r"IMAD minus Debate \1",
    r"(.+) \(IMAD - GRPO without debate\)": r"IMAD minus GRPO alone \1",
    r"GRPO without debate was not run": "GRPO alone was not run",
    r"^(\S+ \[\S+, \+1\.\d+\])$": r"\1 (not cut at 1, the largest difference of two shares)",
    r"^trait ([\d.]+), fall ": r"the share of texts with the trait is \1 unsteered, and falls by ",
}
"""Pattern of a measurement in the claims' table -> how README says it."""
REASONS = {
    r"planted directions over random (\+[\d.]+ \[(?:-[\d.]+|\+0\.0[01]\d*), \+[\d.]+\])": r". In FAMILY the method "
    r"fails its check. In the check, a copy of the base is trained to write an agent's turn when a given direction is "
    r"added. All of the interval of this direction's gain in ROUGE-L over random ones must be at least +0.02; the gain "
    r"is \1",
    r"up to (5[1-9]|[6-9]\d|100)% of the answers were not read": r". In FAMILY the method fails its check. The check "
    r"is the same replacement in the texts of Debate: at most 50 % of them may then be without an answer, but \1 % are",
}
"""Pattern of a check that fails in the claims' table -> how README gives the reason of `not testable here`."""
CONTROL = re.compile(r"(.+) points over DebateGPT \+ GRPO")
"""The control of a claim that holds and is not specific, in the claims' table."""


def _training_findings(folder: Path) -> list[list[str]]:
    """The judged claims about training in `folder`, a row per claim, with the verdicts of their page of results."""
    rows = []
    for preset, page in (("miniature", "results"), ("smollm2", "results-smollm2")):
        try:
            judged, _ = _read(f"{preset}/claims", folder)
        except FileNotFoundError:
            continue
        of_claim: dict[str, list[Any]] = {}
        for row in judged.itertuples():
            family, _, claim = str(row.name).partition(": ")
            if claim in FOUND and row.ours:
                of_claim.setdefault(FOUND[claim], []).append((family, row))
        for claim, parts in of_claim.items():
            units = {family: row.unit for family, row in parts if row.unit.endswith(" training seeds")}
            number = {family: unit.removesuffix(" training seeds") for family, unit in units.items()}
            of_each = "; ".join(f"{family}: {seeds}" for family, seeds in number.items())
            seeds = of_each if len(set(number.values())) > 1 else next(iter(number.values()), "")

            results = "; ".join(f"{family}: {_in_words(row.ours, row.verdict, family)}" for family, row in parts)
            verdicts = [row.verdict for _, row in parts]
            verdict = "; ".join(f"{family}: {row.verdict}" for family, row in parts)
            shown = verdicts[0] if len(set(verdicts)) == 1 else verdict
            rows.append([f"[training](docs/{page}.md): {claim}", results, "", seeds, shown])
    return rows


def _in_words(ours: str, verdict: str, family: str) -> str:
    """The measurement of a claim, with the control that is as good, or with the check that fails."""
    measured, *others = ours.split("; ")
    for pattern, words in IN_WORDS.items():
        measured = re.sub(pattern, words, measured)
    for other in others:
        if verdict == "holds, not specific" and (control := CONTROL.fullmatch(other)):
            measured += f", but IMAD minus the control {control[1]} points"
        for pattern, words in REASONS.items():
            if verdict == "not testable here" and (reason := re.fullmatch(pattern, other)):
                measured += reason.expand(words.replace("FAMILY", family))
    return measured


def tutorial_gains(folder: Path) -> str:
    """The tutorial's gains in mood at each coefficient, over coefficient 0 and over random directions."""
    table, _ = _read("tutorial/gains", folder)
    mood = table[table["score"] == "mood"]
    zero, random = (mood[mood["over"] == over].set_index("coefficient") for over in ("coefficient 0", "random"))
    rows = [
        [
            f"{coefficient:g}",
            _interval(zero.loc[coefficient]),
            p_text(zero.loc[coefficient, "p"]),
            _interval(random.loc[coefficient]),
            p_text(random.loc[coefficient, "p_rank"]),
        ]
        for coefficient in zero.index
        if coefficient
    ]
    header = ("coefficient", "gain over coefficient 0", "p", "gain over random directions", "p by rank")
    return markdown_table(header, rows)


def reading_table(folder: Path) -> str:
    """The tutorial's lines with their doses and perplexities, for the page on reading them."""
    table, _ = _read("tutorial/gains", folder)
    curves, _ = _read("tutorial/curves", folder)
    mood = table[table["score"] == "mood"]
    zero, random = (mood[mood["over"] == over].set_index("coefficient") for over in ("coefficient 0", "random"))
    own = curves[(curves["score"] == "perplexity") & (curves["vector"] == "cheerful")].set_index("coefficient")
    rows = [
        [
            f"{c:g}",
            f"{zero.loc[c, 'relative_dose']:.2f}",
            _interval(zero.loc[c]),
            p_text(zero.loc[c, "p"]),
            _interval(random.loc[c]),
            p_text(random.loc[c, "p_rank"]),
            _interval(own.loc[c], ("mean", "low", "high"), 1),
        ]
        for c in zero.index
        if c
    ]
    header = ("coefficient", "relative dose", "gain over coefficient 0", "p", "gain over 19 random directions")
    return markdown_table((*header, "p by rank", "perplexity"), rows)


def steering_moved(folder: Path) -> str:
    """How far steering at one and at several layers moves the stream."""
    table, _ = _read("steering/moved", folder)
    rows = [
        [
            row.layers,
            "1/3" if row.coefficient < 1 else "1",
            f"{row.relative_dose:.2f}",
            _interval(row, ("mean", "low", "high")),
            "" if pd.isna(row.random) else _interval(row, ("random", "random_low", "random_high")),
        ]
        for row in table.itertuples()
    ]
    distances = ("relative distance, cheerful vector", "relative distance, random directions")
    return markdown_table(("steered after blocks", "coefficient", "`relative_dose`", *distances), rows)


def conditional_table(folder: Path) -> str:
    """Steering everywhere and under a condition, on target prompts and on an unrelated task, and where it fires."""
    effects, _ = _read("recipes/conditional/effects", folder)
    rates, _ = _read("recipes/conditional/rates", folder)
    at = effects.set_index(["quantity", "task"])
    names = {
        "unsteered": "score, unsteered", "unconditional": "score, steered everywhere",
        "conditional": "score, steered under the condition", "conditional gain": "gain under the condition",
        "kept": "share of the gain that is kept", "conditional over random": "above random directions",
    }  # fmt: skip
    rows = [
        [text, *(_interval(at.loc[name, task], ("mean", "low", "high")) if (name, task) in at.index else ""
                 for task in ("question", "repeat"))]
        for name, text in names.items()
    ]  # fmt: skip
    fired = [_interval(rates.set_index("task").loc[task], ("rate", "low", "high")) for task in ("question", "repeat")]
    return markdown_table(
        ("", "target task: questions", "unrelated task: repeat a text"),
        [*rows, ["share of prompts where it fires", *fired]],
    )


def training_table(folder: Path, family: str, preset: str = "miniature") -> str:
    """Accuracy and tokens of every method of a family, sampled, and the accuracy of IMAD above it."""
    main, _ = _read(f"{preset}/main_table", folder)
    gaps, _ = _read(f"{preset}/differences", folder)
    some = main[(main["family"] == family) & (main["decoding"] == "sampled")]
    gaps = gaps[(gaps["family"] == family) & (gaps["decoding"] == "sampled")].set_index("minus")
    rows = []
    for row in some.itertuples():
        above = ""
        if row.method in gaps.index:
            gap, low, high = (100 * gaps.loc[row.method, name] for name in ("difference", "low", "high"))
            above = interval_text(gap, low, high, 1, signed=True)
        accuracy = interval_text(100 * row.accuracy, 100 * row.low, 100 * row.high, 1)
        each = " ".join(f"{100 * float(value):.1f}" for value in str(row.by_seed).split())
        name = f"**{row.method}**" if row.method == "IMAD" else row.method
        rows.append([name, accuracy, each if row.seeds > 1 else "", f"{row.tokens:.0f}", above])
    return markdown_table(("method", "accuracy, %", "by seed", "tokens", "IMAD minus this method, points"), rows)


def fact_recall_table(folder: Path) -> str:
    """Effects of patching by third of the layers, at the country's and at the last token, in both modes."""
    table, _ = _read("patching/fact_recall_depth", folder)
    columns = ("effect", "low", "high")
    rows = []
    for (mode, site, position), group in table.groupby(["mode", "site", "position"], sort=False):
        by_part = {row["part"]: row for _, row in group.iterrows()}
        largest = by_part["largest"]
        thirds = [_interval(by_part[part], columns) for part in ("early", "middle", "late")]
        rows.append([mode, f"`{site}`", position, *thirds, f"{largest['first']}: {_interval(largest, columns)}"])
    first = table[(table["mode"] == rows[0][0]) & (table["part"] != "largest")].drop_duplicates("part")
    spans = [f"layers {row.first} to {row.last}" for row in first.itertuples()]
    return markdown_table(("mode", "site", "token", *spans, "layer with the largest effect: its effect"), rows)


SPEED = (
    (
        "capture",
        "layer 15",
        "floor",
        "means of 96 texts, layer 15 of 30",
        "the same forward without reading (ours / it)",
    ),
    ("plain-capture", "layer 15", "plain forward", "", "a plain forward as torch runs it"),
    ("capture", "layer 15", "steering-vectors", "", "steering-vectors"),
    ("capture", "layer 15", "nnsight", "", "nnsight"),
    ("capture", "layer 15", "transformer-lens", "", "transformer-lens"),
    ("capture", "layer 29", "floor", "means of 96 texts, last layer", "the same forward without reading (ours / it)"),
    ("plain-capture", "layer 29", "plain forward", "", "a plain forward as torch runs it"),
    ("capture", "layer 29", "steering-vectors", "", "steering-vectors"),
    ("capture", "layer 29", "nnsight", "", "nnsight"),
    ("capture", "layer 29", "transformer-lens", "", "transformer-lens"),
    ("turns", "six turns", "batched", "six turns of a debate's trace", "one forward per turn, batched"),
    (
        "sweep",
        "",
        "the same 72 rows",
        "sweep, 9 coefficients x 8 prompts x 64 tokens",
        "`generate` of transformers, unsteered",
    ),
    ("kernels", "", "inside our kernels", "", "the same inside steerkit's linear layers (`sk.use_kernels`)"),
    ("one-by-one", "", "with a cache", "", "one row at a time, with a cache"),
    ("one-by-one", "", "without a cache", "", "one row at a time, without a cache"),
    ("llamacpp", "72", "best batch", "72 unsteered rows x 64 tokens", "llama.cpp, F32, its best batch"),
    ("llamacpp", "one row", "llama.cpp", "one row x 64 tokens", "llama.cpp, F32"),
    (
        "prefill",
        "",
        "nothing to share",
        "72 rows of 8 prompts of 320 tokens, 4 new tokens",
        "the same engine, nothing shared",
    ),
    ("compaction", "", "stay", "rows of 4 to 128 new tokens", "ended rows stay in the batch"),
    ("sft", "", "TRL", "SFT step, 8 texts x 192 tokens", "TRL"),
    ("grpo", "", "TRL", "GRPO step, 4 x 4 completions", "TRL"),
    ("rouge", "", "rouge-score", "ROUGE-L of 2,000 pairs", "rouge-score"),
    ("probes", "SmolLM2", "scikit-learn", "probes with their controls, real streams", "scikit-learn in a loop"),
)
"""File of `results/speed`, parts of a line's job and rival, and what README calls them."""


def speed_table(folder: Path) -> str:
    """The most important lines of the benchmarks."""
    rows = []
    for name, job, against, called, rival in SPEED:
        stored = read_json(folder / "speed" / f"{name}.json")["rows"]
        line = next(row for row in stored if job in row["job"] and against in row["against"])
        rows.append([called, rival, interval_text(line["ratio"], line["low"], line["high"])])
    return markdown_table(("job", "against", "ratio"), rows)


SERVED = {
    "sk.sweep through vLLM, the same rows": "sk.sweep through vLLM, eager, prefix cache: 72 steered rows x 64 tokens",
    "our engine": "steerkit's own engine",
    "plugin installed and not asked for": "plugin installed but not switched on",
    "without it": "the same rows without the plugin",
    "unsteered": "the same rows, unsteered",
    "files, table and ROUGE-L included": "the job includes files, table and ROUGE-L; the reference does not",
    "the ratio itself": "the ratio, {ratio:.3f},",
}
"""Words of the stored benchmark of vLLM -> words of the page."""


def serving_table(folder: Path) -> str:
    """All lines of the benchmark of vLLM."""
    words = {True: "met", False: "missed", None: ""}
    rows = []
    names = ("vllm-steered", "vllm-sweep", "vllm-asleep", "vllm-own", "vllm-capture")
    for line in chain.from_iterable(read_json(folder / "speed" / f"{name}.json")["rows"] for name in names):
        seconds = f"{line['ours']:.2f} / {line['theirs']:.2f}"
        target = f"{line['target']} {words[line['holds']]}".strip()
        ratio = interval_text(line["ratio"], line["low"], line["high"])
        texts = [line["job"], line["against"], line["note"]]
        for stored, shown in SERVED.items():
            texts = [text.replace(stored, shown.format(ratio=line["ratio"])) for text in texts]
        job, against, note = texts
        rows.append([job, against, seconds, ratio, target, note])
    return markdown_table(("job", "compared with", "seconds", "ratio", "target for the whole interval", "note"), rows)


def agents_table(folder: Path) -> str:
    """ROUGE-L gained by each agent's direction on clues, nobody named: base, SFT on single turns, IMAD."""
    gains, _ = _read("miniature/clues/gains", folder)
    some = gains[(gains["score"] == "rouge_l") & ~gains["identity"].astype(bool) & (gains["over"] == "coefficient 0")]
    rows = []
    for stage in ("base", "SFT", "IMAD", "SFT on single turns"):
        part = some[some["stage"] == stage].sort_values("agent")
        rows.append([stage, *(_interval(row) for row in part.itertuples())])
    return markdown_table(("", "agent 1", "agent 2", "agent 3"), rows)


def rates_table(folder: Path) -> str:
    """Validation accuracy of each method at each learning rate of its SFT; the chosen one in bold."""
    parts = {family: _read(f"rates/rates-{family}", folder)[0] for family in ("clues", "two_sum")}
    factors = sorted({factor for part in parts.values() for factor in part["factor"]})
    rows = []
    for family, part in parts.items():
        for method, of_method in part.groupby("method", sort=False):
            by_factor = {row.factor: row for row in of_method.itertuples()}
            cells = [
                "" if one is None else f"**{100 * one.accuracy:.1f}**" if one.chosen else f"{100 * one.accuracy:.1f}"
                for one in map(by_factor.get, factors)
            ]
            rows.append([family, str(method), *cells])
    return markdown_table(("family", "method", *(f"{factor:g} x" for factor in factors)), rows)


TABLES: Mapping[str, Callable[[Path], str]] = {
    "demo": demo_table,
    "demo-texts": demo_texts,
    "demo-texts-short": demo_texts_short,
    "dose": dose_table,
    "sizes": sizes_table,
    "comparison": comparison_table,
    "findings": findings_table,
    "speed": speed_table,
    "serving-speed": serving_table,
    "agents-readme": agents_table,
    "tutorial-gains": tutorial_gains,
    "reading": reading_table,
    "steering-moved": steering_moved,
    "conditional": conditional_table,
    "caa": recipes.caa_table,
    "refusal": recipes.refusal_table,
    "persona": recipes.persona_table,
    "judges": recipes.judges_table,
    **{f"job-{name}": partial(recipes.job_block, name=name) for name in recipes.JOBS},
    "fact-recall": fact_recall_table,
    "training-arithmetic": partial(training_table, family="arithmetic"),
    "training-clues": partial(training_table, family="clues"),
    "training-two-sum": partial(training_table, family="two_sum"),
    "training-malice": partial(training_table, family="malice"),
    "rates": rates_table,
    "agents-probes": debate_tables.read,
    "agents-malicious": debate_tables.malicious,
    "agents-unnamed": debate_tables.unnamed,
    "agents-protocol": debate_tables.protocol,
    "agents-suppression": debate_tables.suppression,
    "agents-transplant": debate_tables.transplant,
    "agents-patched": debate_tables.patched,
    "agents-erased": debate_tables.erased,
    "training-smollm2": partial(training_table, family="addition", preset="smollm2"),
}
"""Name of a generated table -> its text."""


def pages() -> Iterator[Path]:
    """README and the pages of docs."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


def draw(name: str, folder: Path, out: Path) -> bool:
    """Draw one picture to `out`; False where its tables are not there."""
    try:
        figure, meta = PICTURES[name](folder)
    except FileNotFoundError:
        return False
    with tempfile.TemporaryDirectory() as temporary:
        png, _ = save_figure(figure, Path(temporary) / "picture", {"source": meta.get("sha256"), "picture": name})
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(png, out)
    return True


def written(page: Path, folder: Path = RESULTS) -> str:
    """The text of a page with its generated tables as they follow from `folder`; one without its results stays."""
    text = page.read_text(encoding="utf-8")
    tables = {}
    for found in GENERATED.finditer(text):
        try:
            tables[found["name"]] = TABLES[found["name"]](folder)
        except FileNotFoundError:
            continue
    return regenerate(text, tables)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m figures.pages", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT, help="draw below this folder; pages are then not written")
    given = parser.parse_args(arguments)
    for name in PICTURES:
        print(f"{name}: {'drawn' if draw(name, RESULTS, given.out / name) else 'no tables in results'}", flush=True)
    for name, stored in recipes.pictures(RESULTS).items():
        (given.out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(stored, given.out / name)
    if given.out == ROOT:
        for page in pages():
            write_text(page, written(page))


if __name__ == "__main__":
    main()
