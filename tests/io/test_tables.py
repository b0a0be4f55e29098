"""Tables: what columns hold comes back, and a meta file belongs to one table."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pandas as pd
import pytest

from steerkit.io.files import write_text
from steerkit.io.tables import read_table, write_table


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_lists_of_floats_and_strings_and_mixed_columns_come_back(suffix: str, tmp_path: Path) -> None:
    table = pd.DataFrame(
        {
            "ids": [[1, 2], [3]],
            "floats": [[-0.5, 1.25], []],
            "words": [["a", "b,c"], ["07"]],
            "layer": pd.Series([8, "8+10"], dtype=object),
        }
    )
    write_table(tmp_path / f"t.{suffix}", table, {})
    back, _ = read_table(tmp_path / f"t.{suffix}")
    for name in ("ids", "floats", "words"):
        assert back[name].tolist() == [tuple(row) for row in table[name]], name
    assert back["layer"].tolist() == [8, "8+10"]
    numbered = table.assign(layer=pd.Series([8, "007"], dtype=object))
    write_table(tmp_path / f"u.{suffix}", numbered, {})
    assert read_table(tmp_path / f"u.{suffix}")[0]["layer"].tolist() == [8, "007"]


def test_a_table_is_not_read_with_the_meta_of_another_table_of_its_name(tmp_path: Path) -> None:
    write_table(tmp_path / "result.parquet", pd.DataFrame({"x": [1]}), {"model": "A"})
    write_table(tmp_path / "result.csv", pd.DataFrame({"x": [2]}), {"model": "B"})
    assert read_table(tmp_path / "result.csv")[1]["model"] == "B"
    with pytest.raises(ValueError, match=r"other content, as result.meta.json is of result.csv"):
        read_table(tmp_path / "result.parquet")


def test_a_written_file_keeps_its_permissions_and_its_link_and_may_have_a_long_name(tmp_path: Path) -> None:
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    write_text(target, "old")
    os.chmod(target, 0o600)
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    long = tmp_path / ("x" * 250 + ".txt")
    write_text(long, "long")
    assert long.read_text() == "long" and not list(tmp_path.glob(".writing-*"))
