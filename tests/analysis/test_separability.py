"""Probes of the agents' names read round 1 alone, and a folder holds one setting."""

from __future__ import annotations

import pytest

from analysis.probes import separability
from analysis.probes.separability import main
from steerkit.io.run_folder import ConfigurationChanged
from steerkit.io.tables import read_table
from steerkit.text.traces import write_traces
from tests.analysis.test_analysis import traces
from tests.tiny import tiny_model, tiny_tokenizer


def test_both_sources_probe_one_turn_of_each_agent_and_question(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(separability.sk, "load", lambda *_, **__: (tiny_model(context=1024), tiny_tokenizer()))
    write_traces(tmp_path / "traces.jsonl", traces(40))
    call = [
        "--traces",
        str(tmp_path / "traces.jsonl"),
        "--stage",
        "base=x",
        "--out",
        str(tmp_path / "out"),
        "--n",
        "10",
    ]
    main(call)
    table, _ = read_table(tmp_path / "out" / "separability.csv")
    assert set(table["n"]) == {30}
    assert set(table["n_groups"]) == {10}
    assert set(zip(table["source"], table["position"], strict=True)) == {
        ("trace", "last"), ("trace", "mean"), ("trace", "tag"), ("plain", "last"), ("plain", "mean"),
        ("untagged", "last"), ("untagged", "mean"),
    }  # fmt: skip
    assert "nested" in capsys.readouterr().out
    with pytest.raises(ConfigurationChanged, match="traces"):
        main([*call[:-1], "8"])
