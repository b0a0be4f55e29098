"""Archive of a reproduction: of each finished training seed the small files that its tables are made from.

A seed takes over an hour, its tables seconds. From the archive in `results/seeds`, `python -m analysis results` makes
the tables of all seeds again, also where the runs themselves are gone. A seed of a family is one zip file. Its tables
are rounded to eight significant digits; of the areas of the paper's protocol it has the mean over the directions of a
kind, and of the curves those of ROUGE-L, since no more is pooled.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from analysis.paper.pooling import READ, mean_areas, rounded
from analysis.paper.reproduce import DONE, STARTED
from steerkit.io.files import atomic_path
from steerkit.io.json import read_json, write_json
from steerkit.io.tables import read_table, write_table

OF_RUN = ("questions.parquet", "config.json", "grpo/log.jsonl")
LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""Time of every file in an archive: equal files give equal bytes."""


def files_of_seed(folder: Path, seed: int, family: str) -> Iterator[Path]:
    """The files of one seed of a family, relative to the folder, with the marks of its finished steps.

    Of the analyses these are the tables that are read to pool the seeds (`analysis.paper.pooling.READ`).
    """
    run, analysed = folder / family / f"seed-{seed}", folder / "analysis" / family / f"seed-{seed}"
    tables = [Path(name) for name in READ]
    found = [run / name for name in OF_RUN]
    found += [analysed / name for path in tables for name in (path, path.with_name(f"{path.stem}.meta.json"))]
    yield from (path.relative_to(folder) for path in found if path.is_file())
    of_seed = re.compile(rf"(?:^|-){family}-{seed}(?:-|$)")
    yield from (path.relative_to(folder) for path in sorted((folder / DONE).glob("*")) if of_seed.search(path.name))


def reduced(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """What an archive keeps of a table: eight significant digits of what is pooled."""
    if path.name == "areas.parquet":
        table = mean_areas(table)
    if path.name == "curves.csv":
        table = table[table["score"] == "rouge_l"]
    return rounded(table, 8)


def copied(folder: Path, files: Sequence[Path], out: Path) -> None:
    """Copy files of a folder, its analyses' tables `reduced`, into another one."""
    for path in files:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        if path.parts[0] == "analysis" and path.suffix in (".csv", ".parquet"):
            table, meta = read_table(folder / path)
            write_table(out / path, reduced(path, table), meta)
        elif not (out / path).exists():  # the description of a table that was written before it stays
            shutil.copyfile(folder / path, out / path)


def packed(folder: Path, files: Sequence[Path], paths: Sequence[Path]) -> bytes:
    """Files of a folder as a zip archive; in JSON, paths below the given folders become relative to them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archived:
        for path in files:
            content = (folder / path).read_bytes()
            if path.suffix == ".json":  # provenance names checkpoints by their place on this machine
                for place in paths:
                    content = content.replace(f"{place}/".encode(), b"")
            archived.writestr(zipfile.ZipInfo(path.as_posix(), LONG_AGO), content, zipfile.ZIP_LZMA)
    return buffer.getvalue()


@contextlib.contextmanager
def unpacked(folder: str | Path) -> Iterator[Path]:
    """The folder itself, or of an archive a temporary folder with all its files, until the end of the `with`."""
    folder = Path(folder)
    archives = sorted(folder.glob("*-*.zip"))
    if not archives:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        for path in archives:
            with zipfile.ZipFile(path) as archived:
                archived.extractall(temporary)  # names that leave the folder are changed by zipfile
        write_json(Path(temporary) / STARTED, read_json(folder / STARTED))
        yield Path(temporary)


def archive(folder: str | Path, out: str | Path, seed: int, families: Sequence[str] = ()) -> list[Path]:
    """Archive one training seed, as `FAMILY-SEED.zip` for each family.

    Args:
        folder: output folder of `python -m analysis reproduce`.
        out: folder of the archive; other seeds in it stay.
        seed: the training seed; all its steps must be finished.
        families: families of problems; empty: all that were run.

    Returns:
        The archives that were written.

    Raises:
        FileNotFoundError: the seed was not started there, or one of its families is not evaluated.
        ValueError: the archive has other families of the seed from another commit or under other rules.
    """
    folder, out = Path(folder), Path(out)
    families = families or sorted(path.parent.name for path in folder.glob(f"*/seed-{seed}"))
    runs = [folder / family / f"seed-{seed}" for family in families]
    missing = [run for run in runs if not (run / OF_RUN[0]).is_file()]
    if missing or not runs:
        raise FileNotFoundError(
            f"expected all runs of seed {seed} in {folder} to be finished; "
            f"{', '.join(map(str, missing)) or 'none was started'}. Finish it by `python -m analysis reproduce`."
        )
    known = read_json(out / STARTED) if (out / STARTED).is_file() else []
    (own,) = (one for one in read_json(folder / STARTED) if one["seed"] == seed)
    for one in known:
        if one["seed"] == seed and {**one, "time": None} != {**own, "time": None}:
            raise ValueError(
                f"expected all families of seed {seed} to be run by one version; the archive has {one}, {folder} has "
                f"{own}. Remove the seed from {out}, or run it from that commit."
            )
    written = []
    for family in families:
        path = out / f"{family}-{seed}.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        files = list(files_of_seed(folder, seed, family))
        with atomic_path(path) as temporary, tempfile.TemporaryDirectory() as copy:
            copied(folder, files, Path(copy))
            temporary.write_bytes(packed(Path(copy), files, (folder.resolve(), folder)))
        written.append(path)
    first = min([own, *(one for one in known if one["seed"] == seed)], key=lambda one: one["time"])
    others = [one for one in known if one["seed"] != seed]
    write_json(out / STARTED, sorted([*others, first], key=lambda one: one["seed"]))
    return written


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis archive", description=__doc__)
    parser.add_argument("folder", type=Path, help="output folder of `python -m analysis reproduce`")
    parser.add_argument("--seed", type=int, action="append", required=True, help="a finished seed; may be repeated")
    parser.add_argument("--family", action="append", default=[], help="only this family; may be repeated")
    parser.add_argument("--out", type=Path, required=True, help="folder of the archive")
    given = parser.parse_args(arguments)
    for seed in given.seed:
        try:
            written = archive(given.folder, given.out, seed, given.family)
        except (FileNotFoundError, ValueError) as error:
            parser.error(str(error))
        for path in written:
            print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
