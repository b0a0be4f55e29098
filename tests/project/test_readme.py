"""The README's code runs unchanged on the real checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import steerkit as sk

README = Path(__file__).parents[2] / "README.md"


def test_the_code_of_the_readme_runs_and_first_prints_the_line_that_the_readme_shows(
    smollm, tmp_path, monkeypatch, capsys
) -> None:
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    shown = re.findall(r"```\n(SteeringVector.*?)```", text, re.DOTALL)
    assert blocks and len(shown) == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sk, "load", lambda *_, **__: smollm)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == shown[0].splitlines()[0]  # texts depend on rounding
    assert "shuffled" in printed
    assert (tmp_path / "cheerful.safetensors").exists() and (tmp_path / "runs/first/table.parquet").exists()
    assert len(names["texts"]) == 4 and all(names["texts"])
