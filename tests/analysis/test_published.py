"""Published tables name no path of the machine that made them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from analysis.published import published

ROOT = Path(__file__).parents[2]


def test_absolute_paths_of_checkpoints_become_names_and_hub_names_stay() -> None:
    meta = {"checkpoint": "/a/b/small.gguf", "condition": {"checkpoint": "/a/c", "layer": 2}, "n": 3}
    assert published(meta) == {"checkpoint": "small.gguf", "condition": {"checkpoint": "c", "layer": 2}, "n": 3}
    assert published({"checkpoint": "org/name"}) == {"checkpoint": "org/name"}


@pytest.mark.parametrize("path", sorted((ROOT / "results").rglob("*.json")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_published_file_holds_a_path_of_one_machine(path) -> None:
    assert not re.search(r'"(/|[A-Z]:\\\\)\w', path.read_text(encoding="utf-8"))
