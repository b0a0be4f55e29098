"""Tables: what columns hold comes back, and a meta file belongs to one table."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pandas as pd
import pytest
import torch

import steerkit as sk
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


OBJECTS = {
    "yes": [True, None, False, True],
    "share": [1.5, None, 2, 0],
    "ids": [(1, 2), None, (), (3,)],
    "place": [3, "nested", None, "007"],
    "names": ["01", "nan", "true", "2"],
    "any": [{"a": [1]}, "x", 2.5, None],
}


@pytest.mark.parametrize(
    ("suffix", "names"), [("csv", list(OBJECTS)), ("parquet", ["yes", "ids", "place", "names"])], ids=["csv", "parquet"]
)
def test_columns_of_objects_come_back_with_their_types(suffix: str, names: list[str], tmp_path: Path) -> None:
    table = pd.DataFrame({name: pd.Series(OBJECTS[name], dtype=object) for name in names})
    write_table(tmp_path / f"t.{suffix}", table, {})
    back, _ = read_table(tmp_path / f"t.{suffix}")
    for name in names:
        assert back[name].tolist() == OBJECTS[name], name
        assert list(map(type, back[name])) == list(map(type, OBJECTS[name])), name


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_categories_of_strings_come_back_as_strings(suffix: str, tmp_path: Path) -> None:
    table = pd.DataFrame({"c": pd.Categorical(["01", "2", "nan"]), "n": pd.Categorical([1, 2, 1])})
    write_table(tmp_path / f"t.{suffix}", table, {})
    back, _ = read_table(tmp_path / f"t.{suffix}")
    assert back["c"].tolist() == ["01", "2", "nan"] and back["n"].tolist() == [1, 2, 1]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_of_probes_is_written_and_its_layers_come_back(suffix: str, tmp_path: Path) -> None:
    x = torch.randn(24, 2, 4, generator=torch.Generator().manual_seed(0))
    items = {"label": ["a", "b"] * 12, "group": [str(i // 2) for i in range(24)], "start": 1, "n_tokens": 1}
    table = sk.probe_layers(sk.Activations(x, ("embed", 7), pd.DataFrame(items)), folds=3).table
    write_table(tmp_path / f"t.{suffix}", table, {})
    back, _ = read_table(tmp_path / f"t.{suffix}")
    assert back["layer"].tolist() == ["embed", "embed", 7, 7, "nested", None] == table["layer"].tolist()
    pd.testing.assert_frame_equal(back, table, check_dtype=False)


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
