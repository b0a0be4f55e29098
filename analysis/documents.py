"""`python -m analysis documents`: the tables behind README, the demo, the tutorial and the page on steering.

The demo's tables are those of a finished run. The code of the other pages is taken from the pages themselves and runs
on the demo's model. All tables go to `results/`, from which `python -m figures.pages` writes tables and pictures.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

import steerkit as sk
from analysis.published import published
from analysis.sizes import sizes
from steerkit.demo.questions import read_questions
from steerkit.demo.traits import PERSONAS
from steerkit.io.tables import read_table, write_table
from steerkit.models.identity import describe

DOCS = Path(__file__).parents[1] / "docs"
DEMO = ("verdicts", "gains", "dose_curves", "means", "places")
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def run_page(page: str, names: dict[str, Any], only: str = "") -> dict[str, Any]:
    """Run the Python blocks of a page, in a temporary folder.

    Args:
        page: below `docs/`, or `../README.md`.
        names: names that the code may use; those that it defines are added.
        only: run the blocks that hold this text.
    """
    text = (DOCS / page).read_text(encoding="utf-8")
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "docs").symlink_to(DOCS)
        os.chdir(folder)
        try:
            for number, block in enumerate(BLOCK.findall(text), 1):
                if only in block:
                    exec(compile(block, f"{page}, block {number}", "exec"), names)
        finally:
            os.chdir(here)
    return names


def tutorial_tables(names: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Tables of the tutorial: gains of each score over coefficient 0 and over random directions, and the curves."""
    scored, controls = names["scored"], list(names["controls"])
    doses = scored.table.groupby("coefficient")["relative_dose"].mean()
    gains = pd.concat(
        [
            scored.gain(score, vectors=["cheerful"], over=over).assign(score=score, over=label)
            for score in ("mood", "perplexity")
            for label, over in (("coefficient 0", None), ("random", controls))
        ],
        ignore_index=True,
    )
    curves = pd.concat(
        [
            frame.assign(score=score)
            for score, row in zip(names["units"], names["panels"].values(), strict=True)
            for frame in row.values()
        ],
        ignore_index=True,
    )
    settings = names["settings"].assign(chosen=False)
    settings.loc[names["best"].name, "chosen"] = True
    return {"gains": gains.assign(relative_dose=gains["coefficient"].map(doses)), "curves": curves, "tried": settings}


def steering_tables(names: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Tables of the page on steering: how far the stream moved, and the cosines of a vector's parts at near layers."""
    vector, swept = names["vector"], names["swept"]
    doses = swept.table[swept.table["coefficient"] == 1].groupby("layer")["relative_dose"].mean()
    by_size = {str(layer).replace("+", ", "): dose for layer, dose in doses.items()}
    by_size["12 to 16"] = by_size.pop("12, 13, 14, 15, 16")
    moved = names["moved_by"]
    moved = moved.assign(relative_dose=moved["layers"].map(by_size) * moved["coefficient"])
    units = vector.unit().layers
    pairs = [(a, b) for a in range(12, 17) for b in range(a + 1, 17)]
    cosines = [(a, b, float(units[a] @ units[b])) for a, b in pairs]
    return {"moved": moved, "cosines": pd.DataFrame(cosines, columns=["layer", "other", "cosine"])}


def readme_tables(names: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Tables of README: curves of both scores over the doses, of the vector and of its controls; gains in words."""
    scored = names["scored"]
    curves = []
    for score in ("words", "perplexity"):
        own = scored.curve(score).query("vector == 'cheerful'").assign(role="vector", score=score)
        curves += [own, scored.control_curve(score).assign(role="random", score=score)]
    return {"curves": pd.concat(curves, ignore_index=True), "gains": scored.gains("words")}


def write_demo(run: Path, out: Path) -> None:
    """Copy the tables of a finished demo, with the checkpoint's name in place of its path."""
    for name in DEMO:
        table, meta = read_table(run / "tables" / f"{name}.csv")
        write_table(out / "demo" / f"{name}.csv", table, published(meta))
    test, meta = read_table(run / "tables" / "test.parquet")
    for name, table in {"texts": demo_texts(test), "controls": demo_controls(test)}.items():
        write_table(out / "demo" / f"{name}.csv", table, published(meta))


def demo_controls(test: pd.DataFrame) -> pd.DataFrame:
    """Mean trait score and right answers of each control direction over the test questions, at the chosen dose."""
    steered = test[(test["role"] != "vector") & (test["coefficient"] != 0)]
    keys = ["persona", "role", "vector"]
    return steered.groupby(keys, sort=False)[["relative_dose", "trait", "right"]].mean().reset_index()


def demo_texts(test: pd.DataFrame, n: int = 3) -> pd.DataFrame:
    """The texts of each persona on the first `n` test questions, unsteered and steered, as they are."""
    questions = {question.id: question.question for question in read_questions()}
    rows = []
    for persona in PERSONAS:
        own = test[test["vector"] == persona]
        for prompt_id in list(dict.fromkeys(own["prompt_id"]))[:n]:
            plain, steered = (part.iloc[0] for _, part in own[own["prompt_id"] == prompt_id].groupby("coefficient"))
            rows.append(
                {
                    "persona": persona,
                    "prompt_id": prompt_id,
                    "question": questions[prompt_id],
                    "answer": plain["answer"],
                    **{f"{name}_unsteered": plain[name] for name in ("text", "trait", "right")},
                    **{f"{name}_steered": steered[name] for name in ("text", "trait", "right")},
                }
            )
    return pd.DataFrame(rows)


def write_readme(out: Path) -> None:
    """Run README and write its tables below `out`."""
    names = run_page("../README.md", {})
    about = published(describe(names["model"], names["tokenizer"]))
    _write(out, about, readme=readme_tables(names))
    write_table(out / "readme" / "sizes.csv", sizes(), {"written_by": "python -m analysis documents"})


def write_documents(out: Path) -> None:
    """Run both pages and write their tables below `out`."""
    names = run_page("tutorial.md", {"sk": sk})
    steering = run_page("concepts/steering.md", dict(names), only="places")
    about = published(describe(names["model"], names["tokenizer"]))
    _write(out, about, tutorial=tutorial_tables(names), steering=steering_tables(steering))


def _write(out: Path, about: Mapping[str, Any], **pages: Mapping[str, pd.DataFrame]) -> None:
    """Write the tables of each page to a folder of its name."""
    for page, tables in pages.items():
        for name, table in tables.items():
            write_table(out / page / f"{name}.csv", table, {**about, "page": page})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis documents", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of a finished demo")
    parser.add_argument("--only", choices=("readme", "tutorial", "demo"), help="one part; tutorial: steering, too")
    given = parser.parse_args(arguments)
    out, only = given.out.resolve(), given.only
    if only in (None, "demo") and not (given.demo / "summary.json").is_file():
        parser.error(f"expected a finished demo in {given.demo}; there is none. Run `make demo`, or pass --demo.")
    if only in (None, "demo"):
        write_demo(given.demo, out)
    if only in (None, "readme"):
        write_readme(out)
    if only in (None, "tutorial"):
        write_documents(out)
    print(f"Tables of the documents are in {given.out}; python -m figures.pages writes the pages.")


if __name__ == "__main__":
    main()
