"""Persona vectors on a model with a planted trait: measured, resumed, refused where no text follows instructions."""

from __future__ import annotations

import json
from typing import Any

import pytest

import steerkit as sk
from analysis.recipes import persona
from steerkit.sweeps.result import FewWarning
from tests.project.test_recipes import refusing_model
from tests.tiny import tiny_model, tiny_tokenizer

TRAIT: dict[str, Any] = {
    "rubric": "How many S?", "positive": ["Be!", "Do!"], "negative": ["Be?", "Do?"],
    "read": ["the sky?", "a tree?", "my book?"], "validation": ["that river?", "one door?"],
    "test": ["some rain?", "her song?", "no lamp?"],
}  # fmt: skip
HOW: dict[str, Any] = {"layers": [0, 1, 2], "coefficients": [-2.0, 2.0], "n_random": 3, "max_new_tokens": 6}


def share_of_s(text: str) -> str:
    return str(100 * text.count("S") // max(1, len(text)))


def test_the_questions_of_the_trait_are_in_one_part_only() -> None:
    trait = json.loads(persona.TRAIT.read_text())
    questions = [question for part in ("read", "validation", "test") for question in trait[part]]
    assert len(questions) == len(set(questions)) == 40 and len(trait["positive"]) == len(trait["negative"]) == 5


def test_a_planted_trait_is_raised_on_test_questions_and_seen_at_the_end_of_the_prompt(tmp_path) -> None:
    model, tokenizer = refusing_model()
    judge = sk.judge(rule=share_of_s)
    with pytest.warns(FewWarning):
        gains, facts = persona.measure_persona(model, tokenizer, TRAIT, judge, tmp_path / "run", **HOW)
    assert (facts["n_read"], facts["n_kept"], facts["monitoring_auc"]) == (6, 6, 1.0)
    judged = gains[gains["score"] == "judge"]
    assert judged["unsteered"].between(0, 10).all() and judged["wrong_way"].eq(0).all()
    vector = sk.SteeringVector.load(tmp_path / "run" / "trait.safetensors")
    assert sk.generate(model, tokenizer, [persona.ask("a cat?")], max_new_tokens=3,
                       steering=sk.Steering(vector, 2.0, layer=facts["layer"])) == ["SSS"]  # fmt: skip
    up = gains[(gains["score"] == "judge") & (gains["coefficient"] == 2)].set_index("over")
    assert (up["gain"] > 60).all() and up["k"].to_dict() == {"coefficient 0": 0, "random": 3} and set(up["n"]) == {3}
    assert set(gains["score"]) == {"judge", "repeated_4grams"}
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("rows.jsonl")}
    with pytest.warns(FewWarning):
        again, _ = persona.measure_persona(model, tokenizer, TRAIT, judge, tmp_path / "run", **HOW)
    assert again.equals(gains) and {path: path.read_bytes() for path in files} == files and len(files) == 2


def test_a_model_that_follows_no_instruction_is_not_testable(tmp_path) -> None:
    with pytest.raises(ValueError, match="not testable on this model"):
        persona.measure_persona(
            tiny_model(), tiny_tokenizer(), TRAIT, sk.judge(rule=lambda text: "0"), tmp_path / "run", **HOW
        )


def test_a_trait_without_a_part_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sk, "load", lambda *_: pytest.fail("loaded"))
    (tmp_path / "trait.json").write_text(json.dumps({**TRAIT, "test": []}))
    with pytest.raises(SystemExit):
        persona.main(
            ["--checkpoint", "C", "--judge-url", "http://127.0.0.1:1", "--judge-model", "m",
             "--out", str(tmp_path / "r"), "--trait", str(tmp_path / "trait.json")]
        )  # fmt: skip
    assert "missing" in capsys.readouterr().err and not (tmp_path / "r").exists()
