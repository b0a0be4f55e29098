"""Figures and tables of the recipes: random directions are drawn beside a vector's gains, and verdicts are printed."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from figures import pages, recipes
from steerkit.io.tables import write_table

ROW = {"measure": "letters", "behavior": "myopic-reward", "n": 150, "p": 0.01}


def gains(axis: str, values: tuple[float, ...]) -> pd.DataFrame:
    zero = {**ROW, "over": "coefficient 0", "gain": 0.3, "low": 0.2, "high": 0.4, "k": 0}
    random = {**ROW, "over": "random", "gain": 0.25, "low": 0.1, "high": 0.45, "k": 19}
    return pd.DataFrame([{**row, axis: value} for value in values for row in (zero, random)])


@pytest.mark.parametrize("axis", ["layer", "dose"])
def test_a_further_random_direction_is_drawn_where_the_gain_over_it_says(axis: str) -> None:
    curve = recipes.against_random(gains(axis, (-2, 2)), axis).set_index(["vector", "coefficient"])
    own, random = curve.loc[(recipes.CAA, 2)], curve.loc[(recipes.RANDOM, 2)]
    assert own[["mean", "low", "high"]].tolist() == [0.3, 0.2, 0.4]
    assert random[["mean", "low", "high"]].tolist() == pytest.approx([0.05, -0.15, 0.2])
    assert ((recipes.CAA, 0) in curve.index) == (axis == "dose")
    figure = recipes.caa_curves({"small": gains(axis, (-2, 2))}, axis)
    assert figure.get_suptitle().endswith(f"at {1 + (axis == 'layer')} of 2 {axis}s")  # a dose of -2 should lower it
    assert "gain in probability" in figure.axes[0].get_ylabel()
    assert "myopic" in {axes.get_title(loc) for axes in figure.axes for loc in ("left", "center")}
    assert "k = 19 random directions" in figure.legends[0].get_title().get_text()


def test_the_tables_of_the_pages_print_gains_verdicts_and_what_could_not_be_tested(tmp_path: Path) -> None:
    row = {"behavior": "myopic-reward", "gain": 0.1, "gain_low": 0.05, "gain_high": 0.15, "n": 140, "questions": 150,
           "verdict": "moves",
           "unsteered": 0.5, "wrong_way": 0.25,
           "over_random": 0.2, "over_random_low": 0.1, "over_random_high": 0.3}  # fmt: skip
    rows = [{**row, "measure": "letters", "dose": dose} for dose in (-0.2, 0.2)]
    rows.append({**row, "measure": "texts", "dose": 0.2, "n": 30, "questions": 40, "verdict": "not detected"})
    about = {"matching_answers": {"myopic-reward": "prefers less now"}}
    write_table(tmp_path / "recipes/caa-smollm2/verdicts.csv", pd.DataFrame(rows), about)
    lines = recipes.caa_table(tmp_path).splitlines()[2:]
    start = "| SmolLM2-135M-Instruct | myopic-reward (prefers less now) |"
    assert lines[0] == f"{start} letters | -0.2 | 0.50 | 0.10 [0.05, 0.15] | 0.20 [0.10, 0.30] | 0.25 | moves | 150 |"
    assert len(lines) == 3 and "texts | +0.2 |" in lines[2] and "not detected | 40 (fewer than 150)" in lines[2]
    rates = [{"kind": kind, "refused": 0.02, "low": 0.0, "high": 0.07, "n": 100} for kind in ("harmful", "harmless")]
    write_table(tmp_path / "recipes/refusal-smollm2/rates.csv", pd.DataFrame(rates), {"testable": False})
    one = {"operation": "add", "kind": "harmless", "coefficient": 1.0, "gain": 0.5, "low": 0.4, "high": 0.6, "n": 50}
    one |= {"unsteered": 0.04, "wrong_way": 0.06}
    added = pd.DataFrame([{**one, "over": over} for over in ("coefficient 0", "random")])
    write_table(tmp_path / "recipes/refusal-smollm2/gains.csv", added, {})
    lines = recipes.refusal_table(tmp_path).splitlines()[2:]
    model = "SmolLM2-135M-Instruct"
    assert lines[0] == f"| {model} | unsteered, harmful | 0.02 [0.00, 0.07] |  |  |  | 100 (fewer than 150) |"
    assert lines[3].count("0.50 [0.40, 0.60]") == 2 and "not testable" in lines[2]
    assert "| 0.04 | 0.50" in lines[3] and "| 0.06 | 50 (fewer than 150) |" in lines[3]
    assert recipes.WRONG in recipes.refusal_table(tmp_path)
    write_table(tmp_path / "recipes/refusal-smollm2/gains.csv", added.drop(columns="wrong_way"), {})
    earlier = recipes.refusal_table(tmp_path).splitlines()
    assert (
        earlier[0].endswith("| gain over random directions | prompts |")
        and len({one.count("|") for one in earlier}) == 1
    )
    assert recipes.persona_table(tmp_path).startswith("Not run yet")
    judged = added.assign(score="judge", coefficient=-2.0).drop(columns=["operation", "kind"])
    write_table(tmp_path / "recipes/persona-qwen/gains.csv", judged, {})
    (line,) = recipes.persona_table(tmp_path).splitlines()[2:]
    gain = "0.50 [0.40, 0.60]"
    judged_texts = "judge | -2 | 0.04"
    assert line == f"| Qwen2.5-Coder-0.5B-Instruct | {judged_texts} | {gain} | {gain} | 0.06 | 50 (fewer than 150) |"


def test_every_judge_that_was_measured_is_in_the_tables_in_the_order_of_the_models(tmp_path: Path) -> None:
    row = {"n": 50, "n_unread": 3, "n_distinct": 7, "roc_auc": 0.8, "roc_auc_low": 0.7, "roc_auc_high": 0.9,
           "right_side": 0.6, "right_side_low": 0.5, "right_side_high": 0.7, "spearman": float("nan")}  # fmt: skip
    for name, change in (("qwen", {"spearman": 0.5}), ("smollm2", {}), ("another", {"n_unread": 0})):
        write_table(tmp_path / f"recipes/judge-{name}/agreement.csv", pd.DataFrame([{**row, **change}]), {})
    lines = recipes.judges_table(tmp_path).splitlines()[2:]
    names = [line.split(" | ")[0] for line in lines]
    assert names == ["| SmolLM2-135M-Instruct", "| Qwen2.5-Coder-0.5B-Instruct", "| another"]
    assert lines[0].endswith("| 50 | 3 | 7 | 0.80 [0.70, 0.90] | 0.60 [0.50, 0.70] |  |") and lines[1].endswith(
        "0.50 |"
    )


def test_the_findings_of_readme_name_every_judge_in_results(tmp_path: Path, monkeypatch) -> None:
    stored = {
        name: next(iter(recipes.measured("judge", name, pages.RESULTS).values())) for name in ("agreement", "texts")
    }
    monkeypatch.setattr(recipes, "measured", lambda _, name, __: dict.fromkeys(("one", "two"), stored[name]))
    found = pages.findings_table(pages.RESULTS)
    assert "one and two as judges" in found


def test_readme_names_only_claims_that_the_results_have() -> None:
    judged, _ = pages._read("miniature/claims", pages.RESULTS)
    claims = {str(name).partition(": ")[2] for name in judged["name"]}
    assert set(pages.FOUND) <= claims


def test_a_measurement_of_a_claim_is_said_without_the_names_of_its_table() -> None:
    found = pages.findings_table(pages.RESULTS)
    assert "plurality" not in found and "GRPO without debate" not in found and " against " not in found
