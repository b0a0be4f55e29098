from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from steerkit.io import json as json_module
from steerkit.io.files import atomic_path, sha256, write_text
from steerkit.io.json import canonical_json, depth_of, parse_json, short_json, unique_keys
from steerkit.io.rows import append_rows, read_rows
from steerkit.io.run_folder import ConfigurationChanged, RunFolderBusy, check_config, run_folder
from steerkit.io.tables import read_table, write_table
from steerkit.text.pairs import ContrastPair, read_pairs, write_pairs


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_file_cut_anywhere_in_its_last_row_keeps_the_others_and_takes_new_ones(tmp_path, cut: int) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"a": 1}, {"a": 2}])
    whole = path.read_bytes()
    append_rows(path, [{"a": 3, "text": "naïve"}])
    last = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + last[: min(cut, len(last) - 1)])
    there = [row["a"] for row in read_rows(path)]
    assert there == ([1, 2, 3] if cut >= len(last) - 1 else [1, 2])
    append_rows(path, [{"a": 4}])
    assert [row["a"] for row in read_rows(path)] == [*there, 4]


def test_a_broken_row_in_the_middle_is_an_error_that_names_its_line(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    for bad in (b"{broken", b"[1, 2]", b'"text"'):
        path.write_bytes(b'{"a": 1}\n' + bad + b'\n{"a": 2}\n')
        with pytest.raises(ValueError, match=r"JSON object in .*rows\.jsonl, line 2"):
            read_rows(path)


def test_values_that_json_lacks_become_null_and_equal_values_equal_text() -> None:
    value = {"b": float("nan"), "a": np.float32(0.5), "c": np.array([1, 2]), "d": (1, "x"), "e": float("inf")}
    assert canonical_json(value) == '{"a":0.5,"b":null,"c":[1,2],"d":[1,"x"],"e":null}'


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_comes_back_with_its_provenance(tmp_path, suffix: str) -> None:
    table = pd.DataFrame({"a": [1, 2], "b": ["x", "ü, y"], "c": [0.5, np.nan]})
    write_table(tmp_path / f"t{suffix}", table, {"seed": 3})
    back, meta = read_table(tmp_path / f"t{suffix}")
    pd.testing.assert_frame_equal(back, table, check_dtype=False)
    assert meta["seed"] == 3 and meta["sha256"] == sha256(tmp_path / f"t{suffix}")
    with pytest.raises(ValueError, match=r"\.parquet or \.csv"):
        write_table(tmp_path / "t.pkl", table, {})


def test_one_folder_belongs_to_one_run_at_a_time(tmp_path) -> None:
    other = (
        "import sys; from steerkit.io.run_folder import run_folder, RunFolderBusy\n"
        "try:\n  with run_folder(sys.argv[1], {'a': 1}): print('got it')\n"
        "except RunFolderBusy as error: print('busy', error)"
    )
    command = [sys.executable, "-c", other, str(tmp_path)]
    with run_folder(tmp_path, {"a": 1}):
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("busy expected")
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "got it\n"


def test_a_folder_is_free_again_when_the_process_that_holds_it_is_killed(tmp_path) -> None:
    holder = (
        "import sys, time; from steerkit.io.run_folder import run_folder\n"
        "with run_folder(sys.argv[1], {'a': 1}): print('held', flush=True); time.sleep(120)"
    )
    command = [sys.executable, "-c", holder, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(RunFolderBusy, match="another run holds"), run_folder(tmp_path, {"a": 1}):
            pass
        process.kill()
        process.wait()
    with run_folder(tmp_path, {"a": 1}) as folder:
        assert folder == tmp_path


def test_a_folder_is_busy_for_a_second_run_of_the_same_process_and_free_after_an_error(tmp_path) -> None:
    with pytest.raises(ZeroDivisionError), run_folder(tmp_path, {}):
        with pytest.raises(RunFolderBusy), run_folder(tmp_path, {}):
            pass
        raise ZeroDivisionError
    with run_folder(tmp_path, {}):
        pass


def test_of_the_ranks_of_one_run_the_first_holds_the_folder_for_all(tmp_path, monkeypatch) -> None:
    with run_folder(tmp_path, {"a": 1}):
        monkeypatch.setenv("RANK", "1")  # alone it says nothing: schedulers set it for unrelated jobs
        with pytest.raises(RunFolderBusy), run_folder(tmp_path, {"a": 1}):
            pass
        monkeypatch.setenv("WORLD_SIZE", "2")
        with run_folder(tmp_path, {"a": 1}):
            pass
        with pytest.raises(ConfigurationChanged), run_folder(tmp_path, {"a": 2}):
            pass


def test_only_a_text_with_many_brackets_is_searched_for_deep_nesting(tmp_path, monkeypatch) -> None:
    searched: list[object] = []
    monkeypatch.setattr(json_module, "depth_of", lambda value: searched.append(value) or depth_of(value))
    row = {"ids": list(range(256)), "text": "[{" * 40}
    append_rows(tmp_path / "rows.jsonl", [row] * 3)
    assert read_rows(tmp_path / "rows.jsonl") == [row] * 3 and not searched
    assert parse_json(json.dumps({"text": "[" * 500})) == {"text": "[" * 500} and len(searched) == 1
    for deep in ("[" * 101 + "]" * 101, '{"a":' * 101 + "1" + "}" * 101):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json(deep)
    assert parse_json("[" * 100 + "]" * 100)


def test_a_duplicate_key_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="duplicate key 'b'"):
        json.loads('{"a": 1, "b": 2, "b": 3}', object_pairs_hook=unique_keys)
    assert short_json(list(range(100)), width=40).endswith("... (291 characters)")


def test_a_changed_configuration_names_every_difference(tmp_path) -> None:
    with run_folder(tmp_path, {"a": 1, "b": [1, 2], "same": "x"}):
        pass
    with (
        pytest.raises(ConfigurationChanged, match=r"a: 1 -> 2\n  b: \[1,2\] -> null\n  c: null -> 3"),
        run_folder(tmp_path, {"a": 2, "c": 3, "same": "x"}),
    ):
        pass


def test_a_difference_is_named_where_it_is(tmp_path) -> None:
    check_config(tmp_path, {"setting": {"sampling": {"seed": 1, "top_p": 0.9}, "rounds": 2}})
    with pytest.raises(ConfigurationChanged) as raised:
        check_config(tmp_path, {"setting": {"sampling": {"seed": 2, "top_p": 0.9}, "rounds": 2}})
    assert "now):\n  setting.sampling.seed: 1 -> 2\nUse" in str(raised.value)


def test_of_two_lists_what_differs_is_told(tmp_path) -> None:
    check_config(tmp_path, {"cells": [["v", "8", c] for c in (-1, 1, 2)]})
    with pytest.raises(ConfigurationChanged) as raised:
        check_config(tmp_path, {"cells": [["v", "8", c] for c in (1, 2, 3)]})
    assert 'cells: [["v","8",-1]] -> [["v","8",3]]' in str(raised.value)
    with pytest.raises(ConfigurationChanged, match="cells"):
        check_config(tmp_path, {"cells": [["v", "8", c] for c in (2, 1, -1)]})


def test_a_model_is_the_same_wherever_its_folder_is_moved(tmp_path) -> None:
    model = {"checkpoint": "runs/a", "model_fingerprint": "f", "dtype": "float32"}
    check_config(tmp_path, {"model": model, "checkpoint": "runs/a"})
    check_config(tmp_path, {"model": {**model, "checkpoint": "/moved/a"}, "checkpoint": "runs/a"})
    with pytest.raises(ConfigurationChanged, match=r"checkpoint: .*runs/a.* -> .*runs/b"):
        check_config(tmp_path, {"model": model, "checkpoint": "runs/b"})
    with pytest.raises(ConfigurationChanged, match=r"model\.model_fingerprint"):
        check_config(tmp_path, {"model": {**model, "model_fingerprint": "g"}, "checkpoint": "runs/a"})


def test_groups_are_text_and_come_back_equal(tmp_path) -> None:
    pairs = [ContrastPair("x", "a", "b", group=3), ContrastPair("y", "a", "b", group=0)]  # type: ignore[arg-type]
    assert [pair.group for pair in pairs] == ["3", "0"]
    write_pairs(tmp_path / "p.jsonl", pairs)
    assert read_pairs(tmp_path / "p.jsonl") == pairs


def test_pairs_come_back_equal(tmp_path) -> None:
    pairs = [
        ContrastPair("plain ünïcode\nprompt", "yes\n", "no", "g1"),
        ContrastPair([{"role": "user", "content": "hi"}], "a", "b"),
    ]
    write_pairs(tmp_path / "p.jsonl", pairs)
    assert read_pairs(tmp_path / "p.jsonl") == pairs
