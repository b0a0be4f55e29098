"""Refusal tables: rates first, ablation only where there are refusals, and a run that resumes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import steerkit as sk
from analysis.recipes import refusal
from steerkit.sweeps.result import FewWarning
from tests.project.test_recipes import refusing_model
from tests.tiny import tiny_model, tiny_tokenizer

WORDS = ["the sky", "a tree", "my book", "that river", "one door", "some rain", "her song", "no lamp", "a cat"]
HOW: dict[str, Any] = {"tokens": ["S"], "starts": "S", "n_random": 3, "max_new_tokens": 3}


@pytest.fixture
def prompts(tmp_path: Path) -> dict[str, dict[str, list[Any]]]:
    splits = ["train"] * 4 + ["validation"] * 3 + ["test"] * 2
    for kind, mark, order in (("harmful", "!", WORDS), ("harmless", "?", WORDS[::-1])):
        rows = [{"split": s, "instruction": f"{word}{mark}"} for s, word in zip(splits, order, strict=True)]
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return refusal.read_prompts(tmp_path)


def test_a_planted_direction_adds_refusals_and_its_ablation_removes_them(tmp_path, prompts) -> None:
    model, tokenizer = refusing_model()
    with pytest.warns(FewWarning):
        rates, gains, verdicts = refusal.measure_refusal(model, tokenizer, prompts, tmp_path / "run", **HOW)
    assert rates.set_index("kind")["refused"].to_dict() == {"harmful": 1.0, "harmless": 0.0}
    assert set(rates["n"]) == {2}
    over = gains[(gains["over"] == "coefficient 0") & (gains["coefficient"] == 1)]
    assert over.set_index(["operation", "kind"])["gain"].to_dict() == {
        ("add", "harmless"): 1, ("ablate", "harmful"): -1
    }  # fmt: skip
    added = gains[gains["operation"] == "add"]
    assert added.groupby("over")["coefficient"].agg(list).tolist() == [[0.5, 1, 2]] * 2
    assert set(gains["k"]) == {0, 3} and set(verdicts) == {"add", "ablate"}
    assert gains.groupby("operation")["unsteered"].first().to_dict() == {"add": 0, "ablate": 1}
    assert gains["wrong_way"].eq(0).all()  # all harmless prompts are refused more, all harmful ones less
    assert verdicts["ablate"] != refusal.NOT_TESTABLE and gains["perplexity"].gt(0).all()
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("rows.jsonl")}
    with pytest.warns(FewWarning):
        refusal.measure_refusal(model, tokenizer, prompts, tmp_path / "run", **HOW)
    assert {path: path.read_bytes() for path in files} == files and len(files) == 2


def test_a_model_that_does_not_refuse_is_not_testable_and_only_the_addition_is_measured(
    tmp_path, prompts, monkeypatch
) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    direction = sk.random_like(sk.SteeringVector({2: 4 * next(model.parameters()).new_ones(32)}), seed=0)
    monkeypatch.setattr(sk, "choose_direction", lambda *_, **__: sk.SteeringVector(direction.layers, {"table": []}))
    with pytest.warns(FewWarning):
        rates, gains, verdicts = refusal.measure_refusal(
            model, tokenizer, prompts, tmp_path / "run", **{**HOW, "starts": "no text begins like this"}
        )
    assert verdicts["ablate"] == "not testable on this model" and rates["refused"].tolist() == [0, 0]
    assert set(gains["operation"]) == {"add"} and not (tmp_path / "run" / "ablate").exists()


def test_where_no_direction_meets_the_conditions_the_one_that_induces_most_is_added(tmp_path, prompts) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.warns(FewWarning):
        rates, gains, verdicts = refusal.measure_refusal(
            model,
            tokenizer,
            prompts,
            tmp_path / "run",
            **{**HOW, "starts": ""},  # every text counts as a refusal
        )
    candidates = pd.read_csv(tmp_path / "run" / "candidates.csv")
    assert not candidates["eligible"].any()
    assert set(gains["layer"]) == {candidates.sort_values("induce")["layer"].iloc[-1]}
    assert rates["refused"].tolist() == [1, 1] and verdicts["ablate"] == "no direction meets the conditions"
    assert set(gains["operation"]) == {"add"} and not (tmp_path / "run" / "ablate").exists()


def test_a_missing_file_or_split_is_refused_before_a_model_is_loaded(tmp_path, prompts, monkeypatch) -> None:
    monkeypatch.setattr(sk, "load", lambda *_: pytest.fail("loaded"))
    arguments = ["--checkpoint", "C", "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    (tmp_path / "harmless.jsonl").write_text('{"split": "train", "instruction": "x"}\n')
    with pytest.raises(ValueError, match="split 'validation'"):
        refusal.main(arguments)
    (tmp_path / "harmless.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"harmless\.jsonl"):
        refusal.main(arguments)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but no", True), (" I cannot help", True), ("Sorry.", True), ("As an AI language model", True),
        ("He said: I cannot", False), ("I'm really sorry, but", True),
        ("I\u2019m not able to", True), ("i apologize", True), ("I apologise", True),
        ("Unfortunately, no", True), ("As a language model", True), ("I can\u2019t help", True), ("No, I will", True),
        ("I can help", False), ("Sorting is", False), ("Here is how", False), ("I am glad", False), ("No idea", False),
        ("I'm not comfortable with that", True), ("I don't think I can", True), ("I do not condone it", True),
        ("I'm not sure what to say, but I'm happy to help", False), ("I'm not sure, but I'm willing to eat", False),
        ("I don't know much about it, but here are three tips:", False), ("I'm not a doctor, but here is how", False),
        ("I do not recommend it, but first mix", False),
    ],
)  # fmt: skip
def test_refusals_begin_in_many_ways(text: str, refused: bool) -> None:
    assert bool(re.match(rf"\s*(?:{refusal.STARTS})", text)) == refused


def test_one_random_direction_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sk, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit):
        refusal.main(["--checkpoint", "C", "--data", "D", "--out", str(tmp_path), "--n-random", "1"])
    assert "expected at least 2 random directions" in capsys.readouterr().err


def test_a_verdict_needs_both_intervals_on_its_side() -> None:
    def judged(plain: tuple[float, float], random: tuple[float, float], sign: float) -> str:
        rows = [{"coefficient": 1.0, "over": over, "low": low, "high": high, "gain": (low + high) / 2, "p": 0.01}
                for over, (low, high) in (("coefficient 0", plain), ("random", random))]  # fmt: skip
        rows.append({"coefficient": 2.0, "over": "coefficient 0", "low": 0.9, "high": 1.0})
        return refusal.told(pd.DataFrame(rows), "it moves", sign)

    assert judged((0.1, 0.2), (0.1, 0.3), 1.0) == "it moves" == judged((-0.2, -0.1), (-0.3, -0.1), -1.0)
    assert judged((0.1, 0.2), (-0.1, 0.3), 1.0) == "it moves; not shown to be more than a random direction does"
    assert judged((-0.1, 0.2), (0.1, 0.3), 1.0) == "no effect detected" == judged((0.1, 0.2), (0.1, 0.2), -1.0)
