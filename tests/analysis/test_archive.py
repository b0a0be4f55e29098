"""An archive holds what the pooled tables read, of one seed at a time, and nothing of unfinished seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.paper import pooling
from analysis.paper.archive import archive, reduced, unpacked
from analysis.paper.main_table import write as write_main_table
from analysis.paper.pooling import READ, collect_tables
from analysis.paper.reproduce import versions_of
from steerkit.io.files import write_text
from steerkit.io.json import read_json, write_json
from steerkit.io.tables import read_table, write_table

SEEDS = (20, 21)


@pytest.fixture
def reproduced(tmp_path) -> Path:
    """Two finished seeds of a family, with probes, and a large table of texts beside them."""
    folder = tmp_path / "reproduced"
    write_json(folder / "started.json", [{"seed": seed, "time": "t", "commit": "c", "rules": "r"} for seed in SEEDS])
    for seed in SEEDS:
        run, analysed = folder / "clues" / f"seed-{seed}", folder / "analysis" / "clues" / f"seed-{seed}"
        rows = [
            {"family": "clues", "method": method, "decoding": "sampled", "seed": seed, "id": f"{seed}-{i}",
             "correct": (i + seed) % 3 == 0, "tokens_in": 9, "tokens_out": 5, "parsed": True, "agents": 3.0}
            for method in ("Single", "Debate", "IMAD")
            for i in range(12)
        ]  # fmt: skip
        write_table(run / "questions.parquet", pd.DataFrame(rows), {})
        write_json(run / "config.json", {"family": "clues", "seed": seed, "checkpoint": str(run / "base")})
        write_text(run / "checkpoint" / "weights.txt", "large")
        keys = {"stage": "SFT", "debates": "personas", "source": "trace", "position": "last", "layer": "3",
                "features": "stream", "labels": "true"}  # fmt: skip
        values = {"accuracy": 0.8 + seed / 1e3, "accuracy_low": 0.7, "accuracy_high": 0.9, "majority": 0.3}
        write_table(analysed / "separability.csv", pd.DataFrame([{**keys, **values, "n": 90, "n_groups": 30}]), {})
        write_text(analysed / "stages" / "sft" / "gains.csv", "joined in the common table")
        write_text(analysed / "rows.csv", "rows of single texts")
        for step in (f"clues-{seed}-imad", f"probes-clues-{seed}", f"clues-{seed}0"):
            write_json(folder / "done" / step, {"step": "1f", "seconds": 1.0, "commit": "c"})
    return folder


def test_tables_of_the_archive_equal_those_of_the_runs(reproduced, tmp_path) -> None:
    out = tmp_path / "archive"
    for seed in reversed(SEEDS):
        archive(reproduced, out, seed)
    runs = [reproduced / "clues" / f"seed-{seed}" for seed in SEEDS]
    before = write_main_table(runs, tmp_path / "a")
    theirs = collect_tables(reproduced)["clues"]
    with unpacked(out) as folder:
        kept = [folder / "clues" / f"seed-{seed}" for seed in SEEDS]
        pd.testing.assert_frame_equal(before, write_main_table(kept, tmp_path / "b"))
        ours = collect_tables(folder)["clues"]
        assert read_json(folder / "clues" / "seed-20" / "config.json")["checkpoint"] == "clues/seed-20/base"
        assert not list(folder.rglob("rows.csv")) and not list(folder.rglob("checkpoint"))
        assert not list(folder.rglob("stages"))
        assert versions_of(folder, 20) == versions_of(reproduced, 20) == {"c": 2}
        assert not (folder / "done" / "clues-200").exists()
    assert not folder.exists()
    assert ours.keys() == theirs.keys() == {"separability"}
    pd.testing.assert_frame_equal(ours["separability"], theirs["separability"])
    assert [one["seed"] for one in read_json(out / "started.json")] == list(SEEDS)


def test_every_table_that_is_pooled_is_in_an_archive(monkeypatch) -> None:
    opened: set[Path] = set()

    def read(path: Path) -> Any:
        opened.add(path)
        return read_table(path)

    monkeypatch.setattr(pooling, "read_table", read)
    with unpacked(Path(__file__).parents[2] / "results" / "seeds" / "tiny") as folder:
        collect_tables(folder)
        names = {path.relative_to(folder / "analysis").as_posix().split("/", 2)[2] for path in opened}
    assert names | set(pooling.POOLED) <= set(READ) and len(names) > 10


def test_equal_files_give_equal_archives_and_a_plain_folder_is_itself(reproduced, tmp_path) -> None:
    one, two = (archive(reproduced, tmp_path / name, 20)[0].read_bytes() for name in "ab")
    assert one == two
    with unpacked(reproduced) as folder:
        assert folder == reproduced


def test_an_unfinished_seed_is_refused_and_leaves_the_archive_as_it_is(reproduced, tmp_path) -> None:
    (reproduced / "clues" / "seed-21" / "questions.parquet").unlink()
    for seed, reason in ((21, "seed-21"), (22, "none was started")):
        with pytest.raises(FileNotFoundError, match=reason):
            archive(reproduced, tmp_path / "archive", seed)
    assert not (tmp_path / "archive").exists()


def test_families_of_a_seed_are_archived_one_by_one_and_only_of_one_version(reproduced, tmp_path) -> None:
    out, other = tmp_path / "archive", reproduced / "malice" / "seed-20"
    other.mkdir(parents=True)  # begun, not finished
    archive(reproduced, out, 20, ["clues"])
    write_table(other / "questions.parquet", pd.DataFrame({"id": ["a"]}), {})
    later = [{**one, "time": "u"} for one in read_json(reproduced / "started.json")]
    write_json(reproduced / "started.json", later)
    archive(reproduced, out, 20, ["malice"])
    assert sorted(path.name for path in out.glob("*.zip")) == ["clues-20.zip", "malice-20.zip"]
    assert read_json(out / "started.json")[0]["time"] == "t"
    write_json(reproduced / "started.json", [{**one, "commit": "d"} for one in later])
    with pytest.raises(ValueError, match="one version"):
        archive(reproduced, out, 20, ["malice"])


def test_reduced_areas_and_curves_are_pooled_as_the_whole_ones(tmp_path) -> None:
    rng = np.random.default_rng(0)
    whole, small = ({seed: tmp_path / name / str(seed) for seed in SEEDS} for name in ("whole", "small"))
    for seed in SEEDS:
        rows = [
            {"kind": kind, "number": number, "grid": "dose", "question": f"{seed}-{question}", "area": rng.random(),
             "above": rng.random() / 10, "score": score, "stage": stage, "context": "tagged"}
            for stage in ("base", "IMAD") for score in ("rouge_l", "speaks")
            for kind in ("own", "random", "shuffled") for number in range(1 if kind == "own" else 19)
            for question in range(4)
        ]  # fmt: skip
        areas = pd.DataFrame(rows)
        ranks = pd.DataFrame([{"stage": "IMAD", "context": "tagged", "score": "rouge_l", "grid": "dose",
                               "kind": "own", "over": "random", "p_rank": 0.05}])  # fmt: skip
        for folder, kept in ((whole[seed], areas), (small[seed], reduced(Path("protocol/areas.parquet"), areas))):
            write_table(folder / "protocol" / "areas.parquet", kept, {})
            write_table(folder / "protocol" / "protocol.csv", ranks, {})
        assert len(kept) == len(areas) * 3 // 39
    pd.testing.assert_frame_equal(pooling.pool_protocol(small), pooling.pool_protocol(whole), rtol=1e-6)
    curves = pd.DataFrame({"score": ["rouge_l", "speaks"], "mean": [1 / 3, 1.0], "n": [3, 3]})
    kept = reduced(Path("curves.csv"), curves)
    assert kept["mean"].tolist() == [0.33333333] and kept["n"].tolist() == [3]


def test_an_archive_of_an_archive_is_the_same(reproduced, tmp_path) -> None:
    (first,) = archive(reproduced, tmp_path / "a", 20)
    with unpacked(tmp_path / "a") as folder:
        (second,) = archive(folder, tmp_path / "b", 20)
    assert first.read_bytes() == second.read_bytes()


def test_intervals_of_bounded_scores_stay_within_their_range_and_differences_do_not() -> None:
    table = pd.DataFrame(
        {"score": ["rouge_l", "perplexity", "fidelity"], "low": [-0.5, -3.0, -3.0], "high": [1.5, 9.0, 9.0]}
    )
    cut = pooling.within_range(table)
    assert cut["low"].tolist() == [0, 1, -3] and cut["high"].tolist() == [1, 9, 9]
