"""The README's code runs as it stands, on the real checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import steerkit as sk
from steerkit.pairs import write_pairs

README = Path(__file__).parent.parent / "README.md"


def test_the_code_of_the_readme_runs(smollm, tmp_path, monkeypatch, capsys) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sk, "load", lambda *_, **__: smollm)
    words = ["glad", "kind", "warm", "bright", "calm", "fond"]
    write_pairs("pairs.jsonl", [sk.ContrastPair(f"I am {w} and", " happy as well", " sad as ever", w) for w in words])
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "SteeringVector(30 layers, d_model 576" in printed and "shuffled" in printed
    assert (tmp_path / "persona.safetensors").exists() and (tmp_path / "runs/first/table.parquet").exists()
    assert len(names["texts"]) == 2 and all(names["texts"])
