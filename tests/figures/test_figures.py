"""The pictures of the analyses: drawn from tables alone, the same bytes from the same tables, without torch."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from figures import __main__ as figures
from figures.debate import accuracy_by_seed, protocol_areas
from figures.tokens import accuracy_tokens
from figures.training import PANELS, training_curves
from steerkit.io.tables import write_table

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)


def main_table() -> pd.DataFrame:
    methods = {"Single": (0.4, 40), "Debate": (0.7, 360), "IMAD": (0.68, 60), "Self-consistency of 3": (0.5, 120)}
    return pd.DataFrame(
        [
            {
                "family": "two_sum", "method": m, "decoding": d, "seeds": 3, "n": 900, "accuracy": a, "low": a - 0.02,
                "high": a + 0.02, "by_seed": f"{a - 0.01} {a} {a + 0.01}", "tokens": t,
            }
            for d in ("sampled", "greedy")
            for m, (a, t) in methods.items()
        ]
    )  # fmt: skip


def logs() -> pd.DataFrame:
    names = [name for _, some in PANELS for name in some]
    return pd.DataFrame(
        [
            {"step": step, "seed": seed, "family": "two_sum", **{n: RNG.random() for n in names}}
            for seed in (1, 2)
            for step in range(12)
        ]
    )


def curves() -> pd.DataFrame:
    kinds = ("own", "other agents", "random", "matched", "shuffled")
    keys = product(("base", "IMAD"), (False, True), ("rouge_l", "fidelity"), ("1", "2", "3"), kinds, (-1.0, 0.0, 1.0))
    rows = [
        {
            "stage": stage, "identity": identity, "score": score, "agent": agent, "kind": kind, "coefficient": c,
            "role": {"own": "vector", "other agents": "other"}.get(kind, kind),
            "mean": 0.4 + 0.1 * c * (kind == "own"), "low": 0.3, "high": 0.6, "n": 50, "n_missing": 0,
            "relative_dose": abs(c) / 4, "area": 0.5, "area_low": 0.4, "area_high": 0.6,
        }
        for stage, identity, score, agent, kind, c in keys
    ]  # fmt: skip
    return pd.DataFrame(rows)


def separability() -> pd.DataFrame:
    rows = []
    for layer, labels in product(["embed", 0, 1, 2], ["true", "shuffled"]):
        rows.append({"layer": layer, "features": "resid", "labels": labels})
    rows += [{"layer": "nested", "features": "resid", "labels": "true"}]
    rows += [{"layer": None, "features": "length_position", "labels": "true"}]
    about = {
        "accuracy": 0.8, "accuracy_low": 0.7, "accuracy_high": 0.9, "n": 90, "n_groups": 30, "majority": 0.34,
        "stage": "base", "debates": "personas", "source": "plain", "position": "last",
    }  # fmt: skip
    return pd.DataFrame(rows).assign(**about)


def plane() -> pd.DataFrame:
    keys = product(("base", "IMAD"), "123", ("vector", "turn", "turn"))
    rows = [(stage, kind, agent, *RNG.normal(size=2), 20) for stage, agent, kind in keys]
    return pd.DataFrame(rows, columns=["stage", "kind", "agent", "x", "y", "n"])


def suppression_curves() -> pd.DataFrame:
    keys = product(("base", "IMAD"), ("plain", "forced"), ("trait", "accuracy", "perplexity"), ("agent", "random 0"))
    rows = [
        {"stage": s, "context": where, "score": score, "vector": v, "coefficient": c, "mean": 0.5, "low": 0.4,
         "high": 0.6, "n": 20, "role": "vector" if v == "agent" else "random"}
        for s, where, score, v in keys
        for c in (-np.inf, -1.0, 0.0, 1.0)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def tables(tmp_path) -> Path:
    cosines = pd.DataFrame(product(["base", "IMAD"], [1], "123", "123"), columns=["stage", "layer", "agent", "other"])
    cosines["cosine"] = [1.0 if a == b else -0.5 for a, b in zip(cosines["agent"], cosines["other"], strict=True)]
    between = pd.DataFrame(product("123", [0, 1, 2], ["base", "IMAD"], ["base", "IMAD"]))
    between = between.set_axis(["agent", "layer", "stage", "other"], axis=1).assign(cosine=0.5)
    every = {
        "main_table": main_table(), "training": logs(), "curves": curves(), "separability": separability(),
        "plane": plane(), "suppression_curves": suppression_curves(),
        "cosines": cosines, "checkpoint_cosines": between,
        "choice": pd.DataFrame({"stage": ["base", "IMAD"], "layer": [1, 1]}),
    }  # fmt: skip
    for name, table in every.items():
        write_table(tmp_path / f"{name}.csv", table, {"made": "here"})
    return tmp_path


def test_every_table_gives_its_pictures_and_equal_tables_equal_bytes(tables, capsys) -> None:
    figures.main([str(tables), "--out", str(tables / "one")])
    names = sorted(path.name for path in (tables / "one").glob("*.png"))
    assert names == [
        "accuracy-by-seed.png", "accuracy-tokens.png", "cosines-base.png", "cosines-checkpoints.png",
        "cosines-imad.png", "plane.png",
        "probes-base-personas-plain-last.png", "separability.png",
        "steering-base-none.png", "steering-base-tag.png", "steering-imad-none.png", "steering-imad-tag.png",
        "suppression-forced.png", "suppression-plain.png", "training-two_sum.png",
    ]  # fmt: skip
    assert "15 figures" in capsys.readouterr().out
    figures.main([str(tables), "--out", str(tables / "two")])
    for path in (tables / "one").iterdir():
        assert path.read_bytes() == (tables / "two" / path.name).read_bytes(), path.name


def test_figures_show_the_names_of_agents_where_the_folder_has_them(tables) -> None:
    before = {name: figure for name, figure, _ in figures.pictures(tables)}
    (tables / "agents.json").write_text('{"1": "Ann", "2": "Bob", "3": "Cy"}')
    after = {name: figure for name, figure, _ in figures.pictures(tables)}

    def shown(drawn: dict, name: str) -> str:
        return " ".join(text.get_text() for text in drawn[name].findobj(Text))

    for name in ("plane", "cosines-base", "steering-base-none"):
        assert "Ann" in shown(after, name) and "Ann" not in shown(before, name)


def test_no_module_of_figures_imports_torch() -> None:
    names = [f"figures.{path.stem}" for path in (ROOT / "figures").glob("*.py")]
    code = f"import sys, {', '.join(sorted(names))}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_pictures_of_every_table_are_drawn_without_torch(tables) -> None:
    code = f"import sys; from figures.__main__ import main; main([{str(tables)!r}]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_what_a_picture_shows_is_what_the_table_says() -> None:
    figure = accuracy_tokens(main_table())
    sampled, _ = figure.axes
    points = {tuple(line.get_xydata()[0]) for line in sampled.get_lines()}
    assert points == {(40, 40.0), (360, 70.0), (60, 68.0), (120, 50.0)}
    assert sampled.get_title(loc="left") == "two_sum, sampled"
    assert "3 training seeds" in figure.legends[0].get_title().get_text()
    log = logs()
    drawn = training_curves(log).axes[2].get_lines()
    mean = log.groupby("step")["length"].mean()
    assert any(np.allclose(line.get_ydata(), mean) for line in drawn)


def test_an_empty_folder_or_table_is_refused(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        figures.main([str(tmp_path)])
    assert stopped.value.code == 2
    assert "expected a table of an analysis" in capsys.readouterr().err
    with pytest.raises(ValueError, match="missing"):
        accuracy_tokens(main_table().drop(columns="tokens"))
    with pytest.raises(ValueError, match="missing"):
        training_curves(logs().drop(columns="seed"))


def test_each_training_seed_is_a_dot_beside_its_mean() -> None:
    rows = [
        {"family": family, "method": method, "decoding": "sampled", "accuracy": 0.6, "low": 0.5, "high": 0.7,
         "by_seed": "0.55 0.6 0.65", "seeds": 3, "n": 1500}
        for family, methods in {"clues": ("IMAD", "SFT"), "two_sum": ("IMAD",)}.items()
        for method in methods
    ]  # fmt: skip
    figure = accuracy_by_seed(pd.DataFrame(rows))
    clues, two_sum = figure.axes
    assert [text.get_text() for text in clues.get_yticklabels()] == ["IMAD", "SFT"]
    dots = [
        line.get_xdata().tolist()
        for line in clues.lines
        if line.get_linestyle() == "None" and len(line.get_xdata()) == 3
    ]
    assert np.allclose(dots, [[55.0, 60.0, 65.0]] * 2) and len(two_sum.lines) == 2
    assert "3 training seeds" in figure.legends[0].get_title().get_text()


def test_areas_of_the_protocol_have_a_mark_per_kind_and_checkpoint() -> None:
    rows = [
        {"stage": stage, "context": "tagged", "score": "rouge_l", "grid": "coefficient", "measure": f"area, {kind}",
         "value": 0.6, "low": 0.5, "high": 0.7, "by_seed": "0.6", "seeds": 1, "n": 48}
        for stage, kinds in {"base": ("own", "random"), "IMAD": ("own", "random", "shuffled")}.items()
        for kind in kinds
    ]  # fmt: skip
    rows += [{**rows[0], "measure": "area over base"}, {**rows[0], "score": "speaks"}, {**rows[0], "grid": "dose"}]
    figure = protocol_areas({"clues": pd.DataFrame(rows)})
    (axes,) = figure.axes
    assert [text.get_text() for text in figure.legends[0].texts] == ["own", "random", "shuffled"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["base\ntagged", "IMAD\ntagged"]
    assert sum(line.get_marker() != "." for line in axes.lines) == 5


def test_the_caption_counts_the_seeds_of_each_panel_and_controls_at_fewer_strengths_are_shown() -> None:
    row = {"stage": "base", "context": "tagged", "score": "rouge_l", "grid": "coefficient", "measure": "area, own",
           "value": 0.6, "low": 0.5, "high": 0.7, "by_seed": "0.6 0.7 0.5", "seeds": 3, "n": 48}  # fmt: skip
    few = [row, {**row, "grid": "controls"}, {**row, "grid": "controls", "measure": "area, random"}]
    one = {**row, "seeds": 1, "by_seed": "0.6"}
    figure = protocol_areas({"addition": pd.DataFrame(few), "malice": pd.DataFrame([one])})
    assert [text.get_text() for text in figure.legends[0].texts] == ["own", "random"]
    title = figure.legends[0].get_title().get_text()
    assert "over 3 training seeds" in title and "over questions where there is one" in title
