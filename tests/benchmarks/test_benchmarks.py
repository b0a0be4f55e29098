"""The comparison of two checkouts: same work on both sides, timed in turn; one driver serves old and new code."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import compare
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]


class Scripted:
    """A worker with given times and outputs; it records its calls in a list that both sides share."""

    def __init__(self, name: str, seconds: float, calls: list[str], output: str = "same") -> None:
        self.checkout, self.seconds, self.calls, self.output = Path(name), seconds, calls, output

    def run(self, job: str) -> tuple[float, str]:
        self.calls.append(f"{self.checkout} {job}")
        return self.seconds, self.output


def compared(old: float, new: float, output: str = "same") -> tuple[list[Any], list[str]]:
    calls: list[str] = []
    sides: Any = Scripted("old", old, calls), Scripted("new", new, calls, output)
    return compare.compare_checkouts(*sides, pairs=3), calls


def test_both_sides_run_in_turn_and_the_order_alternates() -> None:
    lines, calls = compared(2.0, 1.0)
    capture = ["old", "new", "new", "old", "old", "new", "new", "old"]  # a warm-up each, then three pairs
    assert calls[:8] == [f"{side} capture" for side in capture] and calls[8:] == [f"{side} sweep" for side in capture]
    assert [(line.ratio, line.pairs, line.note) for line in lines] == [(pytest.approx(2.0), 3, "equal outputs")] * 2


def test_a_slower_checkout_and_one_with_other_outputs_are_reported(capsys) -> None:
    compared(1.0, 1.2, output="other")
    printed = capsys.readouterr().out
    assert printed.count("OUTPUTS DIFFER") == 2 and printed.count("SLOWER") == 2
    compared(1.0, 1.02)
    assert "SLOWER" not in capsys.readouterr().out


def test_the_workload_is_72_rows_and_96_texts_as_json() -> None:
    setup = json.loads(json.dumps(compare.workload("somewhere")))
    assert len(setup["texts"]) == 96 and len(setup["prompts"]) * len(setup["coefficients"]) == 72
    assert {15, 45} <= {len(text.split()) for text in setup["texts"]}


def test_a_worker_runs_the_steerkit_of_its_checkout(tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    setup = compare.workload(tmp_path / "model") | {
        "layer": 1, "texts": ["the sea", "a day is"], "prompts": ["The sea"], "coefficients": [0.0, 1.0],
        "max_new_tokens": 3,
    }  # fmt: skip
    with compare.Worker(ROOT, setup) as worker:
        results = [worker.run(job) for job in ("capture", "sweep", "sweep")]
        assert all(seconds > 0 for seconds, _ in results)
        assert results[0][1] != results[1][1] == results[2][1]
    assert worker.process.returncode is not None


def test_a_folder_without_steerkit_is_refused(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(compare, "Worker", SimpleNamespace)
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path)])
    assert "expected a checkout with the package steerkit" in capsys.readouterr().err
