"""Conditional steering: how its tables follow from the scores of texts."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

import steerkit as sk
from analysis.recipes.conditional import LABELS, OTHER, TARGET, Setting, effects, main, prompts, rates, swept
from steerkit.demo.questions import read_questions
from steerkit.demo.traits import steps
from steerkit.scores.text import rouge_l
from tests.tiny import tiny_model, tiny_tokenizer


def table(scores: dict[tuple[str, float, str], list[float]], fired: dict[str, list[float]]) -> pd.DataFrame:
    """A sweep's table: `(vector, coefficient, task) -> score per question`, and the shares of steered positions."""
    return pd.DataFrame(
        [
            {
                "vector": vector, "role": "vector" if vector == "steps" else "random", "coefficient": coefficient,
                "task": task, "group": f"q{number}", "score": score,
                "share_steered": fired[task][number] if coefficient else 0.0,
            }
            for (vector, coefficient, task), values in scores.items()
            for number, score in enumerate(values)
        ]
    )  # fmt: skip


ALWAYS = table(
    {
        ("steps", 0.0, TARGET): [0.0, 0.0, 0.2], ("steps", 2.5, TARGET): [1.0, 0.8, 1.0],
        ("steps", 0.0, OTHER): [0.9, 0.8, 1.0], ("steps", 2.5, OTHER): [0.1, 0.2, 0.1],
    },
    {TARGET: [1.0] * 3, OTHER: [1.0] * 3},
)  # fmt: skip
CONDITIONAL = table(
    {
        ("steps", 2.5, TARGET): [1.0, 0.0, 1.0], ("steps", 2.5, OTHER): [0.9, 0.8, 1.0],
        ("steps", 0.0, TARGET): [0.0, 0.0, 0.2], ("steps", 0.0, OTHER): [0.9, 0.8, 1.0],
        **{(f"steps/random-{i}", 2.5, TARGET): [0.1 * i] * 3 for i in range(3)},
    },
    {TARGET: [0.25, 0.0, 0.5], OTHER: [0.0, 0.0, 0.0]},
)  # fmt: skip


def test_gains_are_paired_by_question_and_the_kept_share_is_their_ratio() -> None:
    found = effects(ALWAYS, CONDITIONAL).set_index(["task", "quantity"])["mean"]
    assert found[TARGET, "unconditional gain"] == pytest.approx((1.0 + 0.8 + 0.8) / 3)
    assert found[TARGET, "conditional gain"] == pytest.approx((1.0 + 0.0 + 0.8) / 3)
    assert found[TARGET, "kept"] == pytest.approx(1.8 / 2.6)
    assert found[OTHER, "conditional gain"] == 0 and found[OTHER, "unconditional gain"] < -0.7


def test_the_vector_stands_beside_random_directions_under_the_same_condition() -> None:
    row = effects(ALWAYS, CONDITIONAL).set_index(["task", "quantity"]).loc[(TARGET, "conditional over random")]
    assert row["mean"] == pytest.approx(2.0 / 3 - 0.1) and row["k"] == 3 and row["p_rank"] == 0.25


def test_a_prompt_counts_as_fired_where_any_position_was_steered() -> None:
    found = rates(CONDITIONAL).set_index("task")
    assert found["rate"].to_dict() == {TARGET: pytest.approx(2 / 3), OTHER: 0.0}
    assert found["share_steered"].to_dict() == {TARGET: pytest.approx(0.25), OTHER: 0.0}


@pytest.mark.parametrize("repeat", ["question", "answer"])
def test_both_tasks_have_a_prompt_per_question_with_the_same_content(repeat: str) -> None:
    some = read_questions()[:3]
    made = prompts(some, repeat)
    assert [len(made[label]) for label in LABELS] == [3, 3]
    for question, ask, other in zip(some, made[TARGET], made[OTHER], strict=True):
        text = question.question if repeat == "question" else question.answers["plain"]
        assert ask[-1]["content"] == question.question and other[-1]["content"].endswith(f" word for word: {text}")


@pytest.mark.parametrize("repeat", ["question", "answer"])
def test_answers_are_scored_by_numbered_steps_and_repetitions_by_their_text(repeat, tmp_path) -> None:
    setting = replace(Setting(), layer=1, coefficient=1.0, repeat=repeat, max_new_tokens=3)
    model, tokenizer, some = tiny_model(context=2048), tiny_tokenizer(), read_questions()[:2]
    found = swept(model, tokenizer, {"steps": sk.SteeringVector({1: torch.ones(32)})}, some, None, setting, tmp_path)
    assert found.groupby("task").size().to_dict() == {TARGET: 4, OTHER: 4}  # coefficients 0 and 1
    for row in found.to_dict("records"):
        own = steps(row["text"]) if row["task"] == TARGET else rouge_l([row["text"]], [row["reference"]])[0]
        assert row["score"] == pytest.approx(own)


def test_another_text_to_repeat_is_refused_on_the_command_line(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "out"), "--set", "repeat=both"])
    assert "got 'both'" in capsys.readouterr().err and not (tmp_path / "out").exists()
